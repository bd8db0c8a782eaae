"""Results of a study, arm by arm and seed by seed.

Arms are compared where they have had as much of something: tokens, floating-point operations, or seconds. That point is
the end of the run that got least of it; the others are read there from their validation curves, straight between two
validations. Only seeds that are finished in the arm and in the baseline enter a difference.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dsv3.config.arms import stages_of
from dsv3.config.problems import one_of
from dsv3.config.study_metrics import Figure, held_out
from dsv3.reporting.documents import TABLE, differing_by_document, half_widths
from dsv3.reporting.history import History, find_runs
from dsv3.reporting.paired import Difference, paired
from dsv3.reporting.picked_runs import Arms, by_settings, picked
from dsv3.reporting.sequential import sequential

BUDGETS = ("tokens", "flops", "seconds")
Curve = tuple[np.ndarray, np.ndarray]  # of a budget, and bits per byte there


class Metric(NamedTuple):
    name: str
    unit: str
    lower_is_better: bool | None  # None: it is neither good nor bad
    of: Callable[[History], float | None]  # None: this run has no such number
    documents: tuple[str, str] | None = None  # weights and domain whose held-out documents it is the mean of
    same: Callable[[History], Any] | None = None  # equal for two runs if it says the same of both; None: it always does


class Study(NamedTuple):
    """The finished runs in a folder."""

    name: str
    question: str
    finding: str  # the report's, in words
    metric: str | None  # that the verdict is on
    baseline: str
    planned_baseline: str  # another one if that has no finished run
    runs: dict[str, dict[int, History]]  # arm -> seed -> run
    unfinished: list[str]
    failed: dict[str, str]  # run -> why it ended
    overrides: Mapping[str, str] = {}  # arm -> what differs
    repeated: Sequence[str] = ()  # runs with the settings and the seed of another
    command: str = ""  # what its runs are, in a word
    folder: Path = Path()
    until: Mapping[str, Any] | None = None  # `study.until`

    def seeds(self, *arms: str) -> list[int]:
        """Those finished in all the arms."""
        return sorted(set.intersection(*(set(self.runs[arm]) for arm in arms)))

    def compared(self) -> list[tuple[int, str]]:
        """The arms that have a seed in common with the baseline, and their numbers, by which they are coloured."""
        arms = enumerate(self.runs)
        return [(i, arm) for i, arm in arms if arm != self.baseline and self.seeds(arm, self.baseline)]

    def values(self, metric: Metric, arm: str, seeds: Sequence[int]) -> list[float]:
        values = [metric.of(self.runs[arm][seed]) for seed in seeds]
        return [value for value in values if value is not None]

    def difference(self, metric: Metric, arm: str) -> Difference | None:
        """From the baseline, by the rule of `until` for the verdict's metric; None where either has no such number, or
        that of something else."""
        if not self.comparable(metric, arm):
            return None
        seeds = self.seeds(arm, self.baseline)
        ours, theirs = self.values(metric, arm, seeds), self.values(metric, self.baseline, seeds)
        if not len(ours) == len(theirs) == len(seeds) > 0:
            return None
        documents = self.document_errors(metric, arm, seeds)
        if self.until and metric.name == (self.metric or equal("tokens")):
            return sequential(ours, theirs, documents, self.until)
        return paired(ours, theirs, documents[-1])

    def comparable(self, metric: Metric, arm: str) -> bool:
        """Whether the figure says the same of the arm's runs and of the baseline's."""
        runs = [*self.runs[arm].values(), *self.runs[self.baseline].values()]
        first, *others = [metric.same(run) if metric.same is not None else None for run in runs]
        return all(other == first for other in others)

    def document_errors(self, metric: Metric, arm: str, seeds: Sequence[int]) -> list[float]:
        """Half width by documents of the difference from the baseline after the first, the first two, ... seeds."""
        if metric.documents is None:
            return [0.0] * len(seeds)
        weights, domain = metric.documents
        ours, theirs = ([self.runs[name][seed] for seed in seeds] for name in (arm, self.baseline))
        every = [*ours, *theirs]

        def make() -> list[float]:
            documents = differing_by_document(ours, theirs, weights=weights, domain=domain)
            return half_widths(documents).tolist() if documents is not None else [0.0] * len(seeds)

        name = f"half widths by document, {weights}, {domain}, of {[run.name for run in every]}"
        return ours[0].kept(name, tuple(run.table(TABLE) for run in every), make)


def read_study(
    root: Path,
    current: Mapping[str, Any] | None = None,
    *,
    where: str | None = None,
    baseline: str | None = None,
    tuned: str | None = None,
) -> Study:
    """The study in a folder: `study_of` all runs below it for which the conditions `where` hold
    (`dsv3.reporting.picked_runs`).

    Raises:
        FileNotFoundError: there is no such folder, or no finished run in it.
        ValueError: no run is picked; see also `study_of`.
    """
    found = picked(find_runs(root), where)
    try:
        return study_of(root, found, current, where=where, baseline=baseline, tuned=tuned)
    except LookupError as error:
        raise FileNotFoundError(f"{root}: {error}") from None


def study_of(
    root: Path,
    found: Sequence[History],
    current: Mapping[str, Any] | None = None,
    *,
    where: str | None = None,
    baseline: str | None = None,
    tuned: str | None = None,
) -> Study:
    """Runs of one study by its arms; all others by the settings in which they differ.

    current: the study's settings as they are now (`study` in the config); None: as its runs have recorded them.
    where: the conditions by which the runs were picked. baseline: an arm; None: the study's. tuned: what the runs are
    to `study.tune`, best or trial; None: runs of the arms as they are written.

    Raises:
        LookupError: no run is finished.
        ValueError: two runs are the same arm with the same seed, or there is no such baseline.
    """
    if where is None:
        found = [run for run in found if run.setting("study.tuned") == tuned]
    of_studies = [run for run in found if run.setting("study.arms")]
    of_studies = [run for run in of_studies if run.setting("study.grid") is None]
    names = {run.setting("run.experiment") for run in of_studies}
    settings: Mapping[str, Any]
    if len(names) == 1 and (where is None or len(of_studies) == len(found)):
        found = [run for run in of_studies if run.setting("study.arm") is not None]  # others only lead to these
        overrides = arms_of(of_studies)
        arms = Arms(by_arm(root, ended(found), overrides), overrides, [])
        settings = of_studies[0].settings["study"] if current is None else current
        name, command = names.pop(), "`experiment={}`"
    else:
        arms = by_settings(ended(found))
        settings = {"baseline": None, "question": None, "finding": None, "metric": None}
        name, command = root.absolute().name, "`{}`" + (f" where `{where}`" if where else "")
    failed = {run.name: why for run in found if run.summary is None and (why := run.folder.failure())}
    if not arms.runs:
        raise LookupError("there is no finished run" + (f" where {where}" if where else ""))
    planned = baseline or settings["baseline"] or next(iter(arms.overrides))
    if baseline is not None and baseline not in arms.runs:
        raise ValueError(f"baseline={baseline}: {one_of([*arms.runs], baseline)}")
    return Study(
        name=name,
        question=settings["question"] or "",
        finding=settings["finding"] or "",
        metric=settings["metric"],
        baseline=planned if planned in arms.runs else next(iter(arms.runs)),
        planned_baseline=planned,
        runs=arms.runs,
        unfinished=[run.name for run in found if run.summary is None and run.name not in failed],
        failed=failed,
        overrides=arms.overrides,
        repeated=arms.repeated,
        command=command.format(name),
        folder=root,
        until=settings.get("until"),
    )


def arms_of(runs: Sequence[History]) -> dict[str, str]:
    """Arm -> its overrides, of all configs: one may have been added later."""
    found: dict[str, str] = {}
    for run in runs:
        study = run.settings["study"]
        found |= {str(arm): overrides_text(overrides) for arm, overrides in study["arms"].items()}
        if (arm := study.get("arm")) is not None:
            found.setdefault(arm, "")
    return found


def overrides_text(arm: Any) -> str:
    """An arm's overrides as on the command line; those of its stages one after the other."""
    stages = stages_of(arm or [])
    texts = [" ".join(map(str, stage)) or "no override" for stage in stages]
    return texts[0] if len(texts) == 1 else "; ".join(f"stage {n}: {text}" for n, text in enumerate(texts, 1))


