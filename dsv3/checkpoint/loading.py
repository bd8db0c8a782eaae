"""Trained models read back from their run folders."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dsv3.build import build_model, load_tokenizer
from dsv3.checkpoint.partial import Fit, compared
from dsv3.checkpoint.run_folder import RunFolder, find_run, load_checkpoint
from dsv3.config.known_parts import refuse_unknown_parts
from dsv3.contracts import Tokenizer
from dsv3.model.decoder import Decoder
from dsv3.model.layers import local

log = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A trained model read back from its run folder."""

    config: DictConfig
    folder: RunFolder
    file: Path
    model: Decoder
    tokens: int
    ema_weights: dict[str, Tensor] | None  # None: the run averaged none

    def use(self, weights: str) -> None:
        """Put the `live` or the `ema` weights into the model.

        Raises:
            ValueError: the run has no averaged weights.
        """
        if weights == "ema":
            if self.ema_weights is None:
                raise ValueError("weights=ema: the run has no EMA weights (it had no callbacks.ema); use weights=live")
            set_weights(self.model, self.ema_weights)

    def tokenizer(self) -> Tokenizer:
        """The one that the run was trained with, from its folder."""
        tokenizer = load_tokenizer(self.folder.tokenizer_path)
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise ValueError(
                f"{self.folder.tokenizer_path} has {tokenizer.vocab_size} tokens, and the model's embedding "
                f"{self.config.model.vocab_size}: it is not the tokenizer that these weights were trained with"
            )
        return tokenizer


def load_run(checkpoint: str | Path, *, device: torch.device | str = "cpu", allow: Collection[str] = ()) -> Loaded:
    """Build the model of a run folder, or of one checkpoint file in it, with its live weights, for inference.

    allow: targets that its config.yaml may name besides those of conf/ (`dsv3.config.known_parts`).

    Raises:
        FileNotFoundError: there is no valid checkpoint.
        ValueError: the run names unknown parts, or its precision does not compute on `device`.
    """
    folder, file = find_run(checkpoint)
    config = folder.config()
    refuse_unknown_parts(OmegaConf.to_container(config), source=folder.config_path, allow=allow)
    state = load_checkpoint(file)
    model = build_model(config, init=False)
    prefix = "model."
    tensors = {k.removeprefix(prefix): v for k, v in state["state_dict"].items() if k.startswith(prefix)}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {folder.config_path}: {mismatch(error)}") from None
    if problems := model.precision.check(torch.device(device)):
        raise ValueError("; ".join(problems))
    ema = state["callbacks"].get("EMA", {}).get("weights")
    return Loaded(config, folder, file, model.to(device).eval(), state["dsv3"]["tokens_seen"], ema)


def fit_of(model: Decoder, start: Loaded, *, partly: bool) -> Fit:
    """What a model can take over of a trained one, and what it cannot. `model` may be on the meta device.

    partly: whether some may be missing, which is then said.

    Raises:
        ValueError: a tensor is missing or has another shape, or none fits.
    """
    fit = compared(model, start.model.state_dict())
    if not fit.fitting or ((fit.fresh or fit.unused) and not partly):
        remedy = "" if partly or not fit.fitting else ". run.init_partly=true takes the tensors that fit"
        raise ValueError(f"run.init_from={start.file}: another model: {fit.told()}{remedy}")
    if fit.fresh or fit.unused:
        kept = f"{len(fit.fitting)} of {len(fit.fitting) + len(fit.fresh)} tensors are taken over"
        log.warning("run.init_from=%s: %s; begun anew: %s", start.file, kept, fit.told())
    return fit


def init_from(model: Decoder, start: Loaded) -> None:
    """Take over the weights and the routing state of a trained model, where they fit (see `fit_of`).

    What its precision remembered is left behind.
    """
    model.load_state_dict(model.state_dict() | compared(model, start.model.state_dict()).fitting)


def mismatch(error: RuntimeError) -> str:
    """What `load_state_dict` says of the first tensor that does not fit."""
    return " ".join(str(error).partition(chr(10))[2].split())[:300]


@torch.no_grad()
def set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into the model's parameters: this rank's parts of them where they are sharded."""
    for name, parameter in model.named_parameters():
        local(parameter).copy_(weights[name])


def is_url(checkpoint: str) -> bool:
    """Whether it is a model behind an API, not files."""
    return checkpoint.startswith(("http://", "https://"))


def is_hf_checkpoint(checkpoint: str) -> bool:
    """Whether this is a folder in Hugging Face's format."""
    folder = Path(checkpoint)
    return (folder / "config.json").is_file() and not (folder / "config.yaml").exists()
