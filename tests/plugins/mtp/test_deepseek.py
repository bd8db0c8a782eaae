"""MTP against eq. 21-25 written out position by position, its switches, and what it must not see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv3.contracts import IGNORE, Forward, Head, MicroBatch
from dsv3.testing.plain import Plain, drawn
from plugins.mtp.deepseek import DeepSeekMTP
from plugins.mtp.none import NoMTP

few = settings(max_examples=15, deadline=None, derandomize=True)
DIM, VOCABULARY = 6, 20


class Mean(nn.Module):
    """A causal block that is easy to write out: x_i plus a matrix times the mean of x_0..x_i (of its document)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x_BTD, tokens_BT, positions_BT, document_ids_BT=None, cache=None):
        length = x_BTD.shape[1]
        seen = torch.ones(length, length, device=x_BTD.device).tril().expand(x_BTD.shape[0], -1, -1)
        if document_ids_BT is not None:
            seen = seen * (document_ids_BT[:, :, None] == document_ids_BT[:, None, :])
        mean = (seen / seen.sum(-1, keepdim=True)).to(x_BTD.dtype) @ x_BTD
        return x_BTD + self.mix(mean), None


def module(depth=1, concat="embedding_hidden", after_final_norm=True, document_boundary="mask"):
    torch.manual_seed(0)
    made = DeepSeekMTP(
        dim=DIM, norm_eps=1e-6, depth=depth, concat=concat, after_final_norm=after_final_norm,
        document_boundary=document_boundary, weight=lambda tokens: 0.3, block=Mean, precision=Plain(torch.float32),
    )  # fmt: skip
    drawn(made)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return made


embedding = nn.Embedding(VOCABULARY, DIM)


