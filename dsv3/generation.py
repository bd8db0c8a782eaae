"""Text from a model, token by token, over its key-value (or latent) caches; with drafts, several tokens at a time."""

from collections.abc import Iterator, Sequence

import torch

from dsv3.layers import held_weights
from dsv3.model import Decoder
from dsv3.sampling import Choice, choice
from dsv3.speculation import DraftCount, Drafter

MOST = 1  # drafts between two passes of the model


def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    stop: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    drafts: DraftCount | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` ids after `prompt`, ending before `stop`; meanwhile the weights must not change.

    temperature: 0 takes the likeliest token; otherwise one is drawn from softmax(logits / temperature), cut to the
        smallest set of tokens that holds `top_p` of the probability.
    drafts: given, the model's MTP modules propose tokens, which changes neither the text (the sampled text's
        distribution) but the number of passes of the model; what became of them is counted here.

    Raises:
        ValueError: the prompt is empty, or there are no MTP modules to draft with.
    """
    if not prompt:
        raise ValueError("an empty prompt: at least one token is needed, such as the tokenizer's bos")
    drafter = Drafter(model, len(prompt) + max_tokens) if drafts is not None else None
    return _generate(model, list(prompt), max_tokens, stop, choice(temperature, top_p, generator), drafter, drafts)


@torch.inference_mode()
def _generate(
    model: Decoder,
    tokens: list[int],
    max_tokens: int,
    stop: int,
    chooses: Choice,
    drafter: Drafter | None,
    count: DraftCount | None,
) -> Iterator[int]:
    end = len(tokens) + max_tokens
    caches = model.new_caches(1, end)
    unread, drafts = tokens[:], list[int]()
    with held_weights(model):
        while len(tokens) < end:
            last_1TD = model.decode_states(torch.tensor([unread + drafts], device=model.device), caches)
            hidden_1TD = model.norm(last_1TD)
            kept, token = chooses.verify(model.logits(hidden_1TD[0, len(unread) - 1 :]), drafts)
            chosen, read = [*drafts[:kept], token], len(tokens) + kept
            tokens += chosen
            for new in chosen:
                if new == stop:
                    return
                yield new
            unread = [token]
            if drafter is not None and count is not None:
                for cache in caches:
                    cache.rewind(read)
                count.passes, count.made, count.kept = count.passes + 1, count.made + len(drafts), count.kept + kept
                h_1TD = hidden_1TD if model.mtp.after_final_norm else last_1TD
                drafter.read(h_1TD[:, : read - drafter.positions])
                drafts = drafter.draft(tokens, min(MOST, end - len(tokens) - 1), chooses.draft)
