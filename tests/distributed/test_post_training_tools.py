"""chat, pairs and answers on a trained model, and mistakes that are found before a run of post-training begins."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from data.conversations import messages_of
from data.preferences import prompt_of, replies_of
from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.inference.generation import stream
from dsv3.inference.sampling import Settings
from dsv3.prompts.chat import Message, chat_prompt
from dsv3.tools import answers, chat, pairs
from tests.distributed.test_post_training import Runs, finish

Compose = Callable[..., DictConfig]
ALLOW = ["tests.synthetic.Sevenths"]


@pytest.fixture(scope="module")
def runs(composed: Compose, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(composed, tmp_path_factory.mktemp("runs"))


def talked(base: str, monkeypatch: pytest.MonkeyPatch, *lines: str, **options: Any) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    found = chat.run(chat.Options(checkpoint=base, max_tokens=6, allow=ALLOW, **options))
    messages: list[dict[str, Any]] = found["messages"]
    return messages


def test_a_conversation_by_a_pipe(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = talked(runs.base, monkeypatch, "hello", "", "and more", "/help", "/nonsense", "/quit", "not read")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[::2]] == ["hello", "and more"]
    output = capsys.readouterr().out
    assert output.count("/system TEXT") == 2
    assert output.startswith(messages[1]["content"] + "\n" + messages[3]["content"] + "\n")
    assert ">" not in output.replace(chat.HELP, "").replace(messages[1]["content"], "").replace(
        messages[3]["content"], ""
    )


def test_replies_are_those_of_the_engine(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(runs.base, allow=ALLOW)
    tokenizer = loaded.tokenizer()
    for temperature in (0.0, 1.0):
        given = talked(runs.base, monkeypatch, "hello", "/seed 7", "more", temperature=temperature, seed=3)
        for place, seed in ((1, 3), (3, 7)):
            before = [Message(message["role"], message["content"]) for message in given[:place]]
            settings = Settings(max_tokens=6, temperature=temperature, seed=seed, eos=(tokenizer.eos,))
            prompt = chat_prompt(tokenizer, before)
            events = stream(loaded.model, prompt, settings, decode=tokenizer.decode)
            assert given[place]["content"] == "".join(event.text for event in events)


def test_commands_begin_anew(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = talked(runs.base, monkeypatch, "hello", "/system Be brief.", "a", "/reset", "b", "/seed -1", "/seed x")
    assert [message["content"] for message in messages[:2]] == ["Be brief.", "b"]
    assert len(messages) == 3
    assert talked(runs.base, monkeypatch, "/system", system="Be kind.") == []
    assert talked(runs.base, monkeypatch) == []


def test_the_oldest_turns_are_forgotten_and_the_system_message_is_not(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = talked(runs.base, monkeypatch, *["one two three"] * 9, system="S")
    assert messages[0]["role"] == "system"
    assert [message["role"] for message in messages[1:]] == ["user", "assistant"] * (len(messages) // 2)
    assert len(messages) < 19
    tokenizer = load_run(runs.base, allow=ALLOW).tokenizer()
    before = [Message(message["role"], message["content"]) for message in messages[:-1]]
    assert len(chat_prompt(tokenizer, before)) + 6 <= 48


SEVENTHS = ["~reward.rewards", "reward._target_=tests.synthetic.Sevenths"]


def sampled(tool: Any, runs: Runs, out: Path, **options: Any) -> dict[str, Any]:
    overrides = [f"data.cache_dir={runs.folder}/cache", "data.sequence_length=64", *options.pop("overrides", SEVENTHS)]
    settings = {"count": 6, "samples": 4, "max_tokens": 3, "temperature": 2.0, "allow": ALLOW} | options
    given = tool.Options(checkpoint=runs.base, out=str(out), overrides=overrides, **settings)
    result: dict[str, Any] = tool.run(given)
    return result


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"say {n}", "answer": "1", "verifier": "exact", "family": "say"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a few steps ends no answer by itself: here each does."""
    import dsv3.rollout.judged as judged

    sample = judged.sample
    monkeypatch.setattr(judged, "sample", lambda *a, **k: [one._replace(ended=True) for one in sample(*a, **k)])


def test_pairs_are_rows_of_preferences(
    runs: Runs, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(monkeypatch)
    found = sampled(pairs, runs, tmp_path / "pairs.jsonl", prompts=str(prompts))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert 1 <= len(rows) == found["rows"]
    for row in rows:
        assert prompt_of(row)[0].content.startswith("say ")
        chosen, rejected = replies_of(row)
        assert chosen != rejected
        assert row["family"] == "say"
    again = sampled(pairs, runs, tmp_path / "again.jsonl", prompts=str(prompts))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()
    assert again["mean_reward"] == found["mean_reward"]
    other = sampled(pairs, runs, tmp_path / "other.jsonl", prompts=str(prompts), seed=4_294_967_295)
    assert other["rows"] <= 6
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "pairs.jsonl").read_bytes()


def test_answers_are_rows_of_conversations(
    runs: Runs, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(monkeypatch)
    found = sampled(answers, runs, tmp_path / "answers.jsonl", prompts=str(prompts), least=0.3)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert 1 <= len(rows) == found["rows"]
    assert all([message.role for message in messages_of(row)] == ["user", "assistant"] for row in rows)


def test_nothing_is_written_where_a_row_or_the_place_is_wrong(runs: Runs, tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "out.jsonl"
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "x", "verifier": "exact", "held_out": False}) + "\n")
    for overrides, words in ((["reward=by_verifier"], "lacks `answer`"), (["reward=exact"], "lacks `answer`")):
        with pytest.raises(ValueError, match=words):
            sampled(pairs, runs, out, prompts=str(prompts), overrides=overrides)
    with pytest.raises(ValueError, match=r"data\.path"):
        sampled(pairs, runs, out, prompts=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(FileNotFoundError):
        pairs.run(pairs.Options(checkpoint=str(tmp_path / "nowhere"), out=str(out)))
    assert not out.exists()


def test_what_a_run_began_with_must_still_be_there_and_be_the_same_model(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.init_from=.*: another model"):
        finish(runs.config("sft", tmp_path / "wide", "model.n_layers=4"))
    config = runs.config("dpo", tmp_path / "run", f"run.init_from={tmp_path}/gone")
    with pytest.raises((ValueError, FileNotFoundError), match="gone"):
        finish(config)


def test_data_of_another_kind_is_refused_by_the_objective(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data=prompts"):
        finish(runs.config("sft", tmp_path / "run", "objective=grpo"))
    assert not RunFolder(tmp_path / "run").checkpoints()
