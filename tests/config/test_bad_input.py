"""Mistakes that people make: each is named before any work, with its key, its value and what would be right."""

from pathlib import Path

import pytest

from dsv3.config.preflight import check

TRAIN = {
    "model.init_std=inf": ("model.init_std", "finite"),
    "schedule.peak=nan": ("schedule.peak", "finite"),
    "schedule.peak=-0.2": ("schedule.peak", "0 or more"),
    "optimizer.betas=[0.9, 1.2]": ("optimizer.betas", "between 0 and 1"),
    "seed=4294967296": ("seed", "between 0 and 4,294,967,295"),
    "+callbacks.guard.unknown=1": ("callbacks.guard.unknown", "no such argument"),
    "+guard.unknown=1": ("guard", "is now called callbacks.guard"),
    "+unknown=1": ("unknown", "unknown key"),
    "+run.unknown=1": ("run.unknown", "unknown key"),
    "+model.unknown=1": ("model.unknown", "unknown key"),
    "++study.unknown=1": ("study.unknown", "unknown key"),
    "+data.fim.unknown=1": ("data.fim.unknown", "no such argument"),
    "data.fim.rate=2": ("data.fim.rate", "between 0 and 1"),
    "+trainer.unknown=1": ("trainer.unknown", "no such argument"),
    "+trainer.accumulate_grad_batches=4": ("trainer.accumulate_grad_batches", "data.micro_batch_size"),
    "+trainer.gradient_clip_val=1.0": ("trainer.gradient_clip_val", "grad_clip"),
    "~attention": ("attention", "attention=OPTION"),
    "run.dir=": ("run.dir", "a folder of the run's own"),
    "run.dir=conf": ("run.dir", "is no run folder"),
    "run.name=../../out": ("run.name", "a folder below runs/"),
    "data.cache_dir=README.md": ("data.cache_dir", "this is a file"),
    "resume=conf": ("resume", "the path of a checkpoint file"),
    "study.seeds=text": ("study.seeds", "a list"),
    "precision=bf16-true": ("precision", "Did you mean 'bf16'"),
    "+benchmarks.tasks.rg_arithmetic.shoots=3": ("benchmarks.tasks.rg_arithmetic.shoots", "num_fewshot"),
    "+optimizer.betaz=[0.9, 0.95]": ("optimizer.betaz", "Did you mean 'betas'"),
    "schedule.segments=[{until: 1.0, too: 1.0, shape: linear}]": ("schedule.segments.0.too", "Did you mean 'to'"),
}
EVALUATE = {
    "weights=emma": ("weights", "one of live, ema"),
    "limit=0": ("limit", "above 0"),
    "seed=-1": ("seed", "between 0"),
    "compare=/nowhere": ("compare", "a run folder"),
    "out=conf": ("out", "a file to write"),
    "output_path=README.md": ("output_path", "must be a folder"),
}


def test_each_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    before = sorted(path.name for path in root.iterdir())
    for argument, (key, words) in TRAIN.items():
        found = {problem.key: problem.message for problem in check("train", [argument])}
        assert words in found.get(key, ""), (argument, found)
    assert before == sorted(path.name for path in root.iterdir())


def test_a_folder_is_no_checkpoint_but_has_some(tmp_path: Path) -> None:
    newest = tmp_path / "checkpoints" / "tokens-000000000512.ckpt"
    newest.parent.mkdir()
    for path in (newest, newest.with_name("tokens-000000000256.ckpt")):
        path.touch()
    for folder in (tmp_path, newest.parent):
        (problem,) = check("train", [f"resume={folder}"])
        assert problem.message.endswith(f"a checkpoint file or folder, such as {newest}")


def test_each_is_named_before_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    for argument, (key, words) in EVALUATE.items():
        found = {problem.key: problem.message for problem in check("evaluate", ["checkpoint=conf", argument])}
        assert words in found.get(key, ""), (argument, found)


def test_mtp_on_a_dense_model_is_named() -> None:
    dense = ["model=tiny", "model.n_dense_layers=3", "model.n_routed_experts=0", "balancing=none"]
    assert [problem.key for problem in check("train", dense)] == ["mtp"]
    assert check("train", [*dense, "mtp=none"]) == []


def test_a_missing_argument_of_a_part_is_named() -> None:
    part = "+data.sources.mine={_target_: data.sources.local_files, path: conf, weight: 1.0}"
    (problem,) = check("train", [part])
    assert problem.key == "data.sources.mine.text_column"
    assert "needs this argument" in problem.message
