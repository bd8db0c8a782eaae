"""Pairs and prompts: what becomes of a row, what is refused, and the steps of a run."""

import functools
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data.examples import ExampleModule
from data.preferences import Preferences
from data.prompts import Prompts
from data.tokenizer import ByteLevelBPE
from dsv3.contracts import IGNORE, MicroBatch, Prompt
from dsv3.prompts.chat import Message, chat_prompt
from dsv3.testing.data import check_data
from plugins.objective.grpo import GRPO
from plugins.reward.by_verifier import ByVerifier
from plugins.reward.exact import Exact
from tests.data.conftest import words

PAIRS = [
    {"prompt": words(seed=n, count=5), "chosen": words(seed=n + 500, count=3), "rejected": words(seed=n + 900, count=4)}
    for n in range(60)
]
PROMPTS = [{"prompt": f"question {n}", "answer": str(n), "verifier": "exact", "note": n} for n in range(40)]
ROOM = 8
Make = Callable[..., Any]


@pytest.fixture
def make(tokenizer: ByteLevelBPE, tmp_path: Path) -> Make:
    def make(kind: type[ExampleModule], rows: list[Any], **changes: Any) -> Any:
        path = tmp_path / f"{kind.__name__}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        settings: dict[str, Any] = {
            "tokenizer": lambda **_: tokenizer, "seed": 1, "cache_dir": tmp_path / "cache", "sequence_length": 128,
            "total_tokens": 6000, "micro_batch_size": 2, "global_batch_size": lambda tokens: 4.0, "fim": {},
            "isolate_documents": True, "held_out_fraction": 0.2, "validation_tokens": 1000, "questions": 20,
            "path": str(path), "sources": {},
        }  # fmt: skip
        settings |= {"max_answer_tokens": ROOM} if kind is Prompts else {}
        return kind(**{**settings, **changes})

    return make


def prompts_of(data: Prompts, steps: int) -> list[list[Prompt]]:
    return [list(step.prompts) for step in itertools.islice(data.train_dataloader(), steps)]


def documents(micro: MicroBatch) -> list[list[tuple[list[int], list[int]]]]:
    """Of each row, the tokens of each document, and those of them that are trained on."""
    rows = []
    for tokens, targets, ids in zip(micro.tokens_BT, micro.targets_BT, micro.document_ids_BT, strict=True):
        own = [ids == number for number in range(1, int(ids.max()) + 1)]
        rows.append([(tokens[each].tolist(), targets[each][targets[each] != IGNORE].tolist()) for each in own])
    return rows


def test_a_pair_stands_in_one_row_with_the_chosen_reply_first(make: Make, tokenizer: ByteLevelBPE) -> None:
    expected = {}
    for row in PAIRS:
        prompt = chat_prompt(tokenizer, [Message("user", row["prompt"])])
        replies = [[*tokenizer.encode(row[side]), tokenizer.eos] for side in ("chosen", "rejected")]
        expected[tuple(prompt)] = replies
    seen, shared = set(), 0
    for step in make(Preferences, PAIRS).train_dataloader():
        for micro in step.micro_batches:
            for row in documents(micro):
                assert len(row) % 2 == 0
                shared += len(row) > 2
                for (chosen, chosen_reply), (rejected, rejected_reply) in zip(row[::2], row[1::2], strict=True):
                    prompt = next(ids for ids in expected if tuple(chosen[: len(ids)]) == ids)
                    assert tuple(rejected[: len(prompt)]) == prompt
                    assert [chosen_reply, rejected_reply] == expected[prompt]
                    seen.add(prompt)
    assert len(seen) > 40
    assert shared


def test_both_kinds_conform(make: Make, tokenizer: ByteLevelBPE) -> None:
    for kind, rows in ((Preferences, PAIRS), (Prompts, PROMPTS)):
        check_data(partial(_made, make, kind, rows), tokenizer=lambda **_: tokenizer)


def _made(make: Make, kind: type[ExampleModule], rows: list[Any], *, tokenizer: Any) -> Any:
    return make(kind, rows, tokenizer=tokenizer)


