"""Checks of what works on a device, and of how fast a training step is: parts of `bench only=gpu_check`."""

import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping

import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from dsv3.bench.compared import EXPERTS, Size, batches, configured, drawn_anew, ours
from dsv3.bench.measuring import Figure
from dsv3.bench.on_device import LEAST_LAYERS, ON_CPU, reason, release, size_on, timed
from dsv3.bench.peak_memory import in_a_process
from dsv3.bench.training_step import gemm_peak, losses_of_tokens, our_step, step_flops, their_step
from dsv3.build import build_model
from dsv3.config.part import part
from dsv3.contracts import MicroBatch, Step
from dsv3.model.compile import compile_parts
from dsv3.model.decoder import Decoder
from dsv3.training.step import balance, gradients, norm_of, read, take_gradients
from dsv3.training.trained_parameters import trained_parameters

RECOMPUTED = "recompute=[norm,attention_up,swiglu]"
COMBINATIONS: Mapping[str, tuple[str, ...]] = {
    "MLA, sigmoid router, loss-free, MTP": ("mtp=deepseek",),
    "GQA, softmax router, auxiliary loss": ("attention=gqa", "router=softmax", "balancing=switch_aux"),
    "documents kept apart": ("data.isolate_documents=true",),
    "n-gram memory": ("memory=ngram", "memory.rows=512"),
    "Muon, norms and SwiGLU recomputed": ("optimizer=muon", "optimizer.newton_schulz_dtype=float32", RECOMPUTED),
    "a loop over experts": ("experts=loop",),
    "FP8 emulated": ("precision=fp8_blockwise", "precision.power_of_two_scales=true"),
}
TINY = Size(
    ("model=tiny", "tokenizer.vocab_size=512", "mtp=none", "optimizer=adamw", "precision=fp32"), rows=2, length=256
)
SAME = 2e-3
"""Largest relative difference of losses after a few steps on two devices."""
STEPS, MEANT = 200, 20
"""Of the runs whose losses are compared, and the last of them, which are averaged."""
PREDICTABLE = 512
"""Tokens of those runs: every other one follows from the one before."""
WAITING = ("cudaStreamSynchronize", "cudaEventSynchronize")


