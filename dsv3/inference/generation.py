"""Text from a model, token by token, over its key-value (or latent) caches; with drafts, several tokens at a time."""

from collections.abc import Iterator, Sequence

import torch

from dsv3.inference.sampling import Choice, choice_of
from dsv3.inference.speculation import Drafter, Speculation
from dsv3.model.decoder import Decoder
from dsv3.model.layers import held_weights


def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    stop: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    speculation: Speculation | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` ids after `prompt`, ending before `stop`. Meanwhile the weights must not change.

    temperature: 0 takes the likeliest token; otherwise one is drawn from softmax(logits / temperature), cut to the
        smallest set of tokens that holds `top_p` of the probability.
    speculation: given, the model's MTP modules draft tokens; fewer passes of the model make the same text, or, where
        tokens are drawn, text of the same distribution. What became of the drafts is added up in it.

    Raises:
        ValueError: the prompt is empty, or there are no MTP modules to draft with.
    """
    return continue_text(model, prompt, max_tokens, stop, choice_of(temperature, top_p, generator), speculation)


def continue_text(
    model: Decoder, prompt: Sequence[int], max_tokens: int, stop: int, choice: Choice, speculation: Speculation | None
) -> Iterator[int]:
    """`generate` by any rule of choosing tokens."""
    if not prompt:
        raise ValueError("an empty prompt: at least one token is needed, such as the tokenizer's bos")
    capacity = len(prompt) + max_tokens
    drafter = Drafter(model, capacity) if speculation is not None else None
    return _tokens(model, list(prompt), capacity, stop, choice, drafter, speculation or Speculation())


@torch.inference_mode()
def _tokens(
    model: Decoder,
    tokens: list[int],
    capacity: int,
    stop: int,
    choice: Choice,
    drafter: Drafter | None,
    speculation: Speculation,
) -> Iterator[int]:
    caches = model.new_caches(1, capacity)
    unread, drafts = tokens[:], list[int]()
    with held_weights(model):
        while len(tokens) < capacity:
            last_1TD = model.decode_states(torch.tensor([unread + drafts], device=model.device), caches)
            hidden_1TD = model.norm(last_1TD)
            kept, token = choice.verify(model.logits(hidden_1TD[0, len(unread) - 1 :]), drafts)
            read, chosen = len(tokens) + kept, [*drafts[:kept], token]
            speculation.passes += 1
            speculation.made += len(drafts)
            speculation.kept += kept
            for new in chosen:
                if new == stop:
                    return
                yield new
            tokens += chosen
            unread = [token]
            if drafter is not None:
                for cache in caches:
                    cache.rewind(read)
                h_1TD = hidden_1TD if model.mtp.after_final_norm else last_1TD
                drafter.read(h_1TD[:, : read - drafter.positions])
                count = min(speculation.drafts, capacity - len(tokens) - 1)
                drafts = drafter.draft(tokens, count, choice.draft)
