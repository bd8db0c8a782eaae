"""Third view: everything that is measured of the experts of one run."""

from typing import Any

from dash import html

from dsv3.reporting import experts
from dsv3.reporting.dashboard.drawing import Drawn, Scene, View
from dsv3.reporting.dashboard.elements import plot
from dsv3.reporting.health import chosen_layer
from dsv3.reporting.history import History
from dsv3.reporting.style import MOST_LEGENDS


def skeleton(run: str) -> list[Any]:
    return [
        html.H1(run),
        plot("load", run, 260),
        html.Div(
            [
                plot("violation", run, 590),
                plot("selection", run, 590),
                plot("bias", run, 340),
                plot("coactivation", run, 440),
            ],
            className="grid",
        ),
        plot("specialisation", run),
        html.Div([plot("nodes", run, 590), plot("stability", run, 340)], className="grid"),
        plot("output_norms", run),
    ]


def load(scene: Scene) -> Any:
    """Of the interval that the slider stands at."""
    times = scene.run.routing().moments
    at = len(times) - 1 + scene.choice.moment
    return experts.load(scene.run, times[at] if 0 <= at < len(times) else None)


def layer_of(scene: Scene) -> str | None:
    return chosen_layer(scene.run, scene.choice.layer)


def first(run: History) -> tuple[str, ...]:
    """The map of many layers is as high as a screen."""
    names = ("load", "violation", "bias")
    return names if len(run.routing().layers) > MOST_LEGENDS else (*names, "coactivation")


VIEW = View(
    skeleton,
    {
        "load": Drawn(load, ("moment",)),
        "violation": Drawn(lambda scene: experts.violation(scene.run)),
        "selection": Drawn(lambda scene: experts.selection(scene.run)),
        "bias": Drawn(lambda scene: experts.bias(scene.run, layer_of(scene)), ("layer",)),
        "coactivation": Drawn(lambda scene: experts.coactivation(scene.run, layer_of(scene)), ("layer",)),
        "specialisation": Drawn(lambda scene: experts.specialisation(scene.run)),
        "nodes": Drawn(lambda scene: experts.nodes(scene.run)),
        "stability": Drawn(lambda scene: experts.stability(scene.run)),
        "output_norms": Drawn(lambda scene: experts.output_norms(scene.run)),
    },
    first,
)
