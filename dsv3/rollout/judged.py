"""Answers of a trained model to prompts, each with its reward: what pairs and conversations are made of."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from random import Random
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dsv3.checkpoint.loading import Loaded
from dsv3.config.part import part
from dsv3.contracts import HasPrompts, Prompt, Reward, Rollout
from dsv3.environments import in_turns
from dsv3.inference.engines import source_of
from dsv3.rollout.sampler import sample

PROMPTS = 16
"""Prompts that are answered and judged at a time."""


class Judged(NamedTuple):
    """An answer and what it earned."""

    rollout: Rollout
    reward: float


def judged_answers(
    loaded: Loaded,
    config: DictConfig,
    *,
    count: int,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    engine: str,
) -> Iterator[tuple[Prompt, list[Judged]]]:
    """Each of the first `count` training prompts of `config.data` with its answers, as `config.reward` judges them;
    fewer where a prompt comes a second time before.

    Raises:
        ValueError: the data has no prompts, or a row of it lacks what its reward needs.
    """
    source = source_of(loaded.model, loaded.config, engine)
    tokenizer = loaded.tokenizer()
    data = part(config.data)(tokenizer=lambda **_: tokenizer)
    data.setup("fit")
    reward: Reward = part(config.reward)
    if isinstance(data, HasPrompts):
        if any(in_turns(prompt.item) for prompt in data.prompts()):
            raise ValueError("data: rows with form=turns open episodes, which have no answer to be written")
        reward([prompt.unanswered() for prompt in data.prompts()])
    prompts = islice(_distinct(prompt for step in data.train_dataloader() for prompt in step.prompts), count)
    while batch := list(islice(prompts, PROMPTS)):
        asked = [prompt for prompt in batch for _ in range(samples)]
        # torch's generators on the CPU take 32 bits of a seed
        seeds = [Random(f"{seed}/{prompt.number}/{i}").getrandbits(32) for prompt in batch for i in range(samples)]
        ids = [prompt.ids for prompt in asked]
        turns = sample(source, tokenizer, ids, seeds, max_tokens=max_tokens, temperature=temperature)
        rollouts = [Rollout([turn]) for turn in turns]
        answers = [prompt.answered(one) for prompt, one in zip(asked, rollouts, strict=True)]
        judged = [Judged(one, value) for one, value in zip(rollouts, reward(answers), strict=True)]
        for place, prompt in enumerate(batch):
            yield prompt, judged[place * samples : (place + 1) * samples]


def _distinct(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Prompts up to the first that has come before."""
    seen: set[tuple[int, ...]] = set()
    for prompt in prompts:
        if tuple(prompt.ids) in seen:
            return
        seen.add(tuple(prompt.ids))
        yield prompt


def pair_of(prompt: Prompt, answers: Sequence[Judged]) -> dict[str, Any] | None:
    """A row of `data=preferences`: the best answer and the worst; None where they earned the same."""
    ended = [one for one in answers if one.rollout.ended]
    if not ended:
        return None
    best, worst = (choose(ended, key=lambda one: one.reward) for choose in (max, min))
    if best.reward == worst.reward or best.rollout.text == worst.rollout.text:
        return None
    row = {"prompt": prompt.item["prompt"], "chosen": best.rollout.text, "rejected": worst.rollout.text}
    return row | _family(prompt.item)


def conversation_of(prompt: Prompt, answers: Sequence[Judged], *, least: float) -> dict[str, Any] | None:
    """A row of `data=conversations`: the best answer, if it earned `least` or more."""
    best = max(answers, key=lambda one: one.reward)
    if best.reward < least or not best.rollout.ended:
        return None
    asked = prompt.item["prompt"]
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    return {"messages": [*messages, {"role": "assistant", "content": best.rollout.text}]} | _family(prompt.item)


def _family(item: Mapping[str, Any]) -> dict[str, str]:
    return {"family": item["family"]} if "family" in item else {}
