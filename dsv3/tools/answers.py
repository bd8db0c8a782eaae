"""Sample answers of a teacher, verify them, and write the right ones as conversations for data=conversations."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from dsv3.bounds import PositiveFloat, PositiveInt, Seed
from dsv3.cli import REQUIRED, option


@dataclass
class Options:
    checkpoint: str = option(REQUIRED, "a run folder, or one of its checkpoint files: the teacher")
    out: str = option(REQUIRED, "the JSON lines to write")
    prompts: str | None = option(None, "a file or folder of prompts (data/prompts.py); null: generated questions")
    count: PositiveInt = option(1000, "number of prompts")
    samples: PositiveInt = option(4, "answers sampled for each prompt")
    least: PositiveFloat = option(1.0, "reward that an answer must earn to be written")
    max_tokens: PositiveInt = option(32, "of an answer")
    temperature: PositiveFloat = option(1.0, "of sampling")
    weights: str = option("live", "live (current), or ema (exponential moving average)", choices=("live", "ema"))
    seed: Seed = option(0, "sampling seed")
    allow: list[str] = option([], "classes outside conf/ that the run's config.yaml may name: [package.Class]")
    device: str = option("auto", "auto: cuda where torch sees a GPU, else cpu", choices=("auto", "cpu", "cuda"))
    overrides: list[str] = option([], "keys of conf/train.yaml, such as reward=math_verify")


def run(options: Options) -> dict[str, Any]:
    """Write a conversation for each prompt that has a verified answer.

    Raises:
        ValueError: an option is out of its range, or a prompt lacks what its reward needs.
        FileNotFoundError: `checkpoint` is not a run's.
    """
    from dsv3.rollout.judged import conversation_of
    from dsv3.tools._sampled import write_rows

    return write_rows(options, partial(conversation_of, least=options.least))