def ended(runs: Iterable[History]) -> list[History]:
    return [run for run in runs if run.summary is not None]


def by_arm(root: Path, finished: Sequence[History], order: Iterable[str]) -> dict[str, dict[int, History]]:
    runs: dict[str, dict[int, History]] = {arm: {} for arm in order}
    for run in finished:
        arm, seed = run.setting("study.arm"), int(run.setting("seed"))
        if seed in runs[arm]:
            raise ValueError(f"{root}: {runs[arm][seed].name} and {run.name} are both {arm} with seed {seed}")
        runs[arm][seed] = run
    return {arm: seeds for arm, seeds in runs.items() if seeds}


def curve(run: History, budget: str, domain: str = "all") -> Curve:
    """Held-out bits per byte of the live weights, over a budget, that of earlier stages included."""
    scores = run.validation()
    if scores.empty:
        return np.empty(0), np.empty(0)

    def make() -> Curve:
        rows = scores[(scores.domain == domain) & scores[budget].notna()]
        return rows[budget].to_numpy(dtype=float), rows.bpb.to_numpy(dtype=float)

    x, y = run.kept(f"{domain} over {budget}", (scores,), make)
    return x + run.before(budget), y


def common_budget(study: Study, budget: str) -> float:
    """How much of it every run of the study has had; nan where it was not logged."""
    ends = [curve(run, budget)[0] for runs in study.runs.values() for run in runs.values()]
    return min((float(end[-1]) for end in ends if len(end)), default=float("nan")) if all(map(len, ends)) else np.nan


