"""Placement of parameters, and memory of a GPU."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3.planning.gpu_memory import gpu_memory
from dsv3.planning.recipe import FORMATS, REPORT, Recipe, single_gpu
from dsv3.planning.sizes import parameters
from dsv3.planning.stages import parts_of_pipeline
from tests.planning.models import PRESETS, skeleton

ONE_GPU = single_gpu(tokens=1e9, seq_len=512, micro_batch=8)
SCHEDULES = ["1f1b", "zb1p", "dualpipe"]
V3 = ("model=v3_671b",)


def all_weights(preset: str) -> int:
    """Model and MTP, without the selection biases, which are no weights."""
    s = skeleton(f"model={preset}")
    counts = parameters(s)
    biases = s.routing_biases * (s.moe_layers + s.mtp.moe_blocks)
    return counts["model"].total + counts["MTP"].total - biases


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("pipeline", SCHEDULES)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_stages_hold_the_model_once_and_dualpipe_twice(preset: str, pipeline: Any, data: st.DataObject) -> None:
    s = skeleton(f"model={preset}")
    pp = data.draw(st.integers(1, s.layers + s.mtp.moe_blocks))
    assume(pipeline != "dualpipe" or pp % 2 == 0)
    parts = parts_of_pipeline(s, pp=pp, pipeline=pipeline)
    times = 2 if pipeline == "dualpipe" else 1
    copies = 0 if times == 2 or pp == 1 or not s.mtp.depth else s.vocab_size * s.dim  # MTP's embedding, at the end
    assert sum(sum(part.weights) for part in parts) == times * all_weights(preset) + copies
    blocks = [part.dense_blocks + part.moe_blocks for part in parts]
    assert sum(blocks) == times * (s.layers + s.mtp.moe_blocks)
    assert max(blocks) - min(blocks) <= times


def test_a_tied_head_stands_with_the_embedding_or_copies_it() -> None:
    tied, untied = (skeleton("model=tiny", "mtp=none", f"model.tie_embeddings={tied}") for tied in ("true", "false"))
    matrix = tied.vocab_size * tied.dim
    for pp, difference in ((1, matrix), (2, 0)):
        counts = [sum(parts_of_pipeline(s, pp=pp, pipeline="1f1b")[-1].weights) for s in (tied, untied)]
        assert counts[1] - counts[0] == difference


@pytest.mark.parametrize(("formats", "per_parameter"), [("fp32", 4 + 4 + 8), ("bf16", 2 + 4 + 4 + 8)])
@pytest.mark.parametrize("preset", PRESETS)
def test_states_on_one_gpu_are_parameters_times_bytes(preset: str, formats: str, per_parameter: int) -> None:
    memory = gpu_memory(skeleton(f"model={preset}"), replace(ONE_GPU, formats=FORMATS[formats]))
    states = memory["weights"] + memory["gradients"] + memory["optimiser"]
    assert states == pytest.approx(per_parameter * all_weights(preset), rel=1e-12)
    assert memory["total"] == memory["mean_total"]


@pytest.mark.parametrize(("pp", "pipeline"), [(1, "1f1b"), (2, "dualpipe")])
def test_zero_1_keeps_the_optimiser_states_once_over_all_gpus(pp: int, pipeline: Any) -> None:
    """Both GPUs of a DualPipe of two hold the whole model; 12 bytes: the master weight and two FP32 moments."""
    s, r = skeleton("model=tiny"), replace(ONE_GPU, gpus=16, pp=pp, ep=4, pipeline=pipeline, zero_stage=1)
    assert gpu_memory(s, r)["optimiser"] * r.gpus == pytest.approx(12 * all_weights("tiny"))
    routed = 3 * s.dim * s.expert_dim * s.n_experts * (s.moe_layers + s.mtp.moe_blocks)
    each = all_weights("tiny") - routed * (1 - 1 / r.ep)
    assert gpu_memory(s, replace(r, zero_stage=0))["optimiser"] == pytest.approx(12 * each)
    assert gpu_memory(s, r)["gradients"] == gpu_memory(s, replace(r, zero_stage=0))["gradients"] == 4 * each


def test_report_recipe_by_hand() -> None:
    """The first and last of 16 stages on one GPU: blocks 0-3 and 59-61 (MTP's the last), embedding and head."""
    memory = gpu_memory(skeleton(*V3), REPORT)
    d, attention = 7168, 187_105_280
    experts = 4 * 3 * d * 2048 * 256 // 64  # blocks 3, 59, 60, 61
    linear = 7 * attention + 3 * 3 * d * 18432 + 4 * 3 * d * 2048 + 2 * d * d
    other = 7 * (1536 + 512 + 2 * d) + 4 * 256 * d + 2 * 129_280 * d + 4 * d
    assert memory["weights"] == linear + experts + 2 * other
    assert memory["gradients"] == 4 * (linear + experts + other)
    assert memory["optimiser"] == pytest.approx(8 * ((linear + other) / 256 + experts / 4))
    dense, moe = 28_672 + 4224 + 24_576 + 36_864, 28_672 + 4224 + 24_576 + 1024 + 8 * 11_264 + 4096
    assert memory["activations"] == (3 * dense + 4 * moe + 28_672) * 4096 * 17 / 2
    assert memory["logits"] == 2 * 129_280 * 4 * 4096
    assert memory["total"] < 80e9, "the report trained on GPUs of 80 GB"


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from(SCHEDULES), st.sampled_from(["none", "selective", "full"]))
def test_more_of_anything_takes_no_more_memory(ep: int, pipeline: Any, recompute: Any) -> None:
    s = skeleton("model=v2_lite")
    r = replace(ONE_GPU, gpus=64, pp=4, ep=ep, pipeline=pipeline, recompute=recompute, num_microbatches=16)
    memory = gpu_memory(s, r)
    assert gpu_memory(s, replace(r, ep=2 * ep))["total"] <= memory["total"]
    assert gpu_memory(s, replace(r, gpus=128))["total"] <= memory["total"]
    assert gpu_memory(s, replace(r, zero_stage=0))["optimiser"] >= memory["optimiser"]
    assert gpu_memory(s, replace(r, micro_batch=2 * r.micro_batch))["total"] > memory["total"]
    if recompute != "none":
        assert gpu_memory(s, replace(r, recompute="none"))["total"] > memory["total"]


