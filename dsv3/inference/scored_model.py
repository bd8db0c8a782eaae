"""The contract between benchmarks and a model: logits of token sequences, and a backend for generation.

Shape legend: V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from dsv3.inference.backend import Backend


class ScoredModel(Protocol):
    """A causal language model with its tokenizer."""

    name: str
    max_length: int  # positions that it attends over
    prefix_token: int  # what a text without a context is conditioned on
    eos: set[int]  # tokens that end a text
    shares_prefixes: bool  # whether `logits` can compute what rows begin with once
    chat: bool  # whether it is asked in its chat template
    scores_bos: bool  # whether a rolling score counts the token put before a text, as lm-eval's own does
    device: torch.device

    def encode(self, text: str, *, bos: bool) -> list[int]: ...

    def encode_framed(self, text: str, room: int) -> list[int] | None:
        """Ids, at most `room`, of a written infilling prompt, or where the model is asked in its chat template, of any
        text as a user's message; None for a text that is continued as it stands."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: Sequence[int]) -> list[Tensor]:
        """Of each row the float32 logits [keep, V] at its last positions. shared: leading ids of each that other rows,
        of this call or the next, begin with too; 0 where it shares none."""

    def backend(self) -> Backend:
        """What the engine writes text over, with no row held."""

    def steady(self) -> AbstractContextManager[None]:
        """Within it the weights stay as they are, so that what follows from them may be kept; after it nothing is."""
