"""Expert monitoring: planted faults are found by name, and the tables continue exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.reporting.page import write_run_report
from dsv3.training.callbacks.monitor import Monitor
from dsv3.training.run import build_run

Compose = Callable[..., DictConfig]


def train(config: DictConfig, plant: Callable[[Any], None] = lambda run: None) -> RunFolder:
    run = build_run(config)
    plant(run)
    run.trainer.fit(run.module, run.data)
    run.folder.release()
    return run.folder


@pytest.fixture(scope="module")
def ran(composed: Compose, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    keys = ("callbacks.monitor.every_tokens=1024", "run.checkpoint_every_tokens=2560", "run.validate_every_tokens=5120")
    return train(composed(f"run.dir={tmp_path_factory.mktemp('ran')}/run", *keys))


def test_tables_cover_every_layer_and_agree_with_the_load_of_each_step(ran: RunFolder) -> None:
    routing, experts = ran.read("metrics/routing"), ran.read("metrics/experts")
    assert sorted(set(routing.tokens)) == [1024, 2048, 2560, 3072, 4096, 5120]
    for layer in ("layers.1", "layers.2", "mtp.0"):
        rows = routing[routing.layer == layer]
        steps = experts[(experts.layer == layer) & (experts.tokens > 4096)]
        assert rows.load.iloc[-1].tolist() == np.stack(steps.load.to_list()).sum(0).tolist()
        assert rows.bias.iloc[-1].tolist() == experts[experts.layer == layer].bias.iloc[-1].tolist()
        assert (np.array(rows.output_norm.iloc[-1])[rows.load.iloc[-1] > 100] > 0).all()
        load_XE = rows.domain_load.iloc[-1].reshape(2, 16)
        assert (load_XE.sum(0) == rows.load.iloc[-1]).all()
        assert list(rows.domains.iloc[-1]) == ["letters", "digits"]
        assert ((rows.nodes >= 1) & (rows.nodes <= 2)).all()
        assert np.allclose(rows.dispatch_bytes, rows.nodes * 64 * 3)
    pairs = ran.read("metrics/coactivation")
    stretch = routing[(routing.layer == "layers.1") & (routing.tokens <= 2560)]
    first = pairs[(pairs.layer == "layers.1")].pairs.iloc[0].reshape(16, 16)
    assert (np.diag(first) == np.stack(stretch.load.to_list()).sum(0)).all()
    assert (first == first.T).all()
    stability = ran.read("metrics/stability")
    assert set(stability.tokens) == {5120}
    assert stability.unchanged_fraction.between(0, 1).all()


def test_a_planted_dead_expert_is_found_by_name(composed: Compose, tmp_path: Path) -> None:
    """Expert 5 of layer 2 can never be chosen: its bias is far below all others."""

    def plant(run: Any) -> None:
        dict(run.module.model.moe_layers())["layers.2"].balancing.parts.loss_free.bias[5] = -100.0

    keys = ("callbacks.monitor.every_tokens=2560", "balancing.parts.loss_free.gamma.peak=0.0")
    folder = train(composed(f"run.dir={tmp_path}/run", *keys), plant)
    alerts = folder.read("metrics/alerts")
    (found,) = alerts[(alerts.layer == "layers.2") & (alerts.expert == 5)].to_dict("records")
    assert (found["kind"], found["tokens"], found["value"]) == ("dead expert", 2560, 0.0)
    assert found["text"] == "layers.2 expert 5 is dead: 0.00% of the balanced load"
    assert found["text"] in write_run_report(folder.path).read_text()


@pytest.mark.slow
def test_a_planted_collapse_is_found_by_name(composed: Compose, tmp_path: Path) -> None:
    """Experts 0 and 1 of layer 1 are always chosen; the other layers route as they do."""

    def plant(run: Any) -> None:
        dict(run.module.model.moe_layers())["layers.1"].balancing.parts.loss_free.bias[:2] = 100.0

    keys = ("callbacks.monitor.every_tokens=2560", "balancing.parts.loss_free.gamma.peak=0.0")
    alerts = train(composed(f"run.dir={tmp_path}/run", *keys), plant).read("metrics/alerts")
    found = alerts[alerts.kind == "collapse"]
    assert "layers.1" in set(found.layer)
    row = found[found.layer == "layers.1"].iloc[0]
    assert row.tokens == 2560
    assert row.value == pytest.approx(2.0)
    assert row.text == "layers.1: routing collapse, 2.0 of 16 experts effective"


def unwatched(run: Any) -> None:
    run.trainer.callbacks = [callback for callback in run.trainer.callbacks if not isinstance(callback, Monitor)]


def test_monitoring_changes_nothing_in_training(composed: Compose, tmp_path: Path, ran: RunFolder) -> None:
    other = train(
        composed(f"run.dir={tmp_path}/rarely", "run.checkpoint_every_tokens=100000", "run.validate_every_tokens=5120"),
        unwatched,
    )
    assert other.read("metrics/routing").empty
    assert other.read("metrics/train").equals(ran.read("metrics/train"))
    ours, theirs = (torch.load(f.checkpoints()[-1], weights_only=True)["state_dict"] for f in (ran, other))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_output_norms_are_those_of_the_experts_alone(composed: Compose, tmp_path: Path) -> None:
    """Against each expert applied to its tokens, row by row: filling rows and gates have no part in them."""
    run = build_run(composed(f"run.dir={tmp_path}/run", "trainer.max_steps=1", "precision=fp32"))
    calls: list[tuple[torch.Tensor, ...]] = []
    name, moe = next(iter(run.module.model.moe_layers()))
    moe.experts.register_forward_hook(lambda module, given, y: calls.append(given) if module.training else None)
    gate_up_EID, down_EDI = (p.detach().clone() for p in moe.experts.parameters())
    run.trainer.fit(run.module, run.data)
    sums_E, counts_E = torch.zeros(16), torch.zeros(16)
    for x_MD, rows_E, gates_M in calls:
        for row, e in enumerate(torch.arange(16).repeat_interleave(rows_E).tolist()):
            if gates_M[row] > 0:
                gate, up = (gate_up_EID[e] @ x_MD[row]).chunk(2)
                sums_E[e] += (down_EDI[e] @ (torch.nn.functional.silu(gate) * up)).norm().detach()
                counts_E[e] += 1
    assert len(calls) == 2, "two micro-batches"
    assert counts_E.sum() == 256 * 2
    routing = run.folder.read("metrics/routing")
    measured = routing[routing.layer == name].output_norm.iloc[0]
    assert measured == pytest.approx((sums_E / counts_E.clamp(min=1)).tolist(), rel=1e-3)
