"""The choice of a backend: `engine=auto|eager|onnx`.

    eager   the model as PyTorch computes it, in its own precision, on any device; on a GPU by recorded CUDA graphs
    onnx    its weights of now in an ONNX graph, in FP32, on the CPU
    auto    onnx for a model on the CPU all of whose parts the graph can express, else eager

The rule reads the configuration and the device, no clock, so that a seed gives the same text on every machine.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from omegaconf import DictConfig

from dsv3.build import load_tokenizer
from dsv3.checkpoint.families import Parts
from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.onnx.expressible import inexpressible
from dsv3.checkpoint.onnx.onnx_manifest import is_onnx_export, read_manifest
from dsv3.contracts import Tokenizer
from dsv3.inference.backend import Backend, DecoderBackend
from dsv3.model.decoder import Decoder
from dsv3.model.layers import cached_weight_casts
from dsv3.prompts.infilling import Order
from dsv3.runtime import device_named

log = logging.getLogger(__name__)

Source = Decoder | Backend
"""What text is written by: a model, decoded eagerly, or a backend."""


def chosen_engine(engine: str, config: DictConfig, device: torch.device) -> Literal["eager", "onnx"]:
    """What `engine` comes to. config: of the model. Where auto falls back to eager, a line says why, once.

    Raises:
        ValueError: `engine=onnx`, and the graph cannot express a part or the device is not the CPU; every reason is in
            the message.
    """
    if engine == "eager":
        return "eager"
    reasons = inexpressible(config)
    if engine == "auto":
        if device.type == "cpu" and reasons:
            _say(f"text is decoded by engine=eager, without an ONNX graph: {'; '.join(reasons)}")
        return "eager" if device.type != "cpu" or reasons else "onnx"
    if device.type != "cpu":
        reasons.append(f"device={device.type}: the graph runs on the CPU")
    if reasons:
        raise ValueError(f"engine=onnx: {'; '.join(reasons)}. engine=eager decodes every model")
    return "onnx"


@cache
def _say(line: str) -> None:
    log.info(line)


def source_of(model: Decoder, config: DictConfig, engine: str, *, drafts: bool | None = False) -> Source:
    """The model itself, or a backend with its weights as they are now; where `drafts`, one that drafts by MTP (None:
    where that usually pays).

    Raises ValueError as `chosen_engine`.
    """
    if chosen_engine(engine, config, model.device) == "eager":
        return model
    from dsv3.inference.onnx_backend import OnnxBackend

    return OnnxBackend.of(model, Parts.of(config), drafts=drafts)


def backend_of(source: Source) -> Backend:
    return decoder_backend(source) if isinstance(source, Decoder) else source


def decoder_backend(model: Decoder) -> DecoderBackend:
    """A backend of the model: on a GPU one that records its steps, where all of its parts can decode like that."""
    if model.device.type == "cuda":
        from dsv3.inference.static_backend import StaticBackend

        with suppress(ValueError):
            return StaticBackend(model)
    return DecoderBackend(model)


@contextmanager
def weights_stay(source: Source) -> Iterator[None]:
    """Within it a model's weights do not change, so that what follows from them is computed once. A backend has its
    own."""
    if isinstance(source, Decoder):
        with cached_weight_casts(source):
            yield
    else:
        yield


class Writer(NamedTuple):
    """What writes text, and what is asked of it."""

    source: Source
    tokenizer: Tokenizer
    sequence_length: int  # of the rows that it was trained on
    fim_order: Order
    vocab_size: int
    tokenizer_folder: Path  # holds its `tokenizer.json`


def writer_of(
    checkpoint: str, *, engine: str, device: str, weights: str, allow: Collection[str], drafts: bool | None
) -> Writer:
    """Open a run, or a folder of ONNX graphs. drafts: text may be drafted by MTP; None: where that usually pays.

    Raises:
        ValueError: as `load_run` and `chosen_engine`; or a folder of graphs is asked for another engine or device.
        FileNotFoundError: there is no checkpoint.
    """
    if is_onnx_export(checkpoint):
        return exported_writer(Path(checkpoint), engine=engine, device=device, drafts=drafts)
    loaded = load_run(checkpoint, device=device_named(device), allow=allow)
    loaded.use(weights)
    data, vocabulary = loaded.config.data, loaded.config.model.vocab_size
    source = source_of(loaded.model, loaded.config, engine, drafts=drafts)
    folder = loaded.folder.tokenizer_path
    return Writer(source, loaded.tokenizer(), data.sequence_length, data.fim.order, vocabulary, folder)


def exported_writer(folder: Path, *, engine: str, device: str, drafts: bool | None) -> Writer:
    """Raises ValueError as `writer_of`."""
    for key, value, only in (("engine", engine, "onnx"), ("device", device, "cpu")):
        if value not in ("auto", only):
            raise ValueError(f"{key}={value}: {folder} holds ONNX graphs; they run by {key}={only}")
    from dsv3.inference.onnx_backend import OnnxBackend

    manifest = read_manifest(folder)
    backend = OnnxBackend.opened(folder, drafts=drafts)
    length, order, vocabulary = (manifest[key] for key in ("sequence_length", "fim_order", "vocab_size"))
    return Writer(backend, load_tokenizer(folder), length, order, vocabulary, folder)
