"""Out of memory is one message with the keys that help and the plan's figures, and a mistake of the user's."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from omegaconf import DictConfig

from dsv3.training import out_of_memory
from dsv3.training.fit import fit
from dsv3.training.out_of_memory import OutOfMemoryError, explained, is_out_of_memory

Compose = Callable[..., DictConfig]


class Greedy(lightning.Callback):
    def on_train_batch_start(self, *arguments: Any) -> None:
        torch.empty(2**55, dtype=torch.uint8)


def test_a_run_that_is_out_of_memory_names_the_keys_that_help(composed: Compose, tmp_path: Path) -> None:
    greedy = f"+callbacks.greedy._target_={__name__}.Greedy"
    with pytest.raises(OutOfMemoryError) as found:
        fit(composed(f"run.dir={tmp_path}/run", "precision=fp32", "data.micro_batch_size=2", greedy))
    message = str(found.value)
    assert "allocate" in message.splitlines()[0]
    assert (tmp_path / "run" / "failure.txt").read_text().strip() == message
    needed, *helps = re.findall(r"([0-9.]+) ([kM])B", message.partition("By the plan's")[2])
    keys = re.findall(r"^  (\S.*?)  +[0-9]", message, re.MULTILINE)
    assert keys == [
        "data.micro_batch_size=1",
        "recompute=[norm,attention_up,swiglu]",
        "data.sequence_length=16",
        "trainer.devices=2 parallel=sharded",
    ]
    size = {"k": 1e3, "M": 1e6}
    assert len(helps) == 4, "BF16 would cost this small a model more, in copies of its weights"
    assert all(float(number) * size[unit] < float(needed[0]) * size[needed[1]] for number, unit in helps), message


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
    ids=repr,
)
def test_only_lack_of_memory_is_taken_for_it(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_a_model_that_the_plan_cannot_read_still_gets_the_keys(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: DictConfig) -> None:
        raise ValueError("no such attention")

    monkeypatch.setattr(out_of_memory, "read_skeleton", refuse)
    message = str(explained(MemoryError(), composed("data.micro_batch_size=4")))
    assert message.startswith("out of memory: MemoryError\n")
    assert "there are no figures (no such attention): data.micro_batch_size=2, recompute=[" in message


def test_ranks_that_share_a_model_get_figures_of_one(composed: Compose) -> None:
    alone = str(explained(MemoryError(), composed()))
    sharded = str(explained(MemoryError(), composed("parallel=sharded", "trainer.devices=2")))
    assert "trainer.devices=4 parallel=sharded" in sharded
    line = "trainer.devices=2 parallel=sharded"
    (figure,) = re.findall(rf"{line} +(\S+ \S+)", alone)
    assert f"needs at least {figure} on" in sharded, "what two devices were promised"
