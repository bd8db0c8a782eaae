"""A small decoder of the simplest parts of every kind, for checks of what works on a whole model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.contracts import (
    IGNORE,
    Cache,
    Denominators,
    Experts,
    Forward,
    Head,
    LossTerm,
    MicroBatch,
    Models,
    MTPPrediction,
    Routing,
    Statistic,
    Step,
)
from dsv3.model.decoder import Block, Decoder
from dsv3.model.initialisation import init_weights
from dsv3.model.layers import FixedDtype, PositionCache, SwiGLU, next_positions
from dsv3.model.moe import MoE
from dsv3.testing.plain import Plain, loop_mm

DIM, VOCABULARY, EXPERTS, TOP_K = 8, 262, 4, 2
EPS = 1e-6


class MeanAttention(nn.Module):
    """A projection of the mean of all positions up to each one, in its document."""

    def __init__(self, *, dim: int, precision: Any) -> None:
        super().__init__()
        self.o_proj = precision.linear(dim, dim, role="attention_out")
        self.dim = dim

    def forward(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: PositionCache | None = None,
    ) -> Tensor:
        count, known_BSD = x_BTD.shape[1], x_BTD
        own_BT = next_positions([0] * len(x_BTD), count, x_BTD.device)
        if cache is not None:
            own_BT = next_positions(cache.lengths.values(), count, x_BTD.device)
            cache.append(x_BTD)
            known_BSD = cache.read()
        seen_BTS = torch.arange(known_BSD.shape[1], device=x_BTD.device) <= own_BT.unsqueeze(-1)
        if document_ids_BT is not None:
            seen_BTS = seen_BTS & (document_ids_BT.unsqueeze(1) == document_ids_BT.unsqueeze(2))
        weights_BTS = seen_BTS.to(x_BTD.dtype) / seen_BTS.sum(-1, keepdim=True)
        return self.o_proj(weights_BTS.to(x_BTD.dtype) @ known_BSD)

    def new_cache(self, rows: Iterable[int] = ()) -> PositionCache:
        weight: Any = self.o_proj.weight
        return PositionCache(self.dim, dtype=torch.float32, device=weight.device, rows=rows)

    def kv_cache_elements_per_token(self) -> int:
        return self.dim

    def flops_per_token(self, context: int) -> int:
        return 2 * self.dim * (self.dim + context)


class SoftmaxRouter(FixedDtype):
    """The K likeliest experts of a softmax."""

    top_k = TOP_K

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, dim))

    def forward(self, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> Routing:
        affinities_NE = (x_ND.float() @ self.weight.T).softmax(-1)
        experts_NK = (affinities_NE + bias_E).topk(TOP_K).indices
        return Routing(experts_NK, affinities_NE.gather(1, experts_NK), affinities_NE)


class NoBalancing(FixedDtype):
    """A bias that stays zero, and no loss."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def loss(self, routing: Routing, batch_shape: tuple[int, int], mask_BT: Tensor, tokens_seen: int) -> Tensor:
        return torch.zeros(())

    def observe(self, counts_E: Tensor) -> None:
        pass

    def update(self, tokens_seen: int) -> None:
        pass


class LoopExperts(nn.Module):
    def __init__(self, *, dim: int, precision: Any) -> None:
        super().__init__()
        self.gate_up_proj = precision.grouped_linear(EXPERTS, dim, 2 * dim, role="expert_gate_up", grouped_mm=loop_mm)
        self.down_proj = precision.grouped_linear(EXPERTS, dim, dim, role="expert_down", grouped_mm=loop_mm)
        self.swiglu = precision.swiglu

    def forward(self, x_MD: Tensor, counts_E: Tensor, gates_M: Tensor) -> Tensor:
        return self.down_proj(self.swiglu(self.gate_up_proj(x_MD, counts_E), gates_M), counts_E)


