"""Trained work is never lost: to unreadable files, to a failing evaluation, to a limit, to a second call."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import RunFolder, load_checkpoint
from dsv3.reporting.history import History, missing_steps
from dsv3.training.callbacks.validate import Validate
from dsv3.training.fit import fit
from dsv3.training.resume import prepare
from dsv3.training.run import build_run
from dsv3.training.summary import summarise

Compose = Callable[..., DictConfig]
STEP = 256  # tokens of a step of the synthetic data


@pytest.fixture(scope="module")
def trained(composed: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps; checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    run = fit(settings(composed, folder))
    run.folder.release()
    return folder


def settings(composed: Compose, folder: Path, *more: str) -> DictConfig:
    steps = [f"run.tokens={4 * STEP}", f"run.checkpoint_every_tokens={2 * STEP}", "callbacks.monitor=null"]
    return composed(*steps, f"run.dir={folder}", *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_whose_checkpoints_are_all_corrupt_is_not_begun_anew(copy: Path, composed: Compose) -> None:
    for checkpoint in RunFolder(copy).checkpoints():
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    before = contents(copy)
    for attempt in (build_run, lambda config: prepare(config, RunFolder(copy))):
        with pytest.raises(ValueError, match=r"none of its checkpoints can be used .*resume=never"):
            attempt(settings(composed, copy))
    assert contents(copy) == before


def test_a_checkpoint_on_a_disk_that_is_not_mounted_stops_the_run(copy: Path, composed: Compose) -> None:
    newest = RunFolder(copy).checkpoints()[-1]
    newest.unlink()
    newest.symlink_to("/not/mounted/x.ckpt")
    with pytest.raises(ValueError, match=rf"{newest.name} may not be read \(No such file"):
        prepare(settings(composed, copy), RunFolder(copy))


def test_a_checkpoint_of_another_model_changes_nothing(copy: Path, trained: Path, composed: Compose) -> None:
    before = contents(copy)
    config = settings(composed, copy, f"resume={RunFolder(trained).checkpoints()[0]}", "model.dim=32")
    with pytest.raises(ValueError, match=r"resume=.*another model: it has embed_tokens\.weight of shape"):
        build_run(config)
    assert contents(copy) == before


def test_files_of_a_killed_process_are_cleared(copy: Path, composed: Compose) -> None:
    leftover = copy / "checkpoints" / ".tokens-000000000512.ckpt.4242.tmp"
    leftover.write_bytes(b"half")
    folder = RunFolder(copy)
    assert prepare(settings(composed, copy), folder) == folder.checkpoints()[-1]
    folder.release()
    assert not leftover.exists()


def test_a_branch_called_again_goes_on_from_where_it_has_come(trained: Path, tmp_path: Path, composed: Compose) -> None:
    start = RunFolder(trained).checkpoints()[0]
    config = settings(composed, tmp_path / "branch", f"resume={start}")
    folder = RunFolder(tmp_path / "branch")
    assert prepare(config, folder) == start
    folder.release()
    run = fit(config)
    assert [int(tokens) for tokens in run.folder.read("metrics/train").tokens] == [3 * STEP, 4 * STEP]
    summary = summarise(run, run.module.model.eval())
    assert summary["validation"]["before"] == {}
    steps = run.folder.read("timing/train").seconds
    assert summary["tokens_per_second"] == pytest.approx(STEP / steps.iloc[1], rel=0.01)
    run.folder.release()
    again = RunFolder(tmp_path / "branch")
    assert prepare(config, again) == again.checkpoints()[-1]
    again.release()


def test_weights_are_on_disk_before_the_last_evaluation(
    tmp_path: Path, composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(composed, tmp_path / "run")
    validate = Validate.validate

    def fail(self: Validate, trainer: Any, module: Any, weights: Any, **options: Any) -> None:
        if module.finished:
            raise RuntimeError("out of memory")
        validate(self, trainer, module, weights, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Validate, "validate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(config)
    folder = RunFolder(tmp_path / "run")
    newest = folder.newest_valid_checkpoint()
    assert newest is not None
    assert load_checkpoint(newest)["dsv3"]["tokens_seen"] == 4 * STEP
    run = fit(config)  # nothing is trained again, and what is lacking is evaluated
    assert len(run.folder.read("metrics/train")) == 4
    scores = run.folder.read("metrics/validation")
    assert sorted(scores[scores.tokens == 4 * STEP].weights.unique()) == ["ema", "live"]
    run.folder.release()
    fit(config).folder.release()
    assert len(folder.read("metrics/validation")) == len(scores)


def test_a_limit_of_the_trainer_ends_with_a_checkpoint_and_scores(tmp_path: Path, composed: Compose) -> None:
    config = settings(composed, tmp_path / "run", "+trainer.limit_train_batches=3")
    run = fit(config)
    newest = run.folder.newest_valid_checkpoint()
    assert newest is not None
    assert load_checkpoint(newest)["dsv3"]["tokens_seen"] == 3 * STEP
    summary = summarise(run, run.module.model.eval())
    run.folder.release()
    assert summary["tokens"] == 3 * STEP
    assert summary["validation"]["after"]
    whole = fit(settings(composed, tmp_path / "run"))  # without the limit: it goes on
    assert [int(tokens) for tokens in whole.folder.read("metrics/train").tokens] == [STEP, 2 * STEP, 3 * STEP, 4 * STEP]
    whole.folder.release()


def test_a_small_temporary_folder_stops_nothing(
    tmp_path: Path, composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **settings: Any) -> Any:
        raise OSError(28, "No space left on device")

    for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile"):
        monkeypatch.setattr(tempfile, name, full)
    run = fit(settings(composed, tmp_path / "run"))
    assert run.folder.newest_valid_checkpoint() is not None
    run.folder.release()


def test_data_that_cannot_be_built_leaves_no_folder(tmp_path: Path, composed: Compose) -> None:
    config = settings(composed, tmp_path / "run")
    OmegaConf.update(config, "data._target_", "tests.training.test_work_is_kept.no_data", force_add=True)
    with pytest.raises(ValueError, match="no texts"):
        build_run(config)
    assert not (tmp_path / "run").exists()


def no_data(**settings: Any) -> Any:
    raise ValueError("no texts")


def test_a_cut_summary_is_made_again(copy: Path) -> None:
    RunFolder(copy).summary_path.write_text('{"tokens": 10')
    assert RunFolder(copy).summary() is None


def test_a_cut_part_of_a_table_is_named(copy: Path) -> None:
    part = sorted((copy / "metrics" / "train").glob("part-*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:50])
    (part.parent / "part-copy.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{part.name} cannot be read as Parquet"):
        RunFolder(copy).read("metrics/train")


def test_a_part_that_was_deleted_is_said_to_be_missing(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = RunFolder(copy).read("metrics/train")
    assert missing_steps(frame) is None
    assert missing_steps(frame.drop(index=[1, 2]).reset_index(drop=True)) == "steps 2 to 3"
    first, *_ = sorted((copy / "metrics" / "train").glob("part-*.parquet"))
    rows = RunFolder(copy).read("metrics/train")
    rows.iloc[[0, 3]].to_parquet(first)
    for part in sorted((copy / "metrics" / "train").glob("part-*.parquet"))[1:]:
        part.unlink()
    History(copy, "run").table("metrics/train")
    assert "steps 2 to 3 of metrics/train are missing" in caplog.text


def test_a_damaged_part_of_a_table_is_named_before_the_run_goes_on(copy: Path, composed: Compose) -> None:
    for name in ("summary.json", "report.html"):
        (copy / name).unlink(missing_ok=True)
    part = sorted((copy / "metrics" / "train").glob("part-*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:-20])
    before = contents(copy)
    with pytest.raises(ValueError, match=rf"{part.name} cannot be read as Parquet .*delete it to go on without"):
        build_run(settings(composed, copy))
    assert contents(copy) == before
    part.rename(part.with_name("part-copy.parquet"))  # no part of the table
    folder = RunFolder(copy)
    assert prepare(settings(composed, copy), folder) == folder.checkpoints()[-1]
    folder.release()
