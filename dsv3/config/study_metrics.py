"""Names of the figures on which a study's verdict may be (`study.metric`).

Besides these there are the metrics of benchmarks, `<task> <metric>`; which ones a task has is known when it has run.
"""

from collections.abc import Iterator
from enum import StrEnum

from omegaconf import DictConfig, OmegaConf

from dsv3.config.moved import todays_value
from dsv3.config.problems import Problem, one_of


class Figure(StrEnum):
    """Figures of every run."""

    EMA = "held-out all, EMA weights"
    LOSS = "training loss, last 10% of tokens"
    MAX_VIO = "MaxVio, last 10% of tokens"
    SPECIALISATION = "specialisation"
    NODES = "nodes per token"
    TRAFFIC = "all-to-all traffic"
    SPEED = "training speed"
    ANSWERS = "exact match"


def held_out(domain: str) -> str:
    """Bits per byte of a domain's held-out text."""
    return f"held-out {domain}"


def unknown_metric(config: DictConfig) -> Iterator[Problem]:
    """A problem if `study.metric` is no figure that runs of this config will have."""
    metric = OmegaConf.select(config, "study.metric")
    sources = OmegaConf.select(config, "data.sources")
    if metric is None or (sources is None and str(metric).startswith(held_out(""))):  # only the data knows its domains
        return
    tasks = list(OmegaConf.select(config, "benchmarks.tasks") or {})
    domains = [name for name, source in (sources or {}).items() if source is not None]
    names = [*map(held_out, [*domains, "all"]), *Figure, *(f"{task} METRIC" for task in tasks)]
    of_task = str(metric).partition(" ")[0]
    if (now := todays_value("study.metric", metric)) != metric:
        yield Problem("study.metric", metric, f"this value is now called {now}: write study.metric='{now}'")
    elif metric not in names and not any(of_task.startswith(task) for task in tasks):
        yield Problem("study.metric", metric, one_of(names, metric))