def packed(seed, rows=2, length=10):
    """Rows of one more token than positions, in documents whose ids rise; the last positions may be padding."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    ids = 1 + (torch.rand(rows, length, generator=generator) < 0.25).long().cumsum(1)
    padding = int(torch.randint(3, (), generator=generator))
    targets = row[:, 1:].clone()
    if padding:
        ids[:, -padding:] = 0
        targets[:, -padding:] = IGNORE
    positions = torch.arange(length).expand(rows, -1)
    return MicroBatch(row[:, :-1], targets, positions, ids, torch.zeros_like(ids))


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


def written_out(mtp, h, batch, isolate, concat):
    """h^k_i for i < T-k of each depth, FP64: M_k [norm(h^(k-1)_i) ; norm(Emb(t_(i+k)))], the block, and its norm."""
    results = []
    for k, m in enumerate(mtp.depths, start=1):
        length = batch.tokens_BT.shape[1] - k
        inputs = torch.zeros(len(h), length, DIM, dtype=torch.float64)
        for row in range(len(h)):
            for i in range(length):
                e = norm(embedding.weight[batch.tokens_BT[row, i + k]].double(), m.enorm.weight)
                s = norm(h[row, i], m.hnorm.weight)
                joined = torch.cat((e, s) if concat == "embedding_hidden" else (s, e))
                inputs[row, i] = m.eh_proj.weight.double() @ joined
        outputs = torch.zeros_like(inputs)
        for row in range(len(h)):
            for i in range(length):
                ids = batch.document_ids_BT[row]
                seen = [j for j in range(i + 1) if not isolate or ids[j] == ids[i]]
                outputs[row, i] = inputs[row, i] + m.block.mix.weight.double() @ inputs[row, seen].mean(0)
        results.append(norm(outputs, m.norm.weight))
        h = outputs
    return results


@given(
    depth=st.integers(1, 3),
    concat=st.sampled_from(["embedding_hidden", "hidden_embedding"]),
    isolate=st.booleans(),
    seed=st.integers(0, 99),
)
@few
def test_hidden_states_equal_the_equations(depth, concat, isolate, seed):
    mtp, batch = module(depth, concat), packed(seed)
    h = torch.randn(2, 10, DIM, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = mtp(h, batch, embedding, isolate)
        expected = written_out(mtp, h.double(), batch, isolate, concat)
    assert len(found) == depth
    for prediction, reference in zip(found, expected, strict=True):
        assert torch.allclose(prediction.hidden_BSD.double(), reference, atol=1e-5)


@given(depth=st.integers(1, 3), boundary=st.sampled_from(["mask", "cross"]), seed=st.integers(0, 99))
@few
def test_targets(depth, boundary, seed):
    """Position i of depth k predicts t_(i+k+1); masked, only within the document of t_i."""
    batch = packed(seed)
    predictions = module(depth, document_boundary=boundary)(torch.randn(2, 10, DIM), batch, embedding, False)
    length = batch.tokens_BT.shape[1]
    for k, prediction in enumerate(predictions, start=1):
        assert prediction.targets_BS.shape == (2, length - k)
        for row in range(2):
            ids = batch.document_ids_BT[row].tolist()
            of_token = [*ids, ids[-1]]  # the row's last target belongs to the last input's document
            for i in range(length - k):
                target = batch.targets_BT[row, i + k].item()  # t_(i+k+1)
                if boundary == "mask" and of_token[i + k + 1] != ids[i]:
                    target = IGNORE
                assert prediction.targets_BS[row, i].item() == target


@given(depth=st.integers(1, 3), seed=st.integers(0, 99))
@few
def test_each_depth_sees_one_token_more(depth, seed):
    """Replacing token j changes depth k exactly where i + k >= j, and a state h_j where i >= j."""
    mtp, batch = module(depth), packed(seed)
    h = torch.randn(2, 10, DIM, generator=torch.Generator().manual_seed(seed))
    plain = mtp(h, batch, embedding, False)
    for j in (0, 4, 9):
        tokens = batch.tokens_BT.clone()
        tokens[:, j] = (tokens[:, j] + 1) % VOCABULARY
        moved_h = h.clone()
        moved_h[:, j] += 1
        by_token = mtp(h, batch._replace(tokens_BT=tokens), embedding, False)
        by_state = mtp(moved_h, batch, embedding, False)
        for k, (before, token, state) in enumerate(zip(plain, by_token, by_state, strict=True), start=1):
            changed = (before.hidden_BSD != token.hidden_BSD).any(-1)
            first = max(min(j - depth_seen for depth_seen in range(1, k + 1) if j - depth_seen >= 0), 0) if j else None
            where = torch.arange(changed.shape[1])
            if first is None:  # token 0 is nobody's next token
                assert not changed.any()
            else:
                assert torch.equal(changed, (where >= first).expand_as(changed))
            changed = (before.hidden_BSD != state.hidden_BSD).any(-1)
            assert torch.equal(changed, (where >= j).expand_as(changed))


def test_another_divisor_changes_what_is_learnt_and_not_what_is_recorded():
    mtp, batch = module(depth=2), packed(3)
    h = torch.randn(2, 10, DIM, generator=torch.Generator().manual_seed(3))
    forward = Forward(h, mtp(h, batch, embedding, False), {})
    head = Head(embedding.weight, embedding.weight)
    given = {"mtp": torch.tensor(4.0), "tokens": torch.tensor(9.0)}
    usual = mtp.auxiliary_loss(forward, head, batch, given, 0)
    other = mtp.auxiliary_loss(forward, head, batch, given | {"mtp_divisor": torch.tensor(40.0)}, 0)
    torch.testing.assert_close(other.loss, usual.loss / 10)
    assert {name: float(value) for name, value in other.sums.items()} == {
        name: float(value) for name, value in usual.sums.items()
    }
    assert {figure.over for figure in mtp.statistics if figure.name.endswith("_loss")} == {"mtp"}


def test_nothing_of_the_main_model_is_copied():
    """Embedding and head are the main model's: depth 2 has twice depth 1, and neither has a row a token."""
    one, two = (sum(p.numel() for p in module(depth).parameters()) for depth in (1, 2))
    assert two == 2 * one == 2 * (3 * DIM + 2 * DIM * DIM + DIM * DIM)


def test_gradients_reach_states_embedding_and_every_weight():
    mtp, batch = module(2), packed(0)
    h = torch.randn(2, 10, DIM, requires_grad=True)
    embedding.weight.grad = None
    sum(p.hidden_BSD.square().sum() for p in mtp(h, batch, embedding, False)).backward()
    tensors = [h, embedding.weight, *mtp.parameters()]
    assert all(t.grad is not None and t.grad.any() for t in tensors)
    assert not h.grad[:, -1].any()  # the last state has no next token to go on with


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"concat": "both"}, "mtp.concat=both"), ({"document_boundary": "stop"}, "mtp.document_boundary=stop")],
)
def test_unknown_switches(changes, words):
    with pytest.raises(ValueError, match=words):
        module(**changes)


def test_none_predicts_nothing():
    none = NoMTP(block=Mean, precision=Plain(torch.float32))
    assert none(torch.randn(2, 10, DIM), packed(0), embedding, False) == []
    assert none.depth == 0
    assert none.weight(10**9) == 0.0
    assert not list(none.parameters())
