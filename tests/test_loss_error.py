"""The relative error of two runs' losses, against its definition; and pairs that cannot be compared."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.tools import loss_error


def write(path, losses, **config):
    folder = RunFolder(path)
    folder.path.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create({"seed": 1, "precision": {"of": str(path)}, **config}), folder.config_path)
    table = folder.table("metrics/train")
    for step, loss in enumerate(losses, start=1):
        table.append({"tokens": 64 * step, "loss": loss})
    table.flush(64 * len(losses))
    return str(path)


@pytest.fixture
def pair(tmp_path):
    base = [4 - 0.01 * step + 0.3 * math.sin(step) for step in range(100)]
    off = [loss * (1 + 0.001 * math.cos(3 * step)) for step, loss in enumerate(base)]
    return write(tmp_path / "fp8", off), write(tmp_path / "bf16", base), off, base


def smoothed(losses):
    found = [losses[0]]
    for loss in losses[1:]:
        found.append(0.9 * found[-1] + 0.1 * loss)
    return found


def test_equals_its_definition(pair, tmp_path):
    one, other, off, base = pair
    result = loss_error.run(loss_error.Options([one], [other], str(tmp_path / "error.png")))
    errors = [a / b - 1 for a, b in zip(smoothed(off), smoothed(base), strict=True)][-10:]
    assert result["mean_absolute"] == pytest.approx(sum(map(abs, errors)) / 10)
    assert result["pairs"][0]["mean"] == pytest.approx(sum(errors) / 10)
    assert (tmp_path / "error.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_has_no_error_against_itself_and_pairs_are_averaged(pair):
    one, other, _, _ = pair
    result = loss_error.run(loss_error.Options([one, other], [other, other], None))
    alone = loss_error.run(loss_error.Options([one], [other], None))
    assert result["pairs"][1]["mean_absolute"] == 0
    assert result["mean_absolute"] == pytest.approx(alone["mean_absolute"] / 2)


def test_pairs_that_cannot_be_compared(pair, tmp_path):
    one, other, off, _ = pair
    shorter = write(tmp_path / "shorter", off[:50])
    another_seed = write(tmp_path / "seed2", off, seed=2)
    for runs, baselines, words in (
        ([one], [], "must be as many, not 1 and 0"),
        ([another_seed], [other], "differ in seed: 2 and 1"),
        ([shorter], [other], "has 50 steps"),
    ):
        with pytest.raises(ValueError, match=words):
            loss_error.run(loss_error.Options(runs, baselines, None))
    empty = RunFolder(tmp_path / "empty")
    empty.path.mkdir()
    OmegaConf.save(OmegaConf.create({"seed": 1}), empty.config_path)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        loss_error.run(loss_error.Options([one], [str(tmp_path / "nowhere")], None))
    with pytest.raises(FileNotFoundError, match="no metrics"):
        loss_error.run(loss_error.Options([str(empty.path)], [other], None))


def test_what_is_measured_of_a_precision_makes_no_other_pair(pair, tmp_path):
    """As in conf/experiment/fp8_gap.yaml: only the FP8 arm measures what it quantises."""
    _, _, off, base = pair
    one = write(tmp_path / "measured", off, callbacks={"quantisation": {"every_tokens": 50_000}})
    other = write(tmp_path / "unmeasured", base, callbacks={"quantisation": {"every_tokens": 0}})
    assert loss_error.run(loss_error.Options([one], [other], None))["pairs"]


def test_pairs_that_read_other_texts_are_refused(pair):
    one, other, *_ = pair
    for folder, stream in ((one, "a"), (other, "b")):
        path = RunFolder(folder).checkpoint_path(64)
        path.parent.mkdir()
        torch.save({"state_dict": {}, "callbacks": {}, "dsv3": {"data_state": {"stream": stream}}}, path)
    with pytest.raises(ValueError, match="read other texts"):
        loss_error.run(loss_error.Options([one], [other], None))
    content = {"state_dict": {}, "callbacks": {}, "dsv3": {"data_state": {"stream": "b"}}}
    torch.save(content, RunFolder(one).checkpoint_path(64))
    assert loss_error.run(loss_error.Options([one], [other], None))["pairs"]
