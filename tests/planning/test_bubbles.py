"""Bubbles: 1F1B against a simulation of it, the others against the report's formulas with numbers put in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.planning.bubbles import pipeline_costs
from dsv3.planning.recipe import CHUNK_TIMES, ChunkTimes


def simulated_1f1b(pp: int, num_microbatches: int, f: float, b: float) -> tuple[float, int]:
    """Duration of a step, and the most micro-batches that a stage holds at once, by running the schedule."""
    orders = []
    for stage in range(pp):
        ahead = min(pp - stage, num_microbatches)
        order = [("F", i) for i in range(ahead)]
        for i in range(num_microbatches):
            order.append(("B", i))
            if ahead + i < num_microbatches:
                order.append(("F", ahead + i))
        orders.append(order)
    done: dict[tuple[int, str, int], float] = {}
    clock, position = [0.0] * pp, [0] * pp
    while any(position[stage] < len(orders[stage]) for stage in range(pp)):
        for stage in range(pp):
            if position[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][position[stage]]
            before = (stage - 1, "F", i) if kind == "F" else (stage + 1, "B", i)
            if 0 <= before[0] < pp and before not in done:
                continue
            clock[stage] = max(clock[stage], done.get(before, 0.0)) + (f if kind == "F" else b)
            done[stage, kind, i] = clock[stage]
            position[stage] += 1
    held = max(sum(1 if kind == "F" else -1 for kind, _ in orders[0][:n]) for n in range(len(orders[0]) + 1))
    return max(clock), held


@given(st.integers(1, 8), st.integers(0, 12), st.floats(0.5, 3), st.floats(0.5, 3))
def test_1f1b_equals_its_simulation(pp: int, more: int, f: float, b: float) -> None:
    num_microbatches = pp + more
    duration, held = simulated_1f1b(pp, num_microbatches, f, b)
    times = ChunkTimes(forward=f, backward=b, weight=b / 2, overlapped=f + b)
    costs = pipeline_costs("1f1b", pp=pp, num_microbatches=num_microbatches, times=times)
    assert costs.bubble == pytest.approx(duration - num_microbatches * (f + b))
    assert costs.share == pytest.approx(costs.bubble / duration)
    assert (costs.parameters, costs.activations) == (1, held)


@pytest.mark.parametrize(
    ("schedule", "bubble", "parameters", "activations"),
    [
        ("1f1b", 15 * (2.0 + 5.0), 1, 16),
        ("zb1p", 15 * (2.0 + 5.0 - 2 * 1.5), 1, 16),
        ("dualpipe", 7 * (6.0 + 5.0 - 3 * 1.5), 2, 17),
    ],
)
def test_table_2(schedule: str, bubble: float, parameters: int, activations: int) -> None:
    times = ChunkTimes(forward=2.0, backward=5.0, weight=1.5, overlapped=6.0)
    costs = pipeline_costs(schedule, pp=16, num_microbatches=120, times=times)  # type: ignore[arg-type]
    assert (costs.bubble, costs.parameters, costs.activations) == (bubble, parameters, activations)


@given(st.integers(1, 16), st.integers(1, 200))
def test_each_schedule_betters_the_one_before(half: int, num_microbatches: int) -> None:
    one, zero, dual = (
        pipeline_costs(schedule, pp=2 * half, num_microbatches=num_microbatches, times=CHUNK_TIMES).bubble  # type: ignore[arg-type]
        for schedule in ("1f1b", "zb1p", "dualpipe")
    )
    assert one > zero > dual >= 0


def test_dualpipe_pairs_stages() -> None:
    with pytest.raises(ValueError, match="pp=3"):
        pipeline_costs("dualpipe", pp=3, num_microbatches=6, times=CHUNK_TIMES)
