"""Sizes that fit a device, and programs timed one after the other: shared by the parts of `gpu_check`.

On a GPU the width of DeepSeek-V2-Lite (2048, 64 experts of 1408, top-6, 2 shared, vocabulary 102,400), with a sigmoid
router and loss-free balancing as in DeepSeek-V3, micro-batches of 4 x 4096 random tokens, and as many layers as fit; on
a CPU a size of seconds, to try the program. A model fills the card, so that programs are not timed in turns.
"""

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dsv3.bench.compared import Size, configured
from dsv3.bench.measuring import Figure, interleaved
from dsv3.planning.gpu_memory import gpu_memory
from dsv3.planning.recipe import single_gpu
from dsv3.planning.skeleton import read_skeleton

ON_GPU = Size(
    ("model=v2_lite", "router=sigmoid_group_limited", "balancing=loss_free", "mtp=none", "optimizer=adamw"),
    rows=4,
    length=4096,
)
ON_CPU = Size(
    ("model=tiny", "tokenizer.vocab_size=512", "router.group_score_top=2", "mtp=none", "optimizer=adamw"),
    rows=4,
    length=64,
)
LEAST_LAYERS, MOST_LAYERS = 4, 8
FILLED = 0.7
"""Share of the card's memory that the plan of a model may take, which counts no buffers of kernels."""


def guarded(name: str, run: Callable[[int, torch.device], Iterator[Figure]]) -> Any:
    """The same part, whose end is a figure: 1 where it came through, 0 and the reason where it failed."""

    def figures(repeats: int, device: torch.device) -> Iterator[Figure]:
        try:
            for figure in run(repeats, device):  # goals are a GPU's
                yield figure if device.type == "cuda" else figure._replace(goal=None)
        except Exception as error:  # whatever a device may raise
            traceback.print_exc(file=sys.stderr)
            yield Figure(name, "came through", 0.0, "", 1.0, note=f"{type(error).__name__}: {reason(error)}")
        else:
            yield Figure(name, "came through", 1.0, "", 1.0)
        release()

    return figures


def reason(error: BaseException) -> str:
    """Its message in one line, as a table has room for."""
    return " ".join(str(error).split())[:200]


def release() -> None:
    """Give back the memory of models that nothing refers to, but for what was compiled of them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()
        torch.cuda.empty_cache()


def size_on(device: torch.device) -> Size:
    """The size that fits the device."""
    if device.type != "cuda":
        return ON_CPU
    room = FILLED * torch.cuda.get_device_properties(device).total_memory
    plan = single_gpu(tokens=ON_GPU.tokens, seq_len=ON_GPU.length, micro_batch=ON_GPU.rows)

    def sized(layers: int) -> Size:
        return ON_GPU._replace(overrides=(*ON_GPU.overrides, f"model.n_layers={layers}"))

    def fits(layers: int) -> bool:
        return gpu_memory(read_skeleton(configured(sized(layers))), plan)["total"] <= room

    return sized(next(filter(fits, range(MOST_LAYERS, LEAST_LAYERS, -1)), LEAST_LAYERS))


def timed(program: Callable[[], object], repeats: int) -> float:
    return interleaved({"": program}, repeats=repeats, warm_up=2)[""]
