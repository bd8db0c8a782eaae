"""Measuring quantisation in a run: what is written, when, and that training is the same with and without it."""

import pytest
import torch

from dsv3.build import build_model
from dsv3.checkpoint.loading import init_from, load_run
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.contracts import is_precision_state
from dsv3.training.run import build_run
from tests.synthetic import TARGETS


def trained(composed, path, *overrides):
    run = build_run(composed(f"run.dir={path}", "trainer.max_steps=3", *overrides))
    run.trainer.fit(run.module, run.data)
    return RunFolder(path), run.module


@pytest.mark.parametrize("precision", ["fp8_blockwise", pytest.param("fp8_tensorwise", marks=pytest.mark.slow)])
def test_measures_steps_and_changes_nothing(composed, tmp_path, precision):
    tokens = composed().data.sequence_length * composed().data.micro_batch_size * composed().data.micro_batches
    every = f"callbacks.quantisation.every_tokens={2 * tokens}"
    watched, one = trained(composed, tmp_path / "watched", f"precision={precision}", every)
    plain, other = trained(composed, tmp_path / "plain", f"precision={precision}")
    assert watched.read("metrics/train").equals(plain.read("metrics/train"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    table = watched.read("metrics/quantisation")
    assert table.tokens.unique().tolist() == [0, tokens], "the first step, and the one that reaches every other step"
    first = table[table.tokens == 0]
    assert not first.duplicated(["role", "tensor"]).any()
    assert set(first.role) == set(composed(f"precision={precision}").precision.roles)
    assert {"x_held", "w_fprop", "dy_dgrad", "x_wgrad" if precision == "fp8_blockwise" else "w_dgrad"} <= set(
        first.tensor
    )
    assert (first.snr_db > 20).all()
    assert plain.read("metrics/quantisation").empty


def test_a_precision_without_quantiser_is_refused(composed, tmp_path):
    config = composed(f"run.dir={tmp_path}/run", "precision=bf16", "callbacks.quantisation.every_tokens=64")
    with pytest.raises(ValueError, match=r"callbacks\.quantisation\.every_tokens=64: BF16 does not measure"):
        build_run(config)


def test_weights_pass_between_precisions(composed, tmp_path):
    """A history of amax is saved with its run, and no other precision is asked for a place for it."""
    trained(composed, tmp_path / "run", "precision=fp8_tensorwise")
    start = load_run(tmp_path / "run", allow=TARGETS)
    remembered = {name: tensor for name, tensor in start.model.state_dict().items() if is_precision_state(name)}
    assert remembered
    assert all(tensor[:, :3].all() and not tensor[:, 3:].any() for tensor in remembered.values()), "of three steps"
    for precision in ("bf16", "fp8_blockwise", "fp8_tensorwise"):
        model = build_model(composed(f"precision={precision}"))
        init_from(model, start)
        state = model.state_dict()
        for name, tensor in start.model.state_dict().items():
            if not is_precision_state(name):
                assert torch.equal(state[name], tensor)
            elif name in state:
                assert not state[name].any(), "a history begins anew"
