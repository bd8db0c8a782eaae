"""The validation set of a quick try."""

from collections.abc import Callable

import pytest
from omegaconf import DictConfig

from dsv3.training.callbacks.validate import QUICK_TOKENS, with_quick_validation


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (("trainer.max_steps=20",), QUICK_TOKENS),
        (("trainer.max_steps=20", "data.validation_tokens=1000"), 1000),
        (("trainer.max_steps=20", "run.checkpoint_every_tokens=4096"), 65536),
        ((), 65536),
    ],
)
def test_a_run_that_ends_before_its_first_checkpoint_validates_on_less(
    composed: Callable[..., DictConfig], options: tuple[str, ...], tokens: int
) -> None:
    config = composed("data=default", "run.tokens=1_000_000", "run.checkpoint_every_tokens=500_000", *options)
    before = config.copy()
    assert with_quick_validation(config).data.validation_tokens == tokens
    assert config == before, "config.yaml keeps the run's own setting, which evaluate.py and a resumed run have"
