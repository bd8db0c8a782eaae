"""Self-contained HTML pages: text, tables and plots in one file that needs no network and no server."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go

from dsv3.checkpoint.run_folder import write_text_atomically
from dsv3.reporting import curves, experts
from dsv3.reporting.episodes import episode_parts, frames_of, read_episodes
from dsv3.reporting.history import History
from dsv3.reporting.style import GRID, INK, NO_UPLOAD
from dsv3.reporting.tables import shown, table

FEW_LAYERS = 8
"""Up to so many layers, each has its own plots of bias and co-activation; beyond, the first, middle and last."""

CSS = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1240px; padding: 16px; color: {INK}; background: #fff;
       font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 24px; margin: 8px 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 28px 0 8px; }}
p {{ margin: 6px 0 12px; max-width: 75ch; overflow-wrap: anywhere; }}
nav {{ display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0; }}
.grid {{ display: grid; align-items: start; gap: 12px;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); }}
.card, .wide {{ border: 1px solid {GRID}; border-radius: 6px; overflow: hidden; min-width: 0; }}
.wide {{ margin: 12px 0; }}
.scroll {{ overflow-x: auto; margin: 8px 0 16px; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }}
th, td {{ padding: 4px 10px; border-bottom: 1px solid {GRID}; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child, .word, td.text {{ text-align: left; }}
td.text {{ white-space: normal; overflow-wrap: anywhere; min-width: 22ch; }}
code {{ overflow-wrap: anywhere; }}
"""

PLOTLY = {"responsive": True, **NO_UPLOAD}
Part: TypeAlias = str | go.Figure


def page(title: str, parts: Iterable[Part | list[Part]], *, plotly: str | None = None) -> str:
    """Parts one below the other; plots in a list share a grid of columns as wide as the screen allows.

    plotly: file name of the plotly.js next to the page; None: it is inside, if the page has plots.
    """
    from plotly.offline import get_plotlyjs

    parts = list(parts)
    body = "\n".join(grid(part) if isinstance(part, list) else _rendered(part, "wide") for part in parts)
    inside = "" if all(isinstance(part, str) for part in parts) else f"<script>{get_plotlyjs()}</script>"
    script = f'<script src="{plotly}"></script>' if plotly else inside
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{CSS}</style>
{script}</head>
<body><h1>{escape(title)}</h1>
{body}
</body></html>
"""


def grid(parts: Sequence[Part]) -> str:
    """HTML of plots side by side, as far as the screen is wide."""
    return f'<div class="grid">{"".join(_rendered(part, "card") for part in parts)}</div>'


def _rendered(part: Part, kind: str) -> str:
    if isinstance(part, str):
        return part
    html = part.to_html(full_html=False, include_plotlyjs=False, auto_play=False, config=PLOTLY)
    return f'<div class="{kind}">{html}</div>'


def write_run_report(path: Path) -> Path:
    """Write `report.html` into a run folder.

    Raises:
        FileNotFoundError: the folder holds no metrics.
    """
    run = History(path, path.name)
    if run.table("metrics/train").empty:
        raise FileNotFoundError(f"{path}: there are no metrics/train/*.parquet")
    html = page(f"Run {path.parent.name}/{path.name}", run_parts(run))
    out = path / "report.html"
    write_text_atomically(out, html)
    return out


def run_parts(run: History) -> Iterable[Part | list[Part]]:
    yield info_table(run)
    yield "<h2>Alerts</h2>"
    yield alerts_table(run)
    yield from spike_tables(run)
    yield "<h2>Training</h2>"
    yield [curves.loss(run), curves.held_out(run), curves.figures(run), curves.rates(run), curves.questions([run])]
    if len(run.table("metrics/benchmarks")):
        yield curves.benchmarks([run])
    if run.routing().layers:
        yield "<h2>Experts</h2>"
        yield experts.load_over_time(run)
        yield [experts.violation(run), experts.selection(run), experts.nodes(run), experts.stability(run)]
        yield experts.specialisation(run)
        yield experts.output_norms(run)
        yield [plot(run, layer) for layer in shown_layers(run) for plot in (experts.bias, experts.coactivation)]
    if len(run.table("metrics/rollouts")):
        yield "<h2>Sampled answers</h2>"
        yield rollouts_table(run)
    if kept := list(read_episodes(run.folder.path)):
        yield "<h2>Episodes</h2>"
        for task, result in kept:
            yield from episode_parts(task, result, frames_of(result))
    if run.tables_by_role():
        yield "<h2>Numeric formats</h2>"
        yield curves.formats(run)


def shown_layers(run: History) -> list[str]:
    names = list(run.routing().layers)
    return names if len(names) <= FEW_LAYERS else [names[0], names[len(names) // 2], names[-1]]


def info_table(run: History) -> str:
    info, summary, train = run.info, run.summary or {}, run.train()
    counts = info.get("parameters", {})
    scores = run.validation()
    last = scores[scores.domain == "all"].bpb.iloc[-1] if len(scores) else None
    seconds = float(train.seconds.max())  # none of a step's are written yet: nan
    rows = {
        "training tokens": run.tokens,
        "planned tokens": info.get("tokens"),
        "state": "finished" if summary else run.folder.failure() or "not finished",
        "parameters": counts.get("total"),
        "active per token": counts.get("active"),
        "FLOPs per token": info.get("flops_per_token"),
        "training seconds": None if np.isnan(seconds) else round(seconds),
        "monitoring overhead": monitoring(run, seconds),
        "bits per byte, held-out text": None if last is None else float(last),
        "seed": info.get("seed"),
        "commit": summary.get("git_commit"),
    }
    return table(["", ""], [(name, value) for name, value in rows.items() if value is not None])


def monitoring(run: History, seconds: float) -> str | None:
    """What `dsv3.training.callbacks.monitor` took, against training's seconds."""
    timing = run.table("timing/monitor")
    return None if timing.empty or np.isnan(seconds) else f"{timing.seconds.sum() / seconds:.2%}"


