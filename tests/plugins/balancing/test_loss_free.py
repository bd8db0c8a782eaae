"""Loss-free balancing against its formula in whole numbers and fractions; its traps; and that it does balance."""

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.balancing.base import Unbalanced
from plugins.balancing.composed import Composed
from plugins.balancing.loss_free import LossFree
from plugins.balancing.sequence_aux import SequenceAux


def loss_free(n_experts, *, gamma=0.001, rule="sign", centred=False):
    return LossFree(
        n_experts=n_experts, gamma=gamma if callable(gamma) else lambda _: gamma, rule=rule, centred=centred
    )


def reference_update(bias, counts, gamma, rule, centred):
    """The update in exact fractions."""
    total, n_experts = sum(counts), len(counts)
    if total == 0:
        return bias
    mean = Fraction(total, n_experts)
    lacks = [mean - count for count in counts]
    moves = [(lack > 0) - (lack < 0) if rule == "sign" else lack / mean for lack in lacks]
    moved = [b + Fraction(gamma) * move for b, move in zip(bias, moves, strict=True)]
    shift = sum(moved) / n_experts if centred else 0
    return [b - shift for b in moved]


COUNTS = st.integers(1, 8).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 100), min_size=n, max_size=n), min_size=1, max_size=6)
)


@settings(max_examples=80, deadline=None)
@given(COUNTS, st.sampled_from(["sign", "proportional"]), st.booleans())
def test_updates_agree_with_exact_fractions(steps, rule, centred):
    balancing = loss_free(len(steps[0]), gamma=0.01, rule=rule, centred=centred)
    expected = [Fraction(0)] * len(steps[0])
    for counts in steps:
        balancing.observe(torch.tensor(counts))
        balancing.update(0)
        expected = reference_update(expected, counts, 0.01, rule, centred)
        assert balancing.bias.tolist() == pytest.approx([float(b) for b in expected], abs=1e-6)
        assert not balancing.counts.any()


def test_gamma_follows_the_tokens():
    balancing = loss_free(2, gamma=lambda tokens: 0.5 if tokens < 100 else 0.0)
    for tokens, expected in ((0, -0.5), (99, -1.0), (100, -1.0)):
        balancing.observe(torch.tensor([3, 1]))
        balancing.update(tokens)
        assert balancing.bias[0].item() == expected


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_it_balances_a_skewed_router(rule):
    """Affinities with a strong preference; without a bias the busiest expert has several times the mean load."""
    torch.manual_seed(0)
    n_experts, top_k = 16, 2
    balancing = loss_free(n_experts, gamma=0.005, rule=rule)
    skew = torch.linspace(-1, 1, n_experts)

    def load():
        affinities = (torch.randn(1024, n_experts) + skew).sigmoid()
        chosen = (affinities + balancing.bias).topk(top_k).indices
        return torch.bincount(chosen.flatten(), minlength=n_experts)

    def violation(counts):
        return (counts.max() / counts.double().mean() - 1).item()

    before = violation(load())
    for _ in range(300):
        balancing.observe(load())
        balancing.update(0)
    assert before > 1.5
    assert violation(sum(load() for _ in range(8))) < 0.15


def v3(n_experts=4):
    return Composed(
        parts={
            "loss_free": lambda: loss_free(n_experts, gamma=0.003),
            "sequence_aux": lambda: SequenceAux(n_experts=n_experts, top_k=1, alpha=1e-4),
        }
    )


def test_composed_bias_is_the_sum_of_its_parts():
    balancing = Composed(parts={"a": lambda: loss_free(2, gamma=0.5), "b": lambda: loss_free(2, gamma=0.25)})
    balancing.observe(torch.tensor([1, 0]))
    balancing.update(0)
    assert balancing.bias.tolist() == [-0.75, 0.75]
    with pytest.raises(ValueError, match="must have at least one part"):
        Composed(parts={})


def test_trap_01_the_bias_is_saved_and_resumes_bitwise_and_is_updated_in_place():
    torch.manual_seed(0)
    whole, first = v3(), v3()
    kept = first.parts["loss_free"].bias
    loads = [torch.randint(50, (4,)) for _ in range(9)]
    for balancing in (whole, first):
        for load in loads[:4]:
            balancing.observe(load)
            balancing.update(0)
        balancing.observe(loads[4])
    assert first.parts["loss_free"].bias is kept
    assert kept.any()
    saved = copy.deepcopy(first.state_dict())
    resumed = v3()
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.bias, whole.bias)
    for balancing in (whole, resumed):
        balancing.update(0)
        for load in loads[5:]:
            balancing.observe(load)
            balancing.update(0)
    assert torch.equal(resumed.bias, whole.bias)


def test_trap_05_one_update_per_step_whatever_the_number_of_micro_batches():
    """Loads [5, 0] and [0, 6] in one step: the sum decides, once."""
    balancing = loss_free(2, gamma=0.5)
    balancing.observe(torch.tensor([5, 0]))
    balancing.observe(torch.tensor([0, 6]))
    assert not balancing.bias.any()
    balancing.update(0)
    assert balancing.bias.tolist() == [0.5, -0.5]
    balancing.update(0)
    assert balancing.bias.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_trap_06_casts_leave_bias_and_counts_alone(cast):
    holder = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2), "balancing": v3()})
    balancing = holder["balancing"]
    balancing.observe(torch.tensor([40_961, 1, 2, 3]))
    cast(holder)
    assert holder["linear"].weight.dtype != torch.float32
    part = balancing.parts["loss_free"]
    assert part.bias.dtype == torch.float32
    assert part.counts.dtype == torch.int64
    assert part.counts.tolist() == [40_961, 1, 2, 3]


def test_trap_06_the_bias_does_not_stall_and_counts_are_exact():
    """In BF16, 0.5 + 0.001 is 0.5, and 40,960 tokens counted by 1 stop early."""
    balancing = loss_free(2, gamma=0.001)
    for _ in range(1000):
        balancing.observe(torch.tensor([0, 1]))
        balancing.update(0)
    assert balancing.bias[0].item() == pytest.approx(1.0, abs=1e-4)
    balancing.observe(torch.tensor([2**62 // 4, 2**62 // 4]))
    balancing.observe(torch.tensor([1, 0]))
    before = balancing.bias.clone()
    balancing.update(0)
    assert balancing.bias[0] < before[0]
    assert balancing.bias[1] > before[1]
    with pytest.raises(ValueError, match="integers"):
        balancing.observe(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_a_step_without_load_leaves_even_an_uncentred_bias_alone(rule):
    balancing = loss_free(3, rule=rule, centred=True)
    balancing.bias.copy_(torch.tensor([0.1, 0.2, 0.7]))
    balancing.update(0)
    assert torch.equal(balancing.bias, torch.tensor([0.1, 0.2, 0.7]))


def test_trap_06_no_optimiser_sees_the_state():
    assert not list(v3().parameters())


def test_moving_to_a_device_moves_the_buffers():
    balancing = v3().to("meta")
    assert {buffer.device.type for buffer in balancing.buffers()} == {"meta"}
    assert balancing.parts["loss_free"].bias.dtype == torch.float32


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="rule=signed"):
        loss_free(2, rule="signed")


def test_the_default_bias_is_not_saved_but_loss_frees_is():
    assert not Unbalanced(n_experts=2).state_dict()
    assert set(loss_free(2).state_dict()) == {"bias", "counts"}
