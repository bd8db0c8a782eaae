"""Sample answers, verify them, and write pairs of a right and a wrong one for data=preferences."""

from dataclasses import dataclass
from typing import Any

from dsv3.tools._sampled import Sampling, write_rows


@dataclass
class Options(Sampling):
    """As `Sampling`."""


def run(options: Options) -> dict[str, Any]:
    """Write a pair for each prompt that has answers of unlike reward.

    Raises:
        ValueError: an option is out of its range, or a prompt lacks what its reward needs.
        FileNotFoundError: `checkpoint` is not a run's.
    """
    from dsv3.rollout.judged import pair_of

    return write_rows(options, pair_of)
