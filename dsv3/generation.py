"""Text from a model, token by token, over its key-value (or latent) caches."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv3.model import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    stop: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` ids after `prompt`, ending before `stop`.

    `temperature` 0 takes the likeliest token; otherwise one is drawn from softmax(logits / temperature), cut to the
    smallest set of tokens that holds `top_p` of the probability.
    """
    if not prompt:
        raise ValueError("an empty prompt: at least one token is needed, such as the tokenizer's bos")
    device = model.device
    caches = model.new_caches(1, len(prompt) + max_tokens)
    tokens_1T = torch.tensor([list(prompt)], device=device)
    for _ in range(max_tokens):
        token = choose(model.decode(tokens_1T, caches)[0, -1], temperature, top_p, generator)
        if token == stop:
            return
        yield token
        tokens_1T = torch.tensor([[token]], device=device)


def choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """One token id from logits."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V, order_V = (logits_V / temperature).softmax(-1).sort(descending=True)
    outside_V = probabilities_V.cumsum(-1) - probabilities_V >= top_p
    drawn = torch.multinomial(probabilities_V.masked_fill(outside_V, 0.0), 1, generator=generator)
    return int(order_V[drawn])
