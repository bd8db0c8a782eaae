"""BF16, or FP32 on a CPU with slower BF16 matmuls.

CPUs with BF16 instructions multiply it about twice as fast as FP32; others emulate it at half that rate. A probe times
both products in turns and takes the best turn of each, which other programs disturb least:

    FP32 if (rate of BF16) < 0.8 (rate of FP32), else BF16

On a GPU it is BF16, without a probe. The choice decides what a seed gives, so it is made once: training writes it into
the run's config.yaml, a resumed run and the jobs of a study keep it.
"""

import time
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from plugins.precision.plain import OneFormat

Choice = Literal["bf16", "fp32"]
DTYPES: dict[Choice, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZE, TURNS = 1024, 7
SLOWEST = 0.8  # rate of BF16 over that of FP32 below which FP32 is taken


class Auto(OneFormat):
    """A precision in one format; BF16 until it is settled. choice: the format; None: not settled yet."""

    def __init__(self, *, choice: Choice | None) -> None:
        if choice is not None and choice not in DTYPES:
            raise ValueError(f"precision.choice={choice}: must be bf16, fp32 or null")
        self.choice = choice
        self.activation_dtype = DTYPES[choice or "bf16"]

    def settle(self, device: torch.device) -> tuple[dict[str, str], str]:
        """The key that settles the choice for training on `device`, and why it is so."""
        if device.type == "cuda":
            return {"choice": "bf16"}, "BF16 on a GPU"
        rates = probe()
        ratio = rates.bf16 / rates.fp32
        choice = "bf16" if ratio >= SLOWEST else "fp32"
        figures = f"BF16 GEMM at {rates.bf16 / 1e9:,.0f} GFLOP/s, FP32 at {rates.fp32 / 1e9:,.0f}"
        return {"choice": choice}, f"{choice.upper()}: {figures} ({ratio:.2f}x) on this CPU"


class Rates(NamedTuple):
    """Operations per second of a square product."""

    bf16: float
    fp32: float


def probe() -> Rates:
    """Both rates, each the best of several turns (a tenth of a second in all)."""
    best: dict[Choice, float] = {}
    operands: dict[Choice, tuple[Tensor, Tensor]] = {
        name: (torch.ones(SIZE, SIZE, dtype=dtype), torch.empty(SIZE, SIZE, dtype=dtype))
        for name, dtype in DTYPES.items()
    }
    for _ in range(TURNS):
        for name, (a, out) in operands.items():
            started = time.perf_counter()
            torch.mm(a, a, out=out)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - started)
    return Rates(**{name: 2 * SIZE**3 / seconds for name, seconds in best.items()})
