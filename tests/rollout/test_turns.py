"""Episodes as rollouts: what each turn is asked, what is trained on, and the reward after the last turn."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from data.demonstrations import episode_rows
from dsv3.contracts import IGNORE, Prompt, Rollout, Turn
from dsv3.environments import ask, opened
from dsv3.prompts.chat import Message, chat_prompt
from dsv3.rollout.turns import rollouts_of
from plugins.objective.packing import Drawn, pack
from plugins.reward.episode import Episode
from tests.synthetic import ByteTokenizer

SEED = 3


class ChatBytes(ByteTokenizer):
    user, assistant = 262, 263

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


TOKENIZER: Any = ChatBytes()
Reply = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Turn]]


def prompt(name: str = "babyai/putnext", *, history: int = 0, seed: int = SEED, steps: int = 30) -> Prompt:
    (row,) = episode_rows(name, seed=seed, steps=steps, history=history, form="turns")
    row |= {"environment": name, "seed": seed}
    return Prompt(chat_prompt(TOKENIZER, [Message("user", row["prompt"])]), row["prompt"], row, 0)


def says(*replies: str, ended: bool = True) -> Reply:
    """A policy that says these in turn, and the last of them for ever; log-probabilities count its tokens."""
    said = {"turns": 0}

    def reply(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Turn]:
        text = replies[min(said["turns"], len(replies) - 1)]
        said["turns"] += 1
        ids = [*TOKENIZER.encode(text), *([TOKENIZER.eos] if ended else [])]
        log_probs = [-float(said["turns"] * 100 + i) for i in range(len(ids))]
        return [Turn(list(asked), ids, text, ended, log_probs) for asked in prompts]

    return reply


def by_expert(name: str, *, steps: int = 30) -> list[str]:
    episode, taken = opened(name, seed=SEED, steps=steps), list[str]()
    policy = episode.expert()
    while not episode.over:
        taken.append(policy())
        episode.step(taken[-1])
    return taken


def rolled(asked: Prompt, reply: Reply, *, room: int = 4000, seed: int = 7) -> Rollout:
    (found,) = rollouts_of([asked], [seed], reply, TOKENIZER, room=room)
    return found


@pytest.mark.parametrize("name", ["babyai/putnext", "babyai/open"])
def test_each_turn_is_asked_as_an_agent_is_and_the_expert_earns_the_reward(name: str) -> None:
    actions, asked = by_expert(name), prompt(name)
    found = rolled(asked, says(*actions))
    episode = opened(name, seed=SEED, steps=30)
    for turn, action in zip(found.turns, actions, strict=True):
        message = ask(episode.rules, [], episode.observation())
        assert turn.prompt == chat_prompt(TOKENIZER, [Message("user", message)])
        episode.step(action)
    assert Episode()([asked.answered(found), asked.answered(found._replace(turns=found.turns[:-1]))]) == [1.0, 0.0]
    assert found.text.split("\n") == actions


def test_a_reply_that_is_no_action_takes_time_and_is_told() -> None:
    actions = by_expert("babyai/putnext")
    found = rolled(prompt(), says("I shall look around", *actions))
    assert len(found.turns) == len(actions) + 1
    assert "no action" in TOKENIZER.decode(found.turns[1].prompt)
    assert Episode()([prompt().answered(found)]) == [1.0]
    lost = rolled(prompt(steps=5), says("drop it"))
    assert len(lost.turns) == 5
    assert Episode()([prompt(steps=5).answered(lost)]) == [0.0]


@pytest.mark.parametrize("ended", [True, False])
def test_earlier_turns_stay_in_the_conversation_and_none_of_what_is_said_between_is_trained_on(ended: bool) -> None:
    """Whole, the conversation is one document; its targets are the tokens of all replies, with their own values."""
    asked = prompt(history=99, steps=4)
    found = rolled(asked, says("turn left", "turn right", ended=ended))
    last = found.turns[-1]
    messages = TOKENIZER.decode(last.prompt)
    assert messages.count("Mission:") == 1
    assert messages.count("You see:") == 4
    values = {"old": found.log_probs, "advantage": 0.5}
    (micro,) = pack([Drawn(found, values)], ["old", "advantage"], rows=2, length=4000, device=torch.device("cpu"))
    assert micro.document_ids_BT.max() == 1
    real_BT = micro.targets_BT != IGNORE
    assert micro.targets_BT[real_BT].tolist() == found.ids
    assert micro.extra["old"][real_BT].tolist() == found.log_probs
    assert micro.extra["advantage"][real_BT].unique().tolist() == [0.5]
    assert not micro.extra["old"][~real_BT].any()
    tokens = [*last.prompt, *last.ids]
    assert micro.tokens_BT[0, : len(tokens) - 1].tolist() == tokens[:-1]
    for turn in found.turns:
        start = len(turn.prompt) - 1
        assert micro.targets_BT[0, start : start + len(turn.ids)].tolist() == turn.ids
    assert tokens.count(TOKENIZER.eos) == 3 + ended, "a reply that was cut is closed before the next message"


def test_some_turns_are_kept_and_those_that_do_not_fit_are_not() -> None:
    found = rolled(prompt(history=2, steps=5), says("turn left"))
    seen = [TOKENIZER.decode(turn.prompt).count("You see:") for turn in found.turns]
    assert seen == [1, 2, 3, 3, 3]
    assert all(TOKENIZER.decode(turn.prompt).startswith("Mission:") for turn in found.turns)
    (micro,) = pack([Drawn(found, {})], [], rows=1, length=9000, device=torch.device("cpu"))
    assert micro.document_ids_BT.max() == 3, "the first three go on from one another"
    room = len(found.turns[2].prompt) - 1
    narrow = rolled(prompt(history=2, steps=5), says("turn left"), room=room)
    assert max(len(turn.prompt) for turn in narrow.turns) <= room
    with pytest.raises(ValueError, match=r"data\.sequence_length: an observation of babyai/putnext has \d+ tokens"):
        rolled(prompt(), says("turn left"), room=9)


def test_rollouts_do_not_depend_on_those_beside_them() -> None:
    """A question among episodes; seeds of turns differ, and the first is the rollout's own."""
    asked: dict[tuple[int, ...], list[int]] = {}

    def reply(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Turn]:
        for ids, seed in zip(prompts, seeds, strict=True):
            asked.setdefault(tuple(ids), []).append(seed)
        return [Turn(list(ids), [97 + seed % 2, TOKENIZER.eos], "turn left", True, [0.0, 0.0]) for ids, seed in
                zip(prompts, seeds, strict=True)]  # fmt: skip

    question = Prompt([5, 6], "", {"prompt": "x"}, 1)
    prompts = [prompt(steps=3), question, prompt("babyai/open", steps=2, history=9)]
    together = rollouts_of(prompts, [7, 8, 9], reply, TOKENIZER, room=4000)
    assert [len(one.turns) for one in together] == [3, 1, 2]
    assert asked[5, 6] == [8]
    assert asked[tuple(prompts[0].ids)][0] == 7
    assert len({seed for seeds in asked.values() for seed in seeds}) == 6
    for one, seed, expected in zip(prompts, [7, 8, 9], together, strict=True):
        assert rollouts_of([one], [seed], reply, TOKENIZER, room=4000) == [expected]


def test_recorded_experts_of_a_turn_stand_where_it_was_written() -> None:
    """Positions that later turns read again keep the experts of the turn that wrote them."""

    def reply(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Turn]:
        ids = [*TOKENIZER.encode("drop"), TOKENIZER.eos]
        turns["number"] += 1
        experts = {"layers.1": [[turns["number"], 50 + i % 7] for i in range(len(prompts[0]) + len(ids) - 1)]}
        return [Turn(list(prompts[0]), ids, "drop", True, [0.0] * len(ids), experts)]

    turns: dict[str, Any] = {"number": 0}
    found = rolled(prompt(history=9, steps=3), reply)
    (micro,) = pack([Drawn(found, {})], [], rows=1, length=4000, device=torch.device("cpu"))
    start = 0
    for number, turn in enumerate(found.turns, start=1):
        end = len(turn.prompt) + len(turn.ids) - 1
        assert micro.replay["layers.1"][0, start:end, 0].unique().tolist() == [number]
        assert micro.replay["layers.1"][0, start:end, 1].tolist() == [50 + i % 7 for i in range(start, end)]
        start = end
    assert (micro.replay["layers.1"][0, start:] == -1).all()
