"""Pipeline parallelism: a Decoder in stages on the ranks of a process group, run by torch's schedules.

    schedule                  stages per rank   rank r of P holds
    1f1b                      1                 r
    interleaved_1f1b          any number        r, r + P, r + 2 P, ...
    interleaved_zero_bubble   any number        r, r + P, r + 2 P, ...
    zbv, dualpipev            2                 r and 2 P - 1 - r

Gradients are those of one process: losses come divided by what a step divides by, so that nothing is scaled here. The
last stage computes the whole loss of its micro-batch, each other one adds the balance losses of its own layers.

MTP, on the last stage, embeds tokens by a copy of the first stage's embedding. The copy is in no module of the model:
gradient norm, optimiser, averages and checkpoints never see it. Its gradient goes home after the schedule, and
`refresh` brings the weight back after the optimiser's step.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, schedules

from dsv3.config.micro_batches import unfit
from dsv3.contracts import Forward, HasAuxiliaryLoss, MicroBatch, Routing
from dsv3.distributed.parallel import ScheduleName
from dsv3.distributed.stage import BalanceLoss, Loss, Stage, Work, cut_off, layers_of_stages
from dsv3.model.decoder import Decoder
from dsv3.model.layers import cached_weight_casts, local


class Kind(NamedTuple):
    """A schedule of torch's."""

    make: Callable[..., Any]
    chunks: int  # stages per rank, where nothing else is asked for
    interleaved: bool  # with any number of stages per rank
    is_v: bool  # the last rank's stages follow each other, and the first rank has the last one too
    splits: bool  # the backward pass: gradients of weights come after those of states


KINDS: dict[ScheduleName, Kind] = {
    "1f1b": Kind(schedules.Schedule1F1B, 1, interleaved=False, is_v=False, splits=False),
    "interleaved_1f1b": Kind(schedules.ScheduleInterleaved1F1B, 2, interleaved=True, is_v=False, splits=False),
    "interleaved_zero_bubble": Kind(
        schedules.ScheduleInterleavedZeroBubble, 2, interleaved=True, is_v=False, splits=True
    ),
    "zbv": Kind(schedules.ScheduleZBVZeroBubble, 2, interleaved=False, is_v=True, splits=True),
    "dualpipev": Kind(schedules.ScheduleDualPipeV, 2, interleaved=False, is_v=True, splits=True),
}


def chunks_of(schedule: ScheduleName, chunks: int | None) -> int:
    """Stages per rank.

    Raises:
        ValueError: the schedule has another number of them.
    """
    kind = KINDS[schedule]
    if chunks is None:
        return kind.chunks
    if not kind.interleaved and chunks != kind.chunks:
        raise ValueError(f"parallel.chunks={chunks}: must be {kind.chunks} where parallel.schedule={schedule}, or null")
    return chunks


def ranks_of_stages(schedule: ScheduleName, ranks: int, chunks: int) -> list[int]:
    """The rank that holds each stage."""
    if KINDS[schedule].is_v:
        return [*range(ranks), *reversed(range(ranks))]
    return list(range(ranks)) * chunks


