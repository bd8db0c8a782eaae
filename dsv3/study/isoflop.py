"""IsoFLOP grid of a study (`study.grid`): every arm at every width for every budget of training FLOPs.

The shapes of a width follow from the model preset by `dsv3.planning.shapes`; a run's tokens are those with which it
uses its budget, in whole optimiser steps:

    tokens = round(C / (FLOPs per token x tokens per step)) x tokens per step

FLOPs are those of matrix products, forward and backward, MTP included (`dsv3.planning.flops`). A cell whose number of
steps is outside `study.grid.steps` is left out: few steps are all warm-up, and many take too long.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dsv3.config.micro_batches import rows_of_steps
from dsv3.planning.flops import training_flops
from dsv3.planning.shapes import scaled_shapes
from dsv3.planning.skeleton import read_skeleton

TOLERANCE = 0.01
"""Of a cell's FLOPs."""


class Cell(NamedTuple):
    """One run of the grid."""

    arm: str
    budget: float  # FLOPs
    width: int
    steps: int
    tokens: int
    flops: float  # that it uses
    overrides: list[str]  # of the arm, then shapes and tokens


def cells(compose: Callable[[list[str]], DictConfig], job: Sequence[str], study: Mapping[str, Any]) -> list[Cell]:
    """The grid, cheapest runs first.

    compose: overrides -> the composed config. job: overrides that every run gets.

    Raises:
        ValueError: the grid is misshapen; no cell is left; a cell cannot meet its budget; the batch size changes in a
            run; an override of the job sets what the grid does; an arm has stages.
    """
    grid = study["grid"]
    refuse_misshapen(study)
    refuse_what_the_grid_sets(job)
    found = []
    for arm in study["arms"] if study["only"] is None else study["only"]:
        own = study["arms"][arm]
        if own and not isinstance(own[0], str):
            raise ValueError(f"study.arms.{arm}: an arm of a grid must be one list of overrides, without stages")
        model = compose([*own, *job]).model
        for width in grid["widths"]:
            shapes = [f"model.{key}={value}" for key, value in scaled_shapes(model, width).items()]
            config = compose([*own, *job, *shapes])
            cost, step = flops_per_token(config), tokens_per_step(config)
            for budget in grid["flops"]:
                steps = round(budget / cost / step)
                if grid["steps"][0] <= steps <= grid["steps"][1]:
                    tokens = steps * step
                    overrides = [*own, *shapes, f"run.tokens={tokens}"]
                    found.append(Cell(arm, budget, width, steps, tokens, cost * tokens, overrides))
    if not found:
        raise ValueError(f"study.grid.steps={list(grid['steps'])}: no width has so many steps at any of the budgets")
    for cell in found:
        if abs(cell.flops / cell.budget - 1) > TOLERANCE:
            raise ValueError(
                f"study.grid.flops: {cell.budget:.3g} at width {cell.width} is {cell.steps} steps, {cell.flops:.4g} "
                f"FLOPs: more than {TOLERANCE:.0%} off; raise study.grid.steps"
            )
    return sorted(found, key=lambda cell: (cell.budget, cell.width))


def refuse_misshapen(study: Mapping[str, Any]) -> None:
    grid = study["grid"]
    lists = [grid.get(name) for name in ("flops", "widths", "steps")] if isinstance(grid, Mapping) else []
    numbers = all(isinstance(of, list) and of and all(isinstance(n, int | float) and n > 0 for n in of) for of in lists)
    if not (lists and numbers and set(grid) == {"flops", "widths", "steps"} and len(grid["steps"]) == 2):
        example = "{flops: [1e13, 2e13], widths: [128, 192, 256], steps: [60, 600]}"
        raise ValueError(f"study.grid={grid}: must be lists of positive numbers, such as {example}")
    if not study["arms"]:
        raise ValueError("study.arms: a grid needs an arm, such as {standard: []}")


def flops_per_token(config: DictConfig) -> int:
    """Of training, MTP included."""
    return training_flops(read_skeleton(config), config.data.sequence_length)["total"]


def tokens_per_step(config: DictConfig) -> int:
    """Of every step of the run.

    Raises:
        ValueError: steps of the run differ.
    """
    rows = {n for span in rows_of_steps(config.data.global_batch_size) for n in span}
    if len(rows) != 1:
        raise ValueError("data.global_batch_size: must be the same at every step of a grid's runs")
    return int(rows.pop() * config.data.sequence_length)


def refuse_what_the_grid_sets(job: Sequence[str]) -> None:
    for override in job:
        key = override.partition("=")[0]
        if key in ("run.tokens", "trainer.max_steps", "model.dim"):
            raise ValueError(f"{override}: study.grid sets the widths and tokens of its runs")
