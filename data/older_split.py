"""Held-out texts of runs of an older version, so that they are scored on what they held out.

Of each domain whose source has not decided, the `share` of groups (rounded up) with the smallest hashes of their names
was held out. A held-out document of which at least half of the distinct telling lines occur in some one training
document went to training, until there was none.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping

from data.cache import number
from data.documents import Document, HeldOut
from data.sources import Source
from data.survey import texts_of
from data.telling import lines_of


def older_held_out(
    sources: Mapping[str, Source], *, share: float, longest: int
) -> tuple[dict[str, list[HeldOut]], dict[str, str]]:
    """The held-out documents of each domain in the older order, and the most frequent training answer by family."""
    unique: dict[str, tuple[str, Document, str]] = {}
    for domain, source in sources.items():
        for document in texts_of(source.documents(), longest):
            text = document.text if isinstance(document.text, str) else "".join(document.text)
            if text not in unique or document.held_out:
                unique[text] = (domain, document, text)
    ordered = sorted(unique.values(), key=lambda found: (number(found[1].name), found[1].name, found[0]))
    groups: dict[str, set[str]] = defaultdict(set)
    for domain, document, _ in ordered:
        if document.held_out is None:
            groups[domain].add(document.group or document.name)
    chosen = {
        domain: set(sorted(members, key=lambda name: (number(name), name))[: math.ceil(share * len(members))])
        for domain, members in groups.items()
    }
    drawn = {
        i
        for i, (domain, document, _) in enumerate(ordered)
        if document.held_out is None and (document.group or document.name) in chosen[domain]
    }
    decided = {i for i, (_, document, _) in enumerate(ordered) if document.held_out}
    kept = decided | _without_near_duplicates([text for _, _, text in ordered], drawn, decided)
    found: dict[str, list[HeldOut]] = {domain: [] for domain in sources}
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for i, (domain, document, text) in enumerate(ordered):
        if i in kept:
            found[domain].append(HeldOut(document.name, text, document.family, document.answer))
        elif document.family:
            answers[document.family][document.answer] += 1
    return found, {family: counts.most_common(1)[0][0] for family, counts in answers.items()}


def _without_near_duplicates(texts: list[str], held_out: set[int], ignored: set[int]) -> set[int]:
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
