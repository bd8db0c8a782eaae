"""Checkpoint folders: written by any number of ranks, read by any other, whole or not taken for a checkpoint."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dsv3.build import build_model
from dsv3.checkpoint.checkpoint_folder import MANIFEST, META, Stored, described, map_named
from dsv3.checkpoint.huggingface import export_run
from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.run_folder import RunFolder, is_valid, load_checkpoint
from dsv3.config.preflight import check
from dsv3.distributed import save_folder as saving
from dsv3.distributed.mesh import make_mesh
from dsv3.distributed.parallel import Sizes
from dsv3.distributed.save_folder import outline, save_folder, shards_of
from dsv3.training.resume import prepare, refuse_unusable
from dsv3.training.strategy import SeveralRanks
from tests.config.looking import BASE
from tests.distributed.ranks import fitted
from tests.distributed.workers import Workers
from tests.synthetic import TARGETS

Compose = Callable[..., DictConfig]

LAYOUTS = {
    "experts 2 x sharded 2": ("parallel=experts", "parallel.experts=2", "trainer.devices=4"),
    "sharded 2": ("parallel=sharded", "trainer.devices=2"),
    "one process": (),
}
STEP = 512  # tokens


def run_of(composed: Compose, path: Path, steps: int, *overrides: str) -> DictConfig:
    """4 steps, each with a checkpoint. Newton-Schulz in FP32, and an epsilon above the rounding of a zero gradient."""
    return composed(
        "precision=fp32", "optimizer.newton_schulz_dtype=float32", "optimizer.eps=1e-6", "data.micro_batches=4",
        f"run.tokens={4 * STEP}", f"run.checkpoint_every_tokens={STEP}", "run.keep_checkpoints=9",
        *(f"callbacks.{name}=null" for name in ("monitor", "validate", "expert_plots", "guard")),
        "run.checkpoint_format=folder", f"run.dir={path}", f"trainer.max_steps={steps}",
        *overrides,
    )  # fmt: skip


def train(config: DictConfig) -> None:
    fitted(config).folder.release()


def train_gathering_nothing(config: DictConfig) -> None:
    """On ranks none of which may make a sharded tensor whole."""

    def refuse(tensor: DTensor, **settings: Any) -> Tensor:
        raise AssertionError("a tensor was gathered")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", refuse)
        train(config)


def tensors(content: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    map_named(found.__setitem__, content)
    return found


def assert_close(ours: Any, theirs: Any) -> None:
    mine, others = tensors(ours), tensors(theirs)
    assert mine.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def in_a_file(composed: Compose, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """4 steps in one process, which writes files."""
    path = tmp_path_factory.mktemp("file")
    train(run_of(composed, path, -1, "run.checkpoint_format=file"))
    return RunFolder(path)


@pytest.fixture(scope="module")
def elastic(composed: Compose, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same on 4 ranks, then 2, then 1, then 4, which write folders."""
    path = tmp_path_factory.mktemp("folder")
    for steps, layout in enumerate(("experts 2 x sharded 2", "sharded 2", "one process", "experts 2 x sharded 2"), 1):
        config = run_of(composed, path, steps, *LAYOUTS[layout])
        ranks = config.trainer.devices
        if ranks > 1:
            workers.run(train_gathering_nothing, config, ranks=ranks)
        else:
            train(config)
    return RunFolder(path)


