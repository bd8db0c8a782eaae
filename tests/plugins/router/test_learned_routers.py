"""The sigmoid and softmax routers against plain Python and float64 twins, and against transformers' routers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from plugins.router.base import top
from plugins.router.sigmoid import SigmoidGroupLimitedRouter
from plugins.router.softmax import SoftmaxRouter


@st.composite
def sizes(draw):
    n_groups = draw(st.integers(1, 4))
    group_size = draw(st.integers(2, 5))
    topk_groups = draw(st.integers(1, n_groups))
    return {
        "dim": draw(st.integers(1, 24)),
        "n_experts": n_groups * group_size,
        "n_groups": n_groups,
        "topk_groups": topk_groups,
        "top_k": draw(st.integers(1, topk_groups * group_size)),
    }


def sigmoid_router(shape, **changes):
    options = {"group_score_top": None, "route_scale": 2.5, "biased_groups": True}
    return SigmoidGroupLimitedRouter(**shape, **(options | changes))


def softmax_router(shape, **changes):
    return SoftmaxRouter(**shape, **({"route_scale": 1.0, "normalise_gates": False} | changes))


def exact_scores(seed, rows, n_experts, levels):
    """Multiples of 1/levels in [0, 1): sums of them are exact in FP32, and ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (rows, n_experts), generator=generator) / levels


def reference_selection(scores, biases, *, n_groups, topk_groups, top_k, group_score):
    """One token's experts: rank the groups, then the experts of those kept; the lower index wins a tie."""
    size = len(scores) // n_groups
    choice = [s + b for s, b in zip(scores, biases, strict=True)]
    groups = [range(g * size, (g + 1) * size) for g in range(n_groups)]
    ranked = sorted(range(n_groups), key=lambda g: (-group_score(groups[g], scores, choice), g))
    allowed = [i for g in ranked[:topk_groups] for i in groups[g]]
    return sorted(allowed, key=lambda i: (-choice[i], i))[:top_k]


@settings(max_examples=60, deadline=None)
@given(sizes(), st.booleans(), st.integers(0, 2**31), st.sampled_from([4, 256]))
def test_sigmoid_selection_is_the_reference_on_exact_scores(shape, biased_groups, seed, levels):
    router = sigmoid_router(shape, biased_groups=biased_groups)
    scores = exact_scores(seed, 8, shape["n_experts"], levels)
    biases = exact_scores(seed + 1, 1, shape["n_experts"], levels)[0] - 0.75
    summed = max(1, shape["top_k"] // shape["topk_groups"])

    def group_score(members, raw, choice):
        return sum(sorted(((choice if biased_groups else raw)[i] for i in members), reverse=True)[:summed])

    expected = [
        reference_selection(
            row, biases.tolist(), group_score=group_score, **{k: shape[k] for k in ("n_groups", "topk_groups", "top_k")}
        )
        for row in scores.tolist()
    ]
    assert router.select(scores, biases).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(0, 2**31), st.sampled_from([4, 256]))
def test_softmax_selection_is_the_reference_on_exact_scores(shape, seed, levels):
    router = softmax_router(shape)
    scores = exact_scores(seed, 8, shape["n_experts"], levels)
    biases = exact_scores(seed + 1, 1, shape["n_experts"], levels)[0] - 0.75

    def group_score(members, raw, choice):
        return max(choice[i] for i in members)

    expected = [
        reference_selection(
            row, biases.tolist(), group_score=group_score, **{k: shape[k] for k in ("n_groups", "topk_groups", "top_k")}
        )
        for row in scores.tolist()
    ]
    assert router.select(scores, biases).tolist() == expected


def reference_gates(x, weight, experts, *, kind, scale, normalise):
    """Affinities and the gates of given experts, from the formulas, in float64."""
    logits = torch.einsum("nd,ed->ne", x, weight)
    raised = logits.exp()
    affinities = raised / (1 + raised) if kind == "sigmoid" else raised / raised.sum(1, keepdim=True)
    rows = torch.arange(len(x)).unsqueeze(1)
    gates = affinities[rows, experts]
    if normalise:
        gates = gates / gates.sum(1, keepdim=True)
    return affinities, gates * scale


