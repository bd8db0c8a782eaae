"""States of experts, findings, settings and curves of runs, without a browser."""

from pathlib import Path

import numpy as np
import pytest

from dsv3.monitoring.expert_states import DEAD, HOT, STARVED, WELL, Spell, spells, states, whole
from dsv3.reporting.dashboard.address import Choice, from_search, to_search
from dsv3.reporting.dashboard.spreadsheet import csv_text
from dsv3.reporting.findings import findings
from dsv3.reporting.health import layers_now, verdict
from dsv3.reporting.history import History
from dsv3.reporting.overlay import along, band, curve, overlay
from dsv3.reporting.settings import differing
from dsv3.reporting.style import LOADS, TOP, outline
from tests.reporting.made_up import MadeUpRun


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> History:
    path = tmp_path_factory.mktemp("sick") / "seed1"
    run = MadeUpRun(path, layers=4, experts=16, sick_from=81)
    for _ in range(8):
        run.interval(20)
    return History(path, "sick")


def test_loads_have_states_and_states_have_spells() -> None:
    load_TE = np.array([[0.0, 0.1, 1.0, 3.0], [0.0, 1.0, 1.0, 1.0], [0.5, 1.0, np.nan, 2.5]])
    state_TE = states(load_TE)
    assert state_TE.tolist() == [[DEAD, STARVED, WELL, HOT], [DEAD, WELL, WELL, WELL], [WELL, WELL, WELL, HOT]]
    found = set(spells(state_TE, np.array([100, 200, 300])))
    assert found == {Spell(0, DEAD, 0, 200), Spell(1, STARVED, 0, 100), Spell(3, HOT, 0, 100), Spell(3, HOT, 200, None)}


def test_an_interval_that_was_cut_short_is_not_judged(tmp_path: Path) -> None:
    assert whole(np.array([100, 200, 210, 300])).tolist() == [True, True, False, True]
    run = MadeUpRun(tmp_path / "seed1", layers=2, experts=8)
    for _ in range(4):
        run.interval()
    run.sick_from = 0
    run.interval(2)
    kinds = {finding.kind for finding in findings(History(run.path, "x"))}
    assert kinds == set()
    run.interval()
    assert "starved domain" in {finding.kind for finding in findings(History(run.path, "x"))}


def test_findings_of_a_sick_run_are_open_since_their_beginning(sick: History) -> None:
    found = {(f.kind, f.layer, f.state, f.since) for f in findings(sick)}
    assert {
        ("dead expert", "layers.2", "open", 327_680),
        ("routing collapse", "layers.2", "open", 327_680),
        ("starved domain", "", "open", 327_680),
        ("loss spike", "", "event", 331_776),
    } <= found
    (slow,) = (f for f in findings(sick) if f.kind == "slow-down")
    assert slow.until is None
    assert 327_680 < slow.since < 327_680 + 20 * 4096
    assert [(each.expert, each.domain) for each in layers_now(sick)[0].unwell] == [(5, "code"), (6, "code")]
    assert verdict(sick)[0] is False


def test_the_colour_of_no_load_is_far_from_that_of_a_tenth() -> None:
    def colour(load: float) -> np.ndarray:
        below = [stop for stop in LOADS if stop[0] <= load / TOP][-1]
        return np.array([int(below[1][i : i + 2], 16) for i in (1, 3, 5)])

    assert np.abs(colour(0.0) - colour(0.1)).sum() > 150


def test_an_outline_keeps_every_spike() -> None:
    y = np.zeros(100_000)
    y[[7, 50_001, 99_998]] = 9.0, -9.0, 5.0
    x, drawn = outline(np.arange(100_000), y)
    assert len(x) <= 1501
    assert {9.0, -9.0, 5.0} <= set(drawn)
    assert x[-1] == 99_999


def test_an_address_holds_every_choice_and_nothing_else() -> None:
    asked = Choice("runs", "a/b", "layers.1", "code", -3, ("x", "y&z="), ("x",), ("loss",), "steps", 0.5, ("y",),
                   "router.top_k", '{"run": 1}', "-bpb")  # fmt: skip
    assert from_search(to_search(asked)) == asked
    assert to_search(Choice()) == ""
    many = Choice(picked=tuple(f"study/seed{i}" for i in range(900)))
    assert from_search(to_search(many)) == many
    more = Choice(view="runs", picked=tuple(f"study/seed{i}" for i in range(9000)))
    assert from_search(to_search(more)) == Choice(view="runs")
    for bad in ("?view=none&x=__proto__&smooth=nan&moment=1e99&log=z&filters=[", "?smooth=2&moment=3", "?%ff=%00"):
        assert from_search(bad) == Choice()


def test_what_a_spreadsheet_would_compute_is_text() -> None:
    assert csv_text(("=a",), [("=1+1",), ("-x",), (-1.5,), ("b,c",)]) == "'=a\n'=1+1\n'-x\n-1.5\n\"b,c\"\n"


def test_runs_are_compared_by_what_differs_and_drawn_on_any_axis(tmp_path: Path, sick: History) -> None:
    made = MadeUpRun(tmp_path / "a", layers=2, experts=8, seed=5, settings={"router": {"_target_": "p.Other", "k": 3}})
    made.interval(30)
    run = History(made.path, "a")
    assert differing([sick, run]) == {"seed": [1, 5], "router": [None, "Other"], "router.k": [None, 3]}
    assert differing([run, run]) == {}
    found = curve(run, "loss")
    assert found is not None
    assert along(run, found.tokens, "steps").tolist() == list(range(1, 31))
    assert np.allclose(along(run, found.tokens, "seconds"), 0.6 * np.arange(1, 31))
    grid, low, mean, high = band(
        [(np.array([0, 10]), np.array([0.0, 10.0])), (np.array([5, 20]), np.array([1.0, 1.0]))]
    )
    assert (grid[0], grid[-1]) == (5, 10)
    assert (low[0], mean[0], high[0]) == (1.0, 3.0, 5.0)
    figure = overlay({"a": [run], "both": [run, sick]}, ["loss", "tokens/s"], x="steps", smooth=0.9)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["a", "both"]
    assert figure.layout.yaxis.title.text == "nats per token"
    assert figure.layout.yaxis2.title.text == "tokens/s"
