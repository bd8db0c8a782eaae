"""A training step (forward, loss, backward, AdamW) against transformers', the GEMM peak, and other settings."""

import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from dsv3.bench import compared
from dsv3.bench.compared import EXPERTS, Size, batches, configured, ours, theirs
from dsv3.bench.measuring import Figure, fastest, interleaved
from dsv3.config.part import part
from dsv3.contracts import Step
from dsv3.model.compile import compile_parts
from dsv3.model.decoder import Decoder
from dsv3.planning.flops import training_flops
from dsv3.planning.skeleton import read_skeleton
from dsv3.training.step import Losses, balance, take_gradients

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GOALS = {"bf16": (3.0, 0.40), "fp32": (2.2, 0.60)}
PEAK_SIZE = 4096


def train(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Tokens per second against transformers' fastest way, and the share of the measured peak of matrix products."""
    size = compared.STANDARD
    for precision, dtype in DTYPES.items():
        config, model = ours(size, f"precision={precision}", "mtp=none", device=device)
        step = our_step(size, model, config)
        twins = {e: theirs(config, model, dtype=dtype, experts=e) for e in EXPERTS}
        rivals = {e: their_step(size, twin, config.model.vocab_size) for e, twin in twins.items()}
        rival = fastest(rivals)
        seconds = interleaved({"ours": step, "theirs": rivals[rival]}, repeats=repeats)
        ratio_goal, share_goal = GOALS[precision]
        rates = [f"{size.tokens / seconds[side]:,.0f}" for side in ("ours", "theirs")]
        note = f"{rates[0]} tokens/s, transformers ({rival}) {rates[1]}"
        ratio = seconds["theirs"] / seconds["ours"]
        yield Figure("train", f"step, {precision}: tokens/s against transformers", ratio, "x", ratio_goal, note=note)
        peak, flops = gemm_peak(dtype, device), step_flops(size, f"precision={precision}", "mtp=none")
        for side, goal in (("ours", share_goal), ("theirs", None)):
            share = flops / seconds[side] / peak
            who = "" if side == "ours" else ", transformers"
            note = f"{flops / 1e9:.0f} GFLOP in {seconds[side]:.3f} s; peak {peak / 1e9:.0f} GFLOP/s"
            yield Figure("train", f"share of the GEMM peak, {precision}{who}", share, "", goal, note=note)


def experts(repeats: int, device: torch.device) -> Iterator[Figure]:
    """What many experts cost at equal active parameters."""
    few, many = (our_step(compared.STANDARD, *sized(n, device)) for n in (8, 256))
    seconds = interleaved({"8": few, "256": many}, repeats=repeats)
    note = f"{seconds['8']:.3f} s and {seconds['256']:.3f} s a step"
    ratio = seconds["256"] / seconds["8"]
    yield Figure("experts", "step with 256 routed experts against 8, bf16", ratio, "x", 1.3, at_most=True, note=note)


def sized(n_experts: int, device: torch.device) -> tuple[Decoder, DictConfig]:
    config, model = ours(compared.STANDARD, f"model.n_routed_experts={n_experts}", "mtp=none", device=device)
    return model, config


def fp8(repeats: int, device: torch.device) -> Iterator[Figure]:
    """What emulating FP8 costs, with the quantiser compiled and not."""
    steps = {}
    for name in ("bf16", "fp8_blockwise", "fp8_blockwise precision.compile_quantiser=true"):
        config, model = ours(compared.STANDARD, "mtp=none", *f"precision={name}".split(), device=device)
        steps[name] = our_step(compared.STANDARD, model, config)
    plain, *emulated = interleaved(steps, repeats=repeats).values()
    for seconds, how, goal in zip(emulated, ("eager", "compiled"), (None, 2.0), strict=True):
        note = f"{seconds:.3f} s against {plain:.3f} s"
        what = f"fp8_blockwise step against bf16, quantiser {how}"
        yield Figure("fp8", what, seconds / plain, "x", goal, at_most=True, note=note)


def compiled(repeats: int, device: torch.device) -> Iterator[Figure]:
    """What torch.compile gives (`compile=true`) and takes."""
    steps = {}
    for name in ("eager", "compiled"):
        config, model = ours(compared.STANDARD, "precision=bf16", "mtp=none", device=device)
        if name == "compiled":
            compile_parts(model)
        steps[name] = our_step(compared.STANDARD, model, config)
    started = time.perf_counter()
    steps["compiled"]()
    first = time.perf_counter() - started
    seconds = interleaved(steps, repeats=repeats)
    note = f"{seconds['eager']:.3f} s against {seconds['compiled']:.3f} s compiled; its first step {first:.0f} s"
    yield Figure("compile", "step, bf16: compiled", seconds["eager"] / seconds["compiled"], "x", note=note)


def our_step(size: Size, model: Decoder, config: DictConfig, *, recompute: Collection[str] = ()) -> Callable[[], None]:
    """The training step of `dsv3.training.step`, with one micro-batch and AdamW."""
    vocab_size = config.model.vocab_size
    stream, optimizer = batches(size, vocab_size, device=model.device), adamw(model)
    losses = losses_of_tokens(model, config)

    def step() -> None:
        sums = take_gradients(losses, Step([next(stream)], 0, {}), recompute=recompute)
        optimizer.step()
        optimizer.zero_grad()
        balance(model, sums.loads, 0)

    return step


def losses_of_tokens(model: Decoder, config: DictConfig) -> Losses:
    """The configured objective, of tokens of one byte each."""
    token_bytes_V = torch.ones(config.model.vocab_size, dtype=torch.int64)
    return Losses(model, part(config.objective)(token_bytes_V=token_bytes_V).to(model.device))


def their_step(size: Size, model: Any, vocab_size: int) -> Callable[[], None]:
    stream, optimizer = batches(size, vocab_size, device=model.device), adamw(model)

    def step() -> None:
        batch = next(stream)
        logits_BTV = model(input_ids=batch.tokens_BT, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def step_flops(size: Size, *overrides: str) -> int:
    """Operations of the products of one step; causal attention counted as the half of the square that is needed."""
    return size.tokens * training_flops(read_skeleton(configured(size, *overrides)), size.length)["total"]


def gemm_peak(dtype: torch.dtype, device: torch.device, *, size: int | None = None, repeats: int = 5) -> float:
    """Operations per second of one large square product: the most that this machine shows."""
    size = size or PEAK_SIZE
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    seconds = interleaved({"": lambda: torch.mm(a, b, out=out)}, repeats=repeats)[""]
    return 2 * size**3 / seconds
