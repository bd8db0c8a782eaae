"""A model that our trainer made, exported, gives transformers the same validation loss and the same greedy text."""

import copy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from dsv3.build import build_data, build_model
from dsv3.checkpoint.loading import load_run
from dsv3.contracts import IGNORE
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from dsv3.model.losses import token_losses
from dsv3.tools.export import Options, run
from dsv3.training.run import build_run
from tests.conftest import ROOT
from tests.parity.twins import CONF, our_loss
from tests.synthetic import TARGETS

DEFAULT_STUDY = ROOT / "runs" / "default" / "seed1"
PROMPTS = ("def read(path):\n", "class Node:\n    def __init__(self", "The function returns", "What is the day")


@torch.no_grad()
def validation_losses(ours, theirs, batches):
    for batch in batches:
        logits = theirs(batch.tokens_BT).logits.flatten(0, 1)
        yield our_loss(ours, batch)[0], torch.nn.functional.cross_entropy(logits, batch.targets_BT.flatten())


def test_trained_model_in_transformers(composed, tmp_path):
    keys = ("precision=fp32", "run.tokens=2560", "schedule.peak=1e-2")
    made = build_run(composed(f"run.dir={tmp_path / 'run'}", *keys))
    made.trainer.fit(made.module, made.data)
    run(Options(checkpoint=str(tmp_path / "run"), out=str(tmp_path / "out")))
    ours, theirs = (
        load_run(tmp_path / "run", allow=TARGETS).model,
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    )
    assert any(moe.balancing.bias.any() for _, moe in ours.moe_layers())  # it was trained
    for mine, other in validation_losses(ours, theirs, made.data.validation_batches()):
        assert abs(mine - other) <= 1e-4
    prompt = torch.tensor([list(b"abcdef")])
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 6:].tolist()
    assert list(generate(ours, prompt[0].tolist(), Settings(max_tokens=12))) == expected


@pytest.fixture(scope="module")
def default_study(tmp_path_factory) -> Path:
    """What `make train` left here; where there is none, its first 40 steps."""
    if (DEFAULT_STUDY / "summary.json").exists():
        return DEFAULT_STUDY
    from hydra import compose, initialize_config_dir

    folder = tmp_path_factory.mktemp("default") / "run"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["trainer.max_steps=40", "logger=none", f"run.dir={folder}"])
    made = build_run(config)
    made.trainer.fit(made.module, made.data)
    return folder


def in_fp32(loaded):
    """The run's model with the same weights, computing in FP32 as its twin will."""
    config = copy.deepcopy(loaded.config)
    config.precision = OmegaConf.load(CONF / "precision" / "fp32.yaml")
    model = build_model(config, init=False)
    model.load_state_dict(loaded.model.state_dict())
    return model.eval()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@torch.no_grad()
def test_default_study_in_transformers(default_study, tmp_path):
    """The loss over the whole held-out set, to 1e-4; greedy text of 48 tokens."""
    run(Options(checkpoint=str(default_study), out=str(tmp_path / "out")))
    loaded = load_run(default_study)
    ours, theirs = in_fp32(loaded), AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = loaded.tokenizer()
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in build_data(loaded.config, tokenizer=tokenizer).validation_batches():
        targets_N = batch.targets_BT.flatten()
        hidden_ND = ours(batch, with_mtp=False).hidden_BTD.flatten(0, 1)
        mine = token_losses(hidden_ND, ours.cast_head(), targets_N).double().sum()
        logits_NV = theirs(batch.tokens_BT).logits.flatten(0, 1)
        other = torch.nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum").double()
        totals += torch.stack([mine, other, (targets_N != IGNORE).sum().double()])
    mine, other = (totals[:2] / totals[2]).tolist()
    assert totals[2] > 100_000
    assert abs(mine - other) <= 1e-4
    for text in PROMPTS:
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False, eos_token_id=None)
        assert list(generate(ours, ids, Settings(max_tokens=48))) == expected[0, len(ids) :].tolist()
