"""Nats and bytes by document against those by domain."""

import math
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig

from dsv3.build import build_data, build_model, token_bytes
from dsv3.contracts import IGNORE, MicroBatch
from dsv3.evaluation.document_bits import DocumentNats
from dsv3.evaluation.held_out import domain_scores

BOS = 9


def micro_batch(rows: list[list[int]], ids: list[list[int]], domains: list[int]) -> MicroBatch:
    """Rows of T + 1 tokens, the document of each input; BOS is no target, and domains are those of rows."""
    tokens = torch.tensor(rows)
    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == BOS, IGNORE)
    domains_BT = torch.tensor(domains)[:, None].expand_as(targets)
    return MicroBatch(tokens[:, :-1], targets, targets * 0, torch.tensor(ids), domains_BT)


def test_a_document_goes_on_in_the_next_row_and_ends_with_its_domain() -> None:
    documents = DocumentNats(bos=BOS, bytes_V=torch.arange(10), domains=["a", "b"])
    rows = [[BOS, 1, 2, BOS, 3], [3, 4, BOS, 5, 5]]
    documents.observe(micro_batch(rows, [[1, 1, 1, 2], [1, 1, 2, 2]], [0, 0]), torch.ones(8))
    documents.observe(micro_batch([[7, 7, 7, 7, 7]], [[1, 1, 1, 1]], [1]), torch.full((4,), 2.0))
    found = [(row["document"], row["domain"], row["nats"], row["bytes"]) for row in documents.rows()]
    assert found == [(0, "a", 2.0, 1 + 2), (1, "a", 2.0, 3 + 4), (2, "a", 2.0, 5 + 5), (3, "b", 8.0, 28)]


def test_sums_over_documents_are_those_of_domains(composed: Callable[..., DictConfig]) -> None:
    config = composed("precision=fp32", "model.init_std=0.1")
    model, data = build_model(config), build_data(config)
    bytes_V = token_bytes(data.tokenizer, config.model.vocab_size)
    documents = DocumentNats(bos=data.tokenizer.bos, bytes_V=bytes_V, domains=data.domains)
    scores = domain_scores(model, data.validation_batches(), data.domains, data.validation_bytes(), documents=documents)
    rows = list(documents.rows())
    for domain in data.domains:
        own = [row for row in rows if row["domain"] == domain]
        nats, n_bytes = (sum(row[name] for row in own) for name in ("nats", "bytes"))
        assert n_bytes == data.validation_bytes()[domain]
        assert nats / math.log(2) / n_bytes == pytest.approx(scores[domain].bpb, rel=1e-9)
