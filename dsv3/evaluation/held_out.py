"""Held-out evaluation: loss and bits per byte by domain, exact match on questions."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from dsv3.build import build_data
from dsv3.checkpoint.loading import Loaded
from dsv3.config.part import part
from dsv3.contracts import IGNORE, Data, Forward, KeepsHeldOut, MicroBatch, Question, Tokenizer
from dsv3.evaluation.document_bits import DocumentNats
from dsv3.model.decoder import Decoder
from dsv3.model.layers import cached_weight_casts
from dsv3.model.losses import greedy_tokens, token_losses
from dsv3.monitoring.expert_load import ExpertLoad
from dsv3.prompts.chat import prompt_ids

log = logging.getLogger(__name__)

QUESTION_ROWS = 16  # questions answered at once


def held_out_data(loaded: Loaded) -> Data:
    """What a trained model is scored on: what its run folder keeps, or else what its configuration holds out."""
    tokenizer = loaded.tokenizer()
    if loaded.folder.held_out_path.is_dir():
        data: Data = part(loaded.config.data)(tokenizer=lambda **_: tokenizer)
        if isinstance(data, KeepsHeldOut):
            if (note := data.use_held_out(loaded.folder.held_out_path)) is not None:
                log.warning("%s", note)
            return data
    return build_data(loaded.config, tokenizer=tokenizer)


class DomainLoss(Metric):
    """Nats and targets by domain, summed in FP64 over batches and ranks."""

    nats_X: Tensor
    targets_X: Tensor

    def __init__(self, n_domains: int) -> None:
        super().__init__()
        self.add_state("nats_X", torch.zeros(n_domains, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets_X", torch.zeros(n_domains, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll_N: Tensor, targets_N: Tensor, domains_N: Tensor) -> None:
        """`nll_N` in nats, 0 where the target is ignored; `domains_N` int64."""
        self.nats_X.index_add_(0, domains_N, nll_N.double())
        self.targets_X.index_add_(0, domains_N, (targets_N != IGNORE).long())

    def compute(self) -> tuple[Tensor, Tensor]:
        return self.nats_X, self.targets_X


def dealt(batches: Iterable[MicroBatch], rank: int, of: int) -> Iterator[MicroBatch]:
    """Every `of`-th batch, from number `rank` on; padding where there is none left, so that each rank has as many."""
    for number, batch in enumerate(batches):
        place = number % of
        if place == 0:
            own = batch.padding()
        if place == rank:
            own = batch
        if place == of - 1:
            yield own
    if place < of - 1:
        yield own


Run = Callable[[MicroBatch], Forward | None]


class DomainScore(NamedTuple):
    loss: float  # nats per target token
    bpb: float  # bits per byte of UTF-8 text


@torch.no_grad()
def domain_scores(
    model: Decoder,
    batches: Iterable[MicroBatch],
    domains: Sequence[str],
    n_bytes: Mapping[str, int],
    load: ExpertLoad | None = None,
    run: Run | None = None,
    documents: DocumentNats | None = None,
) -> dict[str, DomainScore]:
    """Score each domain's held-out text, and `all` of it together; `load` counts which experts it went to, `documents`
    sums each document by itself.

    run: what gives the model's result where it takes more than to call it; None on ranks that have not the last layer.

    bits per byte = nats / ln 2 / UTF-8 bytes. The nats are those of every target, end-of-text tokens included;
    the bytes are the text's alone.
    """
    metric = DomainLoss(len(domains)).to(model.device)
    with cached_weight_casts(model):
        for batch in batches:
            batch = batch.map(lambda tensor: tensor.to(model.device))
            output = model(batch, with_mtp=False) if run is None else run(batch)
            if output is None:
                continue
            if load is not None:
                load.observe(batch, output.routings)
            targets_N = batch.targets_BT.flatten()
            nll_N = token_losses(output.hidden_BTD.flatten(0, 1), model.cast_head(), targets_N)
            metric.update(nll_N, targets_N, batch.domains_BT.flatten())
            if documents is not None:
                documents.observe(batch, nll_N)
    nats_X, targets_X = (values.reshape(-1).tolist() for values in metric.compute())  # torchmetrics squeezes
    sums = {d: (nats_X[i], targets_X[i], n_bytes[d]) for i, d in enumerate(domains) if targets_X[i]}
    nats_all, targets_all, bytes_all = (sum(column) for column in zip(*sums.values(), strict=True))
    sums["all"] = (nats_all, targets_all, int(bytes_all))
    return {
        d: DomainScore(nats / max(targets, 1), nats / math.log(2) / max(n, 1)) for d, (nats, targets, n) in sums.items()
    }


class FamilyScore(NamedTuple):
    questions: int
    correct: int
    majority_correct: int  # correct answers of the majority baseline: always the most frequent training answer

    @property
    def z_score(self) -> float:
        """How far the accuracy is above the baseline's, in standard errors of the paired difference."""
        return lead(self.questions, self.correct, self.majority_correct)


def lead(n: int, correct: int, baseline: int) -> float:
    """(p - q) / sqrt((p(1-p) + q(1-q)) / n): the two are treated as independent, which overstates the error."""
    p, q = correct / n, baseline / n
    error = math.sqrt((p * (1 - p) + q * (1 - q)) / n)
    return (p - q) / error if error else math.copysign(math.inf, p - q) if p != q else 0.0


@torch.no_grad()
def answer_questions(model: Decoder, questions: Sequence[Question], tokenizer: Tokenizer) -> dict[str, FamilyScore]:
    """Exact match of greedy answers, by family.

    Greedy decoding gives the right answer if and only if, the right answer so far being given, the likeliest token
    is its next one, at every position up to the end of text. So one forward pass scores a batch of questions.
    """
    scores: dict[str, list[int]] = {}
    ordered = sorted(questions, key=lambda q: len(q.prompt))
    for start in range(0, len(ordered), QUESTION_ROWS):
        group = ordered[start : start + QUESTION_ROWS]
        for question, right in zip(group, _answered(model, group, tokenizer), strict=True):
            score = scores.setdefault(question.family, [0, 0, 0])
            score[0] += 1
            score[1] += right
            score[2] += question.answer == question.majority_answer
    return {family: FamilyScore(*score) for family, score in sorted(scores.items())}


def _answered(model: Decoder, questions: Sequence[Question], tokenizer: Tokenizer) -> list[bool]:
    device = model.device
    prompts = [prompt_ids(tokenizer, q.prompt, chat=q.chat) for q in questions]
    answers = [[*tokenizer.encode(q.answer), tokenizer.eos] for q in questions]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) - 1
    tokens_BT = torch.full((len(questions), width), tokenizer.pad)
    targets_BT = torch.full((len(questions), width), IGNORE)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor(prompt + answer)
        tokens_BT[row, : len(ids) - 1] = ids[:-1]
        targets_BT[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    batch = MicroBatch(
        tokens_BT,
        targets_BT,
        torch.arange(width).expand_as(tokens_BT),
        (tokens_BT != tokenizer.pad).long(),
        torch.zeros_like(tokens_BT),
    )
    batch = batch.map(lambda tensor: tensor.to(device))
    hidden_ND = model(batch, with_mtp=False).hidden_BTD.flatten(0, 1)
    predicted_BT = greedy_tokens(hidden_ND, model.cast_head()).view_as(batch.targets_BT)
    right_BT = (predicted_BT == batch.targets_BT) | (batch.targets_BT == IGNORE)
    return right_BT.all(1).tolist()
