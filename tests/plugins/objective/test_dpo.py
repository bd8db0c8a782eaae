"""DPO: closed forms, the reference that is kept, TRL's own loss."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from dsv3.build import build_model
from dsv3.contracts import IGNORE, Forward, Head, LossTerm, MicroBatch, Step
from dsv3.model.decoder import Decoder
from dsv3.training.run_models import RunModels
from plugins.objective.documents import of_documents
from plugins.objective.dpo import ANSWERS, DPO, REFERENCE
from tests.synthetic import ByteTokenizer

T, PROMPT, V = 40, 2, 262
LENGTHS = (((9, 7), (5, 12)), ((6, 6),), ((13, 4), (3, 3)))
"""Of the documents of each row, in pairs; the first two tokens are the prompt's."""
BETA = 0.1


def pairs(seed: int = 0, lengths: Sequence[Sequence[tuple[int, int]]] = LENGTHS) -> MicroBatch:
    """Rows of pairs with padding at their ends."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), T)
    tokens_BT = torch.zeros(shape, dtype=torch.int64)
    ids_BT, positions_BT = tokens_BT.clone(), tokens_BT.clone()
    targets_BT = torch.full(shape, IGNORE)
    for b, row in enumerate(lengths):
        start = 0
        for number, length in enumerate((each for pair in row for each in pair), start=1):
            own = torch.randint(1, V, (length,), generator=generator)
            tokens_BT[b, start : start + length] = own
            targets_BT[b, start + PROMPT - 1 : start + length - 1] = own[PROMPT:]
            ids_BT[b, start : start + length] = number
            positions_BT[b, start : start + length] = torch.arange(length)
            start += length
    return MicroBatch(tokens_BT, targets_BT, positions_BT, ids_BT, torch.zeros_like(ids_BT))


def swapped(micro: MicroBatch) -> MicroBatch:
    """The same rows with the numbers of both documents of each pair exchanged."""
    ids_BT = micro.document_ids_BT
    return micro._replace(document_ids_BT=torch.where(ids_BT > 0, (ids_BT - 1 ^ 1) + 1, 0))


def dpo(**settings: Any) -> DPO:
    defaults: dict[str, Any] = {"loss": "sigmoid", "beta": BETA, "label_smoothing": 0.0, "nll": 0.0}
    return DPO(token_bytes_V=torch.ones(V), **{**defaults, **settings})


class Models(RunModels):
    """Of a run that began with the weights of `start`."""

    def __init__(self, config: DictConfig, policy: Decoder, start: Decoder) -> None:
        super().__init__(config, policy, ByteTokenizer())
        self.start, self.asked = start, 0

    def reference(self) -> Decoder:
        self.asked += 1
        return self.start


@pytest.fixture(scope="module")
def models(composed: Callable[..., DictConfig]) -> Models:
    """Two models with unlike weights."""
    config = composed("precision=fp32", "data.isolate_documents=true", "mtp=none")
    policy, start = (
        build_model(config),
        build_model(composed("precision=fp32", "data.isolate_documents=true", "mtp=none", "seed=2")),
    )
    return Models(config, policy, start)


def prepared(objective: DPO, models: Models, micro: MicroBatch | None = None) -> MicroBatch:
    with torch.no_grad():
        return objective.prepare(Step([micro or pairs()], 0, {}), models).micro_batches[0]


def taken(objective: DPO, micro: MicroBatch, hidden_BTD: Tensor, weight_VD: Tensor) -> LossTerm:
    denominators = objective.denominators(Step([micro], 0, {}))
    return objective.loss(Forward(hidden_BTD, [], {}), Head(weight_VD, weight_VD.detach()), micro, denominators)


def log_ratios(micro: MicroBatch, hidden_BTD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Log-ratio of each reply of each pair, [pairs, 2], and its number of tokens, by plain formulas."""
    log_probs = (hidden_BTD @ weight_VD.T).log_softmax(-1)
    found, lengths = [], []
    for b, row in enumerate(LENGTHS):
        for number in range(1, 2 * len(row) + 1):
            own = (micro.document_ids_BT[b] == number) & (micro.extra[ANSWERS][b] != IGNORE)
            ours = log_probs[b, own].gather(1, micro.extra[ANSWERS][b, own].unsqueeze(1)).sum()
            found.append(ours - micro.extra[REFERENCE][b][micro.document_ids_BT[b] == number].sum())
            lengths.append(int(own.sum()))
    return torch.stack(found).view(-1, 2), torch.tensor(lengths).view(-1, 2)


