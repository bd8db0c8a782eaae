"""Whole runs of every objective: stopped and resumed, over ranks, in FP8, without MTP; what they leave behind."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import RunFolder, load_checkpoint
from dsv3.contracts import Prompt
from dsv3.training.fit import fit
from dsv3.training.lightning_module import LanguageModel
from dsv3.training.run_models import RunModels
from dsv3.training.summary import conclude
from plugins.objective.grpo import GRPO
from tests.distributed.ranks import fitted
from tests.distributed.workers import Workers
from tests.smoke.test_resume import assert_same_run

Compose = Callable[..., DictConfig]

FAMILY = (
    "{plus: {generator: simple_equations, train: 60, settings: {min_terms: 2, max_terms: 2, min_value: 1, max_value: 5,"
    " operators: ['+'], operators_weights: [1.0]}}}"
)
SETTINGS = [
    "precision=fp32", "tokenizer=bpe", "tokenizer.vocab_size=400", "schedule=cosine", "data.sequence_length=48",
    "data.validation_tokens=128", "data.questions=2", "data.sources.arithmetic.held_out=4", "data.sources.python=null",
    "data.sources.identity=null", "run.tokens=1536", "run.checkpoint_every_tokens=512", "run.keep_checkpoints=9",
    "run.validate_every_tokens=1536", "callbacks.monitor.every_tokens=512", "callbacks.rollouts.every_tokens=512",
]  # fmt: skip
SAMPLING = ["data=prompts", "data.global_batch_size.peak=6", "objective.max_tokens=3", "objective.temperature=1.5"]
OBJECTIVES = {
    "sft": ["data=conversations"],
    "dpo": ["data=preferences"],
    "grpo": [*SAMPLING, "objective.group=4", "objective.kl=0.01"],
    "distill": [*SAMPLING],
}


class Runs:
    """Configurations of runs that begin with one base run, itself two steps of fine-tuning."""

    def __init__(self, composed: Compose, folder: Path) -> None:
        self.composed, self.folder = composed, folder
        config = self.config("sft", folder / "base", "run.tokens=384")
        finish(config)
        self.base = config.run.dir

    def config(self, objective: str, path: Path, *overrides: str) -> DictConfig:
        begin = [f"run.init_from={self.base}"] if hasattr(self, "base") else []
        given = [f"objective={objective}", *OBJECTIVES[objective], *SETTINGS, f"data.cache_dir={self.folder}/cache"]
        config = self.composed(*given, *begin, *overrides, f"run.dir={path}")
        config.data.sources.arithmetic.families = OmegaConf.create(FAMILY)
        config.reward = {"_target_": "tests.synthetic.Sevenths"}
        return config


def finish(config: DictConfig) -> RunFolder:
    run = fit(config)
    run.folder.release()
    return run.folder


@pytest.fixture(scope="module")
def runs(composed: Compose, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(composed, tmp_path_factory.mktemp("runs"))


class KilledError(Exception):
    """In place of a signal: nothing after it is done, but for closing the folder."""


def kill(config: DictConfig, place: tuple[type, str], *, after: int) -> None:
    """Train until a method has been called `after` times, and fail in the middle of the next call."""
    owner, name = place
    calls, method = itertools.count(), getattr(owner, name)

    def counted(*args: Any, **settings: Any) -> Any:
        if next(calls) == after:
            raise KilledError
        return method(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(KilledError):
            fit(config)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("grpo", ["objective.epochs=2", "objective.replay_routing=true", "run.checkpoint_every_tokens=1"]),
        *(pytest.param(name, [], marks=pytest.mark.slow) for name in ("grpo", "sft", "dpo", "distill")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_run_that_was_killed_and_resumed_is_the_whole_one(
    runs: Runs, tmp_path: Path, objective: str, settings: list[str]
) -> None:
    """Those that sample are killed in a rollout, or between two epochs of one; all go on from a checkpoint before."""
    whole = finish(runs.config(objective, tmp_path / "whole", *settings))
    steps = len(whole.read("metrics/train"))
    config = runs.config(objective, tmp_path / "killed", *settings)
    if settings:  # an odd number of steps is done: the next one is the second that is made of the same answers
        kill(config, (LanguageModel, "take_step"), after=steps - 1 - steps % 2)
    else:
        sampled = objective in ("grpo", "distill")
        kill(config, (RunModels, "sample") if sampled else (LanguageModel, "take_step"), after=steps - 1)
    newest = load_checkpoint(RunFolder(tmp_path / "killed").checkpoints()[-1])["dsv3"]
    assert bool(newest.get("samples")) == bool(newest["data_state"].get("steps_with_them")) == bool(settings)
    finish(config)
    assert_same_run(whole.path, tmp_path / "killed")


def losses(folder: RunFolder) -> np.ndarray:
    return folder.read("metrics/train").loss.to_numpy()


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        pytest.param(
            "grpo", ["mtp=none", "precision=fp8_blockwise"], id="grpo fp8 without mtp", marks=pytest.mark.slow
        ),
        pytest.param("dpo", ["precision=fp8_blockwise"], id="dpo fp8", marks=pytest.mark.slow),
        pytest.param("sft", ["precision=fp8_blockwise"], id="sft fp8", marks=pytest.mark.slow),
        pytest.param("distill", ["precision=fp8_blockwise"], id="distill fp8", marks=pytest.mark.slow),
        pytest.param("dpo", ["mtp=none"], id="dpo without mtp", marks=pytest.mark.slow),
        pytest.param("distill", ["mtp=none"], id="distill without mtp", marks=pytest.mark.slow),
    ],
)
def test_in_fp8_and_without_mtp(runs: Runs, tmp_path: Path, objective: str, settings: list[str]) -> None:
    if "mtp=none" in settings:
        base = finish(runs.config("sft", tmp_path / "base", "run.init_from=null", "trainer.max_steps=1", *settings))
        settings = [*settings, f"run.init_from={base.path}"]
    folder = finish(runs.config(objective, tmp_path / "run", "trainer.max_steps=3", *settings))
    found = losses(folder)
    assert len(found) == 3
    assert np.isfinite(found).all()


def test_reinforcement_moves_weights_and_routing_bias_and_leaves_tables_and_a_report(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Prompt] = []
    monkeypatch.setattr(GRPO, "check_prompts", lambda self, prompts: checked.extend(prompts))
    run = fit(runs.config("grpo", tmp_path / "run"))
    conclude(run)
    folder = run.folder
    last = load_checkpoint(folder.checkpoints()[-1])["state_dict"]
    start = load_checkpoint(RunFolder(runs.base).checkpoints()[-1])["state_dict"]
    for name in (
        "model.layers.1.mlp.balancing.parts.loss_free.bias",
        "model.layers.1.mlp.router.weight",
        "model.lm_head.weight",
    ):
        assert not torch.equal(last[name], start[name]), name
    train, rollouts = folder.read("metrics/train"), folder.read("metrics/rollouts")
    assert train.reward.between(0, 1).all()
    assert (train.rollout_mismatch.dropna() < 1e-4).all()
    assert (train.tokens.diff().dropna() >= 0).all()
    assert set(rollouts.columns) >= {"tokens", "prompt", "answer", "ended", "reward", "advantage"}
    assert rollouts.tokens.nunique() >= 3
    held_out = folder.read("metrics/held_out")
    assert held_out.tokens.tolist() == [0, train.tokens.iloc[-1]], "before the first step and after the last"
    assert held_out.reward.between(0, 1).all()
    rows: Any = run.data
    assert len(checked) == len(rows.prompts()) + 2, "held-out rows are looked at before training, too"
    page = (folder.path / "report.html").read_text()
    for words in ("reward", "flat_groups", "rollout_mismatch", rollouts.prompt[0]):
        assert words in page, words


def test_resume_never_starts_over_from_the_same_weights(runs: Runs, tmp_path: Path) -> None:
    config = runs.config("dpo", tmp_path / "run", "trainer.max_steps=2")
    first = losses(finish(config))
    config.resume = "never"
    second = losses(finish(config))
    assert first[0] == pytest.approx(second[0], abs=0)
    assert len(list(tmp_path.iterdir())) == 2, "the old run is aside"


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("grpo", ["objective.replay_routing=true"]),
        *(pytest.param(name, [], marks=pytest.mark.slow) for name in ("grpo", "sft", "dpo", "distill")),
    ],
)
def test_two_ranks_are_one_process(
    runs: Runs, tmp_path: Path, workers: Workers, objective: str, settings: list[str]
) -> None:
    """One of them has only padding, or other numbers of answers. As long as rounding samples no other token.

    Ranks pack their own answers, and MTP counts the load of the last position of a document by the token that follows
    in its row: objectives that sample are compared without MTP.
    """
    exact = [*settings, "optimizer=adamw", "optimizer.eps=1e-3", "trainer.max_steps=3"]
    if objective == "grpo":
        exact += ["mtp=none", "run.init_from=null", "objective.kl=0"]
    elif objective == "distill":
        base = finish(runs.config("sft", tmp_path / "base", "run.init_from=null", "trainer.max_steps=1", "mtp=none"))
        exact += ["mtp=none", f"run.init_from={base.path}"]
    one = finish(runs.config(objective, tmp_path / "one", *exact)).read("metrics/train")
    config = runs.config(objective, tmp_path / "two", *exact, "parallel=sharded", "trainer.devices=2")
    workers.run(fitted_there, config, ranks=2)
    two = RunFolder(tmp_path / "two").read("metrics/train")
    assert two.tokens.tolist() == one.tokens.tolist()
    assert len(one) == 3
    for name in {"loss", "mtp1_loss", "reward", "surprise", "nll", "answer_length", "reward_margin"} & set(one.columns):
        np.testing.assert_allclose(two[name], one[name], rtol=5e-6, atol=1e-6, err_msg=name)  # some are near 0


def fitted_there(config: DictConfig) -> None:
    fitted(config).folder.release()
