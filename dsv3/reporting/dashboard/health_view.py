"""First screen: whether the experts are well, and the run with them."""

import math
import time
from typing import Any

from dash import dcc, html

from dsv3.monitoring.expert_states import DEAD, HOT, STARVED
from dsv3.reporting import health, health_plots
from dsv3.reporting.amounts import compact, text_of_seconds
from dsv3.reporting.dashboard.address import Choice, to_search
from dsv3.reporting.dashboard.drawing import Drawn, Scene, View
from dsv3.reporting.dashboard.elements import badge, part, plot, table
from dsv3.reporting.findings import STEPS, findings, speeds, usual
from dsv3.reporting.health import LayerNow, Unwell, named
from dsv3.reporting.overview import overview
from dsv3.reporting.page import SPIKE_HEADERS, spike_rows, spike_text, spike_title

MOST_FINDINGS = 30
STATE_KIND = {"training": "good", "finished": "plain", "stopped": "warn", "failed": "bad"}


def skeleton(run: str) -> list[Any]:
    return [
        part("headline", run),
        part("tiles", run, "tiles"),
        html.Div(
            [
                html.Div([html.H2("Layers, last interval"), part("layers", run, "tall"), part("unwell", run)]),
                plot("map", run, 520),
                plot("vitals", run, 620),
            ],
            className="three",
        ),
        html.H2("Findings"),
        part("findings", run),
    ]


def headline(scene: Scene) -> list[Any]:
    run, row = scene.run, overview(scene.run)
    well, text = health.verdict(run)
    planned = row["planned"]
    done = f"{compact(row['tokens'])} of {compact(planned)} tokens" if planned else f"{compact(row['tokens'])} tokens"
    share = min(row["tokens"] / planned, 1.0) if planned else 0.0
    word, kind = {True: ("✓ well", "good"), False: ("✗ not well", "bad"), None: ("… too early", "plain")}[well]
    return [
        html.Div(
            [
                html.H1(run.name),
                badge(row["state"], STATE_KIND[row["state"]]),
                html.Div(html.Div(style={"width": f"{share:.1%}"}), className="bar", title=f"{share:.0%}"),
                html.Span(f"{done}{ending(row['seconds_left'])}"),
            ],
            className="top",
        ),
        html.P([badge(word, kind), " ", text], className="verdict", role="status"),
        *([html.P(f"Failed: {row['why'][:400]}", className="verdict")] if row["why"] else []),
    ]


