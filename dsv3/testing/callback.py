"""Does a callback keep to `dsv3.contracts.Callback`?"""

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.contracts import MicroBatch, Question, Sample, Step
from dsv3.testing.requirement import require
from dsv3.testing.small_model import NextToken, micro_batch, small_model
from dsv3.training.callbacks.phases import PHASES, ChecksModel
from dsv3.training.callbacks.save import DirectIO
from dsv3.training.lightning_module import LanguageModel

STEPS, ROWS, LENGTH = 3, 4, 8
STEP_TOKENS = ROWS * LENGTH - 2  # two positions of a `micro_batch` are padding


def check_callback(factory: Callable[[], Any]) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory()` is a callback that the core can use.

    It watches three steps of 30 tokens of a small model: two layers, the second one a MoE of 4 experts, top-2.
    """
    with torch.random.fork_rng(devices=[]):
        callback = factory()
        require(isinstance(callback, lightning.Callback), "a callback is a lightning.Callback")
        phase = getattr(callback, "phase", "observe")
        require(phase in PHASES, f"`phase` must be one of {', '.join(PHASES)}; not {phase!r}")
        _fits(callback)
        plain, watched = _trained([]), _trained([callback])
        for name, tensor in plain.items():
            require(
                torch.equal(watched[name], tensor),
                f"after three steps, {name} differs from what training without the callback gives: a callback changes "
                "no weights, no routing state and no random numbers (torch.random.fork_rng)",
            )
        require(watched.keys() == plain.keys(), "a callback must add nothing to the model")
        _reloads(callback, factory())


def _fits(callback: Any) -> None:
    if not isinstance(callback, ChecksModel):
        return
    with torch.device("meta"):
        model = small_model()
    try:
        callback.check_model(model)
    except ValueError as error:
        raise AssertionError(
            f"the factory must be given sizes that fit the check's model of 4 experts: {error}"
        ) from error


def _trained(callbacks: list[Any], *, steps: int = STEPS) -> Mapping[str, torch.Tensor]:
    """The model's state after so many steps, and that of the random number generator."""
    torch.manual_seed(0)
    module = LanguageModel(
        small_model(), objective=NextToken(), optimizer=_optimizer, schedule=lambda tokens: 0.1, grad_clip=1.0,
        total_tokens=STEPS * STEP_TOKENS,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        module.config = OmegaConf.create({"run": {"name": "check"}, "benchmarks": {"tasks": {}}})
        module.folder = RunFolder(Path(folder))
        try:
            with _quiet():
                trainer = lightning.Trainer(
                    accelerator="cpu", devices=1, max_epochs=1, default_root_dir=folder, callbacks=callbacks,
                    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                    limit_val_batches=0, limit_train_batches=steps, use_distributed_sampler=False,
                    plugins=[DirectIO()],
                )  # fmt: skip
                trainer.fit(module, _Data())
            module.folder.flush(module.tokens_seen)
        except Exception as error:
            raise AssertionError(
                f"three steps of training, and writing its tables, fail with it: {type(error).__name__}: {error}"
            ) from error
        require(module.tokens_seen == steps * STEP_TOKENS, "with the callback, training stopped before its end")
    return {**module.model.state_dict(), "the random number generator": torch.get_rng_state()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's words about itself: a check that passes says nothing."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        log.setLevel(level)


def _optimizer(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in named], lr=0.0)


def _reloads(callback: Any, fresh: Any) -> None:
    file = io.BytesIO()
    state = callback.state_dict()
    torch.save(state, file)
    file.seek(0)
    try:
        loaded = torch.load(file, weights_only=True)
    except Exception as error:
        raise AssertionError(
            f"state_dict() must hold tensors and plain containers only: checkpoints execute nothing ({error})"
        ) from error
    fresh.load_state_dict(loaded)
    _trained([fresh], steps=0)  # some take their state up when training begins
    require(
        _equal(fresh.state_dict(), state),
        "a new callback, given the saved state, must hold it when training resumes (load_state_dict)",
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


class _Tokenizer:
    """Bytes."""

    vocab_size = 262
    bos, eos, pad, fim_begin, fim_hole, fim_end = range(256, 262)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Any) -> bytes:
        return bytes(i for i in ids if i < 256)


class _Data(lightning.LightningDataModule):
    """Random tokens of one domain."""

    domains = ("random",)
    tokenizer = _Tokenizer()

    def train_dataloader(self) -> Iterator[Step]:
        for number in range(STEPS):
            before = number * STEP_TOKENS
            yield Step([micro_batch(ROWS, LENGTH, seed=number)], before, {"tokens": before + STEP_TOKENS})

    def validation_batches(self) -> Iterator[MicroBatch]:
        yield micro_batch(ROWS, LENGTH, seed=STEPS)

    def validation_bytes(self) -> Mapping[str, int]:
        return {"random": STEP_TOKENS}

    def questions(self) -> list[Question]:
        return []

    def samples(self) -> list[Sample]:
        return []
