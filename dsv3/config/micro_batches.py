"""Micro-batches of a step, dealt to ranks: what a pipeline can run, and what is padding. Imports no torch.

A step of R rows is ceil(R / micro_batch_size) micro-batches; each rank that reads different rows gets
ceil(micro-batches / ranks), with padding where there are too few.
"""

from itertools import chain
from math import ceil
from typing import Any, NamedTuple

LEAST = {"1f1b": 1, "dualpipev": 2}
"""Micro-batches of a step for each rank of the pipeline that a schedule cannot do without: one per stage."""

WORTH_SAYING = 0.1
"""Share of the rows computed in a step that another micro-batch size would save, from which a run says so."""


def unfit(schedule: str, ranks: int, number: int) -> str | None:
    """What a schedule on `ranks` ranks needs or cannot do, where it cannot run `number` micro-batches per step."""
    if number < (least := LEAST.get(schedule, 0) * ranks):
        return f"needs at least {least} micro-batches per step on {ranks} ranks, and there are {number}"
    rounds = max(1, number // ranks)
    if schedule.startswith("interleaved") and number % rounds:
        return f"cannot divide {number} micro-batches per step into {rounds} rounds of {ranks} ranks"
    return None


def rows_of_steps(global_batch_size: Any) -> list[range]:
    """Numbers of rows that steps have over a run, the smallest first, of the mapping of a piecewise schedule.

    Between the ends of a segment that is not level, every number counts. Empty for other schedules.
    """
    found, begin = [], 0.0
    try:
        peak, factor = float(global_batch_size["peak"]), float(global_batch_size["start"])
        for segment in global_batch_size["segments"]:
            until, to = float(segment["until"]), float(segment["to"])
            if until > begin:
                least, most = sorted(max(1, round(peak * value)) for value in (factor, to))
                found.append(range(least, most + 1))
            begin, factor = until, to
    except (KeyError, TypeError, ValueError, OverflowError):
        return []
    return sorted(found, key=lambda rows: rows[0])


class Dealt(NamedTuple):
    """The micro-batches of a run."""

    rows: list[range]  # of its steps, as `rows_of_steps` has them
    data: int  # ranks that read different rows
    stages: int = 1  # ranks that a micro-batch passes through
    schedule: str | None = None  # of the pipeline

    def per_rank(self, rows: int, size: int) -> int:
        """Micro-batches of `size` rows that each rank gets."""
        return ceil(ceil(rows / size) / self.data)

    def refused(self, size: int) -> tuple[int, str] | None:
        """The first number of rows of which the pipeline cannot run the micro-batches, and why; None: it always can."""
        if self.schedule is None or self.stages == 1:
            return None
        for rows in chain(*self.rows):
            if why := unfit(self.schedule, self.stages, self.per_rank(rows, size)):
                return rows, why
        return None

    def computed(self, size: int) -> int:
        """Rows that the ranks compute in the smallest step, padding included."""
        return self.per_rank(self.rows[0][0], size) * size * self.data

    def best(self, size: int) -> int | None:
        """The micro-batch size with least padding that the pipeline always can run, of those up to `size`; where there
        is none, the next larger one that it can."""
        most = max(rows[-1] for rows in self.rows)
        smaller = [other for other in range(min(size, most), 0, -1) if self.refused(other) is None]
        larger = (other for other in range(size + 1, most + 1) if self.refused(other) is None)
        return min(smaller, key=self.computed) if smaller else next(larger, None)

    def padding(self, size: int) -> str | None:
        """What to say where much of what ranks compute in the smallest step is padding; None: nothing."""
        if not self.rows or self.data == 1:
            return None
        rows, computed, best = self.rows[0][0], self.computed(size), self.best(size)
        if best is not None and 1 - (least := self.computed(best)) / computed >= WORTH_SAYING:
            return (
                f"data.micro_batch_size={size}: {computed - rows} of the {computed} rows that {self.data} ranks "
                f"compute in a step are padding; with data.micro_batch_size={best}, {least - rows} are"
            )
        if rows < self.data:
            return (
                f"data.global_batch_size: a step of {rows} rows leaves {self.data - rows} of {self.data} ranks with "
                "padding only; raise it, or use fewer ranks"
            )
        return None
