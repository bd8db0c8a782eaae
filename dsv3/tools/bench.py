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

CASES = {
    "train": "training_step.train",
    "memory": "peak_memory.memory",
    "decode": "decoding.decode",
    "experts": "training_step.experts",
    "fp8": "training_step.fp8",
    "compile": "training_step.compiled",
    "data": "data_pipeline.data",
    "head": "head_loss.head",
    "speculation": "drafts.speculation",
    "onnx": "onnx_decoding.onnx_decoding",
    "evaluation": "scoring.evaluation",
}
"""The function of each case, in `dsv3.bench`."""
GPU_CHECK = {
    "gpu_works": "gpu_check.works",
    "gpu_attention": "attention_kernels.attention",
    "gpu_step": "gpu_check.step",
    "gpu_waits": "gpu_check.waits",
    "gpu_memory": "gpu_check.memory",
    "gpu_decode": "static_decoding.decode",
    "gpu_fp8": "gpu_check.fp8",
    "gpu_losses": "gpu_check.losses",
}
"""The same of what `only=gpu_check` runs. A part that fails is a line of the table, and the others go on."""
WIDTH = 160  # of a table that is no terminal's


@dataclass
class Options:
    only: str = option(
        "",
        f"cases to run, separated by commas, of {', '.join(CASES)}; empty: all of these. gpu_check: what works on the "
        f"device, and how fast ({', '.join(GPU_CHECK)})",
    )
    repeats: PositiveInt = option(5, "timed repetitions per implementation")
    out: str = option("", "a file for the figures as JSON, which is written after every case")
    device: str = option("auto", "auto: cuda where torch sees a GPU, else cpu", choices=("auto", "cpu", "cuda"))


def run(options: Options) -> dict[str, Any]:
    """Raises SystemExit(1) where a part of `gpu_check` failed."""
    import sys
    from pathlib import Path

    import torch
    from rich.console import Console

    from dsv3.bench.measuring import Figure
    from dsv3.checkpoint.run_folder import write_text_atomically
    from dsv3.runtime import device_named, set_up_process
    from dsv3.strict_json import text_of

    given = [name for name in options.only.split(",") if name] or list(CASES)
    wanted = [case for name in given for case in (GPU_CHECK if name == "gpu_check" else (name,))]
    known = (*CASES, "gpu_check", *GPU_CHECK)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"only={options.only}: {unknown[0]!r} must be one of {', '.join(known)}")
    if options.repeats < 1:
        raise ValueError(f"repeats={options.repeats}: must be at least 1")
    set_up_process()
    device = device_named(options.device)
    if needing := [name for name in ("speculation", "evaluation") if name in wanted]:
        from dsv3.bench.drafts import FINISHED

        if not FINISHED.exists():
            missing = f"{FINISHED} is missing; run `make train`, or select cases with only="
            raise FileNotFoundError(f"{needing[0]}: {missing}")
    from dsv3.bench.training_step import gemm_peak

    figures: list[Figure] = []
    rates = {name: gemm_peak(getattr(torch, name), device) for name in ("bfloat16", "float32")}
    for name in wanted:
        print(f"{name} ...", file=sys.stderr, flush=True)
        for figure in case(name)(options.repeats, device):
            print(f"  {figure.what}: {figure.value:.3g}{figure.unit} {figure.note}", file=sys.stderr, flush=True)
            figures.append(figure)
        measured = {
            "device": described(device),
            "gemm_flops_per_second": rates,
            "figures": [figure._asdict() | {"reached": figure.reached} for figure in figures],
        }
        if options.out:
            write_text_atomically(Path(options.out), text_of(measured))
    products = ", ".join(f"{rate / 1e9:,.0f} in {name}" for name, rate in rates.items())
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(table(figures, f"Measured on {described(device)}, GEMM in GFLOP/s: {products}"))
    if getattr(options, "format", "text") == "text" and any(
        figure.case in GPU_CHECK and not figure.value for figure in figures
    ):
        raise SystemExit(1)
    return measured


def described(device: Any) -> str:
    """The device by its name, as figures are quoted with it."""
    import platform

    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}"


def case(name: str) -> Any:
    """The function of a case: repeats and device -> figures. Only its module is imported."""
    from importlib import import_module

    module, _, function = {**CASES, **GPU_CHECK}[name].partition(".")
    found = getattr(import_module(f"dsv3.bench.{module}"), function)
    if name in CASES:
        return found
    from dsv3.bench.on_device import guarded

    return guarded(name, found)


def table(figures: Any, title: str) -> Any:
    from rich.table import Table

    result = Table(title=title, title_justify="left")
    for column, justify in (("case", "left"), ("what", "left"), ("figure", "right"), ("goal", "right"), ("", "left")):
        result.add_column(column, justify=justify)  # type: ignore[arg-type]
    for figure in figures:
        bound = "" if figure.goal is None else f"{'at most' if figure.at_most else 'at least'} {figure.goal:g}"
        colour = {None: "", True: "[green]", False: "[red]"}[figure.reached]
        value = f"{colour}{figure.value:.3g}{figure.unit}"
        result.add_row(figure.case, figure.what, value, bound, figure.note)
    return result
