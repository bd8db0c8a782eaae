"""Micro-batches per rank: what a pipeline cannot run is refused before any work, and padding is told."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data.datamodule import DataModule
from dsv3.config.micro_batches import Dealt, rows_of_steps, unfit
from dsv3.config.preflight import check
from dsv3.distributed.parallel import Sizes
from dsv3.training.run import share_data
from plugins.schedule.piecewise import Piecewise
from tests.config.looking import BASE, only

sizes = st.integers(min_value=1, max_value=40)


def pipeline(devices: int, schedule: str, *others: str) -> list[str]:
    return [*BASE, "parallel=pipeline", f"trainer.devices={devices}", f"parallel.schedule={schedule}", *others]


def ramp(start: float, peak: int) -> list[str]:
    segments = "[{until: 0.5, to: 1.0, shape: linear}, {until: 1.0, to: 1.0, shape: linear}]"
    key = "data.global_batch_size"
    return [f"{key}.peak={peak}", f"{key}.start={start}", f"{key}.segments={segments}"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            pipeline(2, "1f1b"),
            "data.micro_batch_size=8: in a step of 8 rows, parallel.schedule=1f1b needs at least 2 micro-batches per "
            "step on 2 ranks, and there are 1: write data.micro_batch_size=4",
        ),
        (
            pipeline(4, "dualpipev", "parallel.stages=2", "data.micro_batch_size=2"),
            "data.micro_batch_size=2: in a step of 8 rows, parallel.schedule=dualpipev needs at least 4 micro-batches "
            "per step on 2 ranks, and there are 2: write data.micro_batch_size=1",
        ),
        (
            pipeline(4, "1f1b", "parallel.stages=2", "data.global_batch_size.peak=2"),
            "data.micro_batch_size=8: in a step of 2 rows, parallel.schedule=1f1b needs at least 2 micro-batches per "
            "step on 2 ranks, and there are 1: raise data.global_batch_size.peak, or write parallel.schedule=zbv",
        ),
        (
            pipeline(2, "1f1b", "data.micro_batch_size=4", *ramp(0.25, 16)),
            "data.micro_batch_size=4: in a step of 4 rows, parallel.schedule=1f1b needs at least 2 micro-batches per "
            "step on 2 ranks, and there are 1: write data.micro_batch_size=2",
        ),
        (
            pipeline(2, "interleaved_1f1b", "data.micro_batch_size=1", *ramp(0.5, 10)),
            "data.micro_batch_size=1: in a step of 5 rows, parallel.schedule=interleaved_1f1b cannot divide 5 "
            "micro-batches per step into 2 rounds of 2 ranks: write data.micro_batch_size=3",
        ),
    ],
    ids=["1f1b", "dualpipev", "no size fits", "a ramp", "interleaved"],
)
def test_a_step_that_a_pipeline_cannot_run_is_refused(arguments: list[str], said: str) -> None:
    assert str(only(check("train", arguments))) == said


@pytest.mark.parametrize(
    "arguments",
    [
        pipeline(2, "1f1b", "data.micro_batch_size=7"),
        pipeline(4, "dualpipev", "parallel.stages=2", "data.micro_batch_size=1"),
        pipeline(2, "zbv"),
        pipeline(2, "interleaved_1f1b", "data.micro_batch_size=4", *ramp(0.5, 10)),
        [*BASE, "parallel=sharded", "trainer.devices=4"],
    ],
    ids=lambda arguments: " ".join(arguments[2:]),
)
def test_what_can_run_passes(arguments: list[str]) -> None:
    assert check("train", arguments) == []


def test_other_mistakes_in_these_keys_are_not_reported_twice() -> None:
    for override, words in (
        ("data.micro_batch_size=0", "above 0"),
        ("data.global_batch_size.peak=many", "must be a number"),
        ("parallel.stages=3", "must divide the number of devices, 2"),
    ):
        problem = only(check("train", pipeline(2, "1f1b", override)))
        assert problem.key == override.partition("=")[0]
        assert words in problem.message


@given(rows=sizes, size=sizes, ranks=st.integers(1, 8))
def test_ranks_get_as_many_micro_batches_as_the_datamodule_deals(rows: int, size: int, ranks: int) -> None:
    dealt = [
        DataModule.own_parts(SimpleNamespace(micro_batch_size=size, _rank=rank, _ranks=ranks), rows)  # type: ignore[arg-type]
        for rank in range(ranks)
    ]
    assert {len(parts) for parts in dealt} == {Dealt([], ranks).per_rank(rows, size)}


@given(
    peak=st.integers(1, 30),
    factors=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=4, max_size=4),
    ends=st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), min_size=2, max_size=2).map(sorted),
)
def test_rows_are_those_that_the_schedule_gives(peak: int, factors: list[float], ends: list[float]) -> None:
    segments = [
        {"until": until, "to": to, "shape": "linear"} for until, to in zip([*ends, 1.0], factors[1:], strict=True)
    ]
    schedule = Piecewise(total_tokens=1000, peak=peak, start=factors[0], segments=segments)
    given_rows = {max(1, round(schedule(tokens))) for tokens in range(1000)}
    ranges = rows_of_steps({"peak": peak, "start": factors[0], "segments": segments})
    found = {rows for span in ranges for rows in span}
    assert given_rows <= found
    assert len(found - given_rows) <= len(segments), "a segment's end, which none but the next step would have"
    assert [span[0] for span in ranges] == sorted(span[0] for span in ranges)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"])
@given(rows=sizes, size=sizes, data=st.integers(1, 4), stages=st.integers(2, 4))
def test_the_size_that_is_named_runs(schedule: str, rows: int, size: int, data: int, stages: int) -> None:
    dealt = Dealt([range(rows, rows + 1)], data, stages, schedule)
    named = dealt.best(size)
    runs = [other for other in range(1, rows + 1) if unfit(schedule, stages, dealt.per_rank(rows, other)) is None]
    assert (named in runs) if runs else named is None


def said(caplog: pytest.LogCaptureFixture, peak: int, size: int, ranks: int, **others: Any) -> str:
    """What a run with several ranks says when its data are shared."""
    segments = [{"until": 1.0, "to": 1.0, "shape": "linear"}]
    batch = {"peak": peak, "start": 1.0, "segments": segments}
    config = OmegaConf.create(
        {"data": {"global_batch_size": batch, "micro_batch_size": size} | others, "parallel": {"schedule": None}}
    )
    data: Any = SimpleNamespace(share=lambda rank, of: None)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        share_data(data, SimpleNamespace(data_rank=0, sizes=Sizes(1, ranks, 1, 1)), config)  # type: ignore[arg-type]
    return caplog.text


def test_wasteful_padding_is_told_once_with_the_better_size(caplog: pytest.LogCaptureFixture) -> None:
    assert "data.micro_batch_size=8: 24 of the 32 rows that 4 ranks compute in a step are padding; with " in said(
        caplog, 8, 8, 4
    )
    assert caplog.text.count("data.micro_batch_size") == 2
    assert "with data.micro_batch_size=2, 0 are" in caplog.text
    assert "data.micro_batch_size=3: 16 of the 24 rows" not in said(caplog, 8, 2, 4)
    assert "with data.micro_batch_size=1, 0 are" in said(caplog, 5, 3, 5)
    assert "data.global_batch_size: a step of 2 rows leaves 2 of 4 ranks with padding only" in said(caplog, 2, 1, 4)
    for peak, size, ranks in ((8, 2, 4), (8, 1, 4), (1000, 7, 8)):
        assert said(caplog, peak, size, ranks) == ""
    assert said(caplog, 8, 8, 4, global_batch_size={"other": 1}) == "", "a stranger's schedule"
