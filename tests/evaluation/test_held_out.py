"""Scores against independent computations."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dsv3.build import build_data, build_model
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.contracts import Question
from dsv3.evaluation.evaluate import evaluate
from dsv3.evaluation.held_out import answer_questions, domain_scores, lead
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from dsv3.paths import CONF
from tests.synthetic import ByteTokenizer


def test_domain_scores_equal_full_logits(composed: Callable[..., DictConfig]) -> None:
    config = composed("precision=fp32", "model.init_std=0.1")
    model, data = build_model(config), build_data(config)
    scores = domain_scores(model, data.validation_batches(), data.domains, data.validation_bytes())
    nats = torch.zeros(2, dtype=torch.float64)
    for batch in data.validation_batches():
        with torch.no_grad():
            logits = model(batch, with_mtp=False).hidden_BTD @ model.lm_head.weight.T
        nll = F.cross_entropy(logits.double().flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
        nats.index_add_(0, batch.domains_BT.flatten(), nll)
    n_bytes = data.validation_bytes()
    for i, domain in enumerate(data.domains):
        assert scores[domain].bpb == pytest.approx(nats[i].item() / math.log(2) / n_bytes[domain], rel=1e-5)
    assert scores["all"].bpb == pytest.approx(nats.sum().item() / math.log(2) / sum(n_bytes.values()), rel=1e-5)


def test_answers_equal_those_of_greedy_decoding(composed: Callable[..., DictConfig]) -> None:
    """One forward pass over the right answer says exactly whether token-by-token decoding would give it."""
    model = build_model(composed("precision=fp32", "model.init_std=0.3")).eval()
    tokenizer = Latin1Tokenizer()
    verdicts = []
    for prompt in ("ab", "hello", "x = 1;", "Question", "zz", "3 + 4 =", "def f", "a, b"):
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        *answer, fourth = generate(model, ids, Settings(max_tokens=4))
        if max(answer) > 255 or fourth in answer:
            continue
        for tokenizer.eos in (fourth, 257 if fourth != 257 else 258):
            decoded = list(generate(model, ids, Settings(max_tokens=4, eos=(tokenizer.eos,))))
            question = Question("family", prompt, tokenizer.decode(answer), "no")
            scored = answer_questions(model, [question], tokenizer)["family"].correct
            assert scored == int(decoded == answer)
            verdicts.append(scored)
    assert 0 in verdicts
    assert 1 in verdicts


class Latin1Tokenizer(ByteTokenizer):
    """Any sequence of bytes is a text, so that what an untrained model says can be asked for."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("latin-1"))

    def decode(self, ids: Any) -> str:
        return self.decode_bytes(ids).decode("latin-1")


def test_right_answers_are_counted_and_the_end_of_text_belongs_to_them() -> None:
    """A model that copies a table of next tokens answers exactly what the table says."""
    tokenizer = ByteTokenizer()
    questions = [Question("f", "a", "b", "b"), Question("f", "c", "d", "b"), Question("g", "a", "bb", "x")]
    scores = answer_questions(Successor(stop_after="b", tokenizer=tokenizer), questions, tokenizer)  # type: ignore[arg-type]
    assert scores["f"] == (2, 1, 1)
    assert scores["g"] == (1, 0, 0)


class Successor(torch.nn.Module):
    """Likeliest next token: the next letter, and the end of text after `stop_after`."""

    def __init__(self, *, stop_after: str, tokenizer: object) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.last, self.eos = ord(stop_after), tokenizer.eos  # type: ignore[attr-defined]

    def cast_head(self) -> torch.Tensor:
        return torch.eye(262)

    def forward(self, batch: object, *, with_mtp: bool) -> object:
        tokens = batch.tokens_BT  # type: ignore[attr-defined]
        following = torch.where(tokens == self.last, self.eos, (tokens + 1) % 262)

        class Output:
            hidden_BTD = F.one_hot(following, 262).float()

        return Output()


def test_lead_in_standard_errors() -> None:
    assert lead(100, 50, 50) == 0
    assert lead(100, 100, 0) == math.inf
    assert lead(100, 60, 40) == pytest.approx(0.2 / math.sqrt(2 * 0.24 / 100))


def test_without_held_out_text_no_text_of_the_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the path looked at that its configuration names."""

    def read(loaded: Any) -> None:
        raise LookupError("the run's texts are read")

    monkeypatch.setattr("dsv3.evaluation.evaluate.held_out_data", read)
    monkeypatch.setattr(
        "dsv3.evaluation.evaluate.load_run", lambda *_, **__: SimpleNamespace(folder=RunFolder(tmp_path))
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("evaluate", overrides=[f"checkpoint={tmp_path}", "benchmarks=none", "held_out=false"])
    evaluate(config)
    assert (tmp_path / "evaluation.json").read_text() == "{}\n"
    config.held_out = True
    with pytest.raises(LookupError):
        evaluate(config)
