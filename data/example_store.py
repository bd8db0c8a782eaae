"""The store of examples: their tokens, each marked as trained on or not, in one file a domain.

An example is one document or several that belong together, such as a chosen and a rejected answer: it is never cut, and
its documents stand side by side in a row. Each document begins with BOS. Token ids are uint32, and `TRAINED` is added
to those that are trained on, so that what reads ids by their address reads the marks with them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.cache import number
from data.layout import Epoch, document_order, first_documents
from data.shards import mapped, write_beside
from dsv3.prompts.chat import Rendered

TRAINED = 1 << 31
"""Added to the id of a token that is trained on."""

DTYPE = "uint32"


class Example(NamedTuple):
    """What one row of a source becomes."""

    documents: Sequence[Rendered]
    content: str  # equal for equal rows: by its hash an example is held out, if the source does not decide
    held_out: bool | None = None
    question: Mapping[str, str] | None = None  # `prompt`, `answer`, and `family` of one with a short right answer
    item: Mapping[str, Any] | None = None  # the row itself, where training reads it


class StoredExamples(NamedTuple):
    """The examples of a domain."""

    tokens: np.ndarray  # uint32, of all examples, end to end
    ends: np.ndarray  # int64 [examples], tokens up to the end of each
    facts: Mapping[str, Any]  # questions and counts

    def example(self, index: int) -> np.ndarray:
        """The tokens of one, uint32."""
        return self.tokens[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)


def write_examples(folder: Path, examples: Iterator[Example], *, share: float) -> None:
    """Write a domain's examples into an empty folder: those of training into `training`, the others into `held_out`.

    share: of examples to be held out, where the source does not decide; one at least, if there are two.

    Raises:
        ValueError: there are no examples to train on, or none to hold out.
    """
    kept: list[tuple[int, np.ndarray, Example]] = []
    untrained = 0
    for example in examples:
        ids = np.concatenate([np.array(document.ids, np.int64) for document in example.documents])
        trained = np.concatenate([np.array(document.trained, bool) for document in example.documents])
        if not trained.any():
            untrained += 1
            continue
        kept.append((number(example.content), (ids + trained * TRAINED).astype(DTYPE), example._replace(documents=())))
    if not kept:
        raise ValueError(f"there is nothing to train on ({untrained:,} rows have no reply that is trained on)")
    held_out = [example.held_out if example.held_out is not None else h < share * 2**64 for h, _, example in kept]
    undecided = [i for i, (_, _, example) in enumerate(kept) if example.held_out is None]
    if not any(held_out) and undecided:
        held_out[min(undecided, key=lambda i: kept[i][0])] = True
    if all(held_out) or not any(held_out):
        raise ValueError(f"of {len(kept):,} examples, {sum(held_out):,} are held out: some must be, and some must not")
    majority = _majority([example.question for (_, _, example), out in zip(kept, held_out) if not out])
    for name, wanted in (("training", False), ("held_out", True)):
        own = [(tokens, example) for (_, tokens, example), out in zip(kept, held_out) if out == wanted]
        questions = [dict(example.question or {}) for _, example in own] if wanted else []
        items = [example.item for _, example in own if example.item is not None]
        facts = {"examples": len(own), "untrained": untrained, "questions": questions, "majority": majority}
        facts |= {"items": items} if items else {}
        _write_part(folder / name, [tokens for tokens, _ in own], facts)


def _write_part(folder: Path, parts: list[np.ndarray], facts: Mapping[str, Any]) -> None:
    folder.mkdir()
    write_beside(folder / "tokens", lambda file: file.writelines(part.tobytes() for part in parts))
    np.save(folder / "ends.npy", np.cumsum([len(part) for part in parts], dtype=np.int64))
    (folder / "facts.json").write_text(json.dumps(facts))


def _majority(questions: Sequence[Mapping[str, str] | None]) -> dict[str, str]:
    """The most frequent answer of each family, the first of equals."""
    counts: dict[str, dict[str, int]] = {}
    for question in questions:
        if question and "family" in question:
            of_family = counts.setdefault(question["family"], {})
            of_family[question["answer"]] = of_family.get(question["answer"], 0) + 1
    return {family: max(answers, key=lambda answer: answers[answer]) for family, answers in counts.items()}


def read_examples(folder: Path) -> StoredExamples:
    """What `write_examples` wrote into `training` or `held_out`."""
    facts = json.loads((folder / "facts.json").read_text())
    return StoredExamples(mapped(folder / "tokens", DTYPE), np.load(folder / "ends.npy"), facts)


def epoch_of_examples(stored: StoredExamples, *, seed: int, domain: str, epoch: int, length: int) -> Epoch:
    """The order of an epoch's examples, and which of them fill each row of `length` tokens; longer ones are left out.

    Raises:
        ValueError: none fits.
    """
    lengths = stored.lengths()
    order = document_order(len(lengths), seed=seed, domain=domain, epoch=epoch)
    order = order[lengths[order] <= length]
    if not len(order):
        raise ValueError(
            f"data.sequence_length={length - 1}: no example of {domain} fits; the shortest has {lengths.min():,} tokens"
        )
    ends = np.cumsum(lengths[order])
    starts = stored.ends[order] - lengths[order]
    return Epoch([stored.tokens], [0], starts, ends, first_documents(ends, length))


def packed_in_order(stored: StoredExamples, *, length: int, tokens: int, pad: int) -> np.ndarray:
    """Rows uint32 [rows, length] of the first examples that fit, up to `tokens` of them together and one at least."""
    rows: list[np.ndarray] = []
    room = given = 0
    for index in range(len(stored.ends)):
        ids = stored.example(index)
        if len(ids) > length:
            continue
        if rows and given + len(ids) > tokens:
            break
        if len(ids) > room:
            rows.append(np.full(length, pad, DTYPE))
            room = length
        rows[-1][length - room : length - room + len(ids)] = ids
        room, given = room - len(ids), given + len(ids)
    return np.stack(rows) if rows else np.zeros((0, length), DTYPE)
