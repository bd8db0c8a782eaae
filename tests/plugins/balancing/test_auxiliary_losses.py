"""The sequence-wise, batch-wise and Switch losses against loops in float64; their closed forms; padding; gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.contracts import Routing
from plugins.balancing.base import Unbalanced
from plugins.balancing.batch_aux import BatchAux, SwitchAux
from plugins.balancing.composed import Composed
from plugins.balancing.loss_free import LossFree
from plugins.balancing.sequence_aux import SequenceAux


def reference_row(chosen, affinities, real):
    """sum_i f_i P_i over the real tokens of one row, written out (eq. 17-20); None without a real token."""
    tokens = [t for t, is_real in enumerate(real) if is_real]
    if not tokens:
        return None
    n_experts, top_k = affinities.shape[1], len(chosen[0])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n_experts):
        f = n_experts / (top_k * len(tokens)) * sum(i in chosen[t] for t in tokens)
        p = sum(affinities[t, i] / affinities[t].sum() for t in tokens) / len(tokens)
        total = total + f * p
    return total


def raw_top(affinities, top_k):
    rows = affinities.tolist()
    return [sorted(range(len(row)), key=lambda i: -row[i])[:top_k] for row in rows]


@st.composite
def micro_batches(draw):
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    n_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, n_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    affinities = torch.rand(rows * length, n_experts, generator=generator) + 0.01
    experts = torch.rand(rows * length, n_experts, generator=generator).argsort(1)[:, :top_k]
    mask = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.3, 0.8, 2.0]))
    return affinities, experts, mask, top_k


def reference_loss(kind, affinities, experts, mask, top_k):
    rows, length = mask.shape
    chosen = experts.tolist() if kind == "switch" else raw_top(affinities, top_k)
    if kind != "sequence":
        mask, rows, length = mask.reshape(1, -1), 1, rows * length
    losses = []
    for row in range(rows):
        part = slice(row * length, (row + 1) * length)
        losses.append(reference_row(chosen[part], affinities[part], mask[row].tolist()))
    losses = [loss for loss in losses if loss is not None]
    return sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64)


def part(kind, n_experts, top_k, alpha):
    if kind == "switch":
        return SwitchAux(n_experts=n_experts, alpha=alpha)
    return {"sequence": SequenceAux, "batch": BatchAux}[kind](n_experts=n_experts, top_k=top_k, alpha=alpha)


@pytest.mark.parametrize("kind", ["sequence", "batch", "switch"])
@settings(max_examples=40, deadline=None)
@given(micro_batches())
def test_losses_and_gradients_agree_with_float64(kind, batch):
    affinities, experts, mask, top_k = batch
    ours, theirs = affinities.clone().requires_grad_(), affinities.double().requires_grad_()
    balancing = part(kind, affinities.shape[1], top_k, 0.5)
    loss = balancing.loss(Routing(experts, affinities.gather(1, experts), ours), tuple(mask.shape), mask, 0)
    expected = 0.5 * reference_loss(kind, theirs, experts, mask, top_k)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    if mask.any():
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["sequence", "batch", "switch"])
def test_a_balanced_load_costs_alpha_and_a_collapsed_one_more(kind):
    """Tokens that take the experts in turn: f_i = 1, so the loss is alpha, at any scale of the affinities."""
    n_experts, top_k, rows = 8, 2, 3
    one = torch.rand(n_experts)
    turns = torch.stack([one.roll(t) for t in range(n_experts)]).repeat(rows, 1)
    mask = torch.ones(rows, n_experts, dtype=torch.bool)
    balancing = part(kind, n_experts, top_k, 1e-4)

    def loss(affinities):
        experts = affinities.topk(top_k).indices
        return balancing.loss(Routing(experts, affinities.gather(1, experts), affinities), (rows, 8), mask, 0).item()

    assert loss(turns) == pytest.approx(1e-4)
    assert loss(turns * 0.01) == pytest.approx(1e-4)
    collapsed = torch.tensor([1.0, 1.0] + [0.0] * 6).expand(rows * 8, 8)
    assert loss(collapsed) == pytest.approx(1e-4 * n_experts / top_k)


def test_sequence_and_batch_losses_differ_where_sequences_specialise():
    """Two rows, each all on its own expert: balanced over the batch, collapsed in each sequence."""
    affinities = torch.eye(2).repeat_interleave(4, dim=0)
    routing = Routing(affinities.topk(1).indices, torch.ones(8, 1), affinities)
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert SequenceAux(n_experts=2, top_k=1, alpha=1.0).loss(routing, (2, 4), mask, 0) == 2
    assert BatchAux(n_experts=2, top_k=1, alpha=1.0).loss(routing, (2, 4), mask, 0) == 1


def test_f_counts_raw_affinities_not_the_experts_that_the_bias_chose():
    affinities = torch.tensor([[0.9, 0.1]] * 4)
    routing = Routing(torch.ones(4, 1, dtype=torch.int64), torch.ones(4, 1), affinities)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert SequenceAux(n_experts=2, top_k=1, alpha=1.0).loss(routing, (1, 4), mask, 0).item() == pytest.approx(1.8)
    assert BatchAux(n_experts=2, top_k=1, alpha=1.0).loss(routing, (1, 4), mask, 0).item() == pytest.approx(1.8)
    assert SwitchAux(n_experts=2, alpha=1.0).loss(routing, (1, 4), mask, 0).item() == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["sequence", "batch", "switch"])
def test_trap_07_padding_is_no_load(kind):
    """A padded micro-batch costs what the same tokens cost without padding, whatever the padding's affinities."""
    torch.manual_seed(0)
    real, n_experts = 5, 6
    affinities = torch.rand(real, n_experts)
    padding = torch.zeros(4, n_experts)
    padding[:, 0] = 1
    balancing = part(kind, n_experts, 2, 1.0)

    def loss(values, mask):
        experts = values.topk(2).indices
        return balancing.loss(Routing(experts, values.gather(1, experts), values), tuple(mask.shape), mask, 0)

    alone = loss(affinities, torch.ones(1, real, dtype=torch.bool))
    padded = loss(torch.cat([affinities, padding]), torch.arange(9)[None] < real)
    torch.testing.assert_close(padded, alone)


