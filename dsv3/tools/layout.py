"""Lay a run out over ranks: bytes of parameters, gradients, optimiser state and averaged weights on each.

python -m dsv3 layout model=v3_671b parallel=experts parallel.experts=64 trainer.devices=8 trainer.num_nodes=256

The model is built on the meta device and divided as training divides it, by as many ranks as the run would have.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv3.cli import option

if TYPE_CHECKING:
    from dsv3.distributed.imagined import RankLayout
    from dsv3.distributed.parallel import Sizes


@dataclass
class Options:
    overrides: list[str] = option([], "")


def run(options: Options) -> dict[str, Any]:
    """Print what ranks hold, and return it.

    Raises:
        ValueError: the model cannot be divided so.
    """
    from dsv3.build import build_model
    from dsv3.config.compose import choices, hydra_flags, opened
    from dsv3.config.part import part
    from dsv3.distributed.imagined import layouts

    flags = hydra_flags(options.overrides)
    with opened("train", flags) as composer:
        config = composer.compose(flags.overrides)
        chosen = choices(config)
        parallel = part(config.parallel)
        sizes = parallel.sizes(config.trainer.devices, config.trainer.num_nodes)
        found = layouts(
            lambda: build_model(config, init=False),
            sizes,
            parallel.schedule,
            part(config.optimizer),
            averaged=config.callbacks.get("ema") is not None,
        )
    names = {kind: chosen[kind] for kind in ("model", "parallel", "optimizer")}
    show(found, sizes, title=", ".join(f"{kind} {name}" for kind, name in names.items()))
    most, least = (chooser(found, key=lambda one: one.held.total) for chooser in (max, min))
    return {
        **names,
        "sizes": {**sizes._asdict(), "data": sizes.data, "world": sizes.world},
        "rank_zero": as_row(found[0]),
        "most": as_row(most),
        "least": as_row(least),
        "ranks": [as_row(one) for one in found],
    }


def as_row(one: "RankLayout") -> dict[str, int]:
    return {
        "rank": one.rank,
        "stage": one.stage,
        **one.held._asdict(),
        "total": one.held.total,
        "whole_gradients": one.whole_gradients,
    }


def show(found: "list[RankLayout]", sizes: "Sizes", *, title: str) -> None:
    """Print rank 0, the fullest rank and the emptiest one."""
    from dsv3.distributed.rank_bytes import layout_line, text_of_bytes
    from dsv3.planning.render import Page

    most, least = (chooser(found, key=lambda one: one.held.total) for chooser in (max, min))
    rows = [
        (f"{label} (rank {one.rank:,}, stage {one.stage})", *map(text_of_bytes, (*one.held, one.held.total)))
        for label, one in (("first", found[0]), ("most", most), ("least", least))
    ]
    page = Page()
    page.console.print(f"[bold]{title}[/bold]\n{layout_line(sizes, found[0].held)}")
    note = "EMA weights are in host memory. With several micro-batches per step, a rank adds up the gradients of whole "
    note += f"weights first: {text_of_bytes(most.whole_gradients)} on rank {most.rank:,}."
    columns = ("", "parameters", "gradients", "optimiser", "EMA", "total")
    page.table("Bytes per rank", columns, rows, note=note)