@settings(max_examples=40, deadline=None)
@given(sizes(), st.sampled_from(["sigmoid", "softmax", "softmax normalised"]), st.integers(0, 2**31))
def test_values_and_gradients_agree_with_float64(shape, kind, seed):
    torch.manual_seed(seed)
    router = (
        sigmoid_router(shape, route_scale=2.5)
        if kind == "sigmoid"
        else softmax_router(shape, route_scale=2.5, normalise_gates="normalised" in kind)
    )
    x = torch.randn(6, shape["dim"], requires_grad=True)
    bias = torch.randn(shape["n_experts"]) * 0.1
    routing = router(x, bias, torch.zeros(6, dtype=torch.int64))
    assert torch.equal(routing.experts_NK, router.select(routing.affinities_NE, bias))

    weight64, x64 = (t.detach().double().requires_grad_() for t in (router.weight, x))
    affinities, gates = reference_gates(
        x64, weight64, routing.experts_NK, kind=kind.split()[0], scale=2.5, normalise=kind != "softmax"
    )
    torch.testing.assert_close(routing.affinities_NE.double(), affinities, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.gates_NK.double(), gates, rtol=1e-5, atol=1e-6)
    a, b = torch.randn_like(gates), torch.randn_like(affinities)
    ours = torch.autograd.grad(
        (routing.gates_NK * a.float()).sum() + (routing.affinities_NE * b.float()).sum(), [x, router.weight]
    )
    theirs = torch.autograd.grad((gates * a).sum() + (affinities * b).sum(), [x64, weight64])
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-4, atol=2e-5)


def by_expert(experts, gates, n_experts):
    """Gates as a dense row per token, so that the order of the choices does not matter."""
    return torch.zeros(len(experts), n_experts).scatter(1, experts, gates)


def test_sigmoid_router_is_transformers_v3_router():
    torch.manual_seed(3)
    config = DeepseekV3Config(
        hidden_size=48,
        n_routed_experts=32,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(config)
    ours = sigmoid_router({"dim": 48, "n_experts": 32, "top_k": 8, "n_groups": 8, "topk_groups": 4})
    assert ours.group_score_top == 2
    theirs.weight.data.copy_(ours.weight.data)
    bias = torch.randn(32) * 0.3
    theirs.e_score_correction_bias.copy_(bias)
    x = torch.randn(500, 48)
    logits, their_gates, their_experts = theirs(x)
    routing = ours(x, bias, torch.zeros(500, dtype=torch.int64))
    torch.testing.assert_close(routing.affinities_NE, logits.sigmoid())
    mixed, expected = by_expert(routing.experts_NK, routing.gates_NK, 32), by_expert(their_experts, their_gates, 32)
    torch.testing.assert_close(mixed, expected)
    weights = torch.randn(500, 32)
    our_gradient = torch.autograd.grad((mixed * weights).sum(), ours.weight)[0]
    their_gradient = torch.autograd.grad((expected * weights).sum(), theirs.weight)[0]
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "n_groups", "topk_groups"), [("greedy", 1, 1), ("group_limited_greedy", 8, 3)])
def test_softmax_router_is_transformers_v2_router(method, n_groups, topk_groups):
    torch.manual_seed(4)
    config = DeepseekV2Config(
        hidden_size=48,
        num_attention_heads=4,
        n_routed_experts=32,
        num_experts_per_tok=6,
        n_group=n_groups,
        topk_group=topk_groups,
        topk_method=method,
        routed_scaling_factor=16.0,
    )
    theirs = DeepseekV2TopkRouter(config)
    shape = {"dim": 48, "n_experts": 32, "top_k": 6, "n_groups": n_groups, "topk_groups": topk_groups}
    ours = softmax_router(shape, route_scale=16.0)
    theirs.weight.data.copy_(ours.weight.data)
    x = torch.randn(500, 48)
    _, their_gates, their_experts = theirs(x)
    routing = ours(x, torch.zeros(32), torch.zeros(500, dtype=torch.int64))
    torch.testing.assert_close(
        by_expert(routing.experts_NK, routing.gates_NK, 32), by_expert(their_experts, their_gates, 32)
    )


