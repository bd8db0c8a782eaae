"""Stages of a pipeline: which layers each holds, and the part of a Decoder that runs as one.

The blocks (the layers in order, then MTP's) are cut as evenly as whole blocks allow. Embedding and memory are on the
first stage; final norm, head and MTP on the last.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.contracts import Forward, Head, MicroBatch, Routing
from dsv3.model.decoder import Absent, Decoder
from dsv3.model.recompute import recomputing

Loss = Callable[[Forward, Head, MicroBatch], Tensor]
"""A micro-batch's share of the step's loss, on the last stage: the objective's, auxiliary losses of parts, and the
balance losses of the MoE layers in `Forward.routings`, which are this stage's."""

BalanceLoss = Callable[[dict[str, Routing], MicroBatch], Tensor]
"""The share of the balance losses of these MoE layers, those of one of the other stages."""


def layers_of_stages(n_layers: int, mtp_depth: int, stages: int) -> list[range]:
    """Numbers of the layers on each stage; MTP's blocks, on the last one, count as layers.

    Raises:
        ValueError: there are fewer blocks than stages, or MTP has more blocks than the last stage's share.
    """
    blocks = n_layers + mtp_depth
    if stages > blocks:
        mtp = f" and mtp.depth={mtp_depth}" if mtp_depth else ""
        raise ValueError(f"model.n_layers={n_layers}{mtp}: must be at least the {stages} stages of the pipeline")
    first = [-(-stage * blocks // stages) for stage in range(stages)] + [blocks]
    if first[stages - 1] > n_layers:
        share = blocks - first[stages - 1]
        raise ValueError(
            f"mtp.depth={mtp_depth}: must be at most {share}, the share of the last of {stages} stages, which has all "
            "MTP modules; fewer stages have more each"
        )
    return [range(start, min(end, n_layers)) for start, end in pairwise(first)]


@dataclass
class Work:
    """What the stages of a rank compute together: a step, or without `loss` a forward pass."""

    micro_batches: Sequence[MicroBatch]
    with_mtp: bool
    loss: Loss | None = None
    balance_loss: BalanceLoss | None = None
    recompute: Collection[str] = ()
    head: Head | None = None  # of the last stage, cast once
    routings: list[dict[str, Routing]] = field(default_factory=list)  # by micro-batch, of all stages of the rank

    def __post_init__(self) -> None:
        self.routings = [{} for _ in self.micro_batches]


class Stage(Decoder):
    """A Decoder of one stage's parts, which are those of the whole one: its other parts are absent.

    The last stage's `embed_tokens`, which MTP reads, is a copy of the first's.
    """

    work: Work

    def __init__(self, whole: Decoder, *, number: int, cut: Sequence[range]) -> None:
        nn.Module.__init__(self)
        self.number, self.is_first, self.is_last = number, number == 0, number == len(cut) - 1
        self.precision, self.isolate_documents = whole.precision, whole.isolate_documents
        self.layers = nn.ModuleList(layer if i in cut[number] else Absent() for i, layer in enumerate(whole.layers))
        here = self.parts()
        for name, part in whole.named_children():
            if name != "layers":
                self.add_module(name, part if name in here else Absent())
        self.has_copy = self.is_last and not self.is_first and whole.mtp.depth > 0
        if self.has_copy:
            self.embed_tokens = copy.deepcopy(whole.embed_tokens)

    def parts(self) -> set[str]:
        """Names of the model's parts on this stage, layers left out."""
        first, last = {"embed_tokens", "memory"}, {"norm", "lm_head", "mtp"}
        return (first if self.is_first else set()) | (last if self.is_last else set())

    def forward(self, x_BTD: Tensor | None = None, *, number: Tensor) -> Any:  # type: ignore[override]
        """Pass on micro-batch `number` of the work, [1], on the host.

        x_BTD: states of the stage before; None on the first.

        Returns:
            The states for the next stage. On the last one the loss, or in a forward pass a `Forward`.
        """
        work, i = self.work, int(number)
        micro = work.micro_batches[i]
        with recomputing(work.recompute):
            last_BTD, routings = self.states(micro, x_BTD)
            result: Any = last_BTD
            if self.is_last:
                result = self.outputs(last_BTD, routings, micro, with_mtp=work.with_mtp)
                if work.loss is not None:
                    # Here, where sharded weights are whole; a step changes none, so that one cast serves all of it.
                    work.head = work.head or self.head()
                    result = work.loss(result, work.head, micro)
            elif work.balance_loss is not None and routings:
                result = _WithLoss.apply(last_BTD, work.balance_loss(routings, micro))
        work.routings[i] |= {name: Routing(*(part.detach() for part in routing)) for name, routing in routings.items()}
        return result


class _WithLoss(torch.autograd.Function):
    """x, and a loss that no later stage knows of: its gradient is 1 when the gradient of x arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.detach()  # torch's schedules refuse views, which an argument that is returned becomes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.saved_tensors[0]


def cut_off(whole: Decoder, stages: Sequence[Stage]) -> None:
    """Make the parts of `whole` absent that are on none of the `stages`, in place."""
    here = {name for stage in stages for name in stage.parts()}
    for name, _ in list(whole.named_children()):
        if name != "layers" and name not in here:
            setattr(whole, name, Absent())
    for i in range(len(whole.layers)):
        if all(isinstance(stage.layers[i], Absent) for stage in stages):
            whole.layers[i] = Absent()
