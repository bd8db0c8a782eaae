"""The average of the weights against its closed form."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dsv3.training.callbacks.ema import EMA
from dsv3.training.callbacks.intervals import crossed


def run_of(values: list[float], decay: float) -> tuple[EMA, Any]:
    """Weights that take `values` one after another, the first before training."""
    model = nn.Linear(2, 2)
    model.register_buffer("bias_E", torch.zeros(3))
    module = SimpleNamespace(model=model, device=torch.device("cpu"))
    ema = EMA(decay=decay)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(values[0])
        ema.on_train_start(None, module)  # type: ignore[arg-type]
        for value in values[1:]:
            for p in model.parameters():
                p.fill_(value)
            ema.on_train_batch_end(None, module, None, None, 0)
    return ema, model


def test_average_is_the_weighted_sum() -> None:
    values, decay = [1.0, 5.0, -2.0, 3.0], 0.7
    ema, _ = run_of(values, decay)
    expected = values[0] * decay**3 + sum(
        (1 - decay) * decay**age * value for age, value in enumerate(reversed(values[1:]))
    )
    for weight in ema.weights.values():
        torch.testing.assert_close(weight, torch.full_like(weight, expected))


def test_applied_puts_the_average_in_and_the_live_weights_back() -> None:
    ema, model = run_of([1.0, 5.0], 0.5)
    model.bias_E.fill_(7.0)
    before = copy.deepcopy(model.state_dict())

    def fail_inside() -> None:
        with ema.applied(model):
            assert (model.weight == 3.0).all()
            assert (model.bias_E == 7.0).all(), "the routing bias is the live one"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_state_comes_back_and_is_not_begun_anew() -> None:
    ema, model = run_of([1.0, 5.0], 0.5)
    other = EMA(decay=0.5)
    other.load_state_dict(ema.state_dict())
    other.on_train_start(None, SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert all(torch.equal(other.weights[key], value) for key, value in ema.weights.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_outside_its_range(decay: float) -> None:
    with pytest.raises(ValueError, match=r"ema\.decay"):
        EMA(decay=decay)


def test_crossed() -> None:
    cases = {(0, 9): False, (0, 10): True, (9, 11): True, (10, 19): False, (10, 20): True, (5, 35): True}
    assert {case: crossed(10, *case) for case in cases} == cases
