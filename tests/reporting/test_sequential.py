"""Statistics of studies on simulated ones, whose true difference is known: coverage, false verdicts, seeds needed."""

import math

import numpy as np
import pytest
from scipy.stats import nct, t

from dsv3.reporting.paired import adjusted, paired
from dsv3.reporting.sequential import BOUNDED, LIMIT, MOST_SEEDS, SHOWN, Settled, looks, sequential, settle

STUDIES = 2000
EFFECTS = (0.0, 0.15, 0.3, 0.6, 1.0, 1.5, 2.0, 4.0)
"""True differences, in standard deviations over seeds."""


def simulated(
    effect: float, *, half_width: float, most: int, documents: float = 0.0, studies: int = STUDIES
) -> Settled:
    """documents: standard deviation of what the choice of held-out documents adds to all seeds of a study."""
    draw = np.random.default_rng(4)
    d_SN = effect + draw.standard_normal((studies, most)) + documents * draw.standard_normal((studies, 1))
    return settle(d_SN, np.full(d_SN.shape, 1.96 * documents), half_width=half_width, most=most)


WIDTHS = (0.0, 0.5, 0.7, 1.0, 2.5)
"""Half widths asked for; the first is never reached, the last always at once."""


@pytest.mark.parametrize(
    ("most", "documents", "highest"), [(3, 0.0, 0.97), (6, 0.0, 0.97), (MOST_SEEDS, 0.0, 0.97), (MOST_SEEDS, 0.3, 0.98)]
)
def test_intervals_cover_the_truth_in_93_to_97_of_100_studies(most: int, documents: float, highest: float) -> None:
    """Whatever the difference is, and in up to 98 where documents add an error as large as that of ten seeds.

    The bounds are wider by two standard errors, as many cases are looked at.
    """
    error = 2 * math.sqrt(0.05 * 0.95 / STUDIES)
    for half_width in WIDTHS:
        for effect in EFFECTS:
            found = simulated(effect, half_width=half_width, most=most, documents=documents)
            covered = (np.abs(found.mean - effect) <= found.half).mean()
            assert 0.93 - error < covered < highest + error, (half_width, effect, covered)


@pytest.mark.parametrize("half_width", WIDTHS)
def test_a_difference_that_is_not_there_is_shown_in_5_of_100_studies_at_most(half_width: float) -> None:
    """One standard error of these many studies is 0.15%."""
    found = simulated(0.0, half_width=half_width, most=MOST_SEEDS, studies=20_000)
    assert (np.abs(found.mean) > found.half).mean() < 0.0515


@pytest.mark.parametrize(("effect", "least", "most"), [(1.2, 0.77, 0.87), (1.5, 0.65, 0.71), (1.75, 0.55, 0.63)])
def test_seeds_needed_against_a_fixed_number_that_shows_the_difference_as_often(
    effect: float, least: float, most: float
) -> None:
    """70% where the difference is 1.5 standard deviations over seeds, less where it is larger; at least 4 seeds."""
    found = simulated(effect, half_width=0.0, most=MOST_SEEDS, studies=10_000)
    power = (np.abs(found.mean) > found.half).mean()
    n = np.linspace(4, 14, 2001)
    fixed = np.interp(power, nct.sf(t.ppf(0.975, n - 1), n - 1, effect * np.sqrt(n)), n)
    assert least < found.seeds.mean() / fixed < most


def test_the_wider_of_two_errors_alone_would_cover_too_little() -> None:
    """Why the errors by seeds and by documents are added."""
    draw, n = np.random.default_rng(0), 100
    means, documents = draw.standard_normal((2, STUDIES)) / math.sqrt(n)
    half = t.ppf(0.975, n - 1) / math.sqrt(n)
    assert (np.abs(means + documents) <= half).mean() < 0.86
    assert (np.abs(means + documents) <= math.hypot(half, half)).mean() > 0.94


def test_quantiles_at_the_last_look_are_one_and_no_look_shows_less_than_students() -> None:
    found = looks(MOST_SEEDS)
    assert list(found) == list(range(4, MOST_SEEDS + 1))
    assert found[MOST_SEEDS].cross == found[MOST_SEEDS].last == found[MOST_SEEDS].width
    for n, look in found.items():
        assert t.ppf(0.975, n - 1) < look.last <= min(look.width, look.cross)
        assert look.p_value(look.last) <= 0.05 + 1e-9 < look.p_value(look.last * 0.95)
    (only,) = looks(3).values()
    assert only.last == pytest.approx(t.ppf(1 - 0.045 / 2, 2), rel=0.03)


def test_a_pair_is_settled_by_the_first_look_that_says_so() -> None:
    until = {"half_width": 0.01, "most_seeds": 6}
    noise = [0.0, 0.003, -0.003, 0.001, 0.0, 0.002]
    shown = sequential([0.1 + d for d in noise], [0.0] * 6, [0.0] * 6, until)
    assert (shown.settled, shown.seeds, shown.significant) == (SHOWN, 4, True)
    bounded = sequential(noise, [0.0] * 6, [0.0] * 6, until)
    assert (bounded.settled, bounded.seeds, bounded.significant) == (BOUNDED, 4, False)
    assert bounded.high - bounded.mean < 0.01
    wide = [10 * d for d in noise]
    assert sequential(wide, [0.0] * 6, [0.0] * 6, until).settled == LIMIT
    assert sequential(wide[:5], [0.0] * 5, [0.0] * 5, until).settled == ""
    assert sequential(wide, [0.0] * 6, [0.0] * 6, until | {"most_seeds": 5}).seeds == 5
    few = sequential(noise[:3], [0.0] * 3, [0.0] * 3, until)
    assert (few.settled, few) == ("", paired(noise[:3], [0.0] * 3)), "before the first look"


def test_documents_keep_a_pair_from_being_bounded() -> None:
    until = {"half_width": 0.01, "most_seeds": 6}
    noise = [0.0, 0.003, -0.003, 0.001, 0.0, 0.002]
    found = sequential(noise, [0.0] * 6, [0.02] * 6, until)
    assert (found.settled, found.documents) == (LIMIT, 0.02)
    assert found.high - found.mean > 0.02


def test_holms_correction() -> None:
    assert adjusted([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    draw = np.random.default_rng(0)
    any_shown = [min(adjusted(draw.uniform(size=4).tolist())) <= 0.05 for _ in range(STUDIES)]
    assert np.mean(any_shown) < 0.06