def test_a_prompt_is_the_users_message_with_its_row_and_a_number_of_its_own(
    make: Make, tokenizer: ByteLevelBPE
) -> None:
    given = prompts_of(make(Prompts, PROMPTS, held_out_fraction=0.0), 30)
    assert [prompt.number for step in given for prompt in step] == list(range(120))
    for prompt in given[0]:
        row = next(row for row in PROMPTS if row["prompt"] == prompt.text)
        assert prompt.item == row
        assert prompt.ids == chat_prompt(tokenizer, [Message("user", prompt.text)])
    epochs = [[p.text for step in given for p in step][start : start + 39] for start in (0, 39, 78)]  # one is held out
    assert all(len(set(epoch)) == 39 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_turns_before_the_prompt_are_read_and_not_trained_on(make: Make, tokenizer: ByteLevelBPE) -> None:
    turns = [Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    expected = chat_prompt(tokenizer, turns)
    rows = [{"prompt": messages, "answer": str(n), "verifier": "exact"} for n in range(9)]
    assert all(prompt.ids == expected for prompt in make(Prompts, rows).prompts())
    pairs = [{"prompt": messages, "chosen": f"{n}", "rejected": "no"} for n in range(9)]
    (row, *_) = documents(next(iter(make(Preferences, pairs).train_dataloader())).micro_batches[0])
    assert row[1][1] == [*tokenizer.encode("no"), tokenizer.eos]
    assert row[1][0][: len(expected)] == expected


def test_prompts_go_on_after_any_step_and_are_dealt_to_ranks(make: Make) -> None:
    whole = prompts_of(make(Prompts, PROMPTS), 12)
    states = [step.state_after for step in itertools.islice(make(Prompts, PROMPTS).train_dataloader(), 12)]
    for done in (1, 7, 11):
        data = make(Prompts, PROMPTS)
        data.restore(json.loads(json.dumps(states[done - 1])))
        assert prompts_of(data, 12 - done) == whole[done:]
    ranks = []
    for rank in range(3):
        data = make(Prompts, PROMPTS)
        data.share(rank, 3)
        ranks.append(prompts_of(data, 12))
    assert all(ranks), "every rank has a prompt"
    for step, *parts in zip(whole, *ranks, strict=True):
        assert sorted(itertools.chain(*parts), key=lambda prompt: prompt.number) == step
    data = make(Prompts, PROMPTS)
    data.share(0, 5)
    with pytest.raises(ValueError, match=r"data\.global_batch_size=4: must be at least the number of ranks"):
        prompts_of(data, 1)


def test_prompts_come_for_several_steps_in_a_row_also_after_any_of_them(make: Make) -> None:
    once = prompts_of(make(Prompts, PROMPTS), 4)
    repeated = functools.partial(make, Prompts, PROMPTS, steps_per_prompt=3)
    whole = prompts_of(repeated(), 12)
    assert whole == [step for step in once for _ in range(3)]
    states = [step.state_after for step in itertools.islice(repeated().train_dataloader(), 12)]
    for done in range(1, 12):
        data = repeated()
        data.restore(json.loads(json.dumps(states[done - 1])))
        assert prompts_of(data, 12 - done) == whole[done:]
    with pytest.raises(ValueError, match=r"data\.steps_per_prompt=0: must be at least 1"):
        make(Prompts, PROMPTS, steps_per_prompt=0)


def test_other_rows_are_another_stream(make: Make) -> None:
    state = next(iter(make(Prompts, PROMPTS).train_dataloader())).state_after
    for rows, changes in (
        (PROMPTS[1:], {}),
        (PROMPTS, {"seed": 2}),
        (PROMPTS, {"max_answer_tokens": ROOM + 1}),
        (PROMPTS, {"steps_per_prompt": 2}),
    ):
        with pytest.raises(ValueError, match="the data state was saved with other"):
            make(Prompts, rows, **changes).restore(state)


def test_prompts_too_long_are_left_out_and_counted_and_long_answers_are_not(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"prompt": words(seed=n, count=300), "answer": "1", "verifier": "exact"} for n in range(5)]
    wordy = [{"prompt": f"why {n}", "answer": words(seed=n, count=300), "verifier": "exact"} for n in range(5)]
    data = make(Prompts, [*PROMPTS, *long, *wordy], held_out_fraction=0.02)
    texts = {prompt.text for prompt in data.prompts()}
    assert len(texts & {row["prompt"] for row in wordy}) >= 4
    assert not texts & {row["prompt"] for row in long}
    assert "data.path: 5 of " in caplog.text or "data.path: 4 of " in caplog.text
    with pytest.raises(ValueError, match=rf"data\.path: no prompt leaves room for data\.max_answer_tokens={ROOM}"):
        make(Prompts, long).setup()
    with pytest.raises(ValueError, match=r"data\.max_answer_tokens=129"):
        make(Prompts, PROMPTS, max_answer_tokens=129)


def test_questions_are_held_out_rows_with_a_text_for_an_answer(make: Make) -> None:
    rows = [{**row, "family": "numbers", "held_out": n % 2 == 0} for n, row in enumerate(PROMPTS)]
    rows.append({"prompt": "open", "verifier": "exact", "held_out": True, "family": "numbers"})
    data = make(Prompts, rows)
    assert {question.prompt for question in data.questions()} == {row["prompt"] for row in rows[:-1:2]}
    assert {prompt.text for prompt in data.prompts()} == {row["prompt"] for row in rows[1:-1:2]}


def test_held_out_prompts_are_rows_that_training_does_not_ask_and_no_episodes(make: Make) -> None:
    rows = [{**row, "held_out": n % 2 == 0} for n, row in enumerate(PROMPTS)]
    rows[0] |= {"form": "turns", "environment": "babyai/goto"}
    rows.append({"prompt": words(seed=1, count=300), "answer": "1", "verifier": "exact", "held_out": True})
    data = make(Prompts, rows)
    held_out = data.held_out_prompts()
    assert [prompt.text for prompt in held_out] == [row["prompt"] for row in rows[2:-1:2]]
    assert [prompt.item["answer"] for prompt in held_out] == [row["answer"] for row in rows[2:-1:2]]
    assert [prompt.number for prompt in held_out] == list(range(19))
    assert held_out == data.held_out_prompts()
    assert len(make(Prompts, rows, questions=5).held_out_prompts()) == 5
    assert make(Prompts, rows, questions=0).held_out_prompts() == []
    mixed = [{**row, "family": "late" if n >= 30 else "early"} for n, row in enumerate(rows[1:-1])]
    families = [prompt.item["family"] for prompt in make(Prompts, mixed, questions=6).held_out_prompts()]
    assert families == ["early"] * 3 + ["late"] * 3


HOSTILE = {
    "prompt": ({"chosen": "a", "rejected": "b"}, "prompt: must be a user's message"),
    "number": ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: must be a user's message"),
    "order": (
        {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"},
        "user and assistant",
    ),
    "empty": ({"prompt": [], "chosen": "a", "rejected": "b"}, "roles given: assistant"),
    "one reply": ({"prompt": "x", "chosen": "a"}, "rejected: must be a reply"),
    "no text": ({"prompt": "x", "chosen": ["a"], "rejected": "b"}, "chosen: must be a reply"),
    "equal": ({"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    "held out": ({"prompt": "x", "chosen": "a", "rejected": "b", "held_out": "no"}, "held_out='no': must be true"),
    "family": ({"prompt": "x", "chosen": "a", "rejected": "b", "family": ["a"]}, r"family=\['a'\]: must be text"),
    "surrogate": ({"prompt": "\ud800", "chosen": "a", "rejected": "b"}, "surrogates"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_row_at_fault_is_named(make: Make, fault: str) -> None:
    row, message = HOSTILE[fault]
    with pytest.raises(ValueError, match=message) as raised:
        make(Preferences, [*PAIRS[:2], row]).setup()
    assert str(raised.value).startswith("data.path: row 3 of ")


def test_a_row_may_have_anything_else_in_it(make: Make) -> None:
    odd = {"prompt": "x", "answer": [1, None], "verifier": "exact", "note": "\ud800", "deep": {"a": [float("nan")]}}
    data = make(Prompts, [*PROMPTS, {**odd, "held_out": False}])
    (item,) = [prompt.item for prompt in data.prompts() if prompt.text == "x"]
    assert item["answer"] == [1, None]
    assert item["note"] == "\ud800"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "answer": "1", "verifier": "exakt"}, "verifier=exakt .* Did you mean 'exact'"),
        ({"prompt": "x", "answer": "1"}, "lacks `verifier`"),
        ({"prompt": "x", "verifier": "exact"}, "lacks `answer`"),
    ],
)
def test_a_row_that_the_reward_cannot_use_is_found_before_training(make: Make, row: Any, words: str) -> None:
    objective = GRPO(
        token_bytes_V=torch.ones(4), reward=ByVerifier(rewards={"exact": Exact()}), seed=1, sequence_length=128,
        micro_batch_size=2, group=2, max_tokens=ROOM, temperature=1.0, advantage="mean", denominator="constant",
        clip_low=0.2, clip_high=0.2, kl=0.0, off_policy_mask=None, drop_flat_groups=True,
    )  # fmt: skip
    objective.check_prompts(make(Prompts, PROMPTS).prompts())
    with pytest.raises(ValueError, match=words):
        objective.check_prompts(make(Prompts, [*PROMPTS, {**row, "held_out": False}]).prompts())
