"""What benchmarks ask of a model: logits of token rows, and decoding over caches.

Two kinds of model answer: a `Decoder` of ours with its tokenizer, and any causal model that transformers opens.

Shape legend: B rows, T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.contracts import Cache, MicroBatch, Tokenizer
from dsv3.evaluation.benchmarks.infill import BEGIN, END, HOLE, infilling_ids, parse_infilling
from dsv3.inference.prefixes import SHORTEST_SHARED, common_prefix
from dsv3.model.decoder import Decoder
from dsv3.model.layers import held_weights
from dsv3.prompts.infilling import Order

PREFILL = 256
"""Positions that are read at once before decoding, which bounds the memory of their logits."""


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [B, longest]; zeros follow the shorter rows, where a causal model does not look."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


class OwnModel:
    """A Decoder and its tokenizer. Rows that begin alike share what their latent caches hold of the beginning."""

    shares_prefixes = True
    scores_bos = False

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, *, name: str, max_length: int, fim_order: Order = "psm"
    ) -> None:
        """`max_length`: the length of the rows that the model was trained on. `fim_order`: as it was trained."""
        self.model, self.tokenizer = model, tokenizer
        self.name, self.max_length, self.fim_order = name, max_length, fim_order
        self.prefix_token, self.eos = tokenizer.bos, {tokenizer.eos}
        self.device = model.device
        self._prefix: list[int] = []
        self._prefix_caches: list[Cache] = []

    @contextmanager
    def steady(self) -> Iterator[None]:
        try:
            with held_weights(self.model):
                yield
        finally:  # a task may fail, and training goes on
            self._prefix, self._prefix_caches = [], []

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [self.tokenizer.bos] * bos + self.tokenizer.encode(text)

    def encode_infilling(self, text: str, room: int) -> list[int] | None:
        parts = parse_infilling(text)
        return None if parts is None else infilling_ids(self.tokenizer, *parts, order=self.fim_order, room=room)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: int) -> list[Tensor]:
        if not shared:
            hidden_BTD = self._hidden(padded(rows, self.device))
            wanted = [hidden_BTD[i, len(row) - k : len(row)] for i, (row, k) in enumerate(zip(rows, keep, strict=True))]
            return list(self.model.lm_head(torch.cat(wanted)).float().split(list(keep)))
        logits_BTV = self.model.decode(
            padded([row[shared:] for row in rows], self.device), self._caches(list(rows[0][:shared]), len(rows))
        )
        ends = [len(row) - shared for row in rows]
        return [logits_BTV[i, end - k : end] for i, (end, k) in enumerate(zip(ends, keep, strict=True))]

    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> "_OwnDecoding":
        shared = min(common_prefix(prompts), min(map(len, prompts)) - 1)
        if len(prompts) > 1 and shared >= SHORTEST_SHARED:
            return _OwnDecoding(self.model, self._caches(list(prompts[0][:shared]), len(prompts)), shared)
        return _OwnDecoding(self.model, self.model.new_caches(len(prompts), capacity), 0)

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        ones, zeros = torch.ones_like(tokens_BT), torch.zeros_like(tokens_BT)
        return self.model(MicroBatch(tokens_BT, tokens_BT, positions_BT, ones, zeros), with_mtp=False).hidden_BTD

    @torch.no_grad()
    def _caches(self, prefix: list[int], rows: int) -> list[Cache]:
        """Caches of `rows` rows that hold `prefix`; what it has in common with the last one is not computed again."""
        if not self._prefix_caches:
            self._prefix_caches = self.model.new_caches(1, self.max_length)
        held = common_prefix([self._prefix, prefix])
        for cache in self._prefix_caches:
            cache.rewind(held)
        for start in range(held, len(prefix), PREFILL):
            piece = torch.tensor([prefix[start : start + PREFILL]], device=self.device)
            self.model.decode_states(piece, self._prefix_caches)
        self._prefix = prefix
        wide = self.model.new_caches(rows, self.max_length)
        for one, many in zip(self._prefix_caches, wide, strict=True):
            widen(one, many)
        return wide


def widen(one: Cache, many: Cache) -> None:
    """Fill every row of `many` with what `one`, a cache of a single row and the same capacity, holds."""
    for name, value in vars(one).items():
        if isinstance(value, Tensor):
            getattr(many, name).copy_(value)  # broadcasts over the rows, on whichever axis they lie
    many.length = one.length


class _OwnDecoding:
    def __init__(self, model: Decoder, caches: list[Cache], length: int) -> None:
        self.model, self.caches, self.length = model, caches, length

    @torch.no_grad()
    def feed(self, tokens_BT: Tensor) -> Tensor:
        for piece_BT in tokens_BT.split(PREFILL, dim=1):
            last_BTD = self.model.decode_states(piece_BT, self.caches)
        return self.model.logits(self.model.norm(last_BTD[:, -1]))


class PublishedModel:
    """A causal model and a tokenizer that transformers opens, of whatever architecture.

    Rows are always scored whole, in the batches that lm-eval's own `hf` model makes of them, so that its figures and
    these agree to the last digit.
    """

    shares_prefixes = False
    scores_bos = True

    def __init__(self, folder: str | Path, *, model: Any = None, tokenizer: Any = None) -> None:
        """`model`, `tokenizer`: already opened ones, instead of those in `folder`.

        Raises:
            OSError, ValueError: transformers cannot open the folder.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = str(folder)
        self.model = (model or AutoModelForCausalLM.from_pretrained(folder, dtype="auto")).eval()
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
        self.device = self.model.device
        self.max_length = int(getattr(self.model.config, "max_position_embeddings", 2048))
        special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.prefix_token = special[0] if special[0] is not None else special[1]
        ends = self.model.generation_config.eos_token_id
        self.eos = {special[1], *(ends if isinstance(ends, list) else [ends])} - {None}

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """With `bos`, what the tokenizer itself puts before a text."""
        repeats = text.startswith(str(self.tokenizer.decode(self.prefix_token)))
        return self.tokenizer.encode(text, add_special_tokens=bos and not repeats)

    def encode_infilling(self, text: str, room: int) -> list[int] | None:
        if parse_infilling(text) is None:
            return None
        if any(len(self.tokenizer.encode(mark, add_special_tokens=False)) != 1 for mark in (BEGIN, HOLE, END)):
            raise ValueError("the model's tokenizer has no fill-in-the-middle tokens")
        ids = self.encode(text, bos=True)
        if len(ids) > room:
            raise ValueError(f"an infilling prompt of {len(ids)} tokens does not fit in {room}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: int) -> list[Tensor]:
        logits_BTV = self.model(padded(rows, self.device)).logits.float()
        ends = map(len, rows)
        return [logits_BTV[i, end - k : end] for i, (end, k) in enumerate(zip(ends, keep, strict=True))]

    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> "_PublishedDecoding":
        return _PublishedDecoding(self.model)

    def steady(self) -> AbstractContextManager[None]:
        return nullcontext()


class _PublishedDecoding:
    length = 0

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None

    @torch.no_grad()
    def feed(self, tokens_BT: Tensor) -> Tensor:
        output = self.model(tokens_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits[:, -1].float()
