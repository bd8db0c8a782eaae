"""Peak memory of training steps, each implementation in its own process.

On a CPU the figure is the growth of the resident set from before the model is built to its peak in two steps: weights,
gradients, optimiser state, activations and logits. On a GPU it is the peak of what torch allocated there.
"""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import get_args

import torch

from dsv3.bench import compared
from dsv3.bench.compared import Size
from dsv3.bench.measuring import Figure
from dsv3.runtime import resident

STEPS = 2


def memory(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Peak memory of training steps against transformers' fastest way. (Not a matter of repeats.)"""
    size = compared.STANDARD
    kept: dict[str, int] = {}
    for precision, goal in (("bf16", 0.6), ("fp32", 0.6)):
        ours, theirs = (in_a_process(size, side, precision, device) for side in ("ours", "theirs"))
        kept[precision] = ours
        note = f"{ours / 2**20:,.0f} MiB against {theirs / 2**20:,.0f} MiB"
        yield Figure(
            "memory", f"peak of a training step, {precision}", ours / theirs, "x", goal, at_most=True, note=note
        )

    recomputed = in_a_process(size, "recomputed", "bf16", device)
    note = f"{recomputed / 2**20:,.0f} MiB against {kept['bf16'] / 2**20:,.0f} MiB; norm, attention_up, swiglu"
    what = "peak of a training step, bf16: recomputed against kept"
    yield Figure("memory", what, recomputed / kept["bf16"], "x", note=note)


def in_a_process(size: Size, side: str, precision: str, device: torch.device) -> int:
    """Bytes that the training of one side (ours, the same recomputed, theirs) adds to a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(size, side, precision, device, sender))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        raise RuntimeError(f"the process that measures the memory of {side} failed") from None
    finally:
        process.join()


def measured(size: Size, side: str, precision: str, device: torch.device, sender: Connection) -> None:
    from transformers import DeepseekV3ForCausalLM  # noqa: F401  (loaded by neither side while it is measured)

    from dsv3.bench.compared import EXPERTS, configured, drawn_anew, ours
    from dsv3.bench.training_step import DTYPES, our_step, their_step
    from dsv3.model.recompute import Part
    from dsv3.runtime import set_up_process

    set_up_process()
    before = resident("VmRSS")
    if side != "theirs":
        config, model = ours(size, f"precision={precision}", "mtp=none", device=device)
        step = our_step(size, model, config, recompute=get_args(Part) if side == "recomputed" else ())
    else:
        config = configured(size, f"precision={precision}", "mtp=none")
        with torch.device(device):
            twin = drawn_anew(config, dtype=DTYPES[precision], experts=EXPERTS[-1])
        step = their_step(size, twin, config.model.vocab_size)
    for _ in range(STEPS):
        step()
    on_gpu = device.type == "cuda"
    sender.send(torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - before)
