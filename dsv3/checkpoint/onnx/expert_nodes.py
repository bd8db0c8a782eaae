"""Routers and routed experts as ONNX nodes.

Both routers end in K gates a token. onnxruntime's `MoE` takes the softmax of what it is given over the K highest, so
that it is given the gates' logarithms there; what the gates sum to is multiplied in afterwards. `QMoE`, its INT8
version, takes gates as they are.
"""

from typing import Any

import numpy as np
from torch import Tensor

from dsv3.checkpoint.onnx.attention_nodes import LOWEST
from dsv3.checkpoint.onnx.nodes import MICROSOFT, Nodes, quantised

NEVER = -1e4
"""Logarithm of the gate of an expert that is not chosen."""
TINY = 1e-30
"""Gates have a logarithm: no smaller one is told from it."""
SWIGLU: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}


class RoutedExperts:
    """The router with its selection bias, and the experts. router: its arguments. sigmoid: or else softmax."""

    def __init__(self, g: Nodes, router: dict[str, Any], *, sigmoid: bool) -> None:
        self.g, self.router, self.sigmoid = g, router, sigmoid
        self.experts, self.top_k, self.groups = (router[key] for key in ("n_experts", "top_k", "n_groups"))
        self.normalised = sigmoid or router["normalise_gates"]
        self.scale = router["route_scale"]

    def __call__(self, x: str, name: str, w: dict[str, Tensor], out: str) -> str:
        """x [N, D] -> [N, D], and the chosen experts [N, K] as the graph's output `out`. w: the MoE's weights."""
        g = self.g
        logits = g.op("MatMul", x, g.weight(f"{name}.router", w["router.weight"].T))
        affinities = g.op("Sigmoid", logits) if self.sigmoid else g.op("Softmax", logits, axis=-1)
        choice = g.op("Add", affinities, g.weight(f"{name}.bias", w["balancing.bias"]))
        if self.groups > 1:
            choice = self._best_groups(affinities, choice)
        g.ops("TopK", choice, g.const([self.top_k]), outs=[f"{out}_scores", out], axis=-1)
        chosen = g.op("GatherElements", affinities, out, axis=1)
        down = w["experts.down_proj.weight"] * self.scale
        # gate and up alternate
        up = w["experts.gate_up_proj.weight"].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        if g.bits == 8:
            return self._quantised(x, name, choice, self._gates(chosen), out, up, down)
        logs = g.op("Log", g.op("Clip", chosen, g.const(TINY, np.float32)))
        given = self._scattered(logs, out, NEVER)
        weights = g.weight(f"{name}.up", up), "", g.weight(f"{name}.down", down)
        y = g.op("MoE", x, given, *weights, domain=MICROSOFT, k=self.top_k, normalize_routing_weights=1, **SWIGLU)
        return y if self.normalised else g.op("Mul", y, g.op("ReduceSum", chosen, g.const([1])))

    def _best_groups(self, affinities: str, choice: str) -> str:
        """`choice` with the lowest score for all experts outside the best groups."""
        g, size = self.g, self.experts // self.groups
        scored = choice if not self.sigmoid or self.router["biased_groups"] else affinities
        kept = self.router["topk_groups"]
        summed = (self.router["group_score_top"] or max(1, self.top_k // kept)) if self.sigmoid else 1
        cut = g.const([-1, self.groups, size])
        best, _ = g.ops("TopK", g.op("Reshape", scored, cut), g.const([summed]), outs=2, axis=-1)
        _, at = g.ops("TopK", g.op("ReduceSum", best, g.const([2]), keepdims=0), g.const([kept]), outs=2, axis=-1)
        rows = g.op("Shape", at, start=0, end=1)
        none, every = (
            g.op("Expand", g.const(value, np.bool_), g.op("Concat", rows, g.const([count]), axis=0))
            for value, count in ((False, self.groups), (True, kept))
        )
        allowed = g.op("Unsqueeze", g.op("ScatterElements", none, at, every, axis=1), g.const([2]))
        limited = g.op("Where", allowed, g.op("Reshape", choice, cut), g.const(LOWEST, np.float32))
        return g.op("Reshape", limited, g.const([-1, self.experts]))

    def _gates(self, chosen: str) -> str:
        """The chosen experts' gates, [N, K], without `route_scale`."""
        g = self.g
        if not self.normalised:
            return chosen
        total = g.op("Add", g.op("ReduceSum", chosen, g.const([1])), g.const(1e-20, np.float32))
        return g.op("Div", chosen, total)

    def _scattered(self, values: str, at: str, rest: float) -> str:
        """[N, E]: values [N, K] at the chosen experts."""
        g = self.g
        rows = g.op("Shape", at, start=0, end=1)
        full = g.op("Expand", g.const(rest, np.float32), g.op("Concat", rows, g.const([self.experts]), axis=0))
        return g.op("ScatterElements", full, at, values, axis=1)

    def _quantised(self, x: str, name: str, choice: str, gates: str, at: str, up: Tensor, down: Tensor) -> str:
        g = self.g
        stored = []
        for part, weight in (("up", up), ("down", down)):
            codes, scales = quantised(weight.flatten(0, 1), g.block)
            stored += [
                g.weight(f"{name}.{part}.codes", codes.view(weight.shape)),
                g.weight(f"{name}.{part}.scales", scales.view(*weight.shape[:2], -1)),
                "",
            ]
        weights = self._scattered(gates, at, 0.0)
        none = [""] * 5  # a third matrix, zero points
        settings = {"k": self.top_k, "normalize_routing_weights": 0, "expert_weight_bits": 8, **SWIGLU}
        settings |= {"block_size": g.block, "accuracy_level": 4}
        return g.op("QMoE", x, choice, *stored, *none, "", weights, domain=MICROSOFT, **settings)
