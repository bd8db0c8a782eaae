"""A training step never waits for the device, but to read its record and where a dispatch needs numbers of rows.

On a CPU nothing waits, so the operations that would are forbidden: by name where Python asks for a value, by operator
where its result's size, or a value, would have to be known on the host.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from omegaconf import DictConfig
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dsv3.model.layers
import dsv3.training.lightning_module
import plugins.dispatch.local
import plugins.experts.grouped
import plugins.precision.quantised_linear
from dsv3.training.run import build_run

Compose = Callable[..., DictConfig]

METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
OPERATORS = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
)  # fmt: skip


class Waits(Exception):  # noqa: N818
    """An operation that waits for the device."""


class _NoValues(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        devices = [kwargs.get("device"), *args[1:2]]
        if name in METHODS or (name == "to" and any(str(device) == "cpu" for device in devices)):
            raise Waits(name)
        return func(*args, **kwargs)


class _NoDataDependentSizes(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in OPERATORS:
            raise Waits(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Waits("repeat_interleave without output_size")
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise Waits("index with a boolean mask")
        return func(*args, **kwargs)


@contextmanager
def no_waiting() -> Iterator[None]:
    with _NoValues(), _NoDataDependentSizes():
        yield


@contextmanager
def no_waiting_on_a_gpu() -> Iterator[None]:
    """What CUDA itself says: an operation that waits raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Watch(lightning.Callback):
    """Forbids waiting during one step, callbacks included; `let` wraps a function that may."""

    phase = "interrupt"

    def __init__(self, step: int, forbidden: Callable[[], AbstractContextManager[None]] = no_waiting) -> None:
        self.step, self.forbidden = step, forbidden
        self.stack: ExitStack | None = None
        self.watched = 0
        self.allowed = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            self.stack = ExitStack()
            self.stack.enter_context(self.forbidden())

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.stack is not None:
            self.stack.close()
            self.stack = None

    def let(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def allowed(*args: Any, **kwargs: Any) -> Any:
            self.allowed += self.stack is not None
            if self.forbidden is no_waiting_on_a_gpu:
                mode = torch.cuda.get_sync_debug_mode()
                torch.cuda.set_sync_debug_mode("default")
                try:
                    return function(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
            with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
                return function(*args, **kwargs)

        return allowed


class Unwatch(lightning.Callback):
    """The last callback of a step."""

    phase = "show"

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.watch.watched += self.watch.stack is not None
        self.watch.close()


def watched_run(
    config: DictConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    step: int,
    forbidden: Callable[[], AbstractContextManager[None]] = no_waiting,
) -> Watch:
    run = build_run(config)
    watch = Watch(step, forbidden)
    run.trainer.callbacks = [watch, *run.trainer.callbacks, Unwatch(watch)]  # type: ignore[attr-defined]
    monkeypatch.setattr(dsv3.training.lightning_module, "read", watch.let(dsv3.training.lightning_module.read))
    for module in (plugins.dispatch.local, plugins.experts.grouped, plugins.precision.quantised_linear):
        monkeypatch.setattr(module, "on_host", watch.let(dsv3.model.layers.on_host))
    run.trainer.fit(run.module, run.data)
    return watch


@pytest.mark.parametrize(
    "parts",
    [
        ["precision=bf16"],
        ["precision=bf16", "dispatch.pad_multiple=1"],
        ["precision=fp32", "experts=loop", "attention=gqa", "optimizer=adamw"],
        ["precision=fp32", "router=softmax", "balancing=switch_aux", "recompute=[norm,attention_up,swiglu]"],
        ["precision=fp8_blockwise", "dispatch.pad_multiple=1"],
        [
            "precision=fp32",
            "optimizer=adamw",
            "optimizer.moments_dtype=bfloat16",
            "mtp=none",
            "data.isolate_documents=true",
        ],
    ],
    ids=lambda parts: " ".join(parts),
)
def test_a_step_and_its_callbacks_wait_only_to_be_recorded(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[str]
) -> None:
    config = composed(f"run.dir={tmp_path}/run", "trainer.max_steps=5", *parts)
    watch = watched_run(config, monkeypatch, step=3)
    assert watch.watched == 1
    layers = config.model.n_layers - config.model.n_dense_layers + ("mtp=none" not in parts)
    rows = layers * config.data.micro_batches if config.dispatch.pad_multiple > 1 and "experts=loop" not in parts else 0
    if "experts=loop" not in parts and "precision=fp8_blockwise" not in parts:
        assert watch.allowed == 1 + rows, "one record, and a number of rows for each layer that pads"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_on_a_gpu_a_step_waits_to_be_recorded_and_no_more(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    overrides = ("trainer.max_steps=5", "precision=bf16", "trainer.accelerator=cuda", f"optimizer={optimizer}")
    config = composed(f"run.dir={tmp_path}/run", *overrides)
    watch = watched_run(config, monkeypatch, step=3, forbidden=no_waiting_on_a_gpu)
    assert (watch.watched, watch.allowed) == (1, 1)


@pytest.mark.parametrize("planted", ["tolist", "item", "bool", "mask", "cpu", "bincount"])
def test_a_planted_wait_is_found(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    wait: Callable[[torch.Tensor], Any] = {
        "tolist": lambda x: x.tolist(),
        "item": lambda x: x.sum().item(),
        "bool": lambda x: bool(x.any()),
        "mask": lambda x: x[x > 0],
        "cpu": lambda x: x.to("cpu"),
        "bincount": lambda x: torch.bincount(x.flatten()),
    }[planted]

    class Planted:
        def observe(self, micro: Any, routings: Any) -> None:
            wait(micro.tokens_BT)

    class Plants(lightning.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.observers.append(Planted())

    monkeypatch.setattr("dsv3.training.run.build_callbacks", lambda config: [Plants()])
    with pytest.raises(Waits):
        watched_run(composed(f"run.dir={tmp_path}/run", "trainer.max_steps=2"), monkeypatch, step=1)
