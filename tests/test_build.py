"""Initial weights: by the seed, and from another run, for context extension."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from dsv3.build import build_model
from dsv3.checkpoint.loading import Loaded, load_run
from dsv3.training.run import build_run
from tests.synthetic import TARGETS, ByteTokenizer

YARN = "model.yarn={factor: 4.0, original_length: 32, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0}"


@pytest.fixture(scope="module")
def trained(composed: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "short"
    run = build_run(composed(f"run.dir={folder}", "trainer.max_steps=3"))
    run.trainer.fit(run.module, run.data)
    return folder


@pytest.fixture
def short_run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three steps on 32 positions."""
    monkeypatch.setattr(Loaded, "tokenizer", lambda self: ByteTokenizer())
    return trained


def test_a_longer_phase_begins_with_the_weights_of_a_shorter_one(
    composed: Callable[..., DictConfig], short_run: Path, tmp_path: Path
) -> None:
    config = composed(
        f"run.dir={tmp_path}/long",
        f"run.init_from={short_run}",
        YARN,
        "data.sequence_length=128",
        "trainer.max_steps=2",
    )  # fmt: skip
    run = build_run(config)
    before, start = run.module.model.state_dict(), load_run(short_run, allow=TARGETS).model.state_dict()
    assert before.keys() == start.keys()
    assert all(torch.equal(before[key], start[key]) for key in before)
    assert any("bias" in key and before[key].abs().sum() > 0 for key in before), "routing state comes along"
    assert run.module.model.layers[0].self_attn.scale > build_model(composed()).layers[0].self_attn.scale
    run.trainer.fit(run.module, run.data)
    assert run.module.tokens_seen == 2 * 2 * 4 * 128


def test_another_shape_is_refused_by_name(composed: Callable[..., DictConfig], short_run: Path, tmp_path: Path) -> None:
    config = composed(f"run.dir={tmp_path}/other", f"run.init_from={short_run}", "model.moe_inter_dim=48")
    with pytest.raises(ValueError, match=r"run\.init_from=.*another model"):
        build_run(config)


def test_initial_weights_follow_the_seed_and_the_name_alone(composed: Callable[..., DictConfig]) -> None:
    """Equal seeds pair the arms of a study wherever names and shapes agree; other seeds share no matrix."""
    one, same, other = (dict(build_model(composed(f"seed={seed}")).named_parameters()) for seed in (1, 1, 2))
    plain = dict(build_model(composed("seed=1", "mtp=none", "router=softmax")).named_parameters())
    matrices = [name for name, parameter in one.items() if parameter.ndim >= 2]
    assert all(torch.equal(one[name], same[name]) for name in matrices)
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    shared = [name for name in matrices if name in plain]
    assert len(shared) > 10
    assert all(torch.equal(one[name], plain[name]) for name in shared)


def test_another_shape_is_found_before_the_data_is_built(
    composed: Callable[..., DictConfig], short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("the data is built")

    monkeypatch.setattr("dsv3.training.run.build_data", build)
    config = composed(f"run.dir={tmp_path}/other", f"run.init_from={short_run}", "model.moe_inter_dim=48")
    with pytest.raises(
        ValueError, match=r"experts\.gate_up_proj\.weight \(\[.*\] here, \[.*\] there\).*run\.init_partly=true"
    ):
        build_run(config)
    assert not (tmp_path / "other").exists()


def test_weights_that_fit_are_taken_over_and_the_rest_is_named(
    composed: Callable[..., DictConfig], short_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = ["model.moe_inter_dim=48", "model.n_layers=4", "mtp=none", "run.init_partly=true"]
    run = build_run(composed(f"run.dir={tmp_path}/other", f"run.init_from={short_run}", *other))
    run.folder.release()
    made, start = run.module.model.state_dict(), load_run(short_run, allow=TARGETS).model.state_dict()
    fresh = dict(build_model(run.config).state_dict())
    taken = {name for name in made.keys() & start.keys() if made[name].shape == start[name].shape}
    assert all(torch.equal(made[name], start[name]) for name in taken)
    assert all(torch.equal(made[name], fresh[name]) for name in made.keys() - taken)
    assert any(name.startswith("layers.2.self_attn") for name in taken)
    for told in (
        f"{len(taken)} of {len(made)} tensors",
        "layers.*.mlp.experts.gate_up_proj",
        "not in this model: mtp.",
    ):
        assert told in caplog.text


def test_no_weights_that_fit_are_no_beginning(
    composed: Callable[..., DictConfig], short_run: Path, tmp_path: Path
) -> None:
    other = ["model.dim=32", "attention=gqa", "mtp=none", "run.init_partly=true", "balancing=none", "router=softmax"]
    config = composed(f"run.dir={tmp_path}/other", f"run.init_from={short_run}", *other)
    with pytest.raises(ValueError, match=r"another model: embed_tokens\.weight"):
        build_run(config)