def equal(budget: str) -> str:
    """Name of the metric `at_equal`."""
    return f"held-out text at equal {budget}"


def at_equal(study: Study, budget: str) -> Metric:
    """Held-out bits per byte where every run has had as much of the budget."""
    return at_point(common_budget(study, budget), budget)


def at_point(point: float, budget: str) -> Metric:
    """Held-out bits per byte after so much of the budget; documents as at the ends of the runs."""

    def value(run: History) -> float | None:
        return float(np.interp(point, *curve(run, budget))) if np.isfinite(point) else None

    return Metric(equal(budget), "bits per byte", True, value, ("live", "all"), all_held_out)


def headline(study: Study) -> Metric:
    """What the verdict is on.

    Raises:
        ValueError: `study.metric` names nothing that the runs have.
    """
    if study.metric is None:
        return at_equal(study, "tokens")
    found = {metric.name: metric for metric in metrics(study)}
    if study.metric not in found:
        raise ValueError(f"study.metric={study.metric}: must be one of {', '.join(found)}")
    return found[study.metric]


def shared_layers(study: Study) -> list[str]:
    """The MoE layers that all runs with experts have: an arm with MTP has more, and would not be compared alike."""
    of_runs = [
        list(run.newest("metrics/routing").get("layer", [])) for runs in study.runs.values() for run in runs.values()
    ]
    first, *others = [layers for layers in of_runs if layers] or [[]]
    return [layer for layer in first if all(layer in layers for layers in others)]