def ending(seconds: float | None) -> str:
    """When a run ends, by this machine's clock."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    at = time.time() + seconds
    return f" · {text_of_seconds(seconds)} left, ends {time.strftime('%a %d %b, %H:%M', time.localtime(at))}"


def tiles(scene: Scene) -> list[Any]:
    run, row = scene.run, overview(scene.run)
    train, speed = run.train(), speeds(run)
    shown: list[tuple[str, str, str]] = []
    if len(train):
        first, unit = next(iter(run.statistics().items()))
        shown.append((f"{first}, smoothed", f"{train[f'{first}_mean'].iloc[-1]:.4g}", unit))
    shown.append(("held-out text", "none yet" if row["bpb"] is None else f"{row['bpb']:.4f}", "bits per byte"))
    if "grad_norm" in train:
        recent, largest = train.grad_norm.tail(STEPS), train.grad_norm.max()
        shown.append(("gradient norm", f"{recent.median():.3g}", f"largest of the run {largest:.3g}"))
    if row["max_violation"] is not None:
        shown.append(("MaxVio, worst layer", f"{row['max_violation']:.2f}", row["worst_layer"]))
    if len(speed):
        now = speed.tail(STEPS).median()
        shown.append(("tokens/s", compact(now), f"{now / usual(speed, 1).iloc[-1]:.0%} of the usual"))
    left = row["seconds_left"]
    missing = (row["planned"] or 0) - row["tokens"]
    tokens_left = f"{compact(missing)} tokens" if missing > 0 else "nothing"
    shown.append(
        ("left", tokens_left if left is None else text_of_seconds(left), tokens_left if left else row["state"])
    )
    return [
        html.Div([html.Span(name, className="label"), html.B(value), html.Span(note, className="label")])
        for name, value, note in shown
    ]


def layers(scene: Scene) -> Any:
    now = health.layers_now(scene.run)
    chosen = health.worst(now, scene.choice.layer)
    if chosen is None:
        return html.P(
            "No interval is over yet." if scene.run.info.get("experts") != 0 else "This model has no experts."
        )
    headers = ("layer", "MaxVio", "dead", "since", "on", "starved", "hot")
    rows = [layer_row(scene, layer) for layer in now]
    return table(headers, rows, chosen=now.index(chosen))


def layer_row(scene: Scene, layer: LayerNow) -> list[Any]:
    dead, on_domain = layer.of(DEAD), layer.of(DEAD, domain=True)
    domains = dict.fromkeys(each.domain for each in on_domain)
    on = ["all"] if dead else []
    on += [f"{domain} ({named([each for each in on_domain if each.domain == domain])})" for domain in domains]
    since = min((each.since for each in dead or on_domain), default=None)
    address = to_search(scene.choice._replace(run=scene.run.name, layer=layer.layer))
    kinds = ((dead, "bad") if dead else (on_domain, "warn"), (layer.of(STARVED), "warn"), (layer.of(HOT), "hot"))
    counts = [
        html.Span(len(some), title=named(some), className=f"badge {kind}") if some else "" for some, kind in kinds
    ]
    when = "" if since is None else compact(since)
    dead_count, *others = counts
    return [dcc.Link(layer.layer, href=address), f"{layer.max_vio:.2f}", dead_count, when, "; ".join(on), *others]


def load_map(scene: Scene) -> Any:
    layer = health.chosen_layer(scene.run, scene.choice.layer)
    return health_plots.load_over_tokens(scene.run, layer, scene.choice.domain or None)


MOST_UNWELL = 12


def unwell(scene: Scene) -> Any:
    """The chosen layer's experts that are not well: since when, and on which domain."""
    layer = health.worst(health.layers_now(scene.run), scene.choice.layer)
    if layer is None:
        return None
    if not layer.unwell:
        return html.P(f"{layer.layer}: all {layer.n_experts} experts are well.")
    worst_first = sorted(layer.unwell, key=lambda each: (each.state == HOT, each.state, each.domain or "", each.expert))
    domains = list(layer.unwell[0].by_domain)
    headers = ("expert", "state", "since tokens", "on", "load", *domains)
    rows = [unwell_row(each, domains) for each in worst_first[:MOST_UNWELL]]
    more = len(worst_first) - len(rows)
    return [
        html.H3(f"{layer.layer}: experts that are not well"),
        table(headers, rows),
        html.P(f"and {more} more") if more else None,
    ]


def unwell_row(each: Unwell, domains: list[str]) -> list[Any]:
    loads = [each.by_domain[domain] for domain in domains]
    texts = ["too few tokens" if math.isnan(load) else f"{load:.2f}" for load in loads]
    kind = {DEAD: "bad", STARVED: "warn", HOT: "hot"}[each.state]
    name = badge(health.state_name(each), kind)
    return [each.expert, name, each.since, each.domain or "all", f"{each.load:.2f}", *texts]


def found(scene: Scene) -> list[Any]:
    every = findings(scene.run)
    if not every:
        return [html.P("None: no dead expert, collapse, starved domain, slow-down or loss spike.")]
    kinds = {"open": "bad", "closed": "plain", "event": "warn"}
    rows = [
        [badge(f.state, kinds[f.state]), f.kind, f.layer, f.text, f.since, "" if f.state != "closed" else f.until]
        for f in every[:MOST_FINDINGS]
    ]
    content: list[Any] = [table(("state", "finding", "layer", "", "since tokens", "until tokens"), rows)]
    if len(every) > len(rows):
        content.append(html.P(f"and {len(every) - len(rows)} older ones"))
    for spike in reversed(scene.run.spikes()):
        spiked = [html.Summary(spike_title(spike)), html.P(spike_text(spike)), table(SPIKE_HEADERS, spike_rows(spike))]
        content.append(html.Details(spiked))
    return content


VIEW = View(
    skeleton,
    {
        "headline": Drawn(headline),
        "tiles": Drawn(tiles),
        "layers": Drawn(layers, tuple(name for name in Choice._fields if name != "picked")),  # they are in its links
        "map": Drawn(load_map, ("layer", "domain")),
        "unwell": Drawn(unwell, ("layer",)),
        "vitals": Drawn(lambda scene: health_plots.vitals(scene.run)),
        "findings": Drawn(found),
    },
    lambda run: ("map", "vitals"),
)
