"""The contract between benchmarks and a model: logits of token rows, and decoding over caches.

Shape legend: B rows, T positions, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Decoding(Protocol):
    """Rows of equal length that are continued token by token."""

    length: int  # ids of each prompt, the same in all of them, that have been read already

    def feed(self, tokens_BT: Tensor) -> Tensor:
        """Append T tokens to each row; return the float32 logits [B, V] after the last of them."""


class ScoredModel(Protocol):
    """A causal language model with its tokenizer."""

    name: str
    max_length: int  # positions that it attends over
    prefix_token: int  # what a text without a context is conditioned on
    eos: set[int]  # tokens that end a text
    shares_prefixes: bool  # whether `logits` can compute what rows begin with once
    scores_bos: bool  # whether a rolling score counts the token put before a text, as lm-eval's own does
    device: torch.device

    def encode(self, text: str, *, bos: bool) -> list[int]: ...

    def encode_infilling(self, text: str, room: int) -> list[int] | None:
        """Ids of a written infilling prompt, at most `room` of them; None where `text` is none."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: int) -> list[Tensor]:
        """Of each row the float32 logits [keep, V] at its last positions; all rows share their first `shared` ids."""

    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> Decoding:
        """Start to continue the prompts, with room for `capacity` positions in all."""

    def steady(self) -> AbstractContextManager[None]:
        """Within it the weights stay as they are, so that what follows from them may be kept; after it nothing is."""
