"""Models as the server needs them: texts and conversations to prompts, ids to text, and a scheduler each."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from dsv3.checkpoint.loading import is_hf_checkpoint
from dsv3.contracts import Tokenizer
from dsv3.evaluation.benchmarks.infill import BEGIN, END, HOLE
from dsv3.evaluation.benchmarks.models import HFModel, TextModel
from dsv3.inference.backend import Backend
from dsv3.inference.engine import Engine
from dsv3.inference.engines import Writer, decoder_backend, weights_stay, writer_of
from dsv3.inference.hf_backend import HFBackend
from dsv3.inference.onnx_backend import OnnxBackend
from dsv3.inference.speculation import Speculation
from dsv3.model.decoder import Decoder
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

    def __init__(self, model: TextModel) -> None:
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
    model: TextModel | HFModel
    steady: AbstractContextManager[None]  # within it the weights stay as they are
    prompts: Prompts
    backend: Backend | None  # of this process
    scheduler: Scheduler
    grammars: JSONGrammars
    vocabulary: int
    drafts: int | None  # of each text that does not say; None: 1 while drafts pay
    most_drafts: int  # 0 where the model has no MTP
    lacks: Sequence[str] = ()  # fields of requests that would change the answer and are refused
    close: Callable[[], None] = lambda: None
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
        return list(self.backend.load) if isinstance(self.backend, RoutedBackend) else []

    @property
    def speculation(self) -> Speculation:
        return self.scheduler.engine.speculation


@dataclass
class ModelSettings:
    """How models are opened and run."""

    engine: str = "auto"
    weights: str = "live"
    device: str = "auto"
    allow: Collection[str] = ()
    drafts: int | None = None  # tokens that MTP drafts, where the model has modules for it; None: 1 while they pay
    prefill: int = 12  # positions of prompts that a step reads next to texts
    cache_bytes: int = 256 * 2**20  # of finished texts that are kept for prompts that begin alike


def open_model(checkpoint: str, settings: ModelSettings, limits: Limits, wake: Callable[[], None]) -> Served:
    """A run, a folder of ONNX graphs or a Hugging Face checkpoint, ready to be served.

    Raises:
        FileNotFoundError, ValueError, OSError: as `writer_of` and transformers say, or `engine` cannot run it.
    """
    name = name_of(checkpoint)
    if is_hf_checkpoint(checkpoint):
        if settings.engine not in ("auto", "eager"):
            raise ValueError(
                f"engine={settings.engine}: {checkpoint} is a Hugging Face checkpoint; it runs by engine=eager"
            )
        hf = HFModel(checkpoint, device=device_named(settings.device))
        hf.name = name
        opened = Opened(hf, nullcontext(), HFPrompts(hf), hf.backend(), Path(checkpoint), hf.model.config.vocab_size)
        return serve(opened, settings, limits, wake)
    writer = writer_of(
        checkpoint,
        engine=settings.engine,
        device=settings.device,
        weights=settings.weights,
        allow=settings.allow,
        drafts=None if settings.drafts is None else settings.drafts > 0,
    )
    model = TextModel(
        writer.tokenizer, name=name, max_length=writer.sequence_length, fim_order=writer.fim_order, chat=False
    )
    backend = routed(writer)
    opened = Opened(
        model, weights_stay(writer.source), NativePrompts(model), backend, writer.tokenizer_folder, writer.vocab_size
    )
    return serve(opened, settings, limits, wake)


def name_of(checkpoint: str) -> str:
    """The last two parts of its path."""
    return "/".join(Path(checkpoint).resolve().parts[-2:])


class Opened(NamedTuple):
    """A model before it has a scheduler."""

    model: TextModel | HFModel
    steady: AbstractContextManager[None]
    prompts: Prompts
    backend: RoutedBackend | HFBackend
    tokenizer: Path  # the folder of its `tokenizer.json`
    vocabulary: int


def routed(writer: Writer) -> RoutedBackend:
    source = writer.source
    if isinstance(source, Decoder):
        moes = {name: moe for name, moe in source.moe_layers() if name.startswith("layers.")}
        experts = max((len(moe.balancing.bias) for moe in moes.values()), default=0)
        return RoutedBackend(decoder_backend(source), list(moes), experts)
    assert isinstance(source, OnnxBackend)
    return RoutedBackend(source, source.routed, source.experts)


def serve(opened: Opened, settings: ModelSettings, limits: Limits, wake: Callable[[], None]) -> Served:
    """A scheduler over an opened model."""
    backend, model, kept, most_drafts = opened.backend, opened.model, 0, 0
    if isinstance(backend, RoutedBackend):
        kept = settings.cache_bytes // max(1, backend.backend.position_bytes)
        most_drafts = MOST_DRAFTS if backend.backend.drafter.caches else 0
    engine = Engine(backend, decode=model.decode, prefill=settings.prefill, kept_positions=kept)
    return Served(
        name=model.name,
        model=model,
        steady=opened.steady,
        prompts=opened.prompts,
        backend=backend,
        scheduler=Scheduler(engine, limits, wake=wake),
        grammars=JSONGrammars(opened.tokenizer / "tokenizer.json", vocabulary=opened.vocabulary, eos=min(model.eos)),
        vocabulary=opened.vocabulary,
        drafts=None if settings.drafts is None else min(settings.drafts, most_drafts),
        most_drafts=most_drafts,
    )
