"""Models for benchmarks: each gives logits of token sequences, and a backend for generation.

There are three kinds: a `Decoder` of ours with its tokenizer, an export of one to ONNX graphs, and any causal model
that transformers opens.

Shape legend: B rows, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.shards import INDEX, Shards
from dsv3.contracts import MicroBatch, Tokenizer
from dsv3.evaluation.benchmarks.infill import BEGIN, END, HOLE, infilling_ids, parse_infilling
from dsv3.inference.backend import Backend
from dsv3.inference.engine import PREFILL
from dsv3.inference.engines import Source, backend_of, exported_writer
from dsv3.inference.hf_backend import HFBackend
from dsv3.inference.prefixes import common_prefix, padded
from dsv3.model.decoder import Caches, Decoder
from dsv3.model.layers import cached_weight_casts
from dsv3.prompts.chat import Message, chat_prompt
from dsv3.prompts.infilling import Order


class TextModel:
    """What models with a tokenizer of ours have in common: texts and prompts as ids."""

    scores_bos = False

    def __init__(self, tokenizer: Tokenizer, *, name: str, max_length: int, fim_order: Order, chat: bool) -> None:
        """`max_length`: the length of the rows that the model was trained on. `fim_order`: as it was trained.
        `chat`: prompts are a user's messages in the chat template.

        Raises ValueError where the tokenizer has no tokens for turns.
        """
        if chat:
            chat_prompt(tokenizer, [Message("user", "")])
        self.tokenizer = tokenizer
        self.name, self.max_length, self.fim_order, self.chat = name, max_length, fim_order, chat
        self.prefix_token, self.eos = tokenizer.bos, {tokenizer.eos}

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [self.tokenizer.bos] * bos + self.tokenizer.encode(text)

    def encode_framed(self, text: str, room: int) -> list[int] | None:
        parts = parse_infilling(text)
        if parts is not None:
            return infilling_ids(self.tokenizer, *parts, order=self.fim_order, room=room)
        if not self.chat:
            return None
        begin, *message = chat_prompt(self.tokenizer, [Message("user", text.strip())])
        return [begin, message[0], *message[1:][-max(1, room - 2) :]]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


class NativeModel(TextModel):
    """A Decoder and its tokenizer. Rows that begin alike share what their latent caches hold of the beginning."""

    shares_prefixes = True

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        name: str,
        max_length: int,
        fim_order: Order = "psm",
        chat: bool = False,
        source: Callable[[], Source] | None = None,
    ) -> None:
        """`source`: makes what writes text, of the weights as they are then; None: the model does. For the rest, and
        what is raised, see `TextModel`."""
        super().__init__(tokenizer, name=name, max_length=max_length, fim_order=fim_order, chat=chat)
        self.model, self.device, self.source = model, model.device, source or (lambda: model)
        self._prefix: list[int] = []
        self._prefix_caches: Caches | None = None

    @contextmanager
    def steady(self) -> Iterator[None]:
        try:
            with cached_weight_casts(self.model):
                yield
        finally:  # a task may fail, and training goes on
            self._prefix, self._prefix_caches = [], None

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: int) -> list[Tensor]:
        if not shared:
            hidden_BTD = self._hidden(padded(rows, self.device))
            wanted = [hidden_BTD[i, len(row) - k : len(row)] for i, (row, k) in enumerate(zip(rows, keep, strict=True))]
            return list(self.model.lm_head(torch.cat(wanted)).float().split(list(keep)))
        caches = self._caches(list(rows[0][:shared]), len(rows))
        logits_BTV = self.model.decode(padded([row[shared:] for row in rows], self.device), caches)
        ends = [len(row) - shared for row in rows]
        return [logits_BTV[i, end - k : end] for i, (end, k) in enumerate(zip(ends, keep, strict=True))]

    def backend(self) -> Backend:
        return backend_of(self.source())

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        ones, zeros = torch.ones_like(tokens_BT), torch.zeros_like(tokens_BT)
        return self.model(MicroBatch(tokens_BT, tokens_BT, positions_BT, ones, zeros), with_mtp=False).hidden_BTD

    @torch.no_grad()
    def _caches(self, prefix: list[int], rows: int) -> Caches:
        """Caches of `rows` rows that hold `prefix`; what it has in common with the last one is not computed again."""
        caches = self._prefix_caches = self._prefix_caches or self.model.new_caches([0])
        held = common_prefix([self._prefix, prefix])
        caches.rewind(0, held)
        for start in range(held, len(prefix), PREFILL):
            piece = torch.tensor([prefix[start : start + PREFILL]], device=self.device)
            self.model.decode_states(piece, caches)
        self._prefix = prefix
        copies = caches.select([0])
        for row in range(1, rows + 1):
            copies.copy(0, row, len(prefix))
        return copies.select(range(1, rows + 1))


class OnnxModel(TextModel):
    """A folder of ONNX graphs."""

    shares_prefixes = True
    device = torch.device("cpu")

    def __init__(self, folder: str, *, chat: bool) -> None:
        """Raises ValueError as `exported_writer` and `TextModel`."""
        self.writer = writer = exported_writer(Path(folder), engine="auto", device="cpu", drafts=False)
        super().__init__(
            writer.tokenizer, name=folder, max_length=writer.sequence_length, fim_order=writer.fim_order, chat=chat
        )

    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: int) -> list[Tensor]:
        backend, numbers = self.backend(), range(len(rows))
        found: list[list[Tensor]] = [[] for _ in rows]
        for row in numbers:
            backend.add(row, drafts=False)
        held = 0
        if shared:
            for start in range(0, shared, PREFILL):
                backend.read([0], [rows[0][start : min(start + PREFILL, shared)]], [0])
            for row in numbers[1:]:
                backend.copy(0, row, shared)
            held = shared
        for start in range(held, max(map(len, rows)), PREFILL):
            reading = [row for row in numbers if start < len(rows[row])]
            pieces = [rows[row][start : start + PREFILL] for row in reading]
            ends = [start + len(piece) - max(start, len(rows[row]) - keep[row]) for row, piece in zip(reading, pieces)]
            logits = backend.read(reading, pieces, [max(0, end) for end in ends])
            for row, logits_KV in zip(reading, logits, strict=True):
                found[row].append(logits_KV)
        for row in numbers:
            backend.drop(row)
        return [torch.cat(pieces) for pieces in found]

    def backend(self) -> Backend:
        return backend_of(self.writer.source)

    def steady(self) -> AbstractContextManager[None]:
        return nullcontext()


def published(folder: str | Path) -> tuple[Any, Any]:
    """The model and the tokenizer in a folder, by transformers.

    Raises:
        FileNotFoundError: a file that the index names is not there.
        ValueError: it names one elsewhere; transformers cannot open them, or would make up weights that the folder
            lacks; or the tokenizer is another's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # or every weight of MTP, which transformers leaves out, has a line
    if (Path(folder) / INDEX).exists():
        Shards(Path(folder), block=None)  # transformers would follow an index out of the folder
    told: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **told)
        model, info = opened
        tokenizer = AutoTokenizer.from_pretrained(folder)
        size, ids = model.get_input_embeddings().num_embeddings, tokenizer.get_vocab().values()
    except Exception as error:  # of transformers, safetensors, tokenizers, torch: a cut file has a type in each
        raise ValueError(f"{folder}: transformers cannot open it: {' '.join(str(error).split())[:300]}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(f"{folder}: its weights do not fit its config.json; lacking or of another shape: {missing[0]}")
    if max(ids, default=0) >= size:
        raise ValueError(
            f"{folder}: its tokenizer has ids up to {max(ids)}, and the model's embedding {size} tokens: it is not the "
            "tokenizer that these weights were trained with"
        )
    return model, tokenizer


class HFModel:
    """A causal model and a tokenizer that transformers opens, of whatever architecture.

    Rows are always scored whole, in the batches that lm-eval's own `hf` model makes of them, so that its figures and
    these agree to the last digit.
    """

    shares_prefixes = False
    scores_bos = True

    def __init__(
        self,
        folder: str | Path,
        *,
        model: Any = None,
        tokenizer: Any = None,
        device: torch.device | str = "cpu",
        chat: bool = False,
    ) -> None:
        """`model`, `tokenizer`: already opened ones, instead of those in `folder`. `chat`: as in `NativeModel`.

        Raises:
            ValueError: transformers cannot open the folder, or its weights or its tokenizer are not those of the model.
        """
        self.name, self.chat = str(folder), chat
        if model is None or tokenizer is None:
            model, tokenizer = published(folder)
        self.model: Any = model.to(device).eval()
        self.tokenizer = tokenizer
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

    def encode_framed(self, text: str, room: int) -> list[int] | None:
        if parse_infilling(text) is None:
            return self._chat_prompt(text, room) if self.chat else None
        if any(len(self.tokenizer.encode(mark, add_special_tokens=False)) != 1 for mark in (BEGIN, HOLE, END)):
            raise ValueError("the model's tokenizer has no fill-in-the-middle tokens")
        ids = self.encode(text, bos=True)
        if len(ids) > room:
            raise ValueError(f"an infilling prompt of {len(ids)} tokens does not fit in {room}")
        return ids

    def _chat_prompt(self, text: str, room: int) -> list[int]:
        messages = [{"role": "user", "content": text.strip()}]
        ids: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(ids) > room:
            raise ValueError(f"a chat prompt of {len(ids)} tokens does not fit in {room}")
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: int) -> list[Tensor]:
        logits_BTV = self.model(padded(rows, self.device)).logits.float()
        ends = map(len, rows)
        return [logits_BTV[i, end - k : end] for i, (end, k) in enumerate(zip(ends, keep, strict=True))]

    def backend(self) -> HFBackend:
        return HFBackend(self.model)

    def steady(self) -> AbstractContextManager[None]:
        return nullcontext()
