"""Models as the server needs them: texts and conversations to prompts, ids to text, and a scheduler each."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dsv3.checkpoint.loading import is_hf_checkpoint, load_run
from dsv3.contracts import Tokenizer
from dsv3.evaluation.benchmarks.infill import BEGIN, END, HOLE
from dsv3.evaluation.benchmarks.models import HFModel, NativeModel
from dsv3.inference.backend import Backend, DecoderBackend
from dsv3.inference.engine import Engine
from dsv3.inference.speculation import Speculation
from dsv3.model.decoder import Decoder
from dsv3.model.layers import CACHE_BLOCK
from dsv3.prompts.chat import Message, chat_prompt
from dsv3.prompts.infilling import infilling_prompt
from dsv3.runtime import device_named
from dsv3.serving.json_grammar import JSONGrammars
from dsv3.serving.routed_backend import RoutedBackend
from dsv3.serving.scheduler import Limits, Scheduler

MOST_DRAFTS = 8
"""Of a text, for each pass of the model."""


class Prompts(Protocol):
    """Ids of what a request gives. Each raises ValueError where the tokenizer cannot write it."""

    def text(self, text: str) -> list[int]: ...

    def chat(self, messages: Sequence[Message]) -> list[int]: ...

    def infill(self, prefix: str, suffix: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...


class NativePrompts:
    """Of a run's tokenizer."""

    def __init__(self, model: NativeModel) -> None:
        self.tokenizer: Tokenizer = model.tokenizer
        self.order = model.fim_order

    def text(self, text: str) -> list[int]:
        return [self.tokenizer.bos, *self.tokenizer.encode(text)]

    def chat(self, messages: Sequence[Message]) -> list[int]:
        return chat_prompt(self.tokenizer, messages)

    def infill(self, prefix: str, suffix: str) -> list[int]:
        return infilling_prompt(self.tokenizer, prefix, suffix, self.order)

    def token_bytes(self, token: int) -> bytes:
        return self.tokenizer.decode_bytes([token])


class HFPrompts:
    """Of a tokenizer of transformers."""

    def __init__(self, model: HFModel) -> None:
        self.model, self.tokenizer = model, model.tokenizer

    def text(self, text: str) -> list[int]:
        return self.model.encode(text, bos=True)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Its own template; here a message that spells a special token is read as one."""
        if not self.tokenizer.chat_template:
            raise ValueError("messages: this checkpoint has no chat template; use /v1/completions")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))

    def infill(self, prefix: str, suffix: str) -> list[int]:
        return self.model.encode_framed(f"{BEGIN}{prefix}{HOLE}{suffix}{END}", self.model.max_length) or []

    def token_bytes(self, token: int) -> bytes:
        return str(self.tokenizer.decode([token])).encode()


@dataclass
class Served:
    """A model that requests name."""

    name: str
    model: NativeModel | HFModel
    prompts: Prompts
    backend: Backend
    scheduler: Scheduler
    grammars: JSONGrammars
    vocabulary: int
    drafts: int  # of each text that does not say
    most_drafts: int  # 0 where the model has no MTP
    opened: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    @property
    def context(self) -> int:
        return self.model.max_length

    @property
    def experts(self) -> int:
        """Routed experts of a layer; 0 where their choice is not noted."""
        return self.backend.experts if isinstance(self.backend, RoutedBackend) else 0

    @property
    def expert_layers(self) -> list[str]:
        """Their names, in the order in which a token's experts are given."""
        return self.backend.layers if isinstance(self.backend, RoutedBackend) else []

    def steady(self) -> AbstractContextManager[None]:
        return self.model.steady()

    @property
    def speculation(self) -> Speculation:
        return self.scheduler.engine.speculation


@dataclass
class ModelSettings:
    """How models are opened and run."""

    weights: str = "live"
    device: str = "auto"
    allow: Collection[str] = ()
    drafts: int = 1  # tokens that MTP drafts, where the model has modules for it
    prefill: int = 12  # positions of prompts that a step reads next to texts
    cache_bytes: int = 256 * 2**20  # of finished texts that are kept for prompts that begin alike


def open_model(checkpoint: str, settings: ModelSettings, limits: Limits, wake: Callable[[], None]) -> Served:
    """A run or a Hugging Face checkpoint, ready to be served.

    Raises:
        FileNotFoundError, ValueError, OSError: as `load_run` and transformers say.
    """
    device = device_named(settings.device)
    name = "/".join(Path(checkpoint).resolve().parts[-2:])
    if is_hf_checkpoint(checkpoint):
        hf = HFModel(checkpoint, device=device)
        hf.name = name
        return serve(hf, Path(checkpoint), hf.model.config.vocab_size, settings, limits, wake)
    loaded = load_run(checkpoint, device=device, allow=settings.allow)
    loaded.use(settings.weights)
    length, order = loaded.config.data.sequence_length, loaded.config.data.fim.order
    native = NativeModel(loaded.model, loaded.tokenizer(), name=name, max_length=length, fim_order=order)
    return serve(native, loaded.folder.tokenizer_path, loaded.config.model.vocab_size, settings, limits, wake)


def serve(
    model: NativeModel | HFModel,
    tokenizer: Path,
    vocabulary: int,
    settings: ModelSettings,
    limits: Limits,
    wake: Callable[[], None],
) -> Served:
    """A scheduler over an opened model. `tokenizer`: the folder of its `tokenizer.json`."""
    backend: Backend
    prompts: Prompts
    kept = most_drafts = 0
    if isinstance(model, NativeModel):
        backend, prompts = RoutedBackend(model.model), NativePrompts(model)
        kept = settings.cache_bytes // position_bytes(model.model)
        most_drafts = MOST_DRAFTS if backend.drafter.caches else 0
    else:
        backend, prompts = model.backend(), HFPrompts(model)
    engine = Engine(backend, decode=model.decode, prefill=settings.prefill, kept_positions=kept)
    return Served(
        name=model.name,
        model=model,
        prompts=prompts,
        backend=backend,
        scheduler=Scheduler(engine, limits, wake=wake),
        grammars=JSONGrammars(tokenizer / "tokenizer.json", vocabulary=vocabulary, eos=min(model.eos)),
        vocabulary=vocabulary,
        drafts=min(settings.drafts, most_drafts),
        most_drafts=most_drafts,
    )


def position_bytes(model: Decoder) -> int:
    """Bytes that a row holds for each position: caches of the model, and of MTP with its states."""
    backend = DecoderBackend(model)
    backend.add(0, drafts=bool(backend.drafter.caches))
    drafter = backend.drafter
    blocks = 0
    for part in (*backend.caches.parts(), *drafter.caches, *drafter.states):
        held = part.rows[0]  # type: ignore[attr-defined]
        held.reserve(CACHE_BLOCK)
        blocks += held.held.nbytes
    return -(-blocks // CACHE_BLOCK)