MOST_ALERTS = 40
NO_ALERTS = "No dead expert, no routing collapse, no loss spike."
ALERT_HEADERS = ("tokens", "alert", "layer", "expert", "")


def alert_rows(run: History) -> list[tuple[Any, ...]]:
    """The latest alerts, newest last."""
    found = run.table("metrics/alerts").tail(MOST_ALERTS)
    return [(r.tokens, r.kind, r.layer, r.expert if r.expert >= 0 else "", r.text) for r in found.itertuples()]


def alerts_table(run: History) -> str:
    rows = alert_rows(run)
    earlier = len(run.table("metrics/alerts")) - len(rows)
    if not rows:
        return f"<p>{NO_ALERTS}</p>"
    more = f"<p>{earlier} earlier alerts are in <code>metrics/alerts</code>.</p>" if earlier else ""
    return table(ALERT_HEADERS, rows) + more


ROLLOUT_HEADERS = ("tokens", "prompt", "answer", "ended", "reward")


def rollouts_table(run: History) -> str:
    """Answers of the first and of the latest step that were kept."""
    found = run.table("metrics/rollouts")
    shown_rows = found[found.tokens.isin([found.tokens.min(), found.tokens.max()])]
    columns = [name for name in ROLLOUT_HEADERS if name in found.columns]
    return table(columns, [tuple(row) for row in shown_rows[columns].itertuples(index=False)])


def spike_tables(run: History) -> Iterable[str]:
    """The documents with the highest losses in each batch that the guard logged."""
    for spike in run.spikes():
        yield f"<h2>{escape(spike_title(spike))}</h2><p>{escape(spike_text(spike))}</p>"
        yield table(SPIKE_HEADERS, spike_rows(spike))


SPIKE_HEADERS = ("domain", "tokens", "nats per token", "document")


def spike_title(spike: dict[str, Any]) -> str:
    return f"{spike['kind'].capitalize()} after {spike['tokens_before']:,} tokens ({spike['policy']})"


def spike_text(spike: dict[str, Any]) -> str:
    violations = ", ".join(f"{layer} {r['max_violation']:.2f}" for layer, r in spike["routing"].items())
    domains = ", ".join(f"{name} {count:,}" for name, count in spike["domains"].items())
    loss = shown(spike["loss"])
    return f"Loss {loss} nats per token. Tokens by domain: {domains}. MaxVio: {violations or 'no experts'}."


def spike_rows(spike: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(d["domain"], d["tokens"], d["loss"], d["text"]) for d in spike["documents"]]