def of_policy(models: Models, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Hidden states and head of the policy, as leaves."""
    with torch.no_grad():
        hidden_BTD = models.policy(micro, with_mtp=False).hidden_BTD
    return hidden_BTD.clone().requires_grad_(), models.policy.head_weight.detach().clone().requires_grad_()


def test_the_loss_begins_at_ln_2_with_margin_0(models: Models) -> None:
    objective = dpo(nll=0.2)
    own = Models(models.config, models.policy, models.policy)
    micro = prepared(objective, own)
    term = taken(objective, micro, *of_policy(own, micro))
    nll = term.sums["chosen_nll"] / (micro.targets_BT != IGNORE).sum()
    assert float(term.loss.detach()) == pytest.approx(math.log(2) + 0.2 * float(nll), abs=1e-5)
    assert abs(float(term.sums["margin"])) < 1e-5


def test_the_reference_is_that_of_the_packed_row_and_is_computed_once(models: Models) -> None:
    objective, micro = dpo(), pairs()
    found = prepared(objective, models, micro).extra[REFERENCE]
    with torch.no_grad():
        live = models.log_probs(models.start, micro)
    ids_BT = micro.document_ids_BT
    torch.testing.assert_close(of_documents(found, ids_BT), of_documents(live, ids_BT), rtol=1e-5, atol=1e-5)
    asked = models.asked
    assert torch.equal(prepared(objective, models, micro).extra[REFERENCE], found)
    assert models.asked == asked
    prepared(objective, models, pairs(seed=1))
    assert models.asked > asked


def test_chosen_replies_alone_are_targets_of_mtp(models: Models) -> None:
    micro, given = prepared(dpo(), models), pairs()
    chosen = given.document_ids_BT % 2 == 1
    assert torch.equal(micro.targets_BT, given.targets_BT.masked_fill(~chosen, IGNORE))
    assert torch.equal(micro.extra[ANSWERS], given.targets_BT)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.2, "nll": 0.3},
        {"loss": "length_normalised", "label_smoothing": 0.1, "beta": 2.0},
        {"loss": "ipo"},
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_formulas(models: Models, settings: dict[str, Any]) -> None:
    objective = dpo(**settings)
    micro = prepared(objective, models)
    hidden_BTD, weight_VD = of_policy(models, micro)
    term = taken(objective, micro, hidden_BTD, weight_VD)
    ratios_P2, lengths_P2 = log_ratios(micro, hidden_BTD, weight_VD)
    if objective.kind != "sigmoid":
        ratios_P2 = ratios_P2 / lengths_P2
    h_P = ratios_P2[:, 0] - ratios_P2[:, 1]
    s, beta = objective.label_smoothing, objective.beta
    if objective.kind == "ipo":
        expected = (h_P - 1 / (2 * beta)).square().mean()
    else:
        expected = -((1 - s) * (beta * h_P).sigmoid().log() + s * (-beta * h_P).sigmoid().log()).mean()
    logits_NV, targets_N = (hidden_BTD @ weight_VD.T).flatten(0, 1), micro.targets_BT.flatten()
    expected = expected + objective.nll * F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE)
    torch.testing.assert_close(term.loss, expected, rtol=1e-5, atol=1e-6)
    leaves = (hidden_BTD, weight_VD)
    for found, right in zip(torch.autograd.grad(term.loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert float(term.sums["margin"]) == pytest.approx(float(beta * h_P.detach().sum()), rel=1e-4)
    assert int(term.sums["right"]) == int((h_P > 0).sum())


def test_figures_are_those_of_chosen_and_rejected_replies(models: Models) -> None:
    objective = dpo()
    micro = prepared(objective, models)
    hidden_BTD, weight_VD = of_policy(models, micro)
    sums, denominators = (
        taken(objective, micro, hidden_BTD, weight_VD).sums,
        objective.denominators(Step([micro], 0, {})),
    )
    ratios_P2, lengths_P2 = log_ratios(micro, hidden_BTD.detach(), weight_VD.detach())
    assert float(sums["chosen_ratio"]) == pytest.approx(float(ratios_P2[:, 0].sum()), rel=1e-4)
    assert float(sums["rejected_ratio"]) == pytest.approx(float(ratios_P2[:, 1].sum()), rel=1e-4)
    assert int(denominators["pairs"]) == 5
    assert [int(denominators[f"{side}_tokens"]) for side in ("chosen", "rejected")] == lengths_P2.sum(0).tolist()


def test_chosen_and_rejected_exchanged_turn_the_margin_round(models: Models) -> None:
    objective = dpo()
    one, other = prepared(objective, models), prepared(objective, models, swapped(pairs()))
    hidden_BTD, weight_VD = of_policy(models, one)
    first, second = (taken(objective, micro, hidden_BTD, weight_VD) for micro in (one, other))
    assert float(first.sums["margin"]) == pytest.approx(-float(second.sums["margin"]), rel=1e-4)
    assert abs(float(first.sums["margin"])) > 0.01
    assert int(first.sums["right"]) + int(second.sums["right"]) == 5


def test_micro_batches_add_up_to_the_step(models: Models) -> None:
    objective = dpo(nll=0.2)
    whole = prepared(objective, models)
    hidden_BTD, weight_VD = of_policy(models, whole)
    parts = [whole.map(lambda tensor, b=b: tensor[b : b + 1]) for b in range(3)]  # type: ignore[misc]
    denominators = objective.denominators(Step([*parts, whole.padding()], 0, {}))
    head = Head(weight_VD, weight_VD.detach())
    terms = [
        objective.loss(Forward(hidden_BTD[b : b + 1], [], {}), head, parts[b], denominators).loss for b in range(3)
    ]
    padding = objective.loss(Forward(hidden_BTD, [], {}), head, whole.padding(), denominators)
    torch.testing.assert_close(sum(terms), taken(objective, whole, hidden_BTD, weight_VD).loss, rtol=1e-5, atol=1e-6)
    assert float(padding.loss.detach()) == 0
    assert not any(value.any() for value in padding.sums.values())


TRL = {
    "sigmoid": ({"nll": 0.3}, {"sigmoid": 1.0, "sft": 0.3}),
    "ipo": ({"loss": "ipo"}, {"ipo": 1.0}),
    "length_normalised": ({"loss": "length_normalised"}, {"sigmoid_norm": 1.0}),
}


@pytest.mark.slow  # nine seconds of imports
@pytest.mark.parametrize("kind", TRL)
def test_loss_and_gradient_are_trls(models: Models, kind: str) -> None:
    """`DPOTrainer._compute_loss` of the same pairs on unpacked rows, with the reference's log-probabilities."""
    settings, weights = TRL[kind]
    objective = dpo(**settings)
    micro = prepared(objective, models)
    policy, found = models.policy, {}
    for whose in ("ours", "trl"):
        policy.zero_grad()
        if whose == "ours":
            loss = taken(objective, micro, policy(micro, with_mtp=False).hidden_BTD, policy.head_weight).loss
        else:
            loss = trl_loss(weights, policy, micro)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        found[whose] = {"loss": loss.detach(), **gradients}
    assert len(found["ours"]) > 20
    assert found["ours"].keys() == found["trl"].keys()
    for name, value in found["ours"].items():
        torch.testing.assert_close(value, found["trl"][name], rtol=1e-5, atol=1e-6, msg=name)


def trl_loss(weights: dict[str, float], policy: Decoder, micro: MicroBatch) -> Tensor:
    """TRL's sum of losses with these weights; its batch is [chosen replies, rejected replies], each in a row."""
    from trl.trainer.dpo_trainer import DPOTrainer

    ids_BT, numbers = micro.document_ids_BT, [range(1, 2 * len(row) + 1) for row in LENGTHS]
    documents = [(b, ids_BT[b] == number) for b, of_row in enumerate(numbers) for number in of_row]
    rows = [*documents[::2], *documents[1::2]]
    ids_RT = torch.zeros(len(rows), T, dtype=torch.int64)
    mask_RT = torch.zeros_like(ids_RT)
    for r, (b, own) in enumerate(rows):
        ids_RT[r, : int(own.sum())] = micro.tokens_BT[b, own]
        mask_RT[r, PROMPT : int(own.sum())] = 1
    chosen, rejected = torch.stack([micro.extra[REFERENCE][b, own].sum() for b, own in rows]).chunk(2)

    def model(*, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        """The policy, with the log-probabilities of the labels; figures that TRL only logs are 0."""
        zeros = torch.zeros_like(input_ids)
        alone = MicroBatch(input_ids, zeros, torch.arange(T).expand_as(zeros), zeros + 1, zeros)
        logits = policy(alone, with_mtp=False).hidden_BTD[:, :-1] @ policy.head_weight.T
        log_probs = logits.log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0).unsqueeze(2)).squeeze(2)
        logged = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs.masked_fill(labels[:, 1:] == IGNORE, 0.0),
            entropy=logged, mean_logits=logged, is_top1=logged.bool(),
        )  # fmt: skip

    def itself(values: Any) -> Any:
        return values

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=itself, gather_for_metrics=itself),
        loss_types=list(weights), loss_weights=list(weights.values()), beta=BETA, f_divergence_type="reverse_kl",
        precompute_ref_logps=True, aux_loss_enabled=False, ld_alpha=None, use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"input_ids": ids_RT, "attention_mask": mask_RT, "completion_mask": mask_RT}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss: Tensor = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss
