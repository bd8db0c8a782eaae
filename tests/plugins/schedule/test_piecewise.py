"""Piecewise against a numpy twin, against the report's published learning rates, and on mistakes."""

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from plugins.schedule.piecewise import Piecewise

CONF = Path(__file__).parents[3] / "conf" / "schedule"
FACTORS = st.floats(0, 4, allow_nan=False)


@st.composite
def segment_lists(draw):
    inner = sorted(draw(st.lists(st.integers(0, 100), max_size=5)))
    ends = [end / 100 for end in inner] + [1.0]
    return [{"until": end, "to": draw(FACTORS), "shape": draw(st.sampled_from(["linear", "cosine"]))} for end in ends]


def reference(x, start, segments):
    """The factor at the fraction x, read from the right: the last segment that x has reached decides."""
    begins = [0.0] + [segment["until"] for segment in segments]
    levels = [start] + [segment["to"] for segment in segments]
    i = int(np.searchsorted(begins, x, side="right")) - 1
    if i == len(segments):
        return levels[-1]
    p = (x - begins[i]) / (begins[i + 1] - begins[i])
    mixed = p if segments[i]["shape"] == "linear" else np.sin(np.pi * p / 2) ** 2
    return (1 - mixed) * levels[i] + mixed * levels[i + 1]


@given(segment_lists(), FACTORS, st.integers(0, 1500), st.floats(1e-6, 10))
def test_agrees_with_the_reference(segments, start, tokens, peak):
    value = Piecewise(total_tokens=1000, peak=peak, start=start, segments=segments)(tokens)
    assert value == pytest.approx(peak * reference(tokens / 1000, start, segments), rel=1e-9, abs=1e-12)


@given(segment_lists(), FACTORS)
def test_stays_between_the_levels_and_holds_the_last(segments, start):
    schedule = Piecewise(total_tokens=997, peak=1.0, start=start, segments=segments)
    levels = [start] + [segment["to"] for segment in segments]
    values = [schedule(tokens) for tokens in range(0, 998, 7)]
    assert min(levels) - 1e-12 <= min(values) <= max(values) <= max(levels) + 1e-12
    assert schedule(997) == schedule(10**9) == segments[-1]["to"]


def test_a_jump_takes_effect_at_its_own_token():
    segments = [
        {"until": 0.966, "to": 1.0, "shape": "linear"},
        {"until": 0.966, "to": 0.25, "shape": "linear"},
        {"until": 1.0, "to": 0.25, "shape": "linear"},
    ]
    schedule = Piecewise(total_tokens=1000, peak=2.0, start=1.0, segments=segments)
    assert [schedule(tokens) for tokens in (0, 965, 966, 1000)] == [2.0, 2.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"total_tokens": 0}, "total_tokens=0"),
        ({"peak": float("nan")}, "peak=nan"),
        ({"start": float("inf")}, "start=inf"),
        ({"segments": []}, "end at 0"),
        ({"segments": [{"until": 0.5, "to": 1, "shape": "linear"}]}, "end at 0.5"),
        ({"segments": [{"until": 1.5, "to": 1, "shape": "linear"}]}, "until"),
        (
            {"segments": [{"until": 0.7, "to": 1, "shape": "linear"}, {"until": 0.6, "to": 1, "shape": "linear"}]},
            "between 0.7",
        ),
        ({"segments": [{"until": 1.0, "to": 1, "shape": "square"}]}, "linear or cosine"),
        ({"segments": [{"until": 1.0, "to": float("nan"), "shape": "linear"}]}, "finite"),
        ({"segments": [{"until": 1.0, "to": 1}]}, "keys"),
        ({"segments": [{"until": 1.0, "to": 1, "shape": "linear", "form": 1}]}, "keys"),
    ],
)
def test_mistakes_are_named(changes, words):
    good = {
        "total_tokens": 10,
        "peak": 1.0,
        "start": 0.0,
        "segments": [{"until": 1.0, "to": 1.0, "shape": "linear"}],
    }
    Piecewise(**good)
    with pytest.raises(ValueError, match=words):
        Piecewise(**(good | changes))


def shipped(name, tokens, **overrides):
    option = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), overrides)
    return instantiate(OmegaConf.create({"run": {"tokens": tokens}, "schedule": option}).schedule)


def test_deepseek_v3_has_the_published_learning_rates():
    """Report section 4.2, at 14.8T tokens; the configuration's fractions are rounded to three digits."""
    trillion = 10**12
    rate = shipped("deepseek_v3", 14_800_000_000_000, peak=2.2e-4)
    assert rate(0) == 0
    for tokens in (1 * trillion, 5 * trillion, 10 * trillion):
        assert rate(tokens) == pytest.approx(2.2e-4)
    middle = (2.2e-4 + 2.2e-5) / 2  # the cosine's value half-way through its 4.3T tokens
    assert rate(int(12.15 * trillion)) == pytest.approx(middle, rel=0.01)
    for tokens in (14_310_000_000_000, 14_600_000_000_000):
        assert rate(tokens) == pytest.approx(2.2e-5)
    for tokens in (14_640_000_000_000, 14_800_000_000_000):
        assert rate(tokens) == pytest.approx(7.3e-6, rel=2e-3)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_shipped_schedules_warm_up_from_zero_to_the_peak_and_end_low(name):
    rate = shipped(name, 1000, peak=1.0)
    values = [rate(tokens) for tokens in range(1001)]
    assert values[0] == 0
    assert max(values) == pytest.approx(1.0)
    assert values[-1] <= 0.1 + 1e-12
    top = values.index(max(values))
    assert values[:top] == sorted(values[:top])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(values[top:], values[top + 1 :], strict=False))
