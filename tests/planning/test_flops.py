"""Closed forms against what torch counts while a small model runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dsv3.build import build_model
from dsv3.contracts import MicroBatch
from dsv3.planning.flops import forward_flops, recomputed_flops, training_flops
from tests.planning.models import config, skeleton

ROWS, LENGTH = 2, 12
# The grouped product counts as nothing; rows of filling would be counted.
COUNTABLE = ("model=tiny", "experts=loop", "precision=fp32", "dispatch.pad_multiple=1")
MODELS = (
    (),
    ("attention=gqa", "model.n_kv_heads=1"),
    ("model.q_lora_rank=null", "router=softmax", "balancing=none"),
    ("model.n_dense_layers=3", "mtp=none"),
    ("model.n_dense_layers=0", "mtp.depth=2", "model.n_shared_experts=0"),
    ("router=hash", "model.tie_embeddings=true"),
)


def count(*overrides: str, with_mtp: bool, backward: bool) -> int:
    """Operations that torch sees in a micro-batch, the logits of every prediction included."""
    model = build_model(config(*COUNTABLE, *overrides))
    tokens = torch.randint(0, 4096, (ROWS, LENGTH + 1))
    ids = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], positions, ids, ids)
    with FlopCounterMode(display=False) as counter:
        output = model(batch, with_mtp=with_mtp)
        states = [output.hidden_BTD, *(prediction.hidden_BSD for prediction in output.predictions)]
        loss = sum(model.lm_head(h).logsumexp(-1).sum() for h in states)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("overrides", MODELS)
def test_forward_equals_what_torch_counts(overrides: tuple[str, ...]) -> None:
    """A row is one block of queries, in which causal attention is not halved: every token sees the whole row."""
    s = skeleton(*COUNTABLE, *overrides)
    planned = forward_flops(s, LENGTH)["model"]
    assert count(*overrides, with_mtp=False, backward=False) == ROWS * LENGTH * planned


@pytest.mark.parametrize("overrides", MODELS)
def test_training_is_three_times_forward(overrides: tuple[str, ...]) -> None:
    s = skeleton(*COUNTABLE, *overrides)
    planned = 3 * forward_flops(s, LENGTH)["model"]
    assert count(*overrides, with_mtp=False, backward=True) == ROWS * LENGTH * planned


def test_mtp_equals_what_torch_counts() -> None:
    """Depth 1 runs on the T - 1 positions that have a token further on."""
    s = skeleton(*COUNTABLE)
    planned = forward_flops(s, LENGTH - 1)["MTP"]
    both, model = count(with_mtp=True, backward=False), count(with_mtp=False, backward=False)
    assert both - model == ROWS * (LENGTH - 1) * planned


@pytest.mark.parametrize("preset", ["tiny", "v3_671b"])
def test_each_depth_of_mtp_costs_the_same(preset: str) -> None:
    one, two, none = (
        forward_flops(skeleton(f"model={preset}", mtp), 64) for mtp in ("mtp.depth=1", "mtp.depth=2", "mtp=none")
    )
    assert none["MTP"] == 0
    assert two["MTP"] == 2 * one["MTP"]
    assert one["model"] == two["model"] == none["model"] == none["total"]


def test_671b_by_hand() -> None:
    """6 x the matrices that a token meets, and 61 layers of 128 heads of 192 + 128 over 2048 positions."""
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    matrices = 37_552_282_624 - 129_280 * 7168 - norms
    scores = 3 * 61 * 2 * 128 * (192 + 128) * 2048
    flops = training_flops(skeleton("model=v3_671b"), 4096)
    assert flops["model"] == 6 * matrices + scores == 250_449_887_232


def test_mtp_of_671b_by_hand() -> None:
    """One MoE block, M_k of 2 d x d, and the shared head once more."""
    one = forward_flops(skeleton("model=v3_671b"), 2048)
    attention = (one["attention projections"] + one["attention scores"]) // 61
    moe = (one["router"] + one["shared experts"] + one["routed experts"]) // 58
    assert one["MTP"] == attention + moe + 2 * 2 * 7168**2 + 2 * 7168 * 129_280


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 2**17), st.sampled_from(["tiny", "v3_671b", "deepseek_llm_67b"]))
def test_only_attention_scores_grow_with_the_row(sequence: int, preset: str) -> None:
    s = skeleton(f"model={preset}")
    short, long = training_flops(s, sequence), training_flops(s, 4 * sequence)
    same = set(short) - {"attention scores", "model", "MTP", "total"}
    assert all(short[name] == long[name] for name in same)
    assert long["attention scores"] >= 4 * short["attention scores"]


def test_recomputation() -> None:
    s = skeleton("model=v3_671b")
    up = 1536 * 128 * 192 + 512 * 128 * (128 + 128)  # W_UQ with W_QR, W_UK with W_UV
    forward = forward_flops(s, 2048)
    assert recomputed_flops(s, 4096, "none") == 0
    assert recomputed_flops(s, 4096, "selective") == 62 * 2 * up
    assert recomputed_flops(s, 4096, "full") == forward["total"] - 2 * forward["head"]
