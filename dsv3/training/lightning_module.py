"""The LightningModule: one batch is one optimiser step.

A step's losses, summed over its micro-batches:
    L = main / (targets of the step) + lambda / D * sum_k mtp_k / (positions of the step) + mean of balancing losses
(report eq. 17, 24, 25). Everything that changes with time is a function of the tokens seen before the step.
"""

import math
from collections.abc import Collection
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn

from dsv3.contracts import IGNORE, FollowsSteps, MicroBatch, OptimizerFactory, Routing, Schedule, Step
from dsv3.model.decoder import Decoder, DecoderOutput
from dsv3.model.layers import held_weights
from dsv3.model.load import max_violation, real_tokens
from dsv3.model.losses import HeadLoss, linear_cross_entropy
from dsv3.model.recompute import recomputing

StepRecord = dict[str, Any]


class RoutingObserver(Protocol):
    """Looks on while training; changes nothing. Callbacks add themselves to `LanguageModel.observers`."""

    def observe(self, micro: MicroBatch, routings: dict[str, Routing]) -> None:
        """Called once per micro-batch, after its backward pass; routings by MoE layer."""


class UpdateGuard(Protocol):
    """Decides whether a step's gradients are used. A callback puts itself at `LanguageModel.guard`."""

    def allows(self, step: Step, loss: float, grad_norm: float, loads: dict[str, Tensor]) -> bool:
        """Called once a step, before the update; `loss` in nats per target, load by MoE layer."""


