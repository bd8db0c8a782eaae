"""Models for benchmarks: each gives logits of token sequences, and a backend for generation.

There are three kinds: a `Decoder` of ours with its tokenizer, an export of one to ONNX graphs, and any causal model
that transformers opens.

Shape legend: B rows, T positions, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.huggingface import read_fields
from dsv3.checkpoint.shards import INDEX, SINGLE, Shards
from dsv3.contracts import MicroBatch, Tokenizer
from dsv3.evaluation.benchmarks.infill import BEGIN, END, HOLE, infilling_ids, parse_infilling
from dsv3.inference.backend import Backend, DecoderBackend
from dsv3.inference.engines import Source, backend_of, exported_writer
from dsv3.inference.hf_backend import HFBackend
from dsv3.inference.prefixes import padded
from dsv3.inference.shared_scoring import SharedScoring
from dsv3.model.decoder import Decoder
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


class SharingModel(TextModel, ABC):
    """One that reads what rows begin with once."""

    shares_prefixes = True
    _scoring: SharedScoring | None = None

    @abstractmethod
    def scoring_backend(self) -> Backend:
        """What rows are scored over, with none held."""

    @contextmanager
    def steady(self) -> Iterator[None]:
        with closing(SharedScoring(self.scoring_backend())) as scoring:
            self._scoring = scoring
            try:
                yield
            finally:  # a task may fail, and training goes on
                self._scoring = None

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: Sequence[int]) -> list[Tensor]:
        if self._scoring is not None:
            return self._scoring.logits(rows, keep, shared)
        with closing(SharedScoring(self.scoring_backend())) as scoring:
            return scoring.logits(rows, keep, shared)


class NativeModel(SharingModel):
    """A Decoder and its tokenizer."""

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

    @contextmanager
    def steady(self) -> Iterator[None]:
        with cached_weight_casts(self.model), super().steady():
            yield

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: Sequence[int]) -> list[Tensor]:
        if any(shared):
            return super().logits(rows, keep, shared)
        hidden_BTD = self._hidden(padded(rows, self.device))
        wanted = [hidden_BTD[i, len(row) - k : len(row)] for i, (row, k) in enumerate(zip(rows, keep, strict=True))]
        return list(self.model.lm_head(torch.cat(wanted)).float().split(list(keep)))

    def scoring_backend(self) -> Backend:
        return DecoderBackend(self.model)

    def backend(self) -> Backend:
        return backend_of(self.source())

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        ones, zeros = torch.ones_like(tokens_BT), torch.zeros_like(tokens_BT)
        return self.model(MicroBatch(tokens_BT, tokens_BT, positions_BT, ones, zeros), with_mtp=False).hidden_BTD


class OnnxModel(SharingModel):
    """A folder of ONNX graphs."""

    device = torch.device("cpu")

    def __init__(self, folder: str, *, chat: bool) -> None:
        """Raises ValueError as `exported_writer` and `TextModel`."""
        self.writer = writer = exported_writer(Path(folder), engine="auto", device="cpu", drafts=False)
        super().__init__(
            writer.tokenizer, name=folder, max_length=writer.sequence_length, fim_order=writer.fim_order, chat=chat
        )

    def scoring_backend(self) -> Backend:
        return backend_of(self.writer.source)

    def backend(self) -> Backend:
        if self._scoring is not None:
            self._scoring.close()  # it holds a row of the same backend
        return self.scoring_backend()


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
    if any((Path(folder) / name).exists() for name in (INDEX, SINGLE)):
        refuse_more_layers(Shards(Path(folder), block=None))  # transformers would follow an index out of the folder
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


def refuse_more_layers(shards: Shards) -> None:
    """Before transformers builds them, which takes hours where config.json says a thousand million.

    Raises:
        ValueError: config.json has more layers than the folder has tensors.
    """
    file = shards.folder / "config.json"
    layers = read_fields(file).get("num_hidden_layers", 0) if file.exists() else 0
    if isinstance(layers, int) and layers > len(shards.where):
        raise ValueError(f"{file}: num_hidden_layers={layers}: the weights beside it are {len(shards.where)} tensors")


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
    def logits(self, rows: Sequence[Sequence[int]], keep: Sequence[int], shared: Sequence[int]) -> list[Tensor]:
        logits_BTV = self.model(padded(rows, self.device)).logits.float()
        ends = map(len, rows)
        return [logits_BTV[i, end - k : end] for i, (end, k) in enumerate(zip(ends, keep, strict=True))]

    def backend(self) -> HFBackend:
        return HFBackend(self.model)

    def steady(self) -> AbstractContextManager[None]:
        return nullcontext()
