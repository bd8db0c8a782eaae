"""Scaling laws of the arms of a grid (`study.grid`), from its finished runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dsv3.reporting.history import History, find_runs
from dsv3.study.compute_gain import Gain, Sizes, compute_gain
from dsv3.study.isoflop_minima import Exponents, Run, envelope, minima
from dsv3.study.parametric_law import Law, fit

Count = Literal["total", "active"]
COUNTS: tuple[Count, ...] = ("total", "active")
SKIPPED = 0.1
"""Fraction of a run at its beginning, where its curve of training loss is no estimate of anything."""


class Prediction(NamedTuple):
    """Loss of a run that is not of the grid."""

    run: str
    tokens: float
    loss: dict[Count, tuple[float, float, float]]  # by each law, with its interval
    measured: float | None  # None: the run is not finished


class OfArm(NamedTuple):
    """What the runs of one arm tell."""

    runs: dict[Count, list[Run]]  # the same runs; their `parameters` are of this count
    laws: dict[Count, Law]
    envelopes: dict[Count, Exponents | None]
    minima: dict[Count, Exponents | None]


class Grid(NamedTuple):
    """A study that is a grid."""

    name: str
    question: str
    finding: str
    baseline: str
    arms: dict[str, OfArm]
    gains: dict[str, dict[Count, Gain]]  # of every arm but the baseline
    predictions: list[Prediction]
    unfinished: list[str]


def is_grid(root: Path) -> bool:
    """Whether the runs in this folder belong to a grid."""
    runs = find_runs(root)
    return bool(runs) and all(run.setting("study.grid") is not None for run in runs)


def read_grid(root: Path, *, predict: Path | None = None, current: Mapping[str, Any] | None = None) -> Grid:
    """Fit the laws of a grid's arms.

    predict: a run folder whose loss the baseline's law is to predict, by its run_info.json; its summary is read for
    comparison alone. current: the study's settings as they are now; None: as the runs have recorded them.

    Raises:
        FileNotFoundError: no run of the grid is finished, or there is no run to predict.
        ValueError: an arm has too few runs for a law.
    """
    finished: dict[str, list[History]] = {}
    unfinished, about = [], None
    for run in find_runs(root):
        arm = run.setting("study.arm")
        if run.setting("study.grid") is None or arm is None:
            continue
        about = run
        if run.summary is None:
            unfinished.append(run.name)
        else:
            finished.setdefault(arm, []).append(run)
    if about is None or not finished:
        raise FileNotFoundError(f"{root}: there is no finished run of a grid")
    settings = about.settings["study"] if current is None else current
    arms = {arm: of_arm(arm, runs) for arm, runs in finished.items()}
    baseline = settings["baseline"] if settings["baseline"] in arms else next(iter(arms))
    gains = {arm: gains_of(found, arms[baseline]) for arm, found in arms.items() if arm != baseline}
    predictions = [prediction(arms[baseline], predict)] if predict is not None else []
    about_it = (about.setting("run.experiment"), settings["question"] or "", settings["finding"] or "")
    return Grid(*about_it, baseline, arms, gains, predictions, unfinished)


def of_arm(arm: str, histories: list[History]) -> OfArm:
    runs = {count: sorted((run_of(run, count) for run in histories), key=lambda run: run[:3]) for count in COUNTS}
    try:
        laws = {
            count: fit([r.parameters for r in of], [r.tokens for r in of], [r.loss for r in of])
            for count, of in runs.items()
        }
    except ValueError as error:
        raise ValueError(f"{arm}: {error}") from None
    return OfArm(
        runs,
        laws,
        {count: envelope(of) for count, of in runs.items()},
        {count: minima(of) for count, of in runs.items()},
    )


def run_of(history: History, count: Count) -> Run:
    """Held-out bits per byte of the current weights at the end; along the way, smoothed ones of the training text."""
    info, summary = history.info, history.summary or {}
    flops = summary["tokens"] * info["flops_per_token"]
    budget = min(history.setting("study.grid.flops"), key=lambda budget: abs(np.log(budget / flops)))
    train = history.train()
    train = train[train.tokens >= SKIPPED * summary["tokens"]]
    curve = train.flops.to_numpy(float), train.bpb_mean.to_numpy(float)
    loss = summary["validation"]["after"]["all"]["bpb"]
    return Run(info["parameters"][count], summary["tokens"], flops, budget, loss, curve)


def gains_of(arm: OfArm, baseline: OfArm) -> dict[Count, Gain]:
    budgets = [run.budget for run in baseline.runs["total"]]
    return {
        count: compute_gain(
            arm.laws[count],
            baseline.laws[count],
            sizes_of(arm.runs[count]),
            sizes_of(baseline.runs[count]),
            (min(budgets), max(budgets)),
        )
        for count in COUNTS
    }


def sizes_of(runs: list[Run]) -> Sizes:
    return Sizes(np.array([run.parameters for run in runs]), np.array([run.flops / run.tokens for run in runs]))


def prediction(arm: OfArm, folder: Path) -> Prediction:
    """By what the run wrote before its first step."""
    run = History(folder, str(folder))
    if not run.info:
        raise FileNotFoundError(f"predict={folder}: no run_info.json, which a run writes before its first step")
    tokens = float(run.info["tokens"])
    loss = {count: arm.laws[count].predict(run.info["parameters"][count], tokens) for count in COUNTS}
    measured = run.summary["validation"]["after"]["all"]["bpb"] if run.summary else None
    return Prediction(str(folder), tokens, loss, measured)


def as_json(grid: Grid) -> dict[str, Any]:
    """All but the runs' curves and the draws. Three numbers: an estimate and the ends of its interval."""
    return {
        "study": grid.name,
        "baseline": grid.baseline,
        "unfinished": grid.unfinished,
        "arms": {
            name: {
                count: {
                    "runs": [run._replace(curve=None)._asdict() for run in arm.runs[count]],  # type: ignore[arg-type]
                    "law": arm.laws[count].constants(),
                    "relative_error": float(np.sqrt(np.mean(arm.laws[count].residuals ** 2))),
                    "envelope": exponents_json(arm.envelopes[count]),
                    "minima": exponents_json(arm.minima[count]),
                }
                for count in COUNTS
            }
            for name, arm in grid.arms.items()
        },
        "gains": {
            arm: {count: gain._asdict() | {"constant": gain.constant} for count, gain in of.items()}
            for arm, of in grid.gains.items()
        },
        "predictions": [prediction._asdict() for prediction in grid.predictions],
    }


def exponents_json(found: Exponents | None) -> dict[str, Any] | None:
    return None if found is None else {"a": found.a, "b": found.b}
