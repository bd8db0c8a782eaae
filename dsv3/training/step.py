"""The arithmetic of an optimiser step, without a Trainer.

    L = objective + sum of auxiliary losses of parts + sum over MoE layers of the mean of their balance losses, over
        micro-batches, each of which counts by its tokens

Gradients are those of the global batch: every term is divided by a denominator that is known before the first
micro-batch. Padding is no token: it counts in no denominator and in no load. Losses, counts and hits are added up on
the device. `read` brings all of them to the host in one transfer; nothing else in a step waits for the device.

Ranks speak three times: they sum the denominators before the first micro-batch, and at the end of the step everything
that was added up, in FP64, and the load, in int64. All that a step decides follows from these sums.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dsv3.contracts import (
    Denominators,
    Forward,
    HasAuxiliaryLoss,
    Head,
    MicroBatch,
    Models,
    Objective,
    Routing,
    Statistic,
    Step,
)
from dsv3.distributed.agree import gathered, sum_over_ranks
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.pipeline import Pipeline
from dsv3.distributed.shard import reduce_gradients
from dsv3.model.decoder import Decoder
from dsv3.model.layers import cached_weight_casts, local
from dsv3.model.load import Loads, max_violation, real_tokens
from dsv3.model.recompute import recomputing

BALANCE = Statistic("aux_loss", "nats", "aux_loss")
"""Balance losses of all MoE layers."""


class RoutingObserver(Protocol):
    """Looks on while training; changes nothing and never waits for the device."""

    def observe(self, micro: MicroBatch, routings: dict[str, Routing]) -> None:
        """Called once per micro-batch, after its backward pass; routings by MoE layer."""


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step, on the host: plain numbers and NumPy arrays."""

    tokens: int  # trained on, this step's included
    figures: Mapping[str, float]  # every `Statistic`, gradient norm, learning rate, MaxVio by layer
    loads: Mapping[str, np.ndarray]  # int64 [E] by MoE layer, over all ranks
    biases: Mapping[str, np.ndarray]  # float32 [E] by MoE layer, after this step's update
    step: int  # its number, from 1, whether its update is made or skipped
    tokens_before: int  # trained on before this step

    @property
    def loss(self) -> float:
        """The objective's loss, over the global batch."""
        return self.figures["loss"]

    def row(self) -> dict[str, float]:
        """The columns of `metrics/train`."""
        return {**self.figures, "step": self.step, "tokens": self.tokens}


@dataclass
class Sums:
    """What a rank adds up on the device in a step: FP64 scalars by name, and the load of every MoE layer."""

    loads: Loads
    denominators: Denominators  # of the whole step
    scalars: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value.detach().double()

    def over_ranks(self) -> "Sums":
        """All of it over ranks, by one FP64 and one int64 reduction; the denominators are among the scalars then."""
        loads = self.loads._replace(counts=sum_over_ranks(self.loads.counts))
        return Sums(loads, self.denominators, {**summed_over_ranks(self.scalars), **self.denominators})


def summed_over_ranks(scalars: Mapping[str, Tensor], group: Any = None) -> dict[str, Tensor]:
    """Each of them over the ranks of a group (None: all), in one FP64 reduction."""
    values = sum_over_ranks(torch.stack([value.double() for value in scalars.values()]), group)
    return dict(zip(scalars, values.unbind(), strict=True))


def tokens_of(micro: MicroBatch) -> Tensor:
    """Their number, a scalar on the device; padding is none."""
    return (micro.document_ids_BT > 0).sum()


