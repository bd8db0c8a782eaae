"""Every shipped callback passes `check_callback`; callbacks with one fault each do not."""

import re
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dsv3.testing.callback import check_callback

CONF = Path(__file__).parents[3] / "conf" / "callbacks"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "default")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_callbacks_conform(name):
    root = OmegaConf.create(
        {
            "run": {"checkpoint_every_tokens": 32, "validate_every_tokens": 64, "keep_checkpoints": 2}
            | {"checkpoint_format": "file"},
            "model": {"n_groups": 1},
            "benchmarks": {"every_tokens": 64, "before": True},
            "trainer": {"max_time": None},
            "profile": False,
            "callback": OmegaConf.load(CONF / f"{name}.yaml"),
        }
    )
    if name == "monitor":
        root.callback.every_tokens = 64  # within the three steps
    check_callback(lambda: instantiate(root.callback, _convert_="all"))


class Good(lightning.Callback):
    """Counts steps, and writes them to a table of its own."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        pl_module.folder.table("metrics/counted").append({"tokens": pl_module.record.tokens, "steps": self.steps})

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]


def test_the_good_callback_conforms():
    check_callback(Good)


class Late(Good):
    phase = "afterwards"


class Decays(Good):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.model.embed_tokens.weight.mul_(0.99)


class DrawsNumbers(Good):
    def on_train_batch_end(self, *given):
        torch.rand(3)


class MovesBias(Good):
    def on_train_start(self, trainer, pl_module):
        for bias_E in pl_module.model.routing_biases().values():
            bias_E[0] = 1


class LeavesUpdatesOut(Good):
    def on_fit_start(self, trainer, pl_module):
        pl_module.guard = SimpleNamespace(allows=lambda step, record: step.tokens_before != 30)


class Stops(Good):
    def on_train_batch_end(self, trainer, *given):
        trainer.should_stop = True


class ReadsLightningsOutputs(Good):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print(outputs["loss"])


class UnwritableTable(Good):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.folder.table("metrics/model").append({"model": pl_module})


class SavesItself(Good):
    def state_dict(self):
        return {"pattern": re.compile("a")}


class Forgets(Good):
    def load_state_dict(self, state_dict):
        pass


class TooManyGroups(Good):
    def check_model(self, model):
        raise ValueError("callbacks.mine.n_groups=3: 4 experts do not divide into them")


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (object, "lightning.Callback"),
        (Late, "`phase` must be one of interrupt, .*not 'afterwards'"),
        (Decays, "embed_tokens.weight differs"),
        (DrawsNumbers, "the random number generator differs"),
        (MovesBias, "bias differs|weight differs"),
        (LeavesUpdatesOut, "weight differs"),
        (Stops, "stopped before its end"),
        (ReadsLightningsOutputs, "fail with it: KeyError"),
        (UnwritableTable, "writing its tables, fail with it: ArrowInvalid"),
        (SavesItself, "plain containers"),
        (Forgets, "must hold it when training resumes"),
        (TooManyGroups, "n_groups=3"),
    ],
)
def test_faulty_callbacks_are_found(callback, words):
    with pytest.raises(AssertionError, match=words):
        check_callback(callback)
