"""Second view: all curves and scores of one run."""

from typing import Any

from dash import html

from dsv3.reporting import curves
from dsv3.reporting.dashboard.drawing import Drawn, View
from dsv3.reporting.dashboard.elements import plot

HIGH = 440
"""Pixels of the plots that are looked at first."""


def skeleton(run: str) -> list[Any]:
    high = {"loss": HIGH, "held_out": HIGH, "rates": 590, "figures": 590, "benchmarks": 420}
    names = ("loss", "held_out", "rates", "figures", "questions", "benchmarks", "formats")
    return [html.H1(run), html.Div([plot(name, run, high.get(name, 340)) for name in names], className="grid")]


VIEW = View(
    skeleton,
    {
        "loss": Drawn(lambda scene: curves.loss(scene.run).update_layout(height=HIGH)),
        "held_out": Drawn(lambda scene: curves.held_out(scene.run).update_layout(height=HIGH)),
        "rates": Drawn(lambda scene: curves.rates(scene.run)),
        "figures": Drawn(lambda scene: curves.figures(scene.run)),
        "questions": Drawn(lambda scene: curves.questions([scene.run])),
        "benchmarks": Drawn(lambda scene: curves.benchmarks([scene.run])),
        "formats": Drawn(lambda scene: curves.formats(scene.run)),
    },
    lambda run: ("loss", "held_out", "figures", "questions", "benchmarks"),
)
