"""Plots of a study: held-out bits per byte of each arm, paired differences from the baseline, experts by domain."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from dsv3.checkpoint.run_folder import write_atomically
from dsv3.reporting.experts import TOP, by_domain, last_interval, specialisation
from dsv3.reporting.history import History
from dsv3.reporting.paired import Difference, paired
from dsv3.reporting.palette import COLOURS
from dsv3.reporting.study_results import Curve, Study, at_equal, at_point, common_budget, curve
from dsv3.reporting.style import INK, SHARES, X_AXES, few, framed, line


def shared_points(*curves: Curve) -> np.ndarray:
    """Every validation's point that lies on all of the curves; the untrained models, which tell nothing, left out."""
    start, end = max(x[1] for x, _ in curves), min(x[-1] for x, _ in curves)
    points = np.unique(np.concatenate([x for x, _ in curves]))
    return points[(points >= start) & (points <= end)]


def with_the_same_text(study: Study, arms: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Those whose held-out text is the baseline's."""
    metric = at_equal(study, "tokens")
    return [(i, arm) for i, arm in arms if study.comparable(metric, arm)]


def band(study: Study, arm: str, budget: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of a budget, the mean of the arm's seeds there, and the standard deviation (0 for one)."""
    curves = [curve(run, budget) for run in study.runs[arm].values()]
    points = shared_points(*curves)
    values = np.stack([np.interp(points, x, y) for x, y in curves])
    return points, values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(points))


def curves(study: Study, budget: str) -> go.Figure:
    """Held-out bits per byte of each arm: mean over its seeds, and a band of one standard deviation."""
    figure = go.Figure()
    for i, arm in with_the_same_text(study, enumerate(study.runs)):
        x, middle, spread = band(study, arm, budget)
        edge = {"x": np.concatenate([x, x[::-1]]), "y": np.concatenate([middle + spread, (middle - spread)[::-1]])}
        fill = {"fill": "toself", "fillcolor": line(i)["color"], "opacity": 0.15, "line": {"width": 0}}
        figure.add_scatter(**edge, **fill, hoverinfo="skip", showlegend=False, mode="lines")
        figure.add_scatter(x=x, y=middle, mode="lines+markers", line=line(i), name=arm)
    return framed(figure, f"Held-out text over {budget}", x=X_AXES[budget], y="bits per byte", height=400)


def gap(study: Study, arm: str, budget: str, common: float) -> tuple[np.ndarray, list[Difference]]:
    """Points of a budget, and the arm's paired difference from the baseline there: by seeds alone, at the `common`
    budget as in the verdict."""
    seeds = study.seeds(arm, study.baseline)
    ours, theirs = ([curve(study.runs[name][seed], budget) for seed in seeds] for name in (arm, study.baseline))
    points = shared_points(*ours, *theirs)
    values = [np.stack([np.interp(points, x, y) for x, y in curves], axis=1) for curves in (ours, theirs)]
    differences = [paired(a.tolist(), b.tolist()) for a, b in zip(*values, strict=True)]
    if len(points) and points[-1] == common:
        differences[-1] = study.difference(at_point(common, budget), arm) or differences[-1]
    return points, differences


def interval(differences: Sequence[Difference]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, and the ends of their intervals; without a second seed there is no interval to draw."""
    means, lows, highs = (np.array([getattr(d, name) for d in differences]) for name in ("mean", "low", "high"))
    return means, np.where(np.isfinite(lows), lows, means), np.where(np.isfinite(highs), highs, means)


def gaps(study: Study, budget: str) -> go.Figure:
    """Each arm's difference from the baseline, with its 95% interval."""
    figure, common = go.Figure(), common_budget(study, budget)
    for i, arm in with_the_same_text(study, study.compared()):
        x, differences = gap(study, arm, budget, common)
        means, lows, highs = interval(differences)
        bars = {"type": "data", "symmetric": False, "array": highs - means, "arrayminus": means - lows}
        figure.add_scatter(x=x, y=means, error_y=bars, mode="lines+markers", line=line(i), name=arm)
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    unit = "difference, bits per byte (95% intervals)"
    return framed(figure, f"Against {study.baseline} over {budget}", x=X_AXES[budget], y=unit, height=400)


def draw(study: Study, out: Path) -> None:
    """The curves over tokens and the differences from the baseline as a PNG, for a page that is not HTML."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, arm in with_the_same_text(study, enumerate(study.runs)):
        x, middle, spread = band(study, arm, "tokens")
        left.plot(x / 1e6, middle, "o-", color=COLOURS[i % len(COLOURS)], markersize=4, label=arm)
        left.fill_between(x / 1e6, middle - spread, middle + spread, color=COLOURS[i % len(COLOURS)], alpha=0.15)
    common = common_budget(study, "tokens")
    apart = 0.04 / max(10, len(study.runs))
    for i, arm in with_the_same_text(study, study.compared()):
        x, differences = gap(study, arm, "tokens", common)
        means, lows, highs = interval(differences)
        width = apart * i * x.max(initial=0) / 1e6  # beside each other, so that intervals are told apart
        errors = np.stack((means - lows, highs - means))
        right.errorbar(x / 1e6 + width, means, errors, fmt="o-", color=COLOURS[i % len(COLOURS)], capsize=3, label=arm)
    right.axhline(0, color=INK, linewidth=1)
    left.set(title=study.name, xlabel="training tokens (millions)", ylabel="held-out text, bits per byte")
    title = f"difference from {study.baseline}, with 95% intervals"
    right.set(title=title, xlabel="training tokens (millions)", ylabel="bits per byte; below 0 is better")
    if few(study.runs):
        left.legend(loc="upper right")
    write_atomically(out, lambda path: figure.savefig(path, format="png", dpi=100))


def first_runs(study: Study) -> dict[str, History]:
    """Of each arm the run whose experts are shown, that of its lowest seed; named by both."""
    lowest = {arm: min(runs) for arm, runs in study.runs.items()}
    runs = {f"{arm}, seed {seed}": study.runs[arm][seed] for arm, seed in lowest.items()}
    return {name: run for name, run in runs.items() if not run.newest("metrics/routing").empty}


def domains(study: Study) -> list[go.Figure]:
    """Relative load of each expert on each domain at the end of a run of each arm."""
    return [specialisation(run, f"Specialisation by domain, {name}") for name, run in first_runs(study).items()]


def draw_domains(study: Study, out: Path) -> None:
    """`domains` as one PNG."""
    from matplotlib.figure import Figure

    runs = first_runs(study)
    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    maps = {name: by_domain(last_interval(run, "domains", "domain_load")) for name, run in runs.items()}
    tallest = max(len(names) for names, _ in maps.values())
    figure = Figure(figsize=(12, rows * (1.2 + 0.2 * tallest)), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, (names, values)) in zip(axes, maps.items(), strict=False):
        image = axis.imshow(values, aspect="auto", cmap=SHARES.lower(), vmin=0, vmax=TOP, interpolation="nearest")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(title=title, xlabel="expert")
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label=f"relative load (1 = balanced) of the domain ({TOP:g} and more)")
    write_atomically(out, lambda path: figure.savefig(path, format="png", dpi=100))
