"""Two models on the same documents: paired differences of every metric.

The mean of the differences varies far less than the difference of the means, since what makes a document hard for one
model mostly makes it hard for the other.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from dsv3.evaluation.benchmarks.results import ResultsFolder
from dsv3.evaluation.benchmarks.statistics import Interval, Paired, paired_accuracy_interval, paired_difference
from dsv3.evaluation.benchmarks.suite import ANSWER_BPB


class Compared(NamedTuple):
    task: str
    metric: str
    n: int
    first: float
    second: float
    difference: float  # second minus first
    stderr: float  # of the difference
    p: float  # two-sided
    interval: Interval | None  # of the difference, where the metric is an accuracy


def comparison(first: ResultsFolder, second: ResultsFolder, names: Sequence[str]) -> Iterator[Compared]:
    """Every metric of every task in `names` that both folders have samples of, over the documents both have."""
    for task in [task for name in names for task in first.tasks(name)]:
        samples = [_by_document(folder.samples(task)) for folder in (first, second)]
        common = [key for key in samples[0] if key in samples[1]]
        chains = dict.fromkeys(chain for _, chain in common)
        for chain in chains:
            pairs = [(samples[0][key], samples[1][key]) for key in common if key[1] == chain]
            for metric, (a, b) in _values(pairs).items():
                paired = paired_difference(a, b)
                label = metric if len(chains) == 1 else f"{metric},{chain}"
                yield _row(task, label, a, b, paired)
            if chain == next(iter(chains)) and all("answer_bits" in sample for pair in pairs for sample in pair):
                yield _row(task, ANSWER_BPB, *(bpb := _bits_per_byte(pairs)), paired_difference(*bpb))


def _row(task: str, metric: str, a: Sequence[float], b: Sequence[float], paired: Paired) -> Compared:
    n = len(a)
    return Compared(task, metric, n, sum(a) / n, sum(b) / n, *paired, paired_accuracy_interval(a, b))


def _by_document(samples: Sequence[dict[str, Any]]) -> dict[tuple[Any, str], dict[str, Any]]:
    """By what was asked, not by number: two models may have been given other prompts, never other documents."""
    return {((sample["doc_id"], sample["doc_hash"]), sample["filter"]): sample for sample in samples}


def _values(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, tuple[list[float], list[float]]]:
    """Metrics that are a number for each document."""
    names = [name for name in pairs[0][0]["metrics"] if all(_is_number(s.get(name)) for pair in pairs for s in pair)]
    return {name: ([float(a[name]) for a, _ in pairs], [float(b[name]) for _, b in pairs]) for name in names}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _bits_per_byte(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[list[float], list[float]]:
    """Each document's bits over the mean number of bytes, so that their mean is the figure for all documents."""
    mean = sum(a["answer_bytes"] for a, _ in pairs) / len(pairs)
    return [a["answer_bits"] / mean for a, _ in pairs], [b["answer_bits"] / mean for _, b in pairs]


def comparison_table(rows: Sequence[Compared], first: str, second: str) -> Table:
    table = Table(title=f"second: {second}, against first: {first}", title_justify="left")
    for column in ("task", "n", "metric", "first", "second", "difference", "p"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", overflow="fold")
    last = None
    for row in rows:
        head = (row.task, str(row.n)) if row.task != last else ("", "")
        interval = row.interval and f"[{row.interval.low:+.3f}, {row.interval.high:+.3f}]"
        difference = f"{row.difference:+.3f} {interval or f'± {row.stderr:.2g}'}"
        table.add_row(*head, row.metric, f"{row.first:.3f}", f"{row.second:.3f}", difference, f"{row.p:.3f}")
        last = row.task
    return table
