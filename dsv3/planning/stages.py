"""Pipeline stages: the parts of the model on each GPU.

The blocks (the layers in order, then MTP's) are cut into PP stages as evenly as whole blocks allow. The embedding is on
the first stage; the final norm, the head and what MTP has outside its blocks are on the last. A GPU holds one
stage; with DualPipe two, the i-th from either end, and so every stage is held twice.
"""

from typing import NamedTuple

from dsv3.planning.recipe import PipelineSchedule
from dsv3.planning.skeleton import Skeleton


class Weights(NamedTuple):
    """Parameters, by how they are stored and spread. Selection biases (a few hundred per layer) are left out."""

    linear: int = 0  # of linear layers, which a precision plugin stores in its format
    other: int = 0  # embedding, memory, head, router, norms
    experts: int = 0  # routed: spread over expert parallelism

    def plus(self, more: "Weights") -> "Weights":
        return Weights(self.linear + more.linear, self.other + more.other, self.experts + more.experts)


class Part(NamedTuple):
    """What one GPU of a pipeline holds."""

    stages: tuple[int, ...]
    weights: Weights  # of all its stages; routed experts whole, before they are spread
    dense_blocks: int
    moe_blocks: int
    mtp_modules: int
    has_head: bool
    has_copy: bool = False  # of the embedding, which is among its weights


def parts_of_pipeline(s: Skeleton, *, pp: int, pipeline: PipelineSchedule) -> list[Part]:
    """Each GPU's part. Raises ValueError where there are more stages than blocks."""
    blocks = [False] * s.dense_layers + [True] * s.moe_layers
    blocks += [False] * s.mtp.dense_blocks + [True] * s.mtp.moe_blocks
    if pp > len(blocks):
        raise ValueError(f"pp={pp}: must be at most {len(blocks)}, the number of blocks")
    parts = [_stage(s, blocks, number, pp) for number in range(pp)]
    if pipeline == "dualpipe":
        parts = [_joined(a, b) for a, b in zip(parts, parts[::-1], strict=True)]
    return [_with_embedding_for_last(s, part) for part in parts]


def block_weights(s: Skeleton, *, moe: bool) -> Weights:
    """Parameters of one block, its two norms included."""
    in_attention = sum(matrix.size for matrix in s.attention.matrices)
    other = s.attention.parameters - in_attention + 2 * s.dim
    if not moe:
        return Weights(in_attention + 3 * s.dim * s.inter_dim, other)
    shared, routed = 3 * s.dim * s.shared_dim, 3 * s.dim * s.expert_dim * s.n_experts
    return Weights(in_attention + shared, other + s.router_parameters, routed)


def _stage(s: Skeleton, blocks: list[bool], number: int, pp: int) -> Part:
    mine = [moe for i, moe in enumerate(blocks) if i * pp // len(blocks) == number]
    weights = Weights()
    for moe in mine:
        weights = weights.plus(block_weights(s, moe=moe))
    is_last = number == pp - 1
    if number == 0:
        weights = weights.plus(Weights(other=s.vocab_size * s.dim + s.memory_parameters))
    if is_last:
        head = 0 if s.tie_embeddings else s.vocab_size * s.dim
        weights = weights.plus(Weights(other=head + s.dim)).plus(_mtp_outside_blocks(s))
    return Part((number,), weights, mine.count(False), mine.count(True), s.mtp.depth if is_last else 0, is_last)


def _mtp_outside_blocks(s: Skeleton) -> Weights:
    linear = sum(matrix.size for matrix in s.mtp.matrices)
    in_blocks = s.mtp.dense_blocks * sum(block_weights(s, moe=False))
    in_blocks += s.mtp.moe_blocks * sum(block_weights(s, moe=True))
    return Weights(linear, s.mtp.parameters - in_blocks - linear)


def _joined(a: Part, b: Part) -> Part:
    return Part(
        a.stages + b.stages,
        a.weights.plus(b.weights),
        a.dense_blocks + b.dense_blocks,
        a.moe_blocks + b.moe_blocks,
        a.mtp_modules + b.mtp_modules,
        a.has_head or b.has_head,
    )


def _with_embedding_for_last(s: Skeleton, part: Part) -> Part:
    """A tied head and MTP need the embedding: a copy, unless the first stage is on the same GPU."""
    needed = part.has_head and 0 not in part.stages and (s.tie_embeddings or s.mtp.depth > 0)
    weights = part.weights.plus(Weights(other=s.vocab_size * s.dim))
    return part._replace(weights=weights, has_copy=True) if needed else part
