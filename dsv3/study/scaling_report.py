"""Report of a scaling law: report.html, report.md, report.png and scaling_law.json."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dsv3.checkpoint.run_folder import write_atomically, write_text_atomically
from dsv3.reporting.page import page, table
from dsv3.reporting.style import COLOURS, framed
from dsv3.strict_json import text_of
from dsv3.study.report import Section, inert, marked_up
from dsv3.study.scaling_results import COUNTS, Grid, OfArm, as_json

LAW = (
    "L = E + A / N^alpha + B / D^beta, with N parameters and D training tokens; L is held-out bits per byte. Intervals "
    "are bootstrapped, at 95%. N includes embedding and head, and leaves MTP out."
)
GROWTH = (
    "Loss-optimal parameters grow as C^a, tokens as C^b. 1: the best run at each budget, by training loss. 2: minima "
    "of profiles of equal FLOPs. 3: a = beta / (alpha + beta) of the law, which takes the cost of a token as "
    "proportional to N."
)
Triple = tuple[float, float, float]


def sections(grid: Grid) -> Iterator[Section]:
    yield Section("Verdict", sentences(grid), (), [])
    rows = [
        (arm, count, *(cell(found.laws[count].constants()[name]) for name in ("E", "A", "alpha", "B", "beta")), error)
        for arm, found in grid.arms.items()
        for count in COUNTS
        if (error := f"{np.sqrt(np.mean(found.laws[count].residuals ** 2)):.2%}")
    ]
    yield Section("Laws", [LAW], ("arm", "N", "E", "A", "alpha", "B", "beta", "noise of a run"), rows)
    yield Section("Growth with compute", [GROWTH], ("arm", "N", "approach", "a", "b", "budgets"), list(growth(grid)))
    if grid.gains:
        gains = [
            (arm, count, *map(cell, gain[:4]), "yes" if gain.constant else "no")
            for arm, of in grid.gains.items()
            for count, gain in of.items()
        ]
        factors = ("arm", "N", "factor", "at the smallest budget", "at the largest", "their ratio", "constant?")
        yield Section("Gain in compute", [f"FLOPs that `{grid.baseline}` needs for the same loss."], factors, gains)
    for arm, found in grid.arms.items():
        headers = ("FLOPs", "N total", "N active", "D", "budget", "L", "law, total N", "law, active N")
        yield Section(f"Runs of {arm}", [], headers, runs_of(found))


def sentences(grid: Grid) -> list[str]:
    said = [f"Question: {grid.question}"] if grid.question else []
    said += [f"Published: {grid.finding}"] if grid.finding else []
    if grid.unfinished:
        said.append(f"Unfinished, not included: {', '.join(grid.unfinished)}.")
    for prediction in grid.predictions:
        for count, (value, low, high) in prediction.loss.items():
            text = f"{prediction.run}, by {count} parameters: {value:.4f} bits per byte ({low:.4f} to {high:.4f})"
            if prediction.measured is not None:
                text += f"; measured {prediction.measured:.4f}, which is {prediction.measured - value:+.4f} from it"
            said.append(f"{text}.")
    for arm, of in grid.gains.items():
        gain = of["active"]
        constant = "a constant factor is not excluded" if gain.constant else "the factor changes with compute"
        said.append(f"{arm}: {grid.baseline} needs {cell(gain.factor)} times the FLOPs for the same loss; {constant}.")
    for arm, found in grid.arms.items():
        constants = found.laws["active"].constants()
        terms = f"{constants['E'][0]:.3f} + {constants['A'][0]:.4g} / N^{constants['alpha'][0]:.3f}"
        said.append(
            f"{arm}: L = {terms} + {constants['B'][0]:.4g} / D^{constants['beta'][0]:.3f} with active parameters."
        )
    return said


def growth(grid: Grid) -> Iterator[tuple[Any, ...]]:
    for arm, found in grid.arms.items():
        for count in COUNTS:
            for number, exponents in ((1, found.envelopes[count]), (2, found.minima[count])):
                cells = (cell(exponents.a), cell(exponents.b)) if exponents else ("", "")
                of = "" if exponents is None or number == 1 else len(exponents.budgets)
                yield arm, count, number, *cells, of
            value, low, high = found.laws[count].constants()["a"]
            yield arm, count, 3, cell((value, low, high)), cell((1 - value, 1 - high, 1 - low)), ""


def runs_of(found: OfArm) -> list[tuple[Any, ...]]:
    rows = []
    for total, active in zip(found.runs["total"], found.runs["active"], strict=True):
        laws = [
            found.laws[count](run.parameters, run.tokens) for count, run in zip(COUNTS, (total, active), strict=True)
        ]
        sizes = (f"{total.parameters:,}", f"{active.parameters:,}", f"{total.tokens:,}")
        fitted = [f"{float(law):.4f}" for law in laws]
        rows.append((f"{total.flops:.3g}", *sizes, f"{total.budget:.3g}", f"{total.loss:.4f}", *fitted))
    return sorted(rows, key=lambda row: float(row[0]))


def cell(value: Triple) -> str:
    middle, low, high = value
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def profiles(found: OfArm) -> Iterator[tuple[str, Any, Any, Any, Any]]:
    """For each budget: its name, active parameters and losses of its runs, and a fine line of the law through them."""
    runs, law = found.runs["active"], found.laws["active"]
    for budget in sorted({run.budget for run in runs}):
        of = [run for run in runs if run.budget == budget]
        n, d = np.array([run.parameters for run in of]), np.array([run.tokens for run in of])
        fine = np.geomspace(n.min(), n.max(), 50)
        yield (
            f"{budget:.3g}",
            n,
            [run.loss for run in of],
            fine,
            law(fine, np.exp(np.interp(np.log(fine), np.log(n), np.log(d)))),
        )


def figure(arm: str, found: OfArm) -> go.Figure:
    drawn = go.Figure()
    for i, (name, n, loss, fine, law) in enumerate(profiles(found)):
        colour = COLOURS[i % len(COLOURS)]
        drawn.add_scatter(x=n, y=loss, mode="markers", marker={"color": colour, "size": 9}, name=f"{name} FLOPs")
        drawn.add_scatter(x=fine, y=law, mode="lines", line={"color": colour}, name=f"law at {name}", showlegend=False)
    drawn.update_xaxes(type="log")
    return framed(
        drawn, f"{arm}: equal FLOPs, and the fitted law", x="active parameters", y="bits per byte", height=400
    )


def draw(grid: Grid, out: Path) -> None:
    """`figure` of every arm as one PNG."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(6 * len(grid.arms), 4.5), layout="constrained")
    axes = np.ravel(sheet.subplots(1, len(grid.arms), squeeze=False))
    for axis, (arm, found) in zip(axes, grid.arms.items(), strict=True):
        for i, (name, n, loss, fine, law) in enumerate(profiles(found)):
            axis.plot(n, loss, "o", color=COLOURS[i % len(COLOURS)], label=f"{name} FLOPs")
            axis.plot(fine, law, color=COLOURS[i % len(COLOURS)])
        axis.set(xscale="log", xlabel="active parameters", ylabel="held-out text, bits per byte", title=arm)
        axis.legend()
    write_atomically(out, lambda path: sheet.savefig(path, format="png", dpi=100))


