"""Agents against random actions: a score is called better only where the interval of its lead says so."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv3.evaluation.benchmarks.statistics import Interval, mean_estimate, paired_accuracy_interval

NORMAL = 1.96
"""Standard errors on either side that hold 95% of a normal distribution."""


class AgainstRandom(NamedTuple):
    """Progress of a model minus that of random legal actions in the same episodes."""

    lead: float
    interval: Interval  # 95%

    @property
    def verdict(self) -> str:
        if self.interval.low > 0:
            return "better than random"
        return "worse than random" if self.interval.high < 0 else "no significant difference from random"


def against_random(samples: Sequence[dict[str, Any]]) -> AgainstRandom | None:
    """Of a task's samples; None where they are no episodes.

    The interval is exact where progress is success; else it is normal, and infinite for a single episode.
    """
    if not samples or not {"progress", "random"} <= set(samples[0]["metrics"]):
        return None
    by_chance, own = ([sample[key] for sample in samples] for key in ("random", "progress"))
    lead = mean_estimate([a - b for a, b in zip(own, by_chance, strict=True)])
    exact = paired_accuracy_interval(by_chance, own)
    reach = math.inf if math.isnan(lead.stderr) else NORMAL * lead.stderr
    return AgainstRandom(lead.value, exact or Interval(lead.value - reach, lead.value + reach))


def line(task: str, samples: Sequence[dict[str, Any]]) -> str | None:
    """A line for the console."""
    found = against_random(samples)
    if found is None:
        return None
    played = [sample["resps"][0][0] for sample in samples]
    rows = [step["rows"] for one in played for step in one["trajectory"]]
    history = sum(one["history"] for one in played) / len(played)
    how = "likelihood" if "log_likelihoods" in played[0]["trajectory"][0] else "text"
    return (
        f"{task}: {found.verdict} ({found.lead:+.3f}, 95% interval [{found.interval.low:+.3f}, "
        f"{found.interval.high:+.3f}]); {len(played)} episodes, actions by {how}, history {history:.2g}, "
        f"{sum(rows) / len(rows):.3g} prompts per model call; BALROG protocol, environments rebuilt"
    )
