"""The plan as text: one table per concern."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

GIB = 2**30
SUMS = ("model", "total")
WIDEST = 100
"""Columns that no table exceeds; a narrower terminal wraps rather than lose digits."""


def show(plan: dict[str, Any], *, title: str) -> None:
    """Print what `plan.make_plan` returns to stdout."""
    page = Page()
    page.console.print(f"[bold]{title}[/bold]")
    _parameters(page, plan)
    _flops(page, plan)
    _cache(page, plan)
    _memory(page, plan)
    if "all_to_all" in plan:
        _traffic(page, plan)
    _pipelines(page, plan)
    _duration(page, plan)
    if "published" in plan:
        _published(page, plan)


class Page:
    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.console.width = max(self.console.width, WIDEST)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, note: str = "") -> None:
        """Title, table (first column left-aligned, numbers right-aligned), and a note."""
        table = Table(box=SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] in SUMS else "")
        self.console.print(f"\n[bold]{title}[/bold]")
        self.console.print(table)
        if note:
            self.console.print(note, style="dim")


def _parameters(page: Page, plan: dict[str, Any]) -> None:
    rows = [
        (name, _short(count["total"]), f"{count['total']:,}", _short(count["active"]), f"{count['active']:,}")
        for name, count in plan["parameters"].items()
        if count["total"]
    ]
    note = "active: used per token. model: sum of the rows above; published sizes exclude MTP."
    page.table("Parameters", ("component", "total", "", "active", ""), rows, note=note)


def _flops(page: Page, plan: dict[str, Any]) -> None:
    flops, recipe = plan["flops_per_token"], plan["recipe"]
    rows = [(name, _giga(flops["forward"][name]), _giga(n)) for name, n in flops["training"].items() if n]
    rows.append((f"recomputed ({recipe['recompute']})", "", _giga(flops["recomputed"])))
    note = "Multiply-add = 2 FLOPs; causal attention counts half; training = 3 x forward, without recomputation."
    title = f"GFLOPs per token, sequences of {recipe['seq_len']:,} tokens"
    page.table(title, ("component", "forward", "training"), rows, note=note)


def _cache(page: Page, plan: dict[str, Any]) -> None:
    rows = []
    for name, cache in plan["cache_per_token"].items():
        rows.append((name, f"{cache['numbers_per_layer']:,}", f"{cache['bytes']:,.0f}"))
        if cache["expanded_numbers_per_layer"] != cache["numbers_per_layer"]:
            expanded = f"{cache['expanded_numbers_per_layer']:,}", f"{cache['expanded_bytes']:,.0f}"
            rows.append((f"  {name}'s heads as multi-head attention (MHA)", *expanded))
    note = f"{plan['recipe']['formats']['cache']:g} bytes per element, without MTP's own cache."
    page.table("KV cache per token", ("attention", "elements per layer", "bytes, all layers"), rows, note=note)


def _memory(page: Page, plan: dict[str, Any]) -> None:
    recipe = plan["recipe"]
    memory = {name: size for name, size in plan["memory_per_gpu"].items() if size}
    labels = {"mean_total": "mean of all", "recomputed": "recomputed block", "gathered": "gathered weights"}
    rows = [(labels.get(name, name), f"{size / GIB:.2f}") for name, size in memory.items()]
    note = f"{recipe['gpus']:,} GPUs = PP {recipe['pp']} x DP {recipe['dp']}, EP {recipe['ep']}, "
    note += f"ZeRO-{recipe['zero_stage']}, {recipe['pipeline']}, recomputation {recipe['recompute']}, "
    note += f"micro-batches of {recipe['micro_batch']} x {recipe['seq_len']:,} tokens."
    page.table("Memory of the most loaded GPU", ("", "GiB"), rows, note=note)


def _traffic(page: Page, plan: dict[str, Any]) -> None:
    recipe, traffic = plan["recipe"], plan["all_to_all"]
    rows = []
    for limit, label in (("limited", "node-limited"), ("unlimited", "unrestricted")):
        for bound in ("at_most", "expected"):
            t = traffic[limit]
            nodes, layer, training = t[f"nodes_{bound}"], t[f"bytes_{bound}"], t[f"training_bytes_{bound}"]
            name = f"{label}, {bound.replace('_', ' ')}"
            rows.append((name, f"{nodes:.3g}", f"{layer:,.0f}", f"{training / 1e6:,.2f}"))
    formats = recipe["formats"]
    note = f"EP {recipe['ep']}, {recipe['gpus_per_node']} GPUs per node; bytes per element: "
    note += f"dispatch {formats['dispatch']:g}, combine {formats['combine']:g}. "
    note += f"Training: forward and backward of {traffic['moe_layers']} MoE layers."
    columns = ("experts chosen", "nodes", "bytes per layer, forward", "MB, training")
    page.table("All-to-all between nodes, per token", columns, rows, note=note)


def _pipelines(page: Page, plan: dict[str, Any]) -> None:
    recipe = plan["recipe"]
    rows = [
        (name, f"{p['bubble']:g}", f"{p['share']:.1%}", f"{p['parameters']}x", f"{p['activations']}")
        for name, p in plan["pipeline"].items()
    ]
    times = ", ".join(f"{name} {value:g}" for name, value in recipe["times"].items())
    note = f"PP {recipe['pp']}, {recipe['num_microbatches']} micro-batches per step; chunk times: {times}. "
    note += "Activations: in micro-batches per stage."
    page.table("Pipeline bubbles", ("", "bubble", "bubble fraction", "parameters", "activations"), rows, note=note)


def _duration(page: Page, plan: dict[str, Any]) -> None:
    recipe, d = plan["recipe"], plan["duration"]
    rows = [
        ("FLOPs", f"{d['flops']:.4g}"),
        ("GPU hours", _number(d["gpu_hours"])),
        ("GPU hours per trillion tokens", _number(d["gpu_hours_per_trillion_tokens"])),
        (f"days on {recipe['gpus']:,} GPUs", _number(d["days"])),
        (f"seconds per step of {recipe['tokens_per_step']:,} tokens", _number(d["seconds_per_step"])),
    ]
    note = f"Assumes {recipe['mfu']:.1%} MFU of {recipe['peak'] / 1e12:,.1f} TFLOP/s per GPU."
    page.table(f"Training on {_short(recipe['tokens'])} tokens", ("", ""), rows, note=note)
    if "implied_mfu" in d:
        _implied_mfu(page, recipe, d["implied_mfu"], f"{d['known_gpu_hours']:,.0f} GPU hours")


def _published(page: Page, plan: dict[str, Any]) -> None:
    p = plan["published"]
    pairs = (
        ("GPU hours", "our_gpu_hours", "gpu_hours"),
        ("GPU hours per trillion tokens", "our_gpu_hours_per_trillion_tokens", "gpu_hours_per_trillion_tokens"),
        ("days", "our_days", "days"),
    )
    rows = [(name, _number(p[ours]), _number(p[theirs]), f"{p[ours] / p[theirs]:.3f}") for name, ours, theirs in pairs]
    title = f"Compared with the report: DeepSeek-V3's {_short(p['tokens'])} tokens on {p['gpus']:,} H800"
    columns = ("", f"at {plan['recipe']['mfu']:.1%} MFU", "published", "ratio")
    page.table(title, columns, rows)
    _implied_mfu(page, plan["recipe"], p["implied_mfu"], f"the published {p['gpu_hours']:,.0f} GPU hours")


def _implied_mfu(page: Page, recipe: dict[str, Any], mfu: dict[str, Any], hours: str) -> None:
    parts = (("with MTP", "total"), ("without MTP", "model"))
    rows = [(name, f"{mfu['peak'][part]:.1%}", f"{mfu['peak_fp8'][part]:.1%}") for name, part in parts]
    peaks = (f"of {label}, {recipe[key] / 1e12:,.1f} TFLOP/s" for key, label in (("peak", "BF16"), ("peak_fp8", "FP8")))
    page.table(f"MFU implied by {hours}", ("", *peaks), rows)


def _short(count: float) -> str:
    """671.03B of 671,026,419,200."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:,.2f}{unit}"
    return f"{count:g}"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f}" if flops >= 1e9 else f"{flops / 1e9:.3g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