def write_scaling_report(grid: Grid, folder: Path) -> dict[str, str]:
    """Write the files into `folder`; returns their paths by kind."""
    paths = {kind: folder / f"report.{kind}" for kind in ("png", "md", "html")} | {"json": folder / "scaling_law.json"}
    content = list(sections(grid))
    draw(grid, paths["png"])
    markdown = [f"# {inert(grid.name)}", f"![losses at equal FLOPs, and the fitted law]({paths['png'].name})"]
    html: list[Any] = []
    for section in content:
        text = [f"## {inert(section.title)}", "\n\n".join(map(inert, section.sentences))]
        if section.rows:
            lines = [section.headers, ["-"] * len(section.headers), *section.rows]
            text.append("\n".join(f"| {' | '.join(inert(str(item)) for item in row)} |" for row in lines))
        markdown += [part for part in text if part]
        html.append(f"<h2>{escape(section.title)}</h2>" + "".join(f"<p>{marked_up(s)}</p>" for s in section.sentences))
        if section.rows:
            html.append(table(section.headers, section.rows))
        if section.title == "Verdict":
            html.append([figure(arm, found) for arm, found in grid.arms.items()])
    texts = {
        "md": "\n\n".join(markdown) + "\n",
        "html": page(f"Study {grid.name}", html),
        "json": text_of(as_json(grid)) + "\n",
    }
    for kind, written in texts.items():
        write_text_atomically(paths[kind], written)
    return {kind: str(path) for kind, path in paths.items()}
