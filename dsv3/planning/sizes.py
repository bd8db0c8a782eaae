"""Parameters by component, total and active per token.

Closed forms (d width, V vocabulary, L layers of which L_d are dense and L_e have experts, f a dense FFN's width,
m an expert's, S the shared experts' together, E experts of which K run):

    embedding, head     V d each; no head of its own where the two are tied
    memory              its tables, of which a token reads a few rows; none in the report
    attention           L x one layer, its own norms included
    dense FFN           L_d x 3 d f
    router              L_e x (its weights + E selection biases, where balancing keeps any)
    shared experts      L_e x 3 d S
    routed experts      L_e x 3 d m E
    norms               2 d L + d

Active are K of the E experts and all the rest but the selection biases, which multiply nothing. MTP is counted by
itself: it is left out of inference, and the model's size is stated without it.
"""

from typing import NamedTuple

from dsv3.planning.skeleton import Skeleton


class Count(NamedTuple):
    total: int
    active: int  # per token


def parameters(s: Skeleton) -> dict[str, Count]:
    """Component -> count; `model` is the sum of all but MTP."""
    embedding = s.vocab_size * s.dim
    expert = 3 * s.dim * s.expert_dim * s.moe_layers
    parts = {
        "embedding": _all(embedding),
        "memory": Count(s.memory_parameters, s.memory_active),
        "attention": _all(s.layers * s.attention.parameters),
        "dense FFN": _all(s.dense_layers * 3 * s.dim * s.inter_dim),
        "router": Count(s.moe_layers * (s.router_parameters + s.routing_biases), s.moe_layers * s.router_parameters),
        "shared experts": _all(s.moe_layers * 3 * s.dim * s.shared_dim),
        "routed experts": Count(expert * s.n_experts, expert * s.top_k),
        "norms": _all(2 * s.dim * s.layers + s.dim),
        "head": _all(0 if s.tie_embeddings else embedding),
    }
    model = Count(sum(part.total for part in parts.values()), sum(part.active for part in parts.values()))
    biases = s.mtp.moe_blocks * s.routing_biases
    idle = s.mtp.moe_blocks * 3 * s.dim * s.expert_dim * (s.n_experts - s.top_k)
    mtp = Count(s.mtp.parameters + biases, s.mtp.parameters - idle)
    return {**parts, "model": model, "MTP": mtp}


def _all(count: int) -> Count:
    return Count(count, count)