@pytest.mark.parametrize("make", [sigmoid_router, softmax_router])
def test_trap_10_masked_groups_are_never_chosen_under_a_negative_bias(make):
    """With every biased score below 0, a mask of 0 would send every token to the groups it had dropped."""
    shape = {"dim": 16, "n_experts": 32, "top_k": 4, "n_groups": 8, "topk_groups": 2}
    router, x = make(shape), torch.randn(300, 16)
    tokens = torch.zeros(300, dtype=torch.int64)
    plain, lowered = (router(x, torch.full((32,), shift), tokens) for shift in (0.0, -2.0))
    groups = lowered.experts_NK // 4
    assert max(len(set(row)) for row in groups.tolist()) <= 2
    torch.testing.assert_close(
        by_expert(lowered.experts_NK, lowered.gates_NK, 32), by_expert(plain.experts_NK, plain.gates_NK, 32)
    )


def test_trap_13_the_bias_works_at_any_width():
    """The published gate has a bias only at width 7168."""
    for dim in (8, 48, 7168):
        router = sigmoid_router({"dim": dim, "n_experts": 8, "top_k": 2, "n_groups": 1, "topk_groups": 1})
        bias = torch.zeros(8)
        bias[5] = 10.0
        routing = router(torch.randn(20, dim), bias, torch.zeros(20, dtype=torch.int64))
        assert (routing.experts_NK == 5).any(1).all()
        torch.testing.assert_close(routing.gates_NK.sum(1), torch.full((20,), 2.5))


def test_one_group_is_no_grouping_and_group_score_top_is_explicit():
    shape = {"dim": 8, "n_experts": 12, "top_k": 4, "n_groups": 3, "topk_groups": 2}
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5]])
    for summed, kept in ((1, {0, 1}), (2, {1, 0}), (4, {2, 1})):
        router = sigmoid_router(shape, group_score_top=summed)
        assert set((router.select(scores, torch.zeros(12)) // 4).unique().tolist()) <= kept
    free = sigmoid_router(shape | {"n_groups": 1, "topk_groups": 1})
    assert free.select(scores, torch.zeros(12)).tolist() == [[0, 4, 5, 8]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 13}, "top_k=13"),
        ({"n_groups": 5}, "n_groups=5"),
        ({"n_groups": 0}, "n_groups=0"),
        ({"topk_groups": 4}, "topk_groups=4"),
        ({"top_k": 9}, "hold only 8"),
        ({"group_score_top": 5}, "group_score_top=5"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    shape = {"dim": 8, "n_experts": 12, "top_k": 4, "n_groups": 3, "topk_groups": 2}
    with pytest.raises(ValueError, match=words):
        sigmoid_router(shape, **changes) if "group_score_top" in changes else sigmoid_router(shape | changes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 64, 65, 300]),
    experts=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 5, 10_000]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_selection_is_that_of_a_stable_sort(rows, experts, levels, seed, data):
    """With many equal scores, negative ones, both zeros and -inf, as groups that are left out have."""
    generator = torch.Generator().manual_seed(seed)
    scores_NE = (torch.randint(-levels, levels + 1, (rows, experts), generator=generator) / levels).float()
    scores_NE[torch.rand(rows, experts, generator=generator) < 0.1] = -0.0
    scores_NE[torch.rand(rows, experts, generator=generator) < 0.1] = float("-inf")
    k = data.draw(st.integers(1, experts))
    expected = scores_NE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top(scores_NE, k), expected)
