"""Parts documents into training and held-out ones so that nothing held out is known from training."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data.cache import number

TRIVIAL = 12
"""Lines of fewer characters (brackets, `return`, `else:`) tell nothing about where a text comes from."""


class Document(NamedTuple):
    """One document of a domain."""

    domain: str
    name: str
    text: str
    held_out: bool | None = None  # None: not decided by its source
    group: str = ""  # documents of one group are held out together; empty: the document is a group of its own
    family: str = ""
    question: str = ""
    answer: str = ""


def split(documents: Sequence[Document], *, share: float) -> list[Document]:
    """Return the documents with `held_out` decided, each text once, in a fixed random order of their names.

    Of each domain whose source has not decided, the `share` of groups (rounded up) with the smallest hashes of their
    names is held out. Then a held-out document of which at least half of the distinct non-trivial lines occur in some
    one training document, of any domain, goes to training as well, until there is none.
    """
    unique: dict[str, Document] = {}
    for document in documents:
        if document.text.strip() and (document.text not in unique or document.held_out):
            unique[document.text] = document  # of equal texts a held-out one stays, so that training has none
    ordered = sorted(unique.values(), key=lambda document: (number(document.name), document.name, document.domain))
    groups: dict[str, set[str]] = defaultdict(set)
    for document in ordered:
        if document.held_out is None:
            groups[document.domain].add(document.group or document.name)
    chosen = {
        domain: set(sorted(members, key=lambda name: (number(name), name))[: math.ceil(share * len(members))])
        for domain, members in groups.items()
    }
    drawn = {
        i
        for i, document in enumerate(ordered)
        if document.held_out is None and (document.group or document.name) in chosen[document.domain]
    }
    decided = {i for i, document in enumerate(ordered) if document.held_out}
    held_out = decided | without_near_duplicates([document.text for document in ordered], drawn, decided)
    return [document._replace(held_out=i in held_out) for i, document in enumerate(ordered)]


def without_near_duplicates(texts: Sequence[str], held_out: set[int], ignored: set[int]) -> set[int]:
    """Return `held_out` (indices into `texts`) without those that nearly repeat a training text.

    Every text that is neither held out nor `ignored` is a training text, and so is one that this function drops.
    """
    lines = {i: lines_of(texts[i]) for i in held_out}
    wanted = set().union(*lines.values())
    holders: Mapping[str, set[int]] = defaultdict(set)  # of each held-out line: the training texts that have it
    for i, text in enumerate(texts):
        if i not in held_out and i not in ignored:
            for line in wanted & lines_of(text):
                holders[line].add(i)
    kept = set(held_out)
    moved = True
    while moved:
        moved = False
        for i in sorted(kept):
            shared = Counter(holder for line in lines[i] for holder in holders[line])
            if lines[i] and 2 * max(shared.values(), default=0) >= len(lines[i]):
                kept.remove(i)
                moved = True
                for line in lines[i]:
                    holders[line].add(i)
    return kept


def lines_of(text: str) -> set[str]:
    """The distinct lines of a text, without surrounding space, that are long enough to tell something."""
    return {stripped for line in text.splitlines() if len(stripped := line.strip()) >= TRIVIAL}
