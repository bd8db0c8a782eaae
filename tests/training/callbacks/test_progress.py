"""The line of progress."""

from types import SimpleNamespace
from typing import Any

import pytest

from dsv3.training.callbacks.progress import Progress
from dsv3.training.callbacks.record import Record
from dsv3.training.callbacks.validate import Validate


def shown_line(figures: dict[str, float], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed after a step with these figures."""
    record, validate = Record(), Validate(every_tokens=1000)
    record.tokens_per_second, record.seconds_left = 1234.5, 90.0
    record.peak_memory = {"resident": 3 * 2**20}
    validate.latest_bpb = {"code": 1.625}
    statistics = [SimpleNamespace(name="loss", shown=True), SimpleNamespace(name="lr", shown=False)]
    module: Any = SimpleNamespace(
        folder=SimpleNamespace(writes=True),
        tokens_seen=250,
        total_tokens=1000,
        losses=SimpleNamespace(statistics=statistics),
        record=SimpleNamespace(figures=figures),
    )
    trainer: Any = SimpleNamespace(callbacks=[record, validate])
    progress, step = Progress(), SimpleNamespace()
    progress.on_train_batch_end(trainer, module, None, step, 0)  # type: ignore[arg-type]
    return capsys.readouterr().err


def test_the_line_names_the_layer_with_the_largest_violation(capsys: pytest.CaptureFixture[str]) -> None:
    violations = {"max_violation/layers.1": 0.5, "max_violation/layers.3": 1.128, "max_violation/mtp.0": 0.75}
    line = shown_line({"loss": 2.5, "lr": 0.1, **violations}, capsys)
    assert "MaxVio 1.13 in layers.3" in line
    assert line.startswith(" 25%  250 tokens  loss 2.500  val bpb code 1.6")
    assert "1,234 tokens/s" in line
    assert "lr" not in line
    assert "layers.1" not in line


def test_a_dense_model_has_no_violation(capsys: pytest.CaptureFixture[str]) -> None:
    assert "MaxVio" not in shown_line({"loss": 2.5, "lr": 0.1}, capsys)
