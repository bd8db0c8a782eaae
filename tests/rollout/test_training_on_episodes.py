"""GRPO on whole episodes of BabyAI, their success as the reward."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from dsv3.training.run_models import RunModels
from tests.distributed.test_post_training import finish, kill
from tests.smoke.test_resume import assert_same_run

GOTO = [
    "data.sources.open=null", "data.sources.putnext=null", "data.sources.pickup=null",
    "data.sources.pick_up_seq_go_to=null", "data.sources.goto.episodes=60",
]  # fmt: skip
SETTINGS = [
    "precision=fp32", "tokenizer=bpe", "tokenizer.vocab_size=400", "schedule=cosine", "data.sequence_length=256",
    "data.validation_tokens=128", "data.questions=2", "run.keep_checkpoints=9", "callbacks.monitor=null",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_on_episodes_that_was_killed_in_one_and_resumed_is_the_whole_one(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """From a policy that has learnt what actions look like, and so succeeds now and then."""
    cache = f"data.cache_dir={tmp_path}/cache"
    taught = composed(
        "objective=sft", "data=babyai", *GOTO, *SETTINGS, cache, "run.tokens=40000", f"run.dir={tmp_path}/taught"
    )
    finish(taught)

    def config(name: str) -> DictConfig:
        turns = ["data=babyai_turns", "data.sources.putnext=null", "data.sources.open.environment=babyai/goto"]
        turns += ["data.sources.open.episodes=60", "data.sources.open.steps=10", "data.sources.open.history=1"]
        return composed(
            "experiment=babyai_grpo", *turns, *SETTINGS, cache, f"run.init_from={tmp_path}/taught", "benchmarks=none",
            "data.global_batch_size.peak=2", "data.micro_batch_size=2", "objective.group=4", "trainer.max_steps=3",
            "run.tokens=40000", "run.checkpoint_every_tokens=1", "run.validate_every_tokens=40000",
            f"run.dir={tmp_path}/{name}",
        )  # fmt: skip

    whole = finish(config("whole"))
    train = whole.read("metrics/train")
    assert train.reward.between(0, 1).all()
    assert (train.flat_groups < 1).any(), "something is learnt"
    assert (train.turns > 1).all()
    kill(config("killed"), (RunModels, "sample"), after=2)
    finish(config("killed"))
    assert_same_run(whole.path, tmp_path / "killed")