def metrics(study: Study) -> Iterator[Metric]:
    """Every number that the runs of the study have at their ends; those of experts over the layers that all have."""
    first = next(run for runs in study.runs.values() for run in runs.values())
    layers = shared_layers(study)
    scores = (first.summary or {}).get("validation", {}).get("after", {})
    for domain in scores:
        same = all_held_out if domain == "all" else kind_of_data
        yield Metric(held_out(domain), "bits per byte", True, _after(domain, "after"), ("live", domain), same)
    yield Metric(Figure.EMA, "bits per byte", True, _after("all", "ema"), ("ema", "all"), all_held_out)
    yield Metric(Figure.LOSS, "nats per token", True, _last_loss, same=objective)
    yield Metric(Figure.MAX_VIO, "MaxVio", True, _violation(layers))
    yield Metric(Figure.SPECIALISATION, "relative load", None, _specialisation(layers), same=all_held_out)
    yield Metric(Figure.NODES, "nodes", True, _routing("nodes", layers))
    yield Metric(Figure.TRAFFIC, "bytes per token per layer", True, _routing("dispatch_bytes", layers))
    yield Metric(Figure.SPEED, "tokens per second", False, lambda run: (run.summary or {}).get("tokens_per_second"))
    yield Metric(Figure.ANSWERS, "per cent", False, _answers)
    for name in _benchmarks(first):
        bits = name.endswith("answer_bpb")
        unit = "bits per byte" if bits else "score"
        yield Metric(name, unit, bits, lambda run, name=name: _benchmarks(run).get(name))  # type: ignore[misc]


def kind_of_data(run: History) -> Any:
    """Held-out conversations, pairs and prompts are not the same text, whatever their domain is called."""
    return run.setting("data._target_")


def all_held_out(run: History) -> Any:
    return kind_of_data(run), set((run.summary or {}).get("validation", {}).get("after", {}))


def objective(run: History) -> Any:
    return run.setting("objective._target_")


def _after(domain: str, when: str) -> Callable[[History], float | None]:
    return lambda run: (run.summary or {}).get("validation", {}).get(when, {}).get(domain, {}).get("bpb")


def _last_loss(run: History) -> float | None:
    train = run.table("metrics/train")
    return None if train.empty else float(train.loss[train.tokens > 0.9 * train.tokens.iloc[-1]].mean())


def _violation(layers: Sequence[str]) -> Callable[[History], float | None]:
    def value(run: History) -> float | None:
        found = (run.summary or {}).get("max_violation", {})
        values = [found[layer] for layer in layers if found.get(layer) is not None]
        return sum(values) / len(values) if values else None

    return value


def routing_of(run: History, layers: Sequence[str]) -> pd.DataFrame:
    """Rows of the last interval's `metrics/routing`, of these layers."""
    rows = run.newest("metrics/routing")
    return rows if rows.empty else rows[rows.layer.isin(layers)]


def _routing(column: str, layers: Sequence[str]) -> Callable[[History], float | None]:
    def value(run: History) -> float | None:
        rows = routing_of(run, layers)
        return None if rows.empty else float(rows[column].mean())

    return value


def specialisation(routing: pd.DataFrame) -> float | None:
    """Mean over layers, domains and experts of how far the relative load on a domain is from that on all of them.

    `routing`: rows of `metrics/routing`, one a layer.
    """
    distances = []
    for row in routing.itertuples():
        load_XE = np.asarray(row.domain_load, dtype=float).reshape(len(row.domains), -1)
        load_XE = load_XE[load_XE.sum(1) > 0]
        relative_XE = load_XE / load_XE.mean(1, keepdims=True)
        all_E = load_XE.sum(0) / load_XE.sum(0).mean()
        distances.append(np.abs(relative_XE - all_E).mean())
    return float(np.mean(distances)) if distances else None


def _specialisation(layers: Sequence[str]) -> Callable[[History], float | None]:
    return lambda run: specialisation(routing_of(run, layers))


def _answers(run: History) -> float | None:
    scores = list((run.summary or {}).get("questions", {}).values())
    asked = sum(score["questions"] for score in scores)
    return 100 * sum(score["correct"] for score in scores) / asked if asked else None


def _benchmarks(run: History) -> dict[str, float]:
    """Scores at the end of the run, by task and metric."""
    rows = (run.summary or {}).get("benchmarks", [])
    return {f"{row['task']} {row['metric']}": row["after"] for row in rows if row["after"] is not None}