def dispatch(x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Rows sorted by expert, and the sum of what comes back."""
    order_M = routing.experts_NK.flatten().argsort(stable=True)
    token_M = order_M // TOP_K
    counts_E = torch.bincount(routing.experts_NK.flatten(), minlength=EXPERTS)
    y_MD = experts(x_ND[token_M], counts_E, routing.gates_NK.flatten()[order_M])
    return torch.zeros_like(x_ND).index_add(0, token_M, y_MD)


class NoMemory(nn.Module):
    active_parameters = 0

    def forward(self, x_BTD: Tensor, *more: Any) -> Tensor:
        return x_BTD

    def new_cache(self, rows: Iterable[int] = ()) -> Cache | None:
        return None


class NoMTP(nn.Module):
    depth = 0
    after_final_norm = True

    def weight(self, tokens_seen: int) -> float:
        return 0.0

    def forward(self, *arguments: Any) -> list[MTPPrediction]:
        return []

    def new_caches(self, rows: Iterable[int] = ()) -> list[Cache]:
        return []

    def extend(
        self, depth: int, h_BTD: Tensor, tokens_BT: Tensor, embed: Callable[[Tensor], Tensor], cache: Cache
    ) -> tuple[Tensor, Tensor]:
        raise ValueError(f"there is no MTP module of depth {depth}")


class NextToken(nn.Module):
    """The mean cross-entropy of a step's targets."""

    statistics: Sequence[Statistic] = (Statistic("loss", "nats per token", "nll", over="targets"),)

    def prepare(self, step: Step, models: Models) -> Step:
        return step

    def denominators(self, step: Step) -> Denominators:
        targets = torch.tensor(sum(int((micro.targets_BT != IGNORE).sum()) for micro in step.micro_batches))
        return {"targets": targets, "mtp": targets}

    def loss(self, forward: Forward, head: Head, micro: MicroBatch, denominators: Denominators) -> LossTerm:
        logits_NV = (forward.hidden_BTD @ head.weight_VD.T).flatten(0, 1)
        targets_N = micro.targets_BT.flatten()
        nll = nn.functional.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE, reduction="sum")
        return LossTerm(nll / denominators["targets"], {"nll": nll.detach()})


def block(*, dim: int, precision: Any, moe: bool) -> Block:
    """A block with a dense FFN or a MoE of 4 experts, top-2."""
    mlp: Any = SwiGLU(dim=dim, inter_dim=dim, precision=precision)
    if moe:
        router: Any = SoftmaxRouter(dim=dim)
        balancing: Any = NoBalancing()
        experts: Any = LoopExperts(dim=dim, precision=precision)
        mlp = MoE(router=router, balancing=balancing, dispatch=dispatch, experts=experts, shared_experts=mlp)
    return Block(dim=dim, norm_eps=EPS, attention=MeanAttention(dim=dim, precision=precision), mlp=mlp)


def small_model() -> Decoder:
    """Two layers, the second one a MoE."""
    precision: Any = Plain(torch.float32)

    def layer(number: int) -> Block:
        return block(dim=DIM, precision=precision, moe=number == 1)

    model = Decoder(
        vocab_size=VOCABULARY, dim=DIM, n_layers=2, norm_eps=EPS, tie_embeddings=False, isolate_documents=False,
        memory=NoMemory, block=layer, mtp=lambda **_: NoMTP(), precision=precision,
    )  # fmt: skip
    init_weights(model, std=0.1, seed=0)
    return model


def micro_batch(rows: int, length: int, *, seed: int, vocab_size: int = VOCABULARY) -> MicroBatch:
    """Random tokens, each row in two documents; the last two positions of the first row are padding."""
    generator = torch.Generator().manual_seed(seed)
    row_BS = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    positions_BT = torch.arange(length).expand(rows, -1)
    ids_BT = 1 + (positions_BT >= length // 2).long()
    targets_BT = row_BS[:, 1:].clone()
    ids_BT[0, -2:], targets_BT[0, -3:] = 0, IGNORE
    return MicroBatch(row_BS[:, :-1], targets_BT, positions_BT, ids_BT, torch.zeros_like(ids_BT))
