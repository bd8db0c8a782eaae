"""The datamodule on small corpora: steps, resume, validation accounting, questions, and what it refuses."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.datamodule import DataModule
from data.documents import Document
from data.held_out import three_parts
from data.sources import Source, reasoning
from dsv3.contracts import IGNORE, MicroBatch, Step
from tests.data.conftest import Make, in_memory, training_texts, words


def same(one: Step, other: Step) -> bool:
    mine, theirs = ([tensor for micro in step.micro_batches for tensor in micro.packed] for step in (one, other))
    return one[1:] == other[1:] and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_contents_of_a_step(make: Make) -> None:
    data = make()
    steps = list(data.train_dataloader())
    assert len(steps) == 30
    assert data.domains == ["long", "middle", "short"]
    for i, step in enumerate(steps):
        assert step.tokens_before == i * 4 * 64
        (batch,) = step.micro_batches
        for tensor in batch.packed:
            assert tensor.shape == (4, 64)
            assert tensor.dtype == torch.int64
        assert torch.equal(batch.targets_BT[:, :-1], batch.tokens_BT[:, 1:])
        assert (batch.targets_BT != IGNORE).all()
        assert (batch.document_ids_BT[:, 0] == 1).all()
        starts = batch.tokens_BT[:, 1:] == data.tokenizer.bos
        assert torch.equal(batch.document_ids_BT.diff(dim=1), starts.long())
        assert torch.equal(batch.positions_BT, torch.arange(64).expand(4, -1))


def test_shares_of_tokens(make: Make) -> None:
    data = make(total_tokens=64 * 4 * 400)
    counts = torch.zeros(3)
    for step in data.train_dataloader():
        for batch in step.micro_batches:
            counts += torch.bincount(batch.domains_BT.flatten(), minlength=3)
    assert torch.allclose(counts / counts.sum(), torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_restored_anywhere_it_continues_bit_for_bit(make: Make, seed: int, isolate: bool) -> None:
    """Stopped and restored again and again at random steps, through a file, in new objects."""
    settings = {"seed": seed, "isolate_documents": isolate, "total_tokens": 64 * 4 * 60}
    whole = list(make(**settings).train_dataloader())
    pieces: list[Step] = []
    source = random.Random(seed)
    while len(pieces) < len(whole):
        data = make(**settings)
        if pieces:
            data.restore(json.loads(json.dumps(pieces[-1].state_after)))
        pieces += itertools.islice(data.train_dataloader(), source.randint(1, 17))
    assert len(pieces) == len(whole)
    assert all(same(one, other) for one, other in zip(pieces, whole))


@pytest.mark.parametrize("packing", ["cut", "whole"])
def test_restored_with_another_micro_batch_size_the_rows_are_the_same(
    make: Make, sources: dict[str, Source], packing: str
) -> None:
    short = {"short": sources["short"]}
    settings = {"packing": packing, "sources": short, "sequence_length": 256, "total_tokens": 256 * 4 * 20}
    whole = list(make(**settings).train_dataloader())
    for size, stopped in ((1, 3), (3, 10), (8, 17)):
        data = make(**settings, micro_batch_size=size)
        data.restore(json.loads(json.dumps(whole[stopped - 1].state_after)))
        for step, expected in zip(data.train_dataloader(), whole[stopped:], strict=True):
            assert step[1:] == expected[1:]
            rows, wanted = (torch.cat([batch.tokens_BT for batch in each.micro_batches]) for each in (step, expected))
            assert torch.equal(rows[:4], wanted)


def test_state_is_small(make: Make) -> None:
    assert max(len(json.dumps(step.state_after)) for step in make().train_dataloader()) < 1000


def test_restored_after_the_last_step_it_gives_nothing(make: Make) -> None:
    *_, last = make().train_dataloader()
    data = make()
    data.restore(last.state_after)
    assert list(data.train_dataloader()) == []


def test_a_longer_run_continues_a_shorter_one(make: Make) -> None:
    *_, last = make().train_dataloader()
    data = make(total_tokens=64 * 4 * 31)
    data.restore(last.state_after)
    (step,) = data.train_dataloader()
    assert step.tokens_before == 64 * 4 * 30


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"sequence_length": 32},
        {"packing": "whole", "fim": {"rate": 0.0, "order": "psm", "max_characters": None}},
        {"held_out_fraction": 0.2},
        {"split_punctuation_newline": 0.0},
        {"fim": {"rate": 0.5, "order": "psm", "max_characters": 200}},
    ],
)
def test_a_state_of_another_stream_is_refused(make: Make, change: dict[str, Any]) -> None:
    step = next(iter(make().train_dataloader()))
    with pytest.raises(ValueError, match="the data state was saved with other"):
        make(**change).restore(step.state_after)


def test_loader_begins_anew_each_time(make: Make) -> None:
    loader = make().train_dataloader()
    one, other = (list(itertools.islice(loader, 3)) for _ in range(2))
    assert all(same(a, b) for a, b in zip(one, other))


def test_seeds_give_different_batches(make: Make) -> None:
    one, other = (next(iter(make(seed=seed).train_dataloader())) for seed in (1, 2))
    assert not torch.equal(one.micro_batches[0].tokens_BT, other.micro_batches[0].tokens_BT)


def test_batch_size_follows_the_schedule_and_padding_fills_the_last_micro_batch(make: Make) -> None:
    data = make(global_batch_size=lambda tokens: 1.0 + tokens / 1000, total_tokens=20_000)
    tokens = 0
    for step in data.train_dataloader():
        assert step.tokens_before == tokens
        rows = round(1 + tokens / 1000)
        assert len(step.micro_batches) == -(-rows // 4)
        assert all(batch.tokens_BT.shape == (4, 64) for batch in step.micro_batches)
        ids, inputs, targets = (
            torch.cat([getattr(batch, name) for batch in step.micro_batches])
            for name in ("document_ids_BT", "tokens_BT", "targets_BT")
        )
        assert (ids[:rows] > 0).all()
        assert not ids[rows:].any()
        assert (inputs[rows:] == data.tokenizer.pad).all()
        assert (targets[rows:] == IGNORE).all()
        tokens += rows * 64
        assert step.state_after["tokens"] == tokens
    assert tokens >= 20_000 > step.tokens_before


def test_twelve_rows_in_micro_batches_of_eight_are_twelve_rows(make: Make) -> None:
    """And the same rows as in micro-batches of four."""
    eight, four = (make(micro_batch_size=size, global_batch_size=lambda tokens: 12) for size in (8, 4))
    for one, other in zip(eight.train_dataloader(), four.train_dataloader(), strict=True):
        assert one[1:] == other[1:]
        rows, expected = (torch.cat([batch.tokens_BT for batch in step.micro_batches]) for step in (one, other))
        assert torch.equal(rows[:12], expected)


def test_micro_batches_do_not_change_the_rows_of_a_step(make: Make) -> None:
    one = next(iter(make(micro_batch_size=4).train_dataloader()))
    other = next(iter(make(micro_batch_size=2).train_dataloader()))
    assert len(other.micro_batches) == 2
    assert torch.equal(one.micro_batches[0].tokens_BT, torch.cat([batch.tokens_BT for batch in other.micro_batches]))


def texts_of(data: DataModule, batches: Sequence[MicroBatch], domain: int) -> tuple[list[int], list[bytes]]:
    """Targets of a domain in order, and the texts between BOS and EOS that its rows spell."""
    rows = [row for batch in batches for row in zip(*batch.packed) if row[4][0] == domain]
    targets = [int(t) for _, row, *_ in rows for t in row if t != IGNORE]
    inputs = [int(t) for row, _, _, ids, _ in rows for t, i in zip(row, ids) if i > 0]
    last_is_no_input = sum(token != data.tokenizer.bos for token in inputs) < len(targets)
    stream = [*inputs, targets[-1]] if last_is_no_input else inputs
    parts: list[list[int]] = []
    for token in stream:
        if token == data.tokenizer.bos:
            parts.append([])
        elif token != data.tokenizer.eos:
            parts[-1].append(token)
    return targets, [data.tokenizer.decode_bytes(part) for part in parts]


@pytest.mark.parametrize("validation_tokens", [50, 1000, 10**6])
@pytest.mark.parametrize("isolate", [False, True])
def test_validation_counts_every_token_and_byte_once(make: Make, validation_tokens: int, isolate: bool) -> None:
    """Read back from the tensors alone, the text is the beginnings of held-out documents; bytes are counted on it."""
    data = make(validation_tokens=validation_tokens, isolate_documents=isolate)
    batches = list(data.validation_batches())
    for index, domain in enumerate(data.domains):
        targets, texts = texts_of(data, batches, index)
        documents = [text.encode() for text in data.held_out_documents(domain)][: len(texts)]
        assert all(document.startswith(text) for document, text in zip(documents, texts, strict=True))
        assert sum(map(len, texts)) == data.validation_bytes()[domain]
        whole = sum(text == document for text, document in zip(texts, documents))
        n_tokens = sum(len(data.tokenizer.encode(text.decode())) for text in texts)
        assert len(targets) == n_tokens + whole
        assert targets.count(data.tokenizer.eos) == whole
        assert data.tokenizer.bos not in targets
        assert sum(len(text.decode()) for text in texts) <= 3 * validation_tokens
    if validation_tokens == 10**6:
        everything = {name: sum(len(t.encode()) for t in data.held_out_documents(name)) for name in data.domains}
        assert everything == data.validation_bytes()


def test_validation_rows_belong_to_one_domain_and_padding_is_marked(make: Make) -> None:
    data = make()
    for batch in data.validation_batches():
        assert (batch.domains_BT == batch.domains_BT[:, :1]).all()
        padded = batch.tokens_BT == data.tokenizer.pad
        assert torch.equal(batch.document_ids_BT == 0, padded)
        assert (batch.targets_BT[padded] == IGNORE).all()
        assert (batch.targets_BT[batch.targets_BT != IGNORE] != data.tokenizer.pad).all()


def test_validation_text_does_not_depend_on_seed_length_or_batch(make: Make) -> None:
    one, other = make(), make(seed=5, sequence_length=48, micro_batch_size=3)
    assert one.validation_bytes() == other.validation_bytes()
    for index in range(3):
        first, second = (texts_of(data, list(data.validation_batches()), index) for data in (one, other))
        assert first == second


def test_nothing_held_out_is_trained_on(make: Make) -> None:
    data = make()
    for domain in data.domains:
        held_out = set(data.held_out_documents(domain))
        assert held_out
        assert held_out.isdisjoint(training_texts(data, domain))


def test_cache_gives_the_same_and_a_second_setup_does_nothing(make: Make, tmp_path: Path) -> None:
    cold, warm = make(cache_dir=tmp_path), make(cache_dir=tmp_path)
    steps = [next(iter(data.train_dataloader())) for data in (cold, warm)]
    assert same(*steps)
    prepared = warm.prepared
    warm.prepare_data()
    warm.setup("fit")
    assert warm.prepared is prepared
    assert not list(tmp_path.glob("*/.building-*"))


def test_failed_building_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    def broken() -> Any:
        raise ValueError("broken")

    source = Source(weight=1.0, identity=dict, documents=broken)
    with pytest.raises(ValueError, match=r"data\.sources\.mine: broken"):
        make(sources={"mine": source}, cache_dir=tmp_path).setup()
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".building")] == []


def test_questions_are_even_over_families_and_end_where_the_answer_begins(make: Make) -> None:
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    legs = {"min_animals": 2, "max_animals": 2}
    families = {
        "sums": {"generator": "chain_sum", "train": 200, "settings": sums},
        "legs": {"generator": "leg_counting", "train": 200, "settings": legs},
    }
    sources = {
        "text": in_memory([words(seed=i, count=50) for i in range(20)]),
        "math": reasoning(families=families, held_out=30, weight=1.0),
    }
    data = make(sources=sources, questions=41)
    questions = data.questions()
    assert questions == make(sources=sources, questions=41, seed=9).questions()
    assert sorted(Counter(question.family for question in questions).values()) == [20, 21]
    training = [found for found in sources["math"].documents() if isinstance(found, Document) and not found.held_out]
    for question in questions:
        assert question.prompt.endswith("\nAnswer:")
        assert question.prompt + question.answer in data.held_out_documents("math")
        assert question.prompt not in {document.text[: len(question.prompt)] for document in training}
        answers = Counter(document.answer for document in training if document.family == question.family)
        assert answers[question.majority_answer.removeprefix(" ")] == max(answers.values())
    with pytest.raises(ValueError, match=r"data\.questions=1000: must be at most (59|60), "):
        make(sources=sources, questions=1000).questions()


def test_no_questions_where_no_source_asks(make: Make) -> None:
    assert make(questions=500).questions() == []


def test_samples_are_a_held_out_text_in_three_parts(make: Make) -> None:
    data = make()
    continued, filled = data.samples()
    assert continued._replace(name="infilling", suffix=filled.suffix) == filled
    assert continued.suffix is None
    prefix, suffix, middle = filled.prefix, filled.suffix, filled.real
    assert any(prefix + middle + suffix in text for text in data.held_out_documents("long"))
    assert middle.strip() == middle
    assert "\n" not in middle
    assert len(middle) > 5


def test_samples_begin_at_a_function_where_there_is_one() -> None:
    text = '"""A module."""\nimport os\n\ndef list_all(path):\n    return sorted(os.listdir(path))\n'
    prefix, suffix, middle = three_parts(text, longest=200)
    assert prefix == "def list_all(path):\n    "
    assert middle == "return sorted(os.listdir(path))"
    assert suffix == "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length=0"),
        ({"micro_batch_size": 0}, "data.micro_batch_size=0"),
        ({"held_out_fraction": 0.0}, "data.held_out_fraction=0.0"),
        ({"split_punctuation_newline": 2}, "data.split_punctuation_newline=2"),
        ({"sources": {}}, "data.sources: must have at least one source"),
        ({"held_out_bytes": 0}, "data.held_out_bytes=0"),
        ({"max_document_bytes": 0}, "data.max_document_bytes=0"),
        ({"fim": {"rate": 2, "order": "psm", "max_characters": None}}, "data.fim.rate=2"),
    ],
)
def test_values_out_of_range_are_named(make: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make(**change).setup()


def test_infilling_happens_at_its_rate_in_the_stream(make: Make) -> None:
    """Half of the documents: half of the BOS of short documents are followed by fim_begin."""
    data = make(fim={"rate": 0.5, "order": "psm", "max_characters": None}, total_tokens=64 * 4 * 300)
    rows = torch.cat([batch.tokens_BT for step in data.train_dataloader() for batch in step.micro_batches])
    starts = rows[:, :-1] == data.tokenizer.bos
    share = (rows[:, 1:][starts] == data.tokenizer.fim_begin).float().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(starts.sum().item())


def test_whole_documents_are_never_cut(make: Make) -> None:
    """Rows begin at a BOS and end with an EOS and padding, which counts as no tokens."""
    sources = {"short": in_memory([words(seed=i, count=10) for i in range(100)])}
    data = make(sources=sources, packing="whole", sequence_length=128, total_tokens=20_000)
    tokens = 0
    for step in data.train_dataloader():
        assert step.tokens_before == tokens
        for batch in step.micro_batches:
            tokens += int((batch.document_ids_BT > 0).sum())
            for row, targets in zip(batch.tokens_BT, batch.targets_BT, strict=True):
                assert row[0] == data.tokenizer.bos
                assert targets[targets != IGNORE][-1] == data.tokenizer.eos
    assert step.state_after["tokens"] == tokens >= 20_000


def test_a_state_of_an_older_version_is_refused(make: Make) -> None:
    state = {"stream": "any", "tokens": 4096, "rows": {"parents": [], "given": [8]}}
    with pytest.raises(ValueError, match="shuffled rows within windows"):
        make().restore(state)


def test_held_out_texts_are_kept_and_need_no_corpus(make: Make, sources: dict[str, Source], tmp_path: Path) -> None:
    data = make()
    data.keep_held_out(tmp_path / "held_out")
    alone = make(cache_dir=tmp_path / "unused")
    assert alone.use_held_out(tmp_path / "held_out") is None
    for one, other in zip(data.validation_batches(), alone.validation_batches(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.packed, other.packed, strict=True))
    assert data.validation_bytes() == alone.validation_bytes()
    assert data.samples() == alone.samples()
    assert not (tmp_path / "unused").exists()
    changed = sources | {"short": in_memory(["another text\n", "and another\n"])}
    assert "have changed" in str(make(sources=changed).use_held_out(tmp_path / "held_out"))

    def gone() -> Any:
        raise ValueError("path='texts' does not exist")

    missing = sources | {"short": Source(weight=1.0, identity=gone, documents=gone)}
    assert "path='texts' does not exist" in str(make(sources=missing).use_held_out(tmp_path / "held_out"))


def test_held_out_texts_are_written_once(make: Make, tmp_path: Path) -> None:
    data = make()
    data.keep_held_out(tmp_path / "held_out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "held_out").iterdir()}
    make().keep_held_out(tmp_path / "held_out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "held_out").iterdir()}
    make(held_out_fraction=0.3).keep_held_out(tmp_path / "held_out")
    assert before != {path: path.stat().st_mtime_ns for path in (tmp_path / "held_out").iterdir()}
    assert list(tmp_path.iterdir()) == [tmp_path / "held_out"]