def test_no_more_micro_batches_are_in_flight_than_there_are() -> None:
    s, r = skeleton("model=tiny"), replace(ONE_GPU, gpus=2, pp=2, num_microbatches=8)
    both, one = gpu_memory(s, r), gpu_memory(s, replace(r, num_microbatches=1))
    assert both["activations"] == 2 * one["activations"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 128, "ep": 128}, "ep=128: must divide the 64 experts"),
        ({"gpus": 28, "pp": 28}, "pp=28: must be at most 27"),
    ],
)
def test_what_cannot_be_spread_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_memory(skeleton("model=v2_lite"), replace(ONE_GPU, **changes))


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"gpus": 6, "pp": 4, "ep": 2}, ["pp=4: must divide gpus=6", "ep=2: must divide gpus / pp = 1"]),
        ({"pp": 0, "mfu": -1.0}, ["pp=0: must be at least 1", "mfu=-1.0: must be above 0"]),
        ({"pp": 3, "gpus": 3, "pipeline": "dualpipe"}, ["pipeline=dualpipe: needs an even pp, not 3"]),
        ({"zero_stage": 2}, ["zero_stage=2: must be 0, 1 or 3"]),
    ],
)
def test_a_recipe_names_all_that_does_not_fit(changes: dict[str, Any], messages: list[str]) -> None:
    recipe: Recipe = replace(ONE_GPU, **changes)
    with pytest.raises(ValueError, match="=") as error:
        recipe.check()
    assert all(message in str(error.value) for message in messages)
