"""Fifth view: the study that the run belongs to, while it goes on: its runs, and its verdict so far."""

from typing import Any

from dash import dcc, html

from dsv3.reporting.amounts import text_of_seconds
from dsv3.reporting.dashboard.address import to_search
from dsv3.reporting.dashboard.drawing import Drawn, Scene, View
from dsv3.reporting.dashboard.elements import badge, part, plot, table
from dsv3.reporting.study_figures import curves, gaps
from dsv3.reporting.study_progress import ENDED, WAITING, Job, jobs_of, seconds_left, study_folder
from dsv3.reporting.study_results import Study, headline, study_of
from dsv3.reporting.study_verdict import answered
from dsv3.reporting.style import empty

KINDS = {"finished": "good", "training": "hot", WAITING: "plain", "stopped": "warn", "failed": "bad"}
"""State of a run -> colour."""
NOTHING_YET = "No run has finished yet."


def skeleton(run: str) -> list[Any]:
    return [
        part("study", run),
        part("counts", run, "tiles"),
        html.H2("Verdict so far"),
        part("answer", run),
        html.H2("Runs"),
        part("jobs", run),
        html.Div([plot("arms", run, 400), plot("gaps", run, 400)], className="grid"),
    ]


def study(scene: Scene) -> Study | None:
    """With the runs that have finished; None: none has."""
    root = study_folder(scene.run)
    try:
        return study_of(root, scene.study) if root is not None else None
    except LookupError:
        return None


def title(scene: Scene) -> Any:
    root = study_folder(scene.run)
    if root is None:
        return html.P(f"{scene.run.name} belongs to no study: choose a run of one.")
    question = scene.run.setting("study.question")
    asked = [html.P(str(question))] if question else []
    return [html.H1(f"Study {root.name}"), *asked]


def counts(scene: Scene) -> list[Any]:
    jobs = jobs_of(scene.study)
    shown = [
        (state, sum(job.state == state for job in jobs))
        for state in KINDS
        if state in ("finished", "training", WAITING) or any(job.state == state for job in jobs)
    ]
    left = seconds_left(jobs)
    end = "unknown" if left is None else text_of_seconds(left)
    if not any(job.state == "training" for job in jobs):
        end = "no run trains"
    if all(job.state in ENDED for job in jobs):
        end = "ended"
    tiles = [(state, str(count), f"of {len(jobs)} runs") for state, count in shown]
    tiles.append(("left", end, "" if left is None else "at the speed of now"))
    return [
        html.Div([html.Span(name, className="label"), html.B(value), html.Span(note, className="label")])
        for name, value, note in tiles
    ]


def jobs(scene: Scene) -> Any:
    """A row for each arm, a column for each seed."""
    found = {(job.arm, job.seed): job for job in jobs_of(scene.study)}
    arms, seeds = dict.fromkeys(arm for arm, _ in found), sorted({seed for _, seed in found})
    rows = [[arm, *(job_cell(scene, found.get((arm, seed))) for seed in seeds)] for arm in arms]
    return table(("arm", *(f"seed {seed}" for seed in seeds)), rows)


def job_cell(scene: Scene, job: Job | None) -> Any:
    if job is None:
        return ""
    mark = badge(job.state, KINDS.get(job.state, "plain"))
    if job.run is None or job.row is None:
        return mark
    row = job.row
    done = f"{row['tokens'] / row['planned']:.0%} " if job.state not in ENDED and row["planned"] else ""
    score = "" if row["bpb"] is None else f"{row['bpb']:.4f} bits per byte"
    address = to_search(scene.choice._replace(view="health", run=job.run.name))
    return html.Span([dcc.Link(mark, href=address), f" {done}{score}"], title=(row["why"] or "")[:400])


def answer(scene: Scene) -> Any:
    """The verdict on the runs that have finished, and how wide its intervals are."""
    now = study(scene)
    if now is None:
        return html.P(NOTHING_YET)
    metric = headline(now)
    sentence, _ = answered(now, metric)
    rows = []
    for _, arm in now.compared():
        if (difference := now.difference(metric, arm)) is not None:
            half = difference.high - difference.mean
            width = f"± {half:.4f}" if difference.seeds > 1 else "open: one seed"
            answer = "yes" if difference.significant else "no"
            rows.append((arm, f"{difference.mean:+.4f}", width, answer, difference.seeds))
    headers = ("arm", f"difference from {now.baseline}", "95% interval", "significant", "seeds")
    return [
        html.P(sentence or "There is no second arm to compare yet.", className="verdict", role="status"),
        table(headers, rows) if rows else None,
    ]


def plotted(draw: Any, name: str) -> Any:
    def make(scene: Scene) -> Any:
        now = study(scene)
        return empty(name, NOTHING_YET) if now is None else draw(now, "tokens")

    return make


VIEW = View(
    skeleton,
    {
        "study": Drawn(title, ("study",)),
        "counts": Drawn(counts, ("study",)),
        "answer": Drawn(answer, ("study",)),
        "jobs": Drawn(jobs, ("study",)),
        "arms": Drawn(plotted(curves, "Held-out text"), ("study",)),
        "gaps": Drawn(plotted(gaps, "Differences"), ("study",)),
    },
    lambda run: ("arms", "gaps"),
)
