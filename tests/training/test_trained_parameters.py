"""Parameters chosen by name are not trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from dsv3.build import build_model
from dsv3.config.preflight import check
from dsv3.training.fit import fit

Compose = Callable[..., DictConfig]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_frozen_parameters_keep_their_values_and_the_others_are_trained(
    composed: Compose, tmp_path: Path, optimizer: str
) -> None:
    settings = [f"run.dir={tmp_path}/run", f"optimizer={optimizer}", "recompute=[norm, swiglu]"]
    patterns = "run.freeze=[embed_tokens.*, '*.self_attn.*', layers.1.*]"

    def trained(tokens: int) -> dict[str, bool]:
        config = composed(*settings, patterns, f"run.tokens={tokens}", f"run.checkpoint_every_tokens={tokens}")
        run = fit(config)
        run.folder.release()
        begun = dict(build_model(config).named_parameters())
        return {name: not torch.equal(p, begun[name]) for name, p in run.module.model.named_parameters()}

    changed = trained(512)
    frozen = {name for name in changed if name.startswith(("embed_tokens.", "layers.1.")) or ".self_attn." in name}
    assert {name for name, has in changed.items() if not has} == frozen
    assert 0 < len(frozen) < len(changed)


def test_a_run_with_frozen_parameters_is_resumed(composed: Compose, tmp_path: Path) -> None:
    def weights(folder: str, *limits: str) -> dict[str, torch.Tensor]:
        for limit in limits:
            settings = ["run.tokens=1024", "run.checkpoint_every_tokens=512", "run.freeze=['layers.*']"]
            run = fit(composed(f"run.dir={tmp_path}/{folder}", *settings, limit))
            run.folder.release()
        return run.module.model.state_dict()

    whole = weights("whole", "trainer.max_steps=4")
    parts = weights("parts", "trainer.max_steps=2", "trainer.max_steps=4")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("embed_token.weight", r"run\.freeze=embed_token\.weight: no parameter .*Did you mean 'embed_tokens\.weight'"),
     ("*", "nothing is left to train")],
)  # fmt: skip
def test_a_pattern_that_cannot_be_meant_is_refused_before_work(
    composed: Compose, tmp_path: Path, pattern: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(composed(f"run.dir={tmp_path}/run", f"run.freeze=['{pattern}']"))
    assert not (tmp_path / "run").exists()


def test_several_ranks_train_all() -> None:
    (problem,) = check("train", ["run.freeze=[embed_tokens.*]", "parallel=sharded", "trainer.devices=2"])
    assert problem.key == "run.freeze"
