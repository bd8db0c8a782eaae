"""Measure speed and memory as ratios within one run, against transformers' DeepseekV3 on the same weights and inputs.

Width 256, 6 layers, 32 experts, top-4, vocabulary 8192, micro-batches of 8 x 512 random tokens, SDPA, without
torch.compile on either side (the case `compile` measures it); transformers uses its fastest expert implementation. The
cases experts, fp8, compile, data, speculation and onnx compare ours with ours, head the loss of the output head with
torch's linear_cross_entropy, evaluation with lm-eval's `hf` model; speculation, onnx and evaluation read the run of
`make train`, and the last two count CPU seconds. In BF16 transformers' weights, gradients and AdamW's moments
are BF16, ours FP32 (as in training). Repetitions are interleaved, and medians are compared. Run it on an idle machine.
"""

from dataclasses import dataclass
from typing import Any

from dsv3.bounds import PositiveInt
from dsv3.cli import option

CASES = ("train", "memory", "decode", "experts", "fp8", "compile", "data", "head", "speculation", "onnx", "evaluation")


@dataclass
class Options:
    only: str = option("", f"cases to run, separated by commas, of {', '.join(CASES)}; empty: all")
    repeats: PositiveInt = option(5, "timed repetitions per implementation")
    device: str = option("auto", "auto: cuda where torch sees a GPU, else cpu", choices=("auto", "cpu", "cuda"))


def run(options: Options) -> dict[str, Any]:
    import sys

    from rich.console import Console

    from dsv3.bench.measuring import Figure
    from dsv3.runtime import device_named, set_up_process

    wanted = [name for name in options.only.split(",") if name] or list(CASES)
    unknown = [name for name in wanted if name not in CASES]
    if unknown:
        raise ValueError(f"only={options.only}: {unknown[0]!r} must be one of {', '.join(CASES)}")
    if options.repeats < 1:
        raise ValueError(f"repeats={options.repeats}: must be at least 1")
    set_up_process()
    device = device_named(options.device)
    from dsv3.bench.drafts import FINISHED  # imports the model

    for name in ("speculation", "evaluation"):
        if name in wanted and not FINISHED.exists():
            raise FileNotFoundError(f"{name}: {FINISHED} is missing; run `make train`, or select cases with only=")
    figures: list[Figure] = []
    for name in wanted:
        print(f"{name} ...", file=sys.stderr, flush=True)
        for figure in case(name)(options.repeats, device):
            print(f"  {figure.what}: {figure.value:.2f}{figure.unit} {figure.note}", file=sys.stderr, flush=True)
            figures.append(figure)
    import torch

    from dsv3.bench.training_step import gemm_peak

    rates = {name: gemm_peak(getattr(torch, name), device) for name in ("bfloat16", "float32")}
    products = ", ".join(f"{rate / 1e9:,.0f} in {name}" for name, rate in rates.items())
    Console(highlight=False).print(table(figures, f"Measured on {described(device)}, GEMM in GFLOP/s: {products}"))
    return {
        "device": described(device),
        "gemm_flops_per_second": rates,
        "figures": [figure._asdict() | {"reached": figure.reached} for figure in figures],
    }


def described(device: Any) -> str:
    """The device by its name, as figures are quoted with it."""
    import platform

    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}"


def case(name: str) -> Any:
    """The function of a case: repeats and device -> figures."""
    from dsv3.bench import (
        data_pipeline,
        decoding,
        drafts,
        head_loss,
        onnx_decoding,
        peak_memory,
        scoring,
        training_step,
    )

    return {
        "train": training_step.train,
        "memory": peak_memory.memory,
        "decode": decoding.decode,
        "experts": training_step.experts,
        "fp8": training_step.fp8,
        "compile": training_step.compiled,
        "data": data_pipeline.data,
        "head": head_loss.head,
        "speculation": drafts.speculation,
        "onnx": onnx_decoding.onnx_decoding,
        "evaluation": scoring.evaluation,
    }[name]


def table(figures: Any, title: str) -> Any:
    from rich.table import Table

    result = Table(title=title, title_justify="left")
    for column, justify in (("case", "left"), ("what", "left"), ("figure", "right"), ("goal", "right"), ("", "left")):
        result.add_column(column, justify=justify)  # type: ignore[arg-type]
    for figure in figures:
        bound = "" if figure.goal is None else f"{'at most' if figure.at_most else 'at least'} {figure.goal:g}"
        colour = {None: "", True: "[green]", False: "[red]"}[figure.reached]
        value = f"{colour}{figure.value:.2f}{figure.unit}"
        result.add_row(figure.case, figure.what, value, bound, figure.note)
    return result