@pytest.fixture
def run(elastic: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of that run, to damage."""
    monkeypatch.chdir(tmp_path)
    return RunFolder(shutil.copytree(elastic.path, tmp_path / "run"))


def test_any_number_of_ranks_goes_on_from_a_folder(elastic: RunFolder, in_a_file: RunFolder) -> None:
    """And none of them gathers a tensor."""
    assert [len(list(each.glob("shard-*"))) for each in elastic.checkpoints()] == [4, 2, 1, 4]
    ours, theirs = (run.read("metrics/train").loss.to_numpy() for run in (elastic, in_a_file))
    assert len(ours) == 4
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    ours, theirs = (run.read("metrics/experts") for run in (elastic, in_a_file))
    for column in ("load", "bias"):
        assert [list(row) for row in ours[column]] == [list(row) for row in theirs[column]]


def test_a_folder_of_four_ranks_holds_what_the_file_of_one_holds(elastic: RunFolder, in_a_file: RunFolder) -> None:
    ours, theirs = (load_checkpoint(run.checkpoints()[-1]) for run in (elastic, in_a_file))
    assert ours.keys() == theirs.keys()
    assert_close(ours, theirs)
    assert ours["dsv3"]["tokens_seen"] == theirs["dsv3"]["tokens_seen"] == 4 * STEP
    states = [content["optimizer_states"][0] for content in (ours, theirs)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    assert [group["params"] for group in states[0]["param_groups"]] == [g["params"] for g in states[1]["param_groups"]]


def test_large_tensors_stay_on_disk_until_they_are_used(run: RunFolder) -> None:
    path = run.checkpoints()[-1]
    lazy, whole = load_checkpoint(path, mmap=True), load_checkpoint(path)
    averaged = lazy["callbacks"]["EMA"]["weights"]
    assert all(isinstance(value, Stored) for value in (*lazy["state_dict"].values(), *averaged.values()))
    name, stored = next(iter(lazy["state_dict"].items()))
    assert stored.shape == whole["state_dict"][name].shape
    assert torch.equal(stored.read(), whole["state_dict"][name])
    rest = {key: value for key, value in lazy["callbacks"].items() if key != "EMA"}
    leaves = torch.utils._pytree.tree_leaves([rest, lazy["dsv3"], lazy["loops"]])
    assert not any(isinstance(leaf, Stored) for leaf in leaves)


def test_evaluation_and_export_read_a_folder_as_they_read_a_file(run: RunFolder, tmp_path: Path) -> None:
    newest = run.checkpoints()[-1]
    expected = load_checkpoint(newest)
    filed = RunFolder(shutil.copytree(run.path, tmp_path / "filed"))
    for folder in filed.checkpoints():
        shutil.rmtree(folder)
    torch.save(expected, filed.checkpoint_path(4 * STEP))
    for named in (run.path, newest):
        loaded = load_run(named, allow=TARGETS)
        assert (loaded.file, loaded.tokens, loaded.folder.path.resolve()) == (newest, 4 * STEP, run.path)
        assert loaded.ema_weights is not None
        assert_close(loaded.model.state_dict(), load_run(filed.path, allow=TARGETS).model.state_dict())
    out = [tmp_path / "of_folder", tmp_path / "of_file"]
    for checkpoint, place in zip((newest, filed.path), out, strict=True):
        export_run(checkpoint, place, weights="ema", mtp=True, dtype=torch.float32, max_shard_bytes=10**9)
    assert (out[0] / "model.safetensors").read_bytes() == (out[1] / "model.safetensors").read_bytes()


def test_a_run_branches_from_a_folder(composed: Compose, run: RunFolder, tmp_path: Path) -> None:
    start, branch = run.checkpoints()[1], RunFolder(tmp_path / "branch")
    assert check("train", [*BASE, f"resume={start}"]) == []
    config = run_of(composed, branch.path, -1, f"resume={start}")
    assert refuse_unusable(config, branch, build_model(config)) == start
    with pytest.raises(ValueError, match=r"another model: it has embed_tokens\.weight of shape"):
        refuse_unusable(config, branch, build_model(run_of(composed, branch.path, -1, "model.dim=32")))
    assert prepare(config, branch) == start
    branch.release()
    (start / MANIFEST).unlink()
    (problem,) = check("train", [*BASE, f"resume={start}"])
    assert problem.key == "resume"


def test_old_folders_are_deleted_and_the_format_may_change(composed: Compose, run: RunFolder) -> None:
    kept = ("run.keep_checkpoints=2", f"run.tokens={4 * STEP}")
    run.drop_after(3 * STEP)
    assert [path.is_dir() for path in run.checkpoints()] == [True] * 3
    train(run_of(composed, run.path, -1, "run.checkpoint_format=file", *kept))
    assert [path.is_dir() for path in run.checkpoints()] == [True, False]
    train(run_of(composed, run.path, -1, *kept))  # nothing is left to train: it is saved once more, over the file
    assert all(is_valid(path) for path in run.checkpoints())
    assert not list(run.path.rglob(".*.tmp"))


def test_a_format_that_is_none_is_refused_by_name() -> None:
    (problem,) = check("train", [*BASE, "run.checkpoint_format=zip"])
    assert str(problem) == "run.checkpoint_format=zip: must be one of file, folder."


CONTENT: dict[str, Any] = {"dsv3": {"tokens_seen": 1}, "callbacks": {}, "state_dict": {}}


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    tied = torch.randn(4, 3)
    content = CONTENT | {
        "state_dict": {"a": tied, "b": tied, "rows": tied[1:3], "turned": tied.T, "bf16": tied.bfloat16()},
        "callbacks": {"none": torch.zeros(0, 3), "step": torch.tensor(7.0), "sparse": tied.to_sparse()},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3)}, 11: {"done": torch.tensor([True])}}}],
        "text": ["a", None, 3, (4, 5)],
    }
    save_folder(tmp_path / "x.ckpt", content, {})
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    assert loaded["text"] == content["text"]
    assert loaded["callbacks"].pop("sparse").to_dense().equal(tied)
    content["callbacks"].pop("sparse")
    ours, theirs = tensors(loaded), tensors(content)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def save_small(path: Path, tokens: int, fault: str = "") -> None:
    """Ranks save a small content as the checkpoint after `tokens`; `fault` says who ends or fails in the middle."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(torch.arange(30.0).view(10, 3) + tokens, mesh, [Shard(0)])
    content = CONTENT | {"state_dict": {"w": weight, "own": torch.ones(2)}, "dsv3": {"tokens_seen": tokens}}
    shards_written = saving._write_shards

    def end(*arguments: Any) -> None:
        if "fails" in fault:
            raise OSError(28, "No space left on device")
        os._exit(1)

    def write_shards(*arguments: Any) -> None:
        shards_written(*arguments)
        if "after its shard" in fault and dist.get_rank() == 1:
            end()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_write_shards", write_shards)
        if "in its shard" in fault and dist.get_rank() == 1:
            patch.setattr("torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data", end)
        if "before meta" in fault:
            patch.setattr(saving, "_finish", end)
        elif "before the manifest" in fault:
            patch.setattr(saving, "_flush_to_disk", end)
            patch.setattr(Path, "write_text", end)
        elif "before the name" in fault:
            patch.setattr(saving, "put_in_place", end)
        save_folder(RunFolder(path).checkpoint_path(tokens), outline(content), shards_of(content))


def save_stages(path: Path) -> None:
    """Each of two stages has a sharded tensor, a plain one and a callback's state."""
    mesh = make_mesh(Sizes(2, 2, 1, 1), "cpu")
    weight = distribute_tensor(torch.arange(10.0) + mesh.stage, mesh.data, [Shard(0)])
    content = {
        "state_dict": {f"w{mesh.stage}": weight, f"b{mesh.stage}": torch.tensor([float(mesh.stage)])},
        "callbacks": {"EMA": {"weights": {f"w{mesh.stage}": weight}}},
        "dsv3": {"tokens_seen": 1},
    }
    ranks: Any = SimpleNamespace(mesh=mesh, is_global_zero=dist.get_rank() == 0)
    ranks._of_all_stages = partial(SeveralRanks._of_all_stages, ranks)
    SeveralRanks.save_checkpoint(ranks, content, path, "folder")


def test_a_folder_has_what_the_stages_of_a_pipeline_have_between_them(workers: Workers, tmp_path: Path) -> None:
    workers.run(save_stages, tmp_path / "x.ckpt")
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    weights = {f"w{stage}": torch.arange(10.0) + stage for stage in (0, 1)}
    assert_close(loaded["callbacks"]["EMA"]["weights"], weights)
    assert_close(loaded["state_dict"], {**weights, "b0": torch.tensor([0.0]), "b1": torch.tensor([1.0])})


@pytest.mark.parametrize("fault", ["after its shard", "before meta", "before the manifest", "before the name"])
def test_a_killed_save_leaves_the_older_checkpoint_in_use(workers: Workers, tmp_path: Path, fault: str) -> None:
    folder = RunFolder(tmp_path)
    workers.run(save_small, tmp_path, 10, ranks=2)
    with pytest.raises(Exception, match=r"ended|reset|closed|abort|peer|failed"):
        workers.run(save_small, tmp_path, 20, fault, ranks=2, timeout=20)
    assert folder.newest_valid_checkpoint() == folder.checkpoint_path(10)
    assert folder.checkpoints() == [folder.checkpoint_path(10)]
    folder.clear_leftovers()
    assert list((tmp_path / "checkpoints").iterdir()) == [folder.checkpoint_path(10)]
    workers.run(save_small, tmp_path, 20, ranks=2)
    newest = folder.newest_valid_checkpoint()
    assert newest == folder.checkpoint_path(20)
    assert load_checkpoint(newest)["state_dict"]["w"].equal(torch.arange(30.0).view(10, 3) + 20)


@pytest.mark.parametrize("fault", ["fails before the name", "fails in its shard"])
def test_all_ranks_hear_of_a_disk_that_is_full(workers: Workers, tmp_path: Path, fault: str) -> None:
    with pytest.raises(OSError, match="No space left"):
        workers.run(save_small, tmp_path, 10, fault, timeout=20)
    assert not list((tmp_path / "checkpoints").iterdir())
    workers.run(save_small, tmp_path, 10)  # in the same processes: none was left waiting


def test_damaged_bytes_are_noticed(run: RunFolder) -> None:
    *_, older, newest = run.checkpoints()
    generator = random.Random(0)
    files = [newest / META, *newest.glob("shard-*")]
    for file in files:
        content = file.read_bytes()
        for _ in range(5):
            damaged = bytearray(content)
            damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            file.write_bytes(damaged)
            assert not is_valid(newest), file
        file.write_bytes(content[:-1])
        assert run.newest_valid_checkpoint() == older
        with pytest.raises(ValueError, match="not a checkpoint of this project"):
            load_checkpoint(newest)
        file.unlink()
        assert not is_valid(newest)
        file.write_bytes(content)
    assert is_valid(newest)
    (newest / MANIFEST).unlink()
    assert run.newest_valid_checkpoint() == older


class Touch:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


def signed(folder: Path, **others: Path) -> None:
    """Write a manifest that fits what is in the folder, as a stranger would, and `others`."""
    files = {file.name: file for file in folder.iterdir() if file.name != MANIFEST} | others
    entries = {name: dict(zip(("bytes", "crc32"), described(file), strict=True)) for name, file in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}))