class Pipeline:
    """The stages of a model that are on this rank, and what all ranks of the group compute with theirs."""

    def __init__(
        self, model: Decoder, *, group: ProcessGroup, schedule: ScheduleName, chunks: int | None = None
    ) -> None:
        """Cut `model` in place: what is not on this rank becomes absent, names of what is stay. All ranks of `group`
        call this together, with equal weights.

        `chunks`: stages per rank; None: as the schedule has it.

        Raises:
            ValueError: the model cannot be cut so.
        """
        self.group, self.schedule = group, schedule
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.chunks = chunks_of(schedule, chunks)
        self.rank_of_stage = ranks_of_stages(schedule, self.ranks, self.chunks)
        self.model, self.dim = model, model.embed_tokens.embedding_dim
        self.cut = layers_of_stages(len(model.layers), model.mtp.depth, len(self.rank_of_stage))
        _check(model, schedule, len(self.cut))
        numbers = [number for number, rank in enumerate(self.rank_of_stage) if rank == self.rank]
        self.stages = [Stage(model, number=number, cut=self.cut) for number in numbers]
        self._has_copy = len(self.cut) > 1 and model.mtp.depth > 0
        cut_off(model, self.stages)
        self._schedules: dict[tuple[int, torch.Size], tuple[Any, list[PipelineStage]]] = {}

    @property
    def has_loss(self) -> bool:
        """Whether the last stage is on this rank."""
        return self.rank == self.rank_of_stage[-1]

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Loss,
        balance_loss: BalanceLoss,
        *,
        recompute: Collection[str] = (),
    ) -> list[dict[str, Routing]]:
        """Add the gradients of all micro-batches to the parameters. All ranks of the group call this together, with the
        same micro-batches; `loss` is called on the last stage's rank alone.

        `recompute`: parts whose results are not kept for the backward pass (`dsv3.model.recompute.Part`).

        Returns:
            Of each micro-batch, the routings of this rank's MoE layers, without gradients.

        Raises:
            ValueError: the schedule cannot run so many micro-batches, or they differ in shape.
        """
        if why := unfit(self.schedule, self.ranks, len(micro_batches)):
            raise ValueError(f"parallel.schedule={self.schedule}: {why}; choose data.micro_batch_size accordingly")
        shape = micro_batches[0].tokens_BT.shape
        if any(micro.tokens_BT.shape != shape for micro in micro_batches):
            raise ValueError("the micro-batches of a step must have one shape in a pipeline")
        schedule, stages = self.order(len(micro_batches), shape)
        work = self._give(Work(micro_batches, True, loss, balance_loss, recompute))
        numbers = torch.arange(len(micro_batches))
        with cached_weight_casts(self.model):
            schedule.step(number=numbers, target=numbers, return_outputs=False)
        self._give(None)
        for stage in stages:
            stage.clear_runtime_states()  # gradients of what was received, or they would last until the next step
        self._bring_gradient_home()
        return work.routings

    @torch.no_grad()
    def forward(self, micro: MicroBatch, *, with_mtp: bool = False) -> tuple[Forward | None, dict[str, Routing]]:
        """Pass a micro-batch through all stages, without gradients. All ranks of the group call this together, and
        `dsv3.distributed.shard.release` what was gathered for it before weights change.

        Returns:
            What the model gives for it, on the last stage's rank; and the routings of this rank's MoE layers.
        """
        work = self._give(Work([micro], with_mtp))
        passed: Any = None
        for stage in self.stages:
            before = None if stage.is_first else self.rank_of_stage[stage.number - 1]
            if before is not None and before != self.rank:
                passed = self._empty(micro.tokens_BT.shape, self.model.device)
                dist.recv(passed, group=self.group, group_src=before)
            passed = stage(passed, number=torch.zeros(1, dtype=torch.int64))
            after = self.rank if stage.is_last else self.rank_of_stage[stage.number + 1]
            if after != self.rank:
                dist.send(passed, group=self.group, group_dst=after)
        self._give(None)
        return (passed if self.has_loss else None), work.routings[0]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the embedding's weight to MTP's copy of it: after every optimiser step, and where weights were loaded.
        All ranks of the group call this together."""
        if self._has_copy:
            home = self.rank_of_stage[0]
            weight = self._carry(home, self.rank_of_stage[-1], lambda: self.model.embed_tokens.weight)
            if weight is not None:
                local(self.stages[-1].embed_tokens.weight).copy_(weight)

    @torch.no_grad()
    def _bring_gradient_home(self) -> None:
        if self._has_copy:
            copied = self.stages[-1].embed_tokens
            grad = self._carry(self.rank_of_stage[-1], self.rank_of_stage[0], lambda: copied.weight.grad)
            if grad is not None:
                of_embedding = self.model.embed_tokens.weight.grad
                assert of_embedding is not None
                local(of_embedding).add_(grad)
            if self.has_loss:
                copied.weight.grad = None

    def _carry(self, source: int, target: int, tensor: Callable[[], Any]) -> Tensor | None:
        """A tensor of the embedding's shape from one rank to another, which may be the same; None on the others."""
        if self.rank not in (source, target):
            return None
        if self.rank == source:
            values = local(tensor())
            if source == target:
                return values
            dist.send(values, group=self.group, group_dst=target)
            return None
        end = self.model if self.rank == self.rank_of_stage[0] else self.stages[-1]
        values = torch.empty_like(local(end.embed_tokens.weight))
        dist.recv(values, group=self.group, group_src=source)
        return values

    def order(self, number: int, shape: torch.Size) -> tuple[Any, list[PipelineStage]]:
        """Torch's schedule of so many micro-batches of a shape [B, T], and the stages that it runs here. Made once:
        their buffers are of fixed sizes."""
        key = (number, shape)
        if key not in self._schedules:
            kind, device = KINDS[self.schedule], self.model.device
            # Metadata that is given: where torch finds it out, it runs every stage once more and load counts twice.
            states, loss = self._empty(shape, "meta").requires_grad_(), torch.empty((), device="meta").requires_grad_()
            stages = [
                PipelineStage(
                    stage, stage.number, len(self.cut), device, group=self.group,
                    input_args=() if stage.is_first else (states,), output_args=(loss if stage.is_last else states,),
                )
                for stage in self.stages
            ]  # fmt: skip
            given = stages[0] if self.schedule == "1f1b" else stages
            made = kind.make(given, number, loss_fn=lambda loss, _: loss, scale_grads=False)
            self._schedules[key] = made, stages
        return self._schedules[key]

    def _empty(self, shape: torch.Size, device: torch.device | str) -> Tensor:
        return torch.empty(*shape, self.dim, dtype=self.model.precision.activation_dtype, device=device)

    def _give(self, work: Work | None) -> Any:
        for stage in self.stages:
            stage.work = work  # type: ignore[assignment]
        return work


def _check(model: Decoder, schedule: ScheduleName, stages: int) -> None:
    """Raises ValueError for what a model may have in one process alone."""
    if stages == 1:
        return
    if KINDS[schedule].splits and model.mtp.depth > 1:
        # MTP reads its embedding once for each depth, a later one of which leads to an earlier one: torch would run
        # that part of the graph twice.
        raise ValueError(
            f"mtp.depth={model.mtp.depth}: must be at most 1 where parallel.schedule={schedule} splits the backward "
            "pass; use parallel.schedule=1f1b or interleaved_1f1b"
        )
    if model.lm_head.weight is model.embed_tokens.weight:
        raise ValueError(
            "model.tie_embeddings=true: embedding and head are on different stages of a pipeline; set it to false, or "
            "use another parallel="
        )
    for name, module in model.named_modules():
        if isinstance(module, HasAuxiliaryLoss) and not name.startswith("mtp"):
            raise ValueError(
                f"{name}: has a loss of its own, which only MTP may have in a pipeline; use another parallel="
            )