class LanguageModel(lightning.LightningModule):
    """Trains a Decoder. `training_step` does the whole optimiser step and returns what callbacks record."""

    token_bytes_V: Tensor

    def __init__(
        self,
        model: Decoder,
        *,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        grad_clip: float,
        total_tokens: int,
        token_bytes_V: Tensor,
        recompute: Collection[str] = (),
    ) -> None:
        """`total_tokens`: the length of training. `token_bytes_V`: bytes that each token stands for, int64 [V].

        `recompute`: parts whose results are not kept for the backward pass (`dsv3.model.recompute.Part`).
        """
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.grad_clip = grad_clip
        self.total_tokens = total_tokens
        self.recompute = recompute
        self.register_buffer("token_bytes_V", token_bytes_V, persistent=False)
        self.tokens_seen = 0
        self.data_state: dict[str, Any] = {}
        self.observers: list[RoutingObserver] = []
        self.guard: UpdateGuard | None = None

    @property
    def finished(self) -> bool:
        """Whether the last step is done, by tokens or by the Trainer's cap on steps."""
        return self.tokens_seen >= self.total_tokens or self.trainer.global_step == self.trainer.max_steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_factory(self.model.named_parameters())

    def training_step(self, step: Step, batch_idx: int) -> StepRecord:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        tokens = step.tokens_before
        totals = StepTotals(step)
        head_copy_VD = self.model.cast_head()
        with held_weights(self.model):
            for micro in step.micro_batches:
                with recomputing(self.recompute):
                    output = self.model(micro, with_mtp=True)
                    loss = self._loss(output, micro, totals, tokens, head_copy_VD)
                self.manual_backward(loss)
                self._observe(output.routings, micro, totals)
                for observer in self.observers:
                    observer.observe(micro, output.routings)
        norm = clip_gradients(self.model, self.grad_clip)
        rate = self.schedule(tokens)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        if self.guard is None or self.guard.allows(step, totals.nll / totals.targets, norm.item(), totals.loads):
            optimizer.step()
        optimizer.zero_grad()
        for _, moe in self.model.moe_layers():
            moe.balancing.update(tokens)
        if isinstance(self.model.precision, FollowsSteps):
            self.model.precision.end_step()
        self.tokens_seen = tokens + totals.positions
        self.data_state = step.state_after
        return totals.record(self.token_bytes_V) | {
            "step": self.trainer.global_step,
            "tokens": self.tokens_seen,
            "grad_norm": norm.item(),
            "lr": rate,
            "mtp_weight": self.model.mtp.weight(tokens),
        }

    def _loss(
        self, output: DecoderOutput, micro: MicroBatch, totals: "StepTotals", tokens: int, copy_VD: Tensor
    ) -> Tensor:
        """Of one micro-batch; `copy_VD` is the head's weight as it is multiplied."""
        head = self.model.head_weight
        main = linear_cross_entropy(output.hidden_BTD.flatten(0, 1), head, micro.targets_BT.flatten(), copy_VD=copy_VD)
        loss = main.total / totals.targets
        totals.add_main(main)
        for depth, prediction in enumerate(output.predictions):
            hidden_ND = prediction.hidden_BSD.flatten(0, 1)
            mtp = linear_cross_entropy(hidden_ND, head, prediction.targets_BS.flatten(), copy_VD=copy_VD)
            scale = self.model.mtp.weight(tokens) / self.model.mtp.depth
            loss = loss + scale * mtp.total / totals.positions
            totals.add_mtp(depth, mtp)
        auxiliary = self._balancing_loss(output.routings, micro, tokens) / totals.micro_batches
        totals.auxiliary += auxiliary.item()
        return loss + auxiliary

    def _balancing_loss(self, routings: dict[str, Routing], micro: MicroBatch, tokens: int) -> Tensor:
        loss = torch.zeros((), device=micro.tokens_BT.device)
        for name, moe in self.model.moe_layers():
            mask_BT = real_tokens(micro, routings[name])
            loss = loss + moe.balancing.loss(routings[name], (mask_BT.shape[0], mask_BT.shape[1]), mask_BT, tokens)
        return loss

    def _observe(self, routings: dict[str, Routing], micro: MicroBatch, totals: "StepTotals") -> None:
        """Count the load of one micro-batch, over all ranks, once. Padding is no load."""
        for name, moe in self.model.moe_layers():
            routing = routings[name]
            experts_NK = routing.experts_NK[real_tokens(micro, routing).flatten()]
            counts_E = torch.bincount(experts_NK.flatten(), minlength=routing.affinities_NE.shape[1])
            counts_E = self.trainer.strategy.reduce(counts_E, reduce_op="sum")
            moe.balancing.observe(counts_E)
            totals.add_load(name, counts_E)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dsv3"] = {"tokens_seen": self.tokens_seen, "data_state": self.data_state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["dsv3"]["tokens_seen"]
        self.data_state = checkpoint["dsv3"]["data_state"]


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale all gradients so that their norm together is at most `largest`; return what it was.

    Sparse gradients (of tables that a step reads few rows of) are summed over occurrences first.
    """
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


class StepTotals:
    """Sums over the micro-batches of one step, and the denominators that are known before the first of them."""

    def __init__(self, step: Step) -> None:
        self.micro_batches = len(step.micro_batches)
        self.positions = sum(micro.tokens_BT.numel() for micro in step.micro_batches)
        self.targets_N = torch.cat([micro.targets_BT.flatten() for micro in step.micro_batches])
        self.targets = int((self.targets_N != IGNORE).sum())
        self.nll = 0.0
        self.auxiliary = 0.0
        self.mtp: dict[int, list[float]] = {}
        self.loads: dict[str, Tensor] = {}

    def add_main(self, loss: HeadLoss) -> None:
        self.nll += loss.total.item()

    def add_mtp(self, depth: int, loss: HeadLoss) -> None:
        new = (loss.total.item(), loss.correct.item(), loss.targets.item())
        self.mtp[depth] = [a + b for a, b in zip(self.mtp.get(depth, (0, 0, 0)), new, strict=True)]

    def add_load(self, name: str, counts_E: Tensor) -> None:
        self.loads[name] = self.loads[name] + counts_E if name in self.loads else counts_E

    def record(self, token_bytes_V: Tensor) -> StepRecord:
        """Losses in nats per target, bits per byte of the trained text, load by MoE layer (int64 [E])."""
        n_bytes = int(token_bytes_V[self.targets_N[self.targets_N != IGNORE]].sum())
        record: StepRecord = {
            "loss": torch.tensor(self.nll / self.targets, dtype=torch.float64),  # Lightning wants a tensor here
            "bpb": self.nll / math.log(2) / max(n_bytes, 1),
            "aux_loss": self.auxiliary,
            "loads": self.loads,
        }
        for depth, (total, correct, count) in self.mtp.items():
            record[f"mtp{depth + 1}_loss"] = total / self.positions
            record[f"mtp{depth + 1}_accuracy"] = correct / max(count, 1)
        for name, counts_E in self.loads.items():
            record[f"max_violation/{name}"] = max_violation(counts_E)
        return record
