"""Intervals in tokens: steps seldom end on a multiple."""


def crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every
