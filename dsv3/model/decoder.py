"""The decoder: embedding and memory, blocks of attention and FFN or MoE, final norm, head, and multi-token prediction.

Names of modules and weights follow transformers' DeepseekV3 where it has them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv3.contracts import MTP, Attention, Cache, Forward, Head, Memory, MicroBatch, MTPPrediction, Precision, Routing
from dsv3.model.layers import PositionCache, RMSNorm, SwiGLU, next_positions
from dsv3.model.moe import MoE


class Block(nn.Module):
    """u = x + attention(norm(x)); out = u + FFN(norm(u)), where the FFN is dense or a MoE."""

    def __init__(self, *, dim: int, norm_eps: float, attention: nn.Module, mlp: MoE | SwiGLU) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dim, eps=norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(dim, eps=norm_eps)
        self.mlp = mlp

    def forward(
        self,
        x_BTD: Tensor,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        replay_BTK: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), positions_BT, document_ids_BT, cache)
        h_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(h_BTD, tokens_BT, replay_BTK)
            return x_BTD + y_BTD, routing
        return x_BTD + self.mlp(h_BTD), None


class Absent(nn.Module):
    """Stands for a part of the model that is on another rank. It has no weights: names of all others stay."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("this part of the model is on another rank of the pipeline")


class Caches(NamedTuple):
    """What decoding keeps: of each layer, and of the memory where it reads earlier tokens. Rows are those of all."""

    layers: list[Any]  # a `Cache` of each
    memory: Cache | None

    def parts(self) -> list[Cache]:
        return self.layers if self.memory is None else [*self.layers, self.memory]

    @property
    def lengths(self) -> dict[int, int]:
        return self.layers[0].lengths

    @property
    def position_bytes(self) -> int:
        """Of a row, as far as its parts keep a `PositionCache`."""
        return sum(part.position_bytes for part in self.parts() if isinstance(part, PositionCache))

    def add(self, row: int) -> None:
        for part in self.parts():
            part.add(row)

    def copy(self, source: int, row: int, length: int) -> None:
        for part in self.parts():
            part.copy(source, row, length)

    def drop(self, row: int) -> None:
        for part in self.parts():
            part.drop(row)

    def rewind(self, row: int, length: int) -> None:
        for part in self.parts():
            part.rewind(row, length)

    def select(self, rows: Sequence[int]) -> "Caches":
        memory = None if self.memory is None else self.memory.select(rows)
        return Caches([layer.select(rows) for layer in self.layers], memory)

    def by_token(self, rows: Sequence[int], counts: Sequence[int]) -> "Caches | None":
        """As `PositionCache.by_token`; None where a part keeps a cache of another kind."""
        parts = self.parts()
        tokens = [part.by_token(rows, counts) for part in parts if isinstance(part, PositionCache)]
        if len(tokens) < len(parts):
            return None
        return Caches([*tokens[: len(self.layers)]], tokens[-1] if self.memory is not None else None)


