"""MLA and GQA against FP64 loops over heads and positions; absorbed decoding against naive."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsv3.testing.plain import Plain, drawn
from plugins.attention.gqa import GroupedQueryAttention
from plugins.attention.masks import attention_mask
from plugins.attention.mla import MultiHeadLatentAttention

few = settings(max_examples=12, deadline=None, derandomize=True)
pick = st.sampled_from
YARN = {"factor": 8.0, "original_length": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7}
SCALE = (0.1 * 0.7 * math.log(8.0) + 1) ** 2


@st.composite
def latent(draw):
    return MultiHeadLatentAttention(
        dim=draw(pick([8, 24])),
        n_heads=draw(pick([1, 3, 4])),
        q_lora_rank=draw(pick([None, 6, 16])),
        kv_lora_rank=draw(pick([4, 16])),
        qk_nope_head_dim=draw(pick([2, 8, 12])),
        qk_rope_head_dim=draw(pick([2, 8])),
        v_head_dim=draw(pick([2, 8, 32])),
        rope_theta=draw(pick([10.0, 1e4])),
        yarn=draw(pick([None, YARN])),
        norm_eps=1e-6,
        decode=draw(pick(["absorb", "naive"])),
        precision=Plain(torch.float32),
    )


@st.composite
def grouped(draw):
    heads = draw(pick([1, 2, 6]))
    return GroupedQueryAttention(
        dim=draw(pick([8, 24])),
        n_heads=heads,
        n_kv_heads=draw(pick([n for n in (1, 2, 3, 6) if heads % n == 0])),
        head_dim=draw(pick([2, 8, 10])),
        rope_theta=draw(pick([10.0, 1e4])),
        yarn=draw(pick([None, YARN])),
        precision=Plain(torch.float32),
    )


def ready(attention, seed):
    torch.manual_seed(seed)
    drawn(attention)
    for name, parameter in attention.named_parameters():
        if name.endswith("layernorm.weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return attention


def inputs(attention, seed, length=9):
    generator = torch.Generator().manual_seed(seed)
    dim = attention.o_proj.weight.shape[0]
    positions = torch.arange(length).expand(2, -1)
    ids = torch.ones(2, length, dtype=torch.int64)
    ids[0, 4:], ids[1, -2:] = 2, 0
    return torch.randn(2, length, dim, generator=generator), positions, ids


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


def turn(vector, position, theta, yarn, neighbours):
    """RoPE of one vector, pair by pair."""
    width, out = len(vector), vector.clone()
    for j in range(width // 2):
        a, b = (2 * j, 2 * j + 1) if neighbours else (j, j + width // 2)
        angle = position * frequency(j, width, theta, yarn)
        out[a] = vector[a] * math.cos(angle) - vector[b] * math.sin(angle)
        out[b] = vector[a] * math.sin(angle) + vector[b] * math.cos(angle)
    return out


def frequency(j, width, theta, yarn):
    """theta^(-2j/R), divided by `factor` where it makes few turns over the original length (arXiv 2309.00071)."""
    plain = theta ** (-2 * j / width)
    if yarn is None:
        return plain

    def pair(turns):
        return width * math.log(yarn["original_length"] / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(yarn["beta_fast"])), 0), min(math.ceil(pair(yarn["beta_slow"])), width - 1)
    share = min(max((j - low) / max(high - low, 1e-3), 0.0), 1.0)
    return plain * (1 - share) + plain / yarn["factor"] * share


def attend(queries, keys, values, visible, scale):
    """softmax(q k^T * scale) v for one head, one query at a time."""
    out = []
    for i, q in enumerate(queries):
        seen = [j for j in range(i + 1) if visible(i, j)]
        weights = torch.stack([q @ keys[j] * scale for j in seen]).softmax(0)
        out.append(sum(w * values[j] for w, j in zip(weights, seen, strict=True)))
    return torch.stack(out)


def latent_reference(m, x, position, visible):
    w = {name: p.detach().double() for name, p in m.named_parameters()}

    def turned(vectors):
        return torch.stack([turn(v, p, m.rope_theta, m.yarn, True) for v, p in zip(vectors, position, strict=True)])

    if m.q_lora_rank:
        q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"]) @ w["q_b_proj.weight"].T
    else:
        q = x @ w["q_proj.weight"].T
    down = x @ w["kv_a_proj_with_mqa.weight"].T
    latents, shared = norm(down[:, : m.rank], w["kv_a_layernorm.weight"]), down[:, m.rank :]
    up = latents @ w["kv_b_proj.weight"].T
    heads = []
    for h in range(m.n_heads):
        own = q[:, h * (m.nope + m.rope) : (h + 1) * (m.nope + m.rope)]
        kv = up[:, h * (m.nope + m.v) : (h + 1) * (m.nope + m.v)]
        queries = torch.cat((own[:, : m.nope], turned(own[:, m.nope :])), 1)
        keys = torch.cat((kv[:, : m.nope], turned(shared)), 1)
        scale = (m.nope + m.rope) ** -0.5 * (SCALE if m.yarn else 1)
        heads.append(attend(queries, keys, kv[:, m.nope :], visible, scale))
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


def grouped_reference(m, x, position, visible):
    w = {name: p.detach().double() for name, p in m.named_parameters()}
    d, scale = m.head_dim, m.head_dim**-0.5 * (SCALE if m.yarn else 1)

    def head(name, h):
        return (x @ w[f"{name}.weight"].T)[:, h * d : (h + 1) * d]

    def turned(vectors):
        return torch.stack([turn(v, p, m.rope_theta, m.yarn, False) for v, p in zip(vectors, position, strict=True)])

    heads = []
    for h in range(m.n_heads):
        group = h // (m.n_heads // m.n_kv_heads)
        heads.append(
            attend(turned(head("q_proj", h)), turned(head("k_proj", group)), head("v_proj", group), visible, scale)
        )
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


CASES = pytest.mark.parametrize(
    ("strategy", "reference"), [(latent(), latent_reference), (grouped(), grouped_reference)], ids=["mla", "gqa"]
)


@CASES
@given(data=st.data(), seed=st.integers(0, 99), isolate=st.booleans())
@few
def test_equals_loops_in_fp64(strategy, reference, data, seed, isolate):
    attention = ready(data.draw(strategy), seed)
    x, positions, ids = inputs(attention, seed)
    found = attention(x, positions, ids if isolate else None)
    for row in range(2):

        def visible(i, j, row=row):
            return not isolate or bool(ids[row, i] == ids[row, j])

        expected = reference(attention, x[row].double(), positions[row].tolist(), visible)
        assert torch.allclose(found[row].double(), expected, rtol=1e-4, atol=1e-5)


@given(data=st.data(), seed=st.integers(0, 99), chunks=st.lists(st.integers(1, 4), min_size=2, max_size=6))
@few
def test_absorbed_decoding_equals_naive(data, seed, chunks):
    attention = ready(data.draw(latent()), seed)
    x, positions, _ = inputs(attention, seed, length=sum(chunks))
    outputs = {}
    for decode in ("absorb", "naive"):
        attention.decode = decode
        cache = attention.new_cache(range(2))
        parts = zip(x.split(chunks, 1), positions.split(chunks, 1), strict=True)
        outputs[decode] = torch.cat([attention(part, at, None, cache) for part, at in parts], 1)
    assert torch.allclose(outputs["absorb"], outputs["naive"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(outputs["naive"], attention(x, positions), rtol=1e-4, atol=1e-5)


def test_absorbed_decoding_never_expands_the_latents(monkeypatch):
    attention = ready(latent_of("absorb"), 0)
    x, positions, _ = inputs(attention, 0)
    cache = attention.new_cache(range(2))
    attention(x[:, :8], positions[:, :8], None, cache)
    monkeypatch.setattr(attention.kv_b_proj, "forward", lambda _: pytest.fail("keys and values were expanded"))
    assert attention(x[:, 8:], positions[:, 8:], None, cache).shape == x[:, 8:].shape


def latent_of(decode):
    return MultiHeadLatentAttention(
        dim=8, n_heads=2, q_lora_rank=None, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
        rope_theta=1e4, yarn=None, norm_eps=1e-6, decode=decode, precision=Plain(torch.float32),
    )  # fmt: skip


def test_cache_numbers():
    """576 a token and layer at 671B, against 40,960 for full keys and values of the same heads (192 + 128 wide)."""
    sizes = {"dim": 7168, "n_heads": 128, "rope_theta": 1e4, "yarn": None, "precision": Plain(torch.bfloat16)}
    with torch.device("meta"):
        mla = MultiHeadLatentAttention(
            **sizes, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            norm_eps=1e-6, decode="absorb",
        )  # fmt: skip
        gqa = GroupedQueryAttention(**sizes, n_kv_heads=8, head_dim=128)
    assert mla.kv_cache_elements_per_token() == 576
    assert mla.new_cache([0]).rows[0].held.shape == (0, 576)
    assert gqa.kv_cache_elements_per_token() == 2 * 8 * 128


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_flops(attention):
    """Counted by torch's own counter over one token that sees a full cache."""
    made = latent_of("naive") if attention == "mla" else GroupedQueryAttention(
        dim=8, n_heads=4, n_kv_heads=4, head_dim=6, rope_theta=1e4, yarn=None, precision=Plain(torch.float32)
    )  # fmt: skip
    context = 16
    x, positions, _ = inputs(ready(made, 0), 0, length=context)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        made(x[:1], positions[:1])
    counted = counter.get_total_flops()
    # One block of queries: the counter sees the full square of queries and keys.
    assert counted == context * made.flops_per_token(context)


def test_masks():
    assert attention_mask(4, 4, None, torch.device("cpu")) is None
    assert attention_mask(2, 3, None, torch.device("cpu")).tolist() == [[True, True, False], [True, True, True]]
    ids = torch.tensor([[1, 1, 2]])
    expected = [[True, False, False], [True, True, False], [False, False, True]]
    assert attention_mask(3, 3, ids, torch.device("cpu"))[0, 0].tolist() == expected
    with pytest.raises(ValueError, match="cache"):
        attention_mask(2, 3, ids, torch.device("cpu"))
