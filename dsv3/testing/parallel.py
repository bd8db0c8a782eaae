"""Do parts work on a model that is divided among ranks?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsv3.build import build_model
from dsv3.config.compose import hydra_flags, opened
from dsv3.config.part import part
from dsv3.contracts import Step
from dsv3.distributed.agree import sum_over_ranks
from dsv3.distributed.mesh import make_mesh
from dsv3.distributed.parallel import Sizes
from dsv3.distributed.shard import shard, whole
from dsv3.testing.ranks import on_ranks
from dsv3.testing.requirement import require
from dsv3.testing.small_model import micro_batch
from dsv3.training.step import Losses, gradients, norm_of, take_gradients

RANKS = 2
SIZES = {"sharded": Sizes(1, RANKS, 1, 1), "experts": Sizes(1, 1, 1, RANKS)}
BASE = ("model=tiny", "precision=fp32", "logger=none", "benchmarks=none")
SMALLEST = 1e-20


class Taken(NamedTuple):
    """One step's results over all ranks."""

    gradients: dict[str, Tensor]
    sums: dict[str, float]  # of the step, by name; `squares`: of the gradients
    counts: Tensor  # int64, load of all experts


def check_parallel(*overrides: str, tolerance: float = 1e-6) -> None:
    """Raise AssertionError, saying what is wrong, unless a step over two ranks is the step of one process.

    The weights are sharded in one step (`parallel=sharded`), and the experts spread in another (`parallel=experts`).

    overrides: of conf/train.yaml, on top of model=tiny and precision=fp32, such as `router=mine`; `--config-dir` and a
        folder first where it has options of your own.
    tolerance: of each gradient, relative to its largest element.
    """
    configs = {name: _composed(overrides, f"parallel={name}", f"trainer.devices={RANKS}") for name in SIZES}
    one = take_step(_composed(overrides), None)
    found = on_ranks(take_steps, [(configs[name], sizes) for name, sizes in SIZES.items()], ranks=RANKS)[0]
    for name, taken in zip(SIZES, found, strict=True):
        _compare(taken, one, f"parallel={name} on {RANKS} ranks", tolerance)


def _composed(overrides: Sequence[str], *more: str) -> DictConfig:
    flags = hydra_flags([*overrides])
    with opened("train", flags) as composer:
        config = composer.compose([*BASE, *flags.overrides, *more])
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def take_steps(asked: Sequence[tuple[DictConfig, Sizes]]) -> list[Taken]:
    return [take_step(config, sizes) for config, sizes in asked]


def take_step(config: DictConfig, sizes: Sizes | None, *, micro_batches: int = 3) -> Taken:
    """The same step in one process (`sizes` None) and over the ranks of this process group."""
    model, mesh = build_model(config), None
    micro = [micro_batch(2, 32, seed=seed, vocab_size=config.model.vocab_size) for seed in range(micro_batches)]
    own, filled = micro, 0
    if sizes is not None:
        mesh = make_mesh(sizes, "cpu")
        shard(model, mesh)
        each = -(-len(micro) // sizes.data)
        numbers = range(mesh.data_rank, each * sizes.data, sizes.data)  # the last ranks have padding
        own = [micro[i] if i < len(micro) else micro[0].padding() for i in numbers]
        filled = sum(i >= len(micro) for i in numbers)
    objective = part(config.objective)(token_bytes_V=torch.ones(config.model.vocab_size, dtype=torch.int64))
    own_sums = take_gradients(Losses(model, objective), Step(own, 0, {}, filled), recompute=config.recompute, mesh=mesh)
    own_sums.add({"squares": norm_of(gradients(model)).double().square()})
    sums = own_sums.over_ranks()
    found = {name: whole_gradient(p) for name, p in model.named_parameters() if p.grad is not None}
    return Taken(found, {name: value.item() for name, value in sums.scalars.items()}, sums.loads.counts)


def whole_gradient(parameter: nn.Parameter) -> Tensor:
    """Dense, on every rank; all of them call this together."""
    gradient: Any = parameter.grad
    if not gradient.is_sparse:
        return whole(gradient)
    return sum_over_ranks(gradient.to_dense()) if isinstance(parameter, DTensor) else gradient.to_dense()


def _compare(taken: Taken, one: Taken, where: str, tolerance: float) -> None:
    require(
        torch.equal(taken.counts, one.counts),
        f"{where}: the load of the experts must be that of one process, to the token: a router may choose by nothing "
        "but its own tokens, weights and bias",
    )
    missing = sorted(one.gradients.keys() ^ taken.gradients.keys())
    require(not missing, f"{where}: {', '.join(missing)} must have a gradient here as in one process")
    for name, gradient in one.gradients.items():
        error = float((taken.gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=SMALLEST))
        require(
            error <= tolerance,
            f"{where}: the gradient of {name} differs from that of one process by {error:.1e} of its largest element, "
            f"and may by {tolerance:.0e}: losses must be sums divided by the step's denominators, never means over "
            "what one rank has, and every gradient must reach the rank that holds the weight",
        )
