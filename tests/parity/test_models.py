"""Logits, loss, gradients and greedy cached generation equal transformers', on random configurations in FP32.

Tokens from the first near-tie of a router on (two scores within 1e-6, which rounding may order either way) are left
out, and must be few.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from dsv3.contracts import IGNORE
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from tests.parity.twins import (
    configured,
    distance,
    gradients_by_their_names,
    load_twin,
    micro_batch,
    near_ties,
    our_loss,
    random_model,
    their_gradients,
    write_twin,
)

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # theirs, without shared experts

LOGITS, GRADIENTS = 1e-5, 1e-4
ROWS, LENGTH = 2, 20
OPTIONS = {
    "deepseek_v3": ("router.group_score_top=2", "mtp=none"),
    "deepseek_v2": ("router=softmax_group_limited", "balancing=sequence_aux", "mtp=none"),
    "llama": ("attention=gqa", "mtp=none"),
}

few = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],  # every example loads a model: shrinking one would take minutes
    suppress_health_check=[HealthCheck.too_slow],
)
pick = st.sampled_from


@st.composite
def yarns(draw, mscales):
    factor, length = draw(pick([4.0, 40.0])), draw(pick([64, 4096]))
    fast, slow = draw(pick([32, 16])), draw(pick([1, 2]))
    keys = {"factor": factor, "original_length": length, "beta_fast": fast, "beta_slow": slow}
    return keys | {"mscale": draw(pick(mscales))}


@st.composite
def shapes(draw, family):
    layers = draw(st.integers(2, 3))
    heads = draw(pick([1, 2, 4]))
    model = {
        "vocab_size": draw(pick([61, 128])),
        "dim": draw(pick([32, 48, 64])),
        "n_layers": layers,
        "inter_dim": draw(pick([24, 80])),
        "n_heads": heads,
        "rope_theta": draw(pick([100.0, 10000.0])),
        "yarn": draw(st.none() | yarns([1.0, 0.707])),
        "tie_embeddings": draw(st.booleans()),
    }
    if family == "llama":
        kv_heads = draw(pick([n for n in (1, 2, 4) if heads % n == 0]))
        dense = {"n_dense_layers": layers, "n_routed_experts": 0, "n_shared_experts": 0}
        return model | dense | {"n_kv_heads": kv_heads, "head_dim": draw(pick([8, 16, 24]))}
    experts, groups = draw(pick([(8, 1), (8, 2), (16, 4), (12, 4), (16, 8)]))
    kept = draw(st.integers(1, groups))
    return model | {
        "n_dense_layers": draw(st.integers(0, layers - 1)),
        "moe_inter_dim": draw(pick([8, 24])),
        "n_routed_experts": experts,
        "n_shared_experts": draw(st.integers(0, 2)),
        "n_groups": groups,
        "topk_groups": kept,
        "top_k": draw(st.integers(1, min(6, kept * experts // groups))),
        "route_scale": draw(pick([1.0, 2.5, 16.0])),
        "q_lora_rank": draw(pick([None, 16, 24])),
        "kv_lora_rank": draw(pick([8, 24])),
        "qk_nope_head_dim": draw(pick([8, 12, 24])),
        "qk_rope_head_dim": draw(pick([2, 8, 16])),
        "v_head_dim": draw(pick([8, 20, 40])),
    }


def twins(family, model, seed):
    config = configured(*OPTIONS[family], **model)
    ours = random_model(config, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        write_twin(config, ours, Path(folder), mtp=False)
        return ours, load_twin(Path(folder))


excluded = {"tokens": 0, "all": 0}


@pytest.fixture(scope="module", autouse=True)
def few_tokens_are_excluded():
    """By all tests of this file that one interpreter runs."""
    yield
    assert excluded["tokens"] <= 0.05 * excluded["all"]


@pytest.mark.parametrize("family", OPTIONS)
@given(data=st.data(), seed=st.integers(0, 1000))
@few
def test_logits_loss_and_gradients(family, data, seed):
    model = data.draw(shapes(family))
    ours, theirs = twins(family, model, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model["vocab_size"], (ROWS, LENGTH + 1), generator=generator)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.2, IGNORE)
    batch = micro_batch(tokens[:, :-1], labels[:, 1:])
    loss, logits = our_loss(ours, batch)
    expected = theirs(input_ids=tokens, labels=labels)
    tied = near_ties(ours, ours(batch, with_mtp=False).routings, (ROWS, LENGTH))
    excluded["tokens"] += int(tied.sum())
    excluded["all"] += tied.numel()
    assert distance(logits[~tied], expected.logits[:, :-1][~tied]) <= LOGITS
    assume(not tied.any())
    assert distance(loss, expected.loss) <= LOGITS
    loss.backward()
    expected.loss.backward()
    mine, other = gradients_by_their_names(ours, model["n_layers"]), their_gradients(theirs)
    assert mine.keys() == other.keys()
    noise = 1e-7 * max(gradient.abs().max().item() for gradient in other.values())
    for name in other:
        assert distance(mine[name], other[name], noise=noise) <= GRADIENTS, name


def test_ties_are_seen():
    """Where two experts have one row and one bias, whoever keeps one of them has chosen by chance."""
    config = configured(*OPTIONS["deepseek_v3"], vocab_size=61, dim=32, n_routed_experts=8, n_groups=1, topk_groups=1)
    model = random_model(config, seed=0)
    tokens = torch.randint(61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = micro_batch(tokens, tokens)
    routings = model(batch, with_mtp=False).routings
    assert not near_ties(model, routings, (ROWS, LENGTH)).any()
    for _, moe in model.moe_layers():
        moe.router.weight.data[1::2] = moe.router.weight.data[::2]
        moe.router.top_k = 3  # of pairs: the third has a twin that is dropped
        for name, buffer in moe.balancing.named_buffers():
            if name.endswith(".bias"):
                buffer.zero_()
    assert near_ties(model, model(batch, with_mtp=False).routings, (ROWS, LENGTH)).all()


@pytest.mark.parametrize("family", OPTIONS)
@given(data=st.data(), seed=st.integers(0, 1000))
@settings(few, max_examples=8)
def test_greedy_cached_generation(family, data, seed):
    model = data.draw(shapes(family))
    ours, theirs = twins(family, model, seed)
    prompt = torch.randint(model["vocab_size"], (1, 7), generator=torch.Generator().manual_seed(seed))
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=True)[0, 7:].tolist()
    assert list(generate(ours, prompt[0].tolist(), Settings(max_tokens=12))) == expected