class Losses:
    """A model's loss under an objective."""

    def __init__(self, model: Decoder, objective: Objective) -> None:
        """Raises ValueError where the objective's first figure is not its loss, or two figures have one name."""
        self.model, self.objective = model, objective
        self.parts = [module for module in model.modules() if isinstance(module, HasAuxiliaryLoss)]
        of_parts = {figure.name: figure for part in self.parts for figure in part.statistics}
        self.statistics: Sequence[Statistic] = (*objective.statistics, BALANCE, *of_parts.values())
        names = [figure.name for figure in self.statistics]
        if names[0] != "loss":
            raise ValueError(f"the first statistic of {type(objective).__name__} must be called loss, not {names[0]}")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two statistics are called {', '.join(sorted(twice))}")
        self.n_experts = {name: moe.balancing.bias.numel() for name, moe in model.moe_layers()}

    def loss(
        self, forward: Forward, head: Head, micro: MicroBatch, denominators: Denominators, tokens_seen: int, sums: Sums
    ) -> Tensor:
        """A micro-batch's share of the step's loss; its sums are added to `sums`."""
        term = self.objective.loss(forward, head, micro, denominators)
        loss = term.loss
        sums.add(term.sums)
        for part in self.parts:
            term = part.auxiliary_loss(forward, head, micro, denominators, tokens_seen)
            loss = loss + term.loss
            sums.add(term.sums)
        return loss + self.balance_loss(forward.routings, micro, denominators, tokens_seen, sums)

    def balance_loss(
        self,
        routings: Mapping[str, Routing],
        micro: MicroBatch,
        denominators: Denominators,
        tokens_seen: int,
        sums: Sums,
    ) -> Tensor:
        """A micro-batch's share of the balance losses of the layers in `routings`, which is added to `sums`."""
        share = tokens_of(micro) / denominators["tokens"].clamp(min=1)  # an objective may leave a step without any
        balance = self._balance_loss(routings, micro, tokens_seen) * share
        sums.add({BALANCE.total: balance})
        return balance

    def _balance_loss(self, routings: Mapping[str, Routing], micro: MicroBatch, tokens_seen: int) -> Tensor:
        """The sum over MoE layers of their balancing's loss."""
        loss = torch.zeros((), device=micro.tokens_BT.device)
        for name, moe in self.model.moe_layers():
            if name not in routings:  # a layer of another stage
                continue
            mask_BS = real_tokens(micro, routings[name])
            loss = loss + moe.balancing.loss(routings[name], (mask_BS.shape[0], mask_BS.shape[1]), mask_BS, tokens_seen)
        return loss


@torch.no_grad()
def held_out_figures(
    losses: Losses, models: Models, rows: Iterable[MicroBatch], names: Collection[str], tokens_seen: int
) -> dict[str, float]:
    """The objective's figures of these names over held-out rows; nothing is trained on."""
    objective, model = losses.objective, losses.model
    given = [micro.map(lambda tensor: tensor.to(model.device)) for micro in rows]
    step = objective.prepare(Step(given, tokens_seen, {}), models)
    denominators = {name: value.double() for name, value in objective.denominators(step).items()}
    sums = dict(denominators)
    head = model.head()
    for micro in step.micro_batches:
        term = objective.loss(model(micro, with_mtp=False), head, micro, denominators)
        for name, value in term.sums.items():
            sums[name] = sums.get(name, 0.0) + value.double()
    by_name = {name: float(value) for name, value in sums.items()}
    return {figure.name: value_of(figure, by_name) for figure in objective.statistics if figure.name in names}


def evened(step: Step, given: Step) -> Step:
    """The step that an objective made of the one that it was given, with padding where other ranks have more
    micro-batches. All ranks call this together."""
    if step.micro_batches is given.micro_batches:
        return step
    most = max(gathered(len(step.micro_batches)))
    more = most - len(step.micro_batches)
    padding = [step.micro_batches[0].padding()] * more
    return step._replace(micro_batches=[*step.micro_batches, *padding], filled=step.filled + more)


def take_gradients(
    losses: Losses,
    step: Step,
    *,
    backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
    recompute: Collection[str] = (),
    observers: Sequence[RoutingObserver] = (),
    mesh: Mesh | None = None,
    pipeline: Pipeline | None = None,
) -> Sums:
    """Add the gradient of the step's loss to the model's parameters; return this rank's sums over micro-batches.

    Everything that changes with time is a function of the tokens seen before the step.
    """
    model = losses.model
    own = {
        **losses.objective.denominators(step),
        "tokens": torch.stack([tokens_of(micro) for micro in step.micro_batches]).sum(),
    }
    denominators = summed_over_ranks(own, mesh.data.get_group() if mesh is not None else None)
    sums = Sums(Loads.zeros(losses.n_experts, model.device), denominators)
    if pipeline is not None:
        take_gradients_of_stages(pipeline, losses, step, sums, recompute=recompute, observers=observers)
        return sums
    with cached_weight_casts(model):
        head = model.head() if local(model.head_weight) is model.head_weight else None
        for number, micro in enumerate(step.micro_batches, start=1):
            reduce_gradients(model, number == len(step.micro_batches))
            with recomputing(recompute):
                forward = model(micro, with_mtp=True)
                of_head = head or model.head()  # a sharded one is whole from the forward pass on
                loss = losses.loss(forward, of_head, micro, denominators, step.tokens_before, sums)
            backward(loss)
            sums.loads.add(micro, forward.routings)
            if number <= len(step.micro_batches) - step.filled:
                for observer in observers:
                    observer.observe(micro, forward.routings)
    return sums


