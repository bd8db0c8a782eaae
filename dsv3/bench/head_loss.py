"""The output head's cross-entropy, forward and backward, against torch's `linear_cross_entropy`."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.bench.measuring import Figure, interleaved
from dsv3.model.losses import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 4096, 256, 8192
WAYS = {"whole": None, "in chunks": nn.LinearCrossEntropyOptions()}
"""torch's: all logits at once, and a part of the rows at a time."""


def head(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Seconds of torch's two ways over ours, with weights in FP32 as in training."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        hidden_ND, weight_VD, targets_N = inputs(dtype, device)
        losses = {"ours": ours} | {how: torchs(options) for how, options in WAYS.items()}
        programs = {how: step(loss, hidden_ND, weight_VD, targets_N) for how, loss in losses.items()}
        seconds = interleaved(programs, repeats=repeats)
        for how in WAYS:
            note = f"{seconds['ours']:.3f} s, torch {seconds[how]:.3f} s; {TOKENS} tokens, vocabulary {VOCABULARY}"
            what = f"head's loss, {name}: speed against torch's, {how}"
            yield Figure("head", what, seconds[how] / seconds["ours"], "x", note=note)


def inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(TOKENS, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    weight_VD = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.02).to(device).requires_grad_()
    return hidden_ND, weight_VD, torch.randint(VOCABULARY, (TOKENS,), generator=generator).to(device)


def ours(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_ND, weight_VD, targets_N).total


def torchs(options: nn.LinearCrossEntropyOptions | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        copy_VD = weight_VD.to(hidden_ND.dtype)
        return F.linear_cross_entropy(hidden_ND, copy_VD, targets_N, reduction="sum", options=options)

    return loss


def step(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor
) -> Callable[[], None]:
    def run() -> None:
        hidden_ND.grad = weight_VD.grad = None
        loss(hidden_ND, weight_VD, targets_N).backward()

    return run
