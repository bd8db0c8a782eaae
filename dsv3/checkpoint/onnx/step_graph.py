"""The decoding step of a `Decoder` as an ONNX graph, written node by node from its config and weights.

    tokens int64 [B, T], length int64 [B], picked int64 [P], cache_* [B, S, width]
        -> logits [P, V], present_* [B, S, width], experts_* int64 [N, K]

Row b holds length[b] positions at the front of its caches and reads T tokens after them; S >= length[b] + T. `picked`
names the flat positions b * T + t of the N = B * T whose logits are wanted. Rows that read fewer than T tokens are
padded at their end: what padding writes lies beyond what the row holds, and the next tokens overwrite it.
`experts_*` are the experts that each MoE layer chose. One graph reads prompts and decodes.

    MTP module k:  the same, with states_in [N, D] of the positions and, as tokens, those k places further on
        -> logits [P, V], states [N, D] of its block, hidden [P, D] after its norm
"""

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from dsv3.checkpoint.families import Parts
from dsv3.checkpoint.onnx.attention_nodes import GroupedAttention, LatentAttention, Positions, positions
from dsv3.checkpoint.onnx.expert_nodes import RoutedExperts
from dsv3.checkpoint.onnx.nodes import Nodes
from dsv3.model.decoder import Block, Decoder
from dsv3.model.moe import MoE


class StepGraph:
    """Writes one graph; `main` or `mtp` is called once.

    bits: 32, or 8 for INT8 weights of all linear layers but routers. block: weights that share a scale there.
    """

    def __init__(self, model: Decoder, parts: Parts, *, bits: int = 32, block: int = 64) -> None:
        self.model_, self.parts, self.shapes = model, parts, parts.model
        self.g = g = Nodes(bits=bits, block=block)
        self.eps = float(parts.model["norm_eps"])
        latent = parts.is_option("attention", "mla")
        self.attention = (LatentAttention if latent else GroupedAttention)(g, parts.attention)
        self.experts: RoutedExperts | None = None
        if parts.router.get("n_experts"):
            sigmoid = parts.is_option("router", "sigmoid_group_limited")
            self.experts = RoutedExperts(g, parts.router, sigmoid=sigmoid)
        self.caches: dict[str, int] = {}  # widths by name
        self.routed: list[str] = []  # names of the MoE layers whose choices are outputs

    @torch.no_grad()
    def main(self, *, states: bool) -> Nodes:
        """All layers and the head. states: output what MTP takes of every position too."""
        g, model = self.g, self.model_
        at = self._begin(range(self.shapes["n_layers"]))
        x, y = self._embedded(), ""
        for i, block in enumerate(model.layers):
            x, y = self._block(block, x, y, i, f"layers.{i}", at)
        norm = model.norm.weight
        if not states:
            x, y = (g.op("Gather", part, "picked") for part in (x, y))
            hidden, _ = g.add_norm(x, y, "norm", norm, self.eps, total=False)
        else:
            normed, last = g.add_norm(x, y, "norm", norm, self.eps, total=not model.mtp.after_final_norm)
            g.op("Identity", last or normed, out=g.output("states", "N", self.shapes["dim"]))
            hidden = g.op("Gather", normed, "picked")
        self._head(hidden)
        return g

    @torch.no_grad()
    def mtp(self, k: int) -> Nodes:
        """MTP module k, counted from 1."""
        g = self.g
        module: Any = self.model_.mtp.get_submodule(f"depths.{k - 1}")  # type: ignore[attr-defined]
        name, dim = f"mtp.{k - 1}", self.shapes["dim"]
        at = self._begin([0])
        g.input("states_in", "N", dim)
        embedded = g.norm(self._embedded(), f"{name}.enorm", module.enorm.weight, self.eps)
        before = g.norm("states_in", f"{name}.hnorm", module.hnorm.weight, self.eps)
        both = (before, embedded) if module.hidden_first else (embedded, before)
        x = g.linear(g.op("Concat", *both, axis=-1), f"{name}.eh", module.eh_proj.weight)
        x, y = self._block(module.block, x, "", 0, name, at)
        states = g.op("Add", x, y, out=g.output("states", "N", dim))
        picked = g.op("Gather", states, "picked")
        hidden = g.norm(picked, f"{name}.norm", module.norm.weight, self.eps)
        g.op("Identity", hidden, out=g.output("hidden", "P", dim))
        self._head(hidden)
        return g

    def _begin(self, layers: Any) -> Positions:
        g = self.g
        for name, shape in (("tokens", ("B", "T")), ("length", ("B",)), ("picked", ("P",))):
            g.input(name, *shape, kind=TensorProto.INT64)
        g.output("logits", "P", self.shapes["vocab_size"])
        for layer in layers:
            self.caches |= self.attention.caches(layer)
        for name, width in self.caches.items():
            g.input(f"cache_{name}", "B", "S", width)
            g.output(f"present_{name}", "B", "S", width)
        rotary: Any = self.model_.attention(0)
        frequencies = rotary.frequencies.on(torch.device("cpu"))
        return positions(g, f"cache_{next(iter(self.caches))}", frequencies, repeats=self.attention.mask_repeats)

    def _embedded(self) -> str:
        """[N, D] of all tokens."""
        g = self.g
        flat = g.op("Reshape", "tokens", g.const([-1]))
        return g.op("Gather", g.weight("embed", self.model_.embed_tokens.weight), flat)

    def _block(self, block: Any, x: str, y: str, layer: int, name: str, at: Positions) -> tuple[str, str]:
        """The stream x, and y, which is still to be added to it (or nothing): the same after a block."""
        assert isinstance(block, Block)
        g, eps = self.g, self.eps
        first, second = block.input_layernorm.weight, block.post_attention_layernorm.weight
        if y:
            hidden, x = g.add_norm(x, y, f"{name}.attention_norm", first, eps)
        else:
            hidden = g.norm(x, f"{name}.attention_norm", first, eps)
        rotary: Any = block.self_attn
        attended = self.attention(hidden, layer, name, weights_of(rotary), rotary.scale, at)
        hidden, x = g.add_norm(x, attended, f"{name}.ffn_norm", second, eps)
        if not isinstance(block.mlp, MoE):
            return x, self._ffn(hidden, f"{name}.ffn", block.mlp)
        assert self.experts is not None
        out = g.output(f"experts_{len(self.routed)}", "N", self.experts.top_k, kind=TensorProto.INT64)
        self.routed.append(name)
        weights = weights_of(block.mlp) | {"balancing.bias": block.mlp.balancing.bias}
        y = self.experts(hidden, name, weights, out)
        shared = block.mlp.shared_experts
        return x, y if shared is None else g.op("Add", y, self._ffn(hidden, f"{name}.shared", shared))

    def _ffn(self, x: str, name: str, module: Any) -> str:
        return self.g.swiglu(x, name, module.gate_up_proj.weight, module.down_proj.weight)

    def _head(self, hidden: str) -> None:
        logits = self.g.linear(hidden, "head", self.model_.head_weight)
        self.g.op("Identity", logits, out="logits")


def weights_of(module: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}
