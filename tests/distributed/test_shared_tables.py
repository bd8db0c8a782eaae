"""Tables whose rows lie on several ranks give what whole tables give: rows, gradients, steps, checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.run_folder import RunFolder, load_checkpoint
from dsv3.distributed.mesh import make_mesh
from dsv3.distributed.parallel import Sizes
from dsv3.distributed.shared_tables import share_tables
from dsv3.model.layers import local
from dsv3.testing.parallel import whole_gradient
from plugins.optimizer.adamw import adamw
from tests.distributed.ranks import fitted
from tests.distributed.test_parallel import RUNS
from tests.distributed.workers import Workers

Compose = Callable[..., DictConfig]
ROWS = 11  # which neither 2 nor 4 ranks divide


def tables(rows: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Embedding(rows, 3, sparse=True), nn.EmbeddingBag(rows, 2, mode="sum", sparse=True)])


def ids_of(rank: int, rows: int, reads: str) -> Tensor:
    """[2, 5], of each rank others."""
    if reads == "own":  # of one rank only the first row, again and again
        return torch.zeros(2, 5, dtype=torch.int64) if rank == 0 else torch.full((2, 5), rows - 1)
    return torch.randint(rows, (2, 5), generator=torch.Generator().manual_seed(rank))


def used(model: nn.ModuleList, ids: Tensor) -> tuple[Tensor, Tensor]:
    found = model[0](ids), model[1](ids)
    sum((rows * torch.arange(1, rows.numel() + 1).view_as(rows)).sum() for rows in found).backward()
    return found[0].detach(), found[1].detach()


def stepped(model: nn.ModuleList, batches: list[Tensor]) -> Any:
    """Of two steps by row-wise Adagrad."""
    optimizer = adamw(
        model.named_parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, moments_dtype="float32",
        sparse_lr_scale=2.0,
    )  # fmt: skip
    optimizer.param_groups[0]["lr"] = 0.1
    looked_up, gradients = [], []
    for _ in range(2):
        looked_up += [used(model, ids) for ids in batches]
        gradients.append([whole_gradient(weight) for weight in model.parameters()])
        optimizer.step()
    sums = [optimizer.state[weight]["square_sum"] for weight in model.parameters()]
    return looked_up, gradients, [full(t.detach()) for t in model.parameters()], [full(t) for t in sums]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def over_ranks(rows: int, reads: str) -> Any:
    ranks, model = dist.get_world_size(), tables(rows)
    share_tables(model, make_mesh(Sizes(1, ranks, 1, 1), "cpu"))
    own = [ids_of(rank, rows, reads) for rank in (dist.get_rank(), dist.get_rank() + ranks)]
    each = -(-rows // ranks)
    assert all(len(local(weight)) <= each for weight in model.parameters())
    assert all(local(w.detach()).untyped_storage().nbytes() <= 4 * each * w.shape[1] for w in model.parameters())
    found = stepped(model, own)
    with torch.no_grad():
        model[0](own[0])
    return found


@pytest.mark.parametrize(
    ("rows", "ranks", "reads"), [(ROWS, 2, "any"), (ROWS, 4, "any"), (ROWS, 2, "own"), (3, 4, "any")]
)
def test_rows_gradients_and_steps_are_those_of_whole_tables(
    workers: Workers, rows: int, ranks: int, reads: str
) -> None:
    """Also where a rank is asked for nothing, and where it has no row."""
    results = workers.run(over_ranks, rows, reads, ranks=ranks)
    batches = [ids_of(rank, rows, reads) for rank in range(2 * ranks)]
    looked_up, *others = stepped(tables(rows), batches)
    for rank, (own, *ours) in enumerate(results):
        expected = [looked_up[i] for i in (rank, rank + ranks, 2 * ranks + rank, 3 * ranks + rank)]
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours, others, rtol=1e-6, atol=1e-6)


def tied_and_refused() -> bool:
    mesh = make_mesh(Sizes(1, 2, 1, 1), "cpu")
    model = tables(ROWS)
    model.append(nn.Embedding(ROWS, 3, sparse=True))
    model[2].weight = model[0].weight
    share_tables(model, mesh)
    assert model[2].weight is model[0].weight

    class Own(nn.Embedding):
        pass

    mean, padded = nn.EmbeddingBag(4, 2, sparse=True), nn.Embedding(4, 2, padding_idx=0, sparse=True)
    for table in (Own(4, 2, sparse=True), mean, padded):
        before = table.weight
        with pytest.raises(ValueError, match=r"^memory\.0: a table with sparse gradients"):
            share_tables(nn.ModuleDict({"memory": nn.ModuleList([table])}), mesh)
        assert table.weight is before
    return model[2].weight is model[0].weight


def test_tied_tables_stay_tied_and_others_are_refused_by_name(workers: Workers) -> None:
    assert workers.run(tied_and_refused, ranks=2) == [True, True]


def run_of(composed: Compose, path: Path, *overrides: str) -> DictConfig:
    return composed(
        "precision=fp32", "optimizer.newton_schulz_dtype=float32", "optimizer.eps=1e-6", "data.micro_batches=4",
        "memory=ngram", "memory.rows=1001", "run.checkpoint_every_tokens=512",
        *(f"callbacks.{name}=null" for name in ("monitor", "expert_plots", "guard")),
        f"run.dir={path}", *overrides,
    )  # fmt: skip


def train(config: DictConfig) -> None:
    fitted(config).folder.release()


@pytest.mark.parametrize(
    ("written_as", "legs"),
    [
        ("folder", ("experts 2", None)),
        pytest.param("folder", ("experts 2 x sharded 2", "sharded 2", None), marks=pytest.mark.slow),
        pytest.param("file", ("pipeline 2 x experts 2", None, "experts 2"), marks=pytest.mark.slow),
    ],
)
def test_a_run_with_tables_goes_on_with_any_number_of_ranks(
    composed: Compose, workers: Workers, tmp_path: Path, written_as: str, legs: tuple[str | None, ...]
) -> None:
    """Losses, held-out text, weights, optimiser state and averages are those of one process."""
    length = f"run.tokens={512 * len(legs)}"
    for steps, layout in enumerate(legs, start=1):
        over = (
            length,
            f"trainer.max_steps={steps}",
            f"run.checkpoint_format={written_as}",
            *RUNS.get(layout or "", ()),
        )
        config = run_of(composed, tmp_path / "ranks", *over)
        if layout:
            workers.run(train, config, ranks=config.trainer.devices)
        else:
            train(config)
    train(run_of(composed, tmp_path / "one", length))
    ours, one = RunFolder(tmp_path / "ranks"), RunFolder(tmp_path / "one")
    for table, column, rows in (("metrics/train", "loss", len(legs)), ("metrics/validation", "bpb", 6)):
        found, expected = (run.read(table)[column].to_numpy()[-rows:] for run in (ours, one))
        np.testing.assert_allclose(found, expected, rtol=2e-6)
    contents = [load_checkpoint(run.checkpoints()[-1]) for run in (ours, one)]
    states = [content["optimizer_states"][0]["state"] for content in contents]
    assert sum("square_sum" in state for state in states[0].values()) == 3
    parts = [(c["state_dict"], c["callbacks"]["EMA"]["weights"], s) for c, s in zip(contents, states, strict=True)]
    torch.testing.assert_close(*parts, rtol=1e-5, atol=1e-5)
