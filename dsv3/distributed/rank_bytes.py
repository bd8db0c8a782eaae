"""Layout of a run: bytes that a rank holds from one step to the next, counted on its parts of the weights.

    parameters  FP32, with the padding by which FSDP2 makes the parts of all ranks equal
    gradients   as many, when the step's last backward pass is over; none of tables, whose gradients are sparse
    optimiser   what the configured optimiser keeps of each element or row, such as moments; scalars are left out
    ema         averaged weights, FP32, in host memory

Weights that are gathered for a pass, and activations, come on top. So do whole gradients where a rank has several
micro-batches per step: FSDP2 adds them up before it shards the sum.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv3.contracts import OptimizerFactory, StepsMatrices
from dsv3.distributed.parallel import Sizes
from dsv3.model.decoder import Decoder
from dsv3.model.layers import joined_weights, local
from dsv3.model.parameters import is_table

FP32 = 4
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Held(NamedTuple):
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimiser: int
    ema: int

    @property
    def total(self) -> int:
        return sum(self)


def held_by(
    model: Decoder,
    optimizer: OptimizerFactory,
    *,
    averaged: bool,
    copies: Collection[nn.Parameter] = (),
    times: Mapping[str, int] | None = None,
) -> Held:
    """What this rank holds of `model`, which may be on the meta device; the optimiser has not stepped yet.

    averaged: whether the run averages weights. copies: weights besides the model's, which are gathered and have
    gradients but no optimiser. times: of the parameter of each name, as how many it counts; None: as one.
    """
    tables = {name for name, parameter in model.named_parameters() if is_table(model, parameter)}
    state = {**state_of_dense(model, optimizer, without=tables), **state_of_tables(model, optimizer, tables)}
    parameters = gradients = kept = average = 0
    for name, parameter in model.named_parameters():
        count = times[name] if times is not None else 1
        part = local(parameter.detach())
        parameters += count * part.untyped_storage().nbytes()
        gradients += 0 if name in tables else count * part.untyped_storage().nbytes()
        kept += count * sum(_bytes(tensor, parameter, part) for tensor in state[name])
        average += count * part.numel() * FP32 if averaged else 0
    of_copies = sum(local(copy.detach()).untyped_storage().nbytes() for copy in copies)
    return Held(parameters + of_copies, gradients + of_copies, kept, average)


def _bytes(state: Tensor, parameter: Tensor, part: Tensor) -> int:
    """Of a rank's part of one tensor of an optimiser's state: sharded as its parameter is, where it has that one's
    shape or a number for each row."""
    is_shared = state.shape == parameter.shape[: state.ndim]
    return (math.prod(part.shape[: state.ndim]) if is_shared else state.numel()) * state.element_size()


def state_of_dense(model: Decoder, optimizer: OptimizerFactory, *, without: Collection[str]) -> dict[str, list[Tensor]]:
    """What the optimiser keeps of each whole parameter after a step, as tensors without memory."""
    with FakeTensorMode(), torch.device("cpu"):
        twins = {n: nn.Parameter(torch.empty(p.shape)) for n, p in model.named_parameters() if n not in without}
        made = optimizer(twins.items())
        if isinstance(made, StepsMatrices):
            own = dict(model.named_parameters())
            rows = joined_weights(model)
            made.separate({twin: rows[own[name]] for name, twin in twins.items() if own[name] in rows})
        return _state_after_step(made, twins)


def state_of_tables(model: Decoder, optimizer: OptimizerFactory, tables: Collection[str]) -> dict[str, list[Tensor]]:
    """The same of tables with sparse gradients, found out on twins of two rows: fake tensors cannot be sparse."""
    if not tables:
        return {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    twins = {name: nn.Parameter(torch.zeros([min(2, size) for size in shape])) for name, shape in shapes.items()}
    made = optimizer(twins.items())
    found = _state_after_step(made, {name: twins[name] for name in tables}, sparse=True)
    return {
        name: [tensor.new_empty((), device="meta").expand(_of_rows(tensor, shapes[name])) for tensor in tensors]
        for name, tensors in found.items()
    }


def _of_rows(state: Tensor, shape: torch.Size) -> torch.Size:
    """The shape of a table's state, from that of its small twin's."""
    return torch.Size(size for size, _ in zip(shape, state.shape))


def _state_after_step(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, sparse: bool = False
) -> dict[str, list[Tensor]]:
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter).to_sparse(1) if sparse else torch.zeros_like(parameter)
    optimizer.step()
    states = {name: optimizer.state[parameter].values() for name, parameter in parameters.items()}
    return {name: [t for t in state if isinstance(t, Tensor) and t.ndim] for name, state in states.items()}


def layout_line(sizes: Sizes, held: Held) -> str:
    """The layout in a sentence, with what rank 0 holds: as much as any of its stage."""
    ranks = "1 rank" if sizes.world == 1 else f"{sizes.world} ranks"
    stages = f" in {sizes.stages} stages of {sizes.data}" if sizes.stages > 1 else ""
    nodes = f" ({sizes.nodes} nodes)" if sizes.nodes > 1 else ""
    experts = f"experts over {sizes.experts}{nodes}, the rest" if sizes.experts > 1 else "all weights"
    return (
        f"{ranks}{stages}: {experts} over {sizes.data}; {text_of_bytes(held.parameters)} of parameters, "
        f"{text_of_bytes(held.gradients)} of gradients, {text_of_bytes(held.optimiser)} of optimiser state per rank"
        + (f", {text_of_bytes(held.ema)} of averaged weights" if held.ema else "")
    )


def text_of_bytes(count: float) -> str:
    """1.9 MB of 1,900,000."""
    for size, unit in UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