def take_gradients_of_stages(
    pipeline: Pipeline,
    losses: Losses,
    step: Step,
    sums: Sums,
    *,
    recompute: Collection[str],
    observers: Sequence[RoutingObserver],
) -> None:
    """The same by the stages of a pipeline; a rank's sums are those of its own stages."""
    denominators, before = sums.denominators, step.tokens_before
    names = {name for figure in losses.statistics for name in (figure.total, figure.over) if name is not None}
    nothing = torch.zeros((), dtype=torch.float64, device=losses.model.device)
    sums.scalars = dict.fromkeys(sorted(names - denominators.keys()), nothing)  # alike on all ranks
    routings = pipeline.step(
        step.micro_batches,
        lambda forward, head, micro: losses.loss(forward, head, micro, denominators, before, sums),
        lambda routings, micro: losses.balance_loss(routings, micro, denominators, before, sums),
        recompute=recompute,
    )
    for number, (micro, of_micro) in enumerate(zip(step.micro_batches, routings, strict=True), start=1):
        sums.loads.add(micro, of_micro)
        if number <= len(step.micro_batches) - step.filled:
            for observer in observers:
                observer.observe(micro, of_micro)


def balance(model: Decoder, loads: Loads, tokens_seen: int) -> None:
    """Show every balancing the load of the step and let it move its bias, once."""
    by_layer = loads.by_layer()
    for name, moe in model.moe_layers():
        moe.balancing.observe(by_layer[name])
        moe.balancing.update(tokens_seen)


def gradients(model: nn.Module) -> list[Tensor]:
    """This rank's parts of all gradients, as views of what the parameters have; of sparse ones (of tables that a step
    reads few rows of), the values of their rows, summed over occurrences."""
    found = []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            found.append(parameter.grad.values())
        else:
            found.append(local(parameter.grad))
    return found


def norm_of(gradients: list[Tensor]) -> Tensor:
    """Their norm together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clip_gradients(gradients: list[Tensor], norm: Tensor, largest: float) -> None:
    """Scale all gradients so that their norm together, which is `norm`, is at most `largest`."""
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))


def read(
    statistics: Sequence[Statistic], sums: Sums, grad_norm: Tensor, biases: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The step's sums, figures, loads and biases on the host, in one transfer."""
    names = list(sums.scalars)
    parts = [torch.stack([*sums.scalars.values(), grad_norm.double()]), sums.loads.counts.double()]
    sizes = [len(bias_E) for bias_E in biases.values()]
    scalars, counts, flat = (
        torch.cat([*parts, *(bias_E.double() for bias_E in biases.values())])
        .cpu()
        .split([len(names) + 1, len(sums.loads.counts), sum(sizes)])
    )
    *values, norm = scalars.tolist()
    by_name = dict(zip(names, values, strict=True))
    figures = {figure.name: value_of(figure, by_name) for figure in statistics} | {"grad_norm": norm}
    loads = sums.loads._replace(counts=counts.long()).by_layer()
    figures |= {f"max_violation/{layer}": float(max_violation(load_E)) for layer, load_E in loads.items()}
    by_layer = dict(zip(biases, flat.float().split(sizes), strict=True))
    return by_name, figures, arrays(loads), arrays(by_layer)


def arrays(by_layer: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {layer: values_E.numpy() for layer, values_E in by_layer.items()}


def value_of(figure: Statistic, sums: Mapping[str, float]) -> float:
    """The figure's value, from the step's sums and denominators."""
    total, over = sums[figure.total], 1.0 if figure.over is None else sums[figure.over]
    return figure.factor * total / over if over else float("nan")
