"""Sample answers of a teacher, verify them, and write the right ones as conversations for data=conversations."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from dsv3.bounds import PositiveFloat
from dsv3.cli import option
from dsv3.tools._sampled import Sampling, write_rows


@dataclass
class Options(Sampling):
    least: PositiveFloat = option(1.0, "reward that an answer must earn to be written")


def run(options: Options) -> dict[str, Any]:
    """Write a conversation for each prompt that has a verified answer.

    Raises:
        ValueError: an option is out of its range, or a prompt lacks what its reward needs.
        FileNotFoundError: `checkpoint` is not a run's.
    """
    from dsv3.rollout.judged import conversation_of

    return write_rows(options, partial(conversation_of, least=options.least))