def test_nothing_in_a_strangers_folder_is_executed(run: RunFolder) -> None:
    newest = run.checkpoints()[-1]
    (newest / ".metadata").write_bytes(pickle.dumps(Touch()))
    signed(newest)
    assert is_valid(newest), "torch's own metadata are not looked at"
    load_run(newest, allow=TARGETS)
    intact = (newest / META).read_bytes()
    for write in (
        lambda file: file.write_bytes(pickle.dumps(Touch())),
        lambda file: torch.save(CONTENT | {"state_dict": Touch()}, file),
    ):
        write(newest / META)
        signed(newest)
        with pytest.raises(ValueError, match="nothing in it was executed"):
            load_run(newest, allow=TARGETS)
        assert not is_valid(newest)
    (newest / META).write_bytes(intact)
    shard = next(newest.glob("shard-*"))
    shard.write_bytes(pickle.dumps(Touch()))
    signed(newest)
    assert not is_valid(newest)
    assert not Path("touched").exists()


def test_a_manifest_that_leads_out_of_its_folder_is_refused(run: RunFolder) -> None:
    newest = run.checkpoints()[-1]
    outside = run.path / "x.safetensors"
    shutil.copy(next(newest.glob("shard-*")), outside)
    signed(newest, **{"../../x.safetensors": outside})
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(newest)


@pytest.mark.parametrize("change", ["a part is missing", "a tensor of a terabyte", "another dtype"])
def test_shards_that_do_not_hold_what_meta_says_are_refused(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "x.ckpt"
    save_folder(folder, CONTENT | {"state_dict": {"w": torch.ones(4, 4)}}, {})
    shape, dtype = {
        "a part is missing": ((5, 4), torch.float32),
        "a tensor of a terabyte": ((2**38,), torch.float32),
        "another dtype": ((4, 4), torch.int32),
    }[change]
    torch.save(CONTENT | {"state_dict": {"w": torch.empty(shape, dtype=dtype, device="meta")}}, folder / META)
    signed(folder)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(folder)