def test_trap_08_the_gradient_is_that_of_the_loss_and_the_auxiliary_loss_together():
    """Through the composed V3 balancing: weight.grad = d(task + alpha * sum f P) / d weight, term by term."""
    torch.manual_seed(0)
    alpha, top_k, rows, length, n_experts = 0.3, 2, 2, 5, 6
    balancing = Composed(
        parts={
            "loss_free": lambda: LossFree(n_experts=n_experts, gamma=lambda _: 0.1, rule="sign", centred=False),
            "sequence_aux": lambda: SequenceAux(n_experts=n_experts, top_k=top_k, alpha=alpha),
        }
    )
    x = torch.randn(rows * length, 4)
    weight = torch.randn(n_experts, 4, requires_grad=True)
    mask = torch.ones(rows, length, dtype=torch.bool)
    affinities = (x @ weight.T).sigmoid()
    experts = affinities.topk(top_k).indices
    task = affinities.gather(1, experts).square().sum()
    routing = Routing(experts, affinities.gather(1, experts), affinities)
    (task + balancing.loss(routing, (rows, length), mask, 0)).backward()

    weight64 = weight.detach().double().requires_grad_()
    affinities64 = (x.double() @ weight64.T).sigmoid()
    auxiliary = alpha * reference_loss("sequence", affinities64, experts, mask, top_k)
    (auxiliary_gradient,) = torch.autograd.grad(auxiliary, weight64, retain_graph=True)
    (task_gradient,) = torch.autograd.grad(affinities64.gather(1, experts).square().sum(), weight64)
    assert auxiliary_gradient.abs().max() > 1e-3
    torch.testing.assert_close(weight.grad.double(), task_gradient + auxiliary_gradient, rtol=1e-4, atol=1e-6)


def test_none_costs_nothing_and_moves_nothing():
    balancing = Unbalanced(n_experts=4)
    routing = Routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.rand(2, 4))
    assert balancing.loss(routing, (1, 2), torch.ones(1, 2, dtype=torch.bool), 0) == 0
    balancing.observe(torch.tensor([8, 0, 0, 0]))
    balancing.update(0)
    assert not balancing.bias.any()
    assert not balancing.state_dict()