class Decoder(nn.Module):
    """The language model. `block(i)` builds layer i; `mtp` is given the factory of its own blocks."""

    embed_tokens: nn.Embedding
    memory: Memory
    mtp: MTP

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        n_layers: int,
        norm_eps: float,
        tie_embeddings: bool,
        isolate_documents: bool,
        memory: Callable[[], Any],
        block: Callable[[int], Block],
        mtp: Callable[..., Any],
        precision: Precision,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.memory = memory()
        self.layers = nn.ModuleList(block(i) for i in range(n_layers))
        self.norm = RMSNorm(dim, eps=norm_eps)
        self.lm_head = precision.linear(dim, vocab_size, role="head")
        if tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp = mtp(block=lambda: block(n_layers), precision=precision)
        self.precision = precision
        self.isolate_documents = isolate_documents

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return self.embed_tokens(tokens_BT).to(self.precision.activation_dtype)

    def forward(self, batch: MicroBatch, *, with_mtp: bool) -> Forward:
        """States and routings of a micro-batch; `with_mtp` runs the MTP modules too (training)."""
        return self.outputs(*self.states(batch), batch, with_mtp=with_mtp)

    def states(self, batch: MicroBatch, x_BTD: Tensor | None = None) -> tuple[Tensor, dict[str, Routing]]:
        """States after the last block that is present, and routings. `x_BTD`: those before the first one that is, or
        None where that is the model's first."""
        documents = batch.document_ids_BT if self.isolate_documents else None
        return self._blocks(batch.tokens_BT, batch.positions_BT, documents, None, x_BTD, batch.replay)

    def outputs(self, last_BTD: Tensor, routings: dict[str, Routing], batch: MicroBatch, *, with_mtp: bool) -> Forward:
        """What follows the last block. MTP's routings are added to `routings`."""
        hidden_BTD = self.norm(last_BTD)
        predictions: list[MTPPrediction] = []
        if with_mtp:
            h_BTD = hidden_BTD if self.mtp.after_final_norm else last_BTD
            predictions = self.mtp(h_BTD, batch, self.embed, self.isolate_documents)
            for depth, prediction in enumerate(predictions):
                if prediction.routing is not None:
                    routings[f"mtp.{depth}"] = prediction.routing
        return Forward(hidden_BTD, predictions, routings)

    def decode(self, tokens_BT: Tensor, caches: Caches) -> Tensor:
        """Next-token logits float32 [B, T, V] of tokens that continue the rows of the caches."""
        return self.logits(self.norm(self.decode_states(tokens_BT, caches)[0]))

    def decode_states(
        self, tokens_BT: Tensor, caches: Caches, positions_BT: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Routing]]:
        """States [B, T, D], before the final norm, and routings of tokens that continue the rows of the caches.

        `positions_BT`: of the tokens, where the caches do not tell on the host.
        """
        if positions_BT is None:
            positions_BT = next_positions(caches.lengths.values(), tokens_BT.shape[1], tokens_BT.device)
        return self._blocks(tokens_BT, positions_BT, None, caches)

    def logits(self, hidden_D: Tensor) -> Tensor:
        """Float32 [..., V] of states [..., D] after a final norm, the model's or an MTP module's."""
        return self.lm_head(hidden_D).float()

    def new_caches(self, rows: Sequence[int] = ()) -> Caches:
        """With these rows, all empty."""
        layers = [self.attention(i).new_cache(rows) for i in range(len(self.layers))]
        return Caches(layers, self.memory.new_cache(rows))

    def attention(self, layer: int) -> Attention:
        attention: Any = self.layers[layer].self_attn
        return attention

    @property
    def head_weight(self) -> Tensor:
        """Of the output head, float32 [V, D]."""
        weight = self.lm_head.weight
        assert isinstance(weight, Tensor)
        return weight

    def head(self) -> Head:
        """The head as losses use it."""
        return Head(self.head_weight, self.cast_head())

    def cast_head(self) -> Tensor:
        """The head's weight without a gradient, [V, D] in the dtype that it is multiplied in: the head layer's `dtype`
        where it has one, or else that of the states."""
        return self.head_weight.detach().to(getattr(self.lm_head, "dtype", self.precision.activation_dtype))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def moe_layers(self) -> Iterator[tuple[str, MoE]]:
        """Every MoE by its short name, found by type, so that MTP's is among them."""
        for name, module in self.named_modules():
            if isinstance(module, MoE):
                yield moe_name(name), module

    def _blocks(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None,
        caches: Caches | None,
        x_BTD: Tensor | None = None,
        replay: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> tuple[Tensor, dict[str, Routing]]:
        of_memory, routings = caches.memory if caches is not None else None, {}
        if x_BTD is None:
            x_BTD = self.memory(self.embed(tokens_BT), tokens_BT, document_ids_BT, of_memory)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Absent):
                continue
            cache = caches.layers[i] if caches is not None else None
            name = f"layers.{i}"
            x_BTD, routing = layer(x_BTD, tokens_BT, positions_BT, document_ids_BT, cache, replay.get(name))
            if routing is not None:
                routings[name] = routing
        return x_BTD, routings

    def routing_biases(self) -> dict[str, Tensor]:
        """The selection bias of every MoE layer, float32 [E], by its short name."""
        return {name: moe.balancing.bias for name, moe in self.moe_layers()}


def moe_name(module_name: str) -> str:
    """`layers.3.mlp` -> `layers.3`; `mtp.depths.0.block.mlp` -> `mtp.0`."""
    parts = module_name.split(".")
    return f"{parts[0]}.{next(part for part in parts if part.isdigit())}"
