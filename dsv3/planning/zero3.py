"""Elements of parameters on one rank where everything is sharded (ZeRO-3), as torch's FSDP2 cuts them.

Over N ranks, a parameter is cut along its first dimension d_0 in parts of ceil(d_0 / N). The last parts may be shorter
or empty, and are padded. Experts are cut twice: over EP ranks evenly, and what these hold over DP / EP others. Tables
with sparse gradients (of `memory=ngram`) are cut in the same parts, without padding.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from dsv3.planning.recipe import Recipe
from dsv3.planning.skeleton import Place, Shape, Skeleton
from dsv3.planning.stages import Part

FP32 = 4


class Sharded(NamedTuple):
    """Elements, of a rank's part of one parameter or of several."""

    stored: int = 0  # padding included
    own: int = 0
    whole: int = 0  # gathered from all ranks that have a part of it

    def plus(self, more: "Sharded", times: int = 1) -> "Sharded":
        return Sharded(*(ours + times * theirs for ours, theirs in zip(self, more, strict=True)))


class Shards(NamedTuple):
    """Elements on one rank."""

    stepped: Sharded  # parameters with gradients and optimiser state
    copied: Sharded  # MTP's copy of the embedding, which has gradients and is not stepped
    table_elements: int
    table_rows: int


def shards(s: Skeleton, r: Recipe, part: Part, *, rank: int = 0) -> Shards:
    """Of one GPU's part of a pipeline, on the data-parallel `rank`. Rank 0 has the most."""
    stepped, elements, rows = Sharded(), 0, 0
    for shape, times in _shapes(s, part):
        if shape.is_table:
            own = _sharded(shape, r, rank).own
            elements, rows = elements + own, rows + own // shape.sizes[1]
        else:
            stepped = stepped.plus(_sharded(shape, r, rank), times)
    embedding = Shape(Place.FIRST, (s.vocab_size, s.dim), is_table=False)
    copied = _sharded(embedding, r, rank) if part.has_copy else Sharded()
    return Shards(stepped, copied, elements, rows)


class States(NamedTuple):
    """Bytes on one rank from one step to the next, with AdamW."""

    parameters: float
    gradients: float  # none of tables
    optimiser: float  # moments, and of a table one number per row
    ema: float  # in host memory


def sharded_states(s: Skeleton, r: Recipe, part: Part, *, rank: int = 0) -> States:
    """What `shards` come to: master weights only, since compute copies are made when they are gathered."""
    stepped, copied, elements, rows = shards(s, r, part, rank=rank)
    f, stored = r.formats, stepped.stored + copied.stored
    return States(
        (stored + elements) * (f.master or f.weight),
        stored * f.gradient,
        2 * stepped.own * f.moment + rows * FP32,
        (stepped.own + elements) * FP32,
    )


def gathered(s: Skeleton, r: Recipe, part: Part) -> float:
    """Bytes of whole weights in a pass: what is outside blocks and the largest block; all in a pipeline, which keeps
    them for the step."""
    of_place = dict.fromkeys(Place, 0)
    for shape, times in _shapes(s, part):
        if not shape.is_table:
            of_place[shape.place] += _sharded(shape, r, 0).whole * (times if r.pp > 1 else 1)
    outside = of_place[Place.FIRST] + of_place[Place.LAST]
    blocks = (of_place[Place.DENSE], of_place[Place.MOE] + of_place[Place.EXPERTS])
    copy = shards(s, r, part).copied.whole
    return (outside + copy + (sum(blocks) if r.pp > 1 else max(blocks))) * (r.formats.master or r.formats.weight)


def whole_gradients(s: Skeleton, r: Recipe, part: Part) -> float:
    """Bytes of what is added up over the micro-batches of a step before it is sharded."""
    found = shards(s, r, part)
    return (found.stepped.whole + found.copied.whole) * r.formats.gradient


def _shapes(s: Skeleton, part: Part) -> Iterator[tuple[Shape, int]]:
    times = {
        Place.FIRST: int(0 in part.stages),
        Place.DENSE: part.dense_blocks,
        Place.MOE: part.moe_blocks,
        Place.EXPERTS: part.moe_blocks,
        Place.LAST: int(part.has_head),
    }
    return ((shape, times[shape.place]) for shape in s.shapes if times[shape.place])


def _sharded(shape: Shape, r: Recipe, rank: int) -> Sharded:
    first, *others = shape.sizes
    ranks = r.dp
    if shape.place is Place.EXPERTS:
        first, ranks, rank = first // r.ep, ranks // r.ep, rank // r.ep
    rows, row = -(-first // ranks), math.prod(others)
    return Sharded(rows * row, min(max(first - rank * rows, 0), rows) * row, first * row)