def works(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Losses of three steps of a tiny model in FP32 against those on the CPU, for every kind of part."""
    for what, overrides in COMBINATIONS.items():
        config = configured(TINY, *overrides)
        here, there = (
            losses_of(build_model(config).to(on), config, TINY, steps=3) for on in (device, torch.device("cpu"))
        )
        worst = max(abs(a - b) / b for a, b in zip(here, there, strict=True))
        note = f"losses {', '.join(f'{loss:.5f}' for loss in here)}"
        yield Figure("works", f"{what}: relative difference to the CPU", worst, "", SAME, at_most=True, note=note)


def losses_of(model: Decoder, config: DictConfig, size: Size, *, steps: int, at_once: int | None = None) -> list[float]:
    """The loss of each step of a training on predictable tokens. `at_once`: rows of a micro-batch; None: all."""
    device = model.device
    losses, optimizer = losses_of_tokens(model, config), part(config.optimizer)(trained_parameters(model))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    found = []
    for number, batch in zip(range(steps), batches(size, PREDICTABLE, device=torch.device("cpu")), strict=False):
        micros = [
            micro.map(lambda tensor: tensor.to(device)) for micro in cut(predictable(batch), at_once or size.rows)
        ]
        sums = take_gradients(losses, Step(micros, number * size.tokens, {}), recompute=config.recompute)
        optimizer.step()
        optimizer.zero_grad()
        balance(model, sums.loads, number * size.tokens)
        found.append(sums.scalars["nll"] / sums.denominators["targets"])
    return torch.stack(found).tolist()


def predictable(batch: MicroBatch) -> MicroBatch:
    """The batch with every other token following from the one before, and documents of a quarter of a row."""
    row = torch.cat((batch.tokens_BT, batch.targets_BT[:, -1:]), 1)
    row[:, 1::2] = (row[:, : row.shape[1] - 1 : 2] * 7 + 3) % PREDICTABLE
    length = batch.tokens_BT.shape[1]
    documents_BT = (torch.arange(length) // (length // 4) + 1).expand_as(batch.tokens_BT)
    return batch._replace(tokens_BT=row[:, :-1], targets_BT=row[:, 1:], document_ids_BT=documents_BT)


def cut(batch: MicroBatch, rows: int) -> list[MicroBatch]:
    """Micro-batches of so many rows."""
    starts = range(0, len(batch.tokens_BT), rows)
    return [batch.map(lambda tensor, start=start: tensor[start : start + rows].contiguous()) for start in starts]  # type: ignore[misc]


def step(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Tokens per second of a BF16 training step against transformers' fastest way; the share of the GEMM peak."""
    size = size_on(device)
    config, model = ours(size, "precision=bf16", device=device)
    seconds = {"ours": timed(our_step(size, model, config), repeats)}
    if device.type == "cuda":
        compile_parts(model)
        seconds["ours, compiled"] = timed(our_step(size, model, config), repeats)
    del model
    release()
    for experts in EXPERTS:
        try:
            seconds[experts] = their_seconds(config, size, experts, repeats, device)
        except (RuntimeError, ValueError) as error:  # too little memory, or no such way on this device
            print(f"transformers, {experts}: {reason(error)}", file=sys.stderr)
        release()
    rivals = {name: value for name, value in seconds.items() if name in EXPERTS}
    best = min(seconds.keys() - rivals.keys(), key=lambda name: seconds[name])
    layers = f"{config.model.n_layers} layers, {size.rows} x {size.length} tokens"
    if rivals:
        rival = min(rivals, key=lambda name: rivals[name])
        note = "; ".join(f"{name} {size.tokens / value:,.0f} tokens/s" for name, value in seconds.items())
        ratio = seconds[rival] / seconds[best]
        yield Figure("step", "bf16: tokens/s against transformers", ratio, "x", 2.5, note=f"{note}; {layers}")
    peak = gemm_peak(torch.bfloat16, device, size=8192 if device.type == "cuda" else 512)
    flops = step_flops(size, "precision=bf16")
    note = f"{best}: {flops / 1e12:.3g} TFLOP in {seconds[best]:.4f} s; peak {peak / 1e12:,.3g} TFLOP/s"
    yield Figure("step", "bf16: share of the GEMM peak", flops / seconds[best] / peak, "", 0.4, note=note)


def their_seconds(config: DictConfig, size: Size, experts: str, repeats: int, device: torch.device) -> float:
    with torch.device(device):
        twin = drawn_anew(config, dtype=torch.bfloat16, experts=experts)
    return timed(their_step(size, twin, config.model.vocab_size), repeats)


def waits(repeats: int, device: torch.device) -> Iterator[Figure]:
    """How often a step waits for the device, its record included, by the profiler; the longest operations to stderr."""
    size = size_on(device)
    config, model = ours(size, "precision=bf16", device=device)
    losses = losses_of_tokens(model, config)
    micros = list(itertools.islice(batches(size, config.model.vocab_size, device=device), 3))  # their copies wait
    optimizer = part(config.optimizer)(trained_parameters(model))

    def whole_step() -> None:
        sums = take_gradients(losses, Step([micros.pop()], 0, {}))
        taken = gradients(model)
        balance(model, sums.loads, 0)
        read(losses.statistics, sums.over_ranks(), norm_of(taken), model.routing_biases())
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        whole_step()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as profiler:
        whole_step()
    averages = profiler.key_averages()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(averages.table(sort_by=order, row_limit=40, max_name_column_width=60), file=sys.stderr)
    counts = {event.key: event.count for event in averages}
    note = ", ".join(
        f"{name} {counts[name]}" for name in (*WAITING, "Memcpy DtoH (Device -> Pageable)") if name in counts
    )
    value = sum(counts.get(name, 0) for name in WAITING) if device.type == "cuda" else float("nan")
    yield Figure("waits", "of a step, its record included", value, "", 2, at_most=True, note=note)


def memory(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Peak memory of a BF16 training step against transformers', each in a process of its own."""
    size = size_on(device)
    mine, other = (in_a_process(size, side, "bf16", device) for side in ("ours", "theirs"))
    note = f"{mine / 2**30:.2f} GiB against {other / 2**30:.2f} GiB"
    yield Figure("memory", "peak of a bf16 step against transformers", mine / other, "x", 0.6, at_most=True, note=note)


def fp8(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Speed of a step in FP8 against BF16."""
    size, seconds = size_on(device), {}
    for name, goal in (("bf16", None), ("fp8_te", 1.25), ("fp8_gpu", None), ("fp8_blockwise", None)):
        what, problem = f"{name}: speed against bf16", unusable(name, device)
        if not problem:
            try:
                seconds[name] = our_seconds(size, name, repeats, device)
            except RuntimeError as error:  # too little memory for it, or a product that the device lacks
                problem = reason(error)
            release()
        if problem:
            yield Figure("fp8", what, float("nan"), "x", note=problem)
        elif name != "bf16":
            note = f"{seconds[name]:.4f} s against {seconds['bf16']:.4f} s"
            yield Figure("fp8", what, seconds["bf16"] / seconds[name], "x", goal, note=note)


def our_seconds(size: Size, precision: str, repeats: int, device: torch.device) -> float:
    config, model = ours(size, f"precision={precision}", device=device)
    return timed(our_step(size, model, config), repeats)


def unusable(precision: str, device: torch.device) -> str:
    """Why the precision cannot be used on the device, or nothing."""
    config = configured(ON_CPU, f"precision={precision}")
    return "; ".join(part(config.precision).check(device))


def losses(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Whether FP8 trains as BF16 does: the loss after 200 steps, beside that of BF16 with sums in another order.

    Micro-batches of half the size add gradients in another order.
    """
    size = size_on(device)
    if device.type == "cuda":
        size = size._replace(overrides=(*size.overrides, f"model.n_layers={LEAST_LAYERS}"))

    def end(precision: str, at_once: int | None = None) -> float:
        config, model = ours(size, f"precision={precision}", device=device)
        found = losses_of(model, config, size, steps=STEPS, at_once=at_once)
        del model
        release()
        return statistics.fmean(found[-MEANT:])

    plain, other = end("bf16"), end("bf16", at_once=size.rows // 2)
    for name in ("fp8_te", "fp8_gpu", *["fp8_blockwise"] * (device.type == "cpu")):
        what = f"{name}: difference to bf16 over the spread of bf16"
        if problem := unusable(name, device):
            yield Figure("losses", what, float("nan"), "x", note=problem)
            continue
        loss = end(name)
        note = f"{name} {loss:.5f}, bf16 {plain:.5f} and in smaller micro-batches {other:.5f}, after {STEPS} steps"
        goal = 1.0 if name == "fp8_te" else None
        yield Figure("losses", what, abs(loss - plain) / abs(plain - other), "x", goal, at_most=True, note=note)
