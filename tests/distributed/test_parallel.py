"""Several ranks train as one process does: gradients of a step, whole runs, checkpoints read by any number of ranks."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from dsv3.distributed.parallel import OneProcess, Parallel, Sizes
from dsv3.testing.parallel import Taken, take_step
from tests.distributed.ranks import Trained, train
from tests.distributed.workers import Workers

Compose = Callable[..., DictConfig]
Alone = Callable[[str], tuple[Trained, Path]]

LAYOUTS = {
    "sharded 2": Sizes(1, 2, 1, 1),
    "sharded 4": Sizes(1, 4, 1, 1),
    "experts 2": Sizes(1, 1, 1, 2),
    "experts 2 x sharded 2": Sizes(1, 2, 1, 2),
    "experts 4 on 2 nodes": Sizes(1, 1, 2, 2),
}

RUNS = {
    "sharded 2": ("parallel=sharded", "trainer.devices=2"),
    "sharded 4": ("parallel=sharded", "trainer.devices=4"),
    "experts 2": ("parallel=experts", "trainer.devices=2"),
    "experts 2 x sharded 2": ("parallel=experts", "parallel.experts=2", "trainer.devices=4"),
    "experts 4 on 2 nodes": ("parallel=experts", "parallel.nodes=2", "trainer.devices=4"),
    "pipeline 2": ("parallel=pipeline", "trainer.devices=2"),
    "pipeline 2 x experts 2": (
        "parallel=pipeline",
        "parallel.stages=2",
        "parallel.experts=2",
        "dispatch=all_to_all",
        "parallel.schedule=1f1b",
        "trainer.devices=4",
    ),
}

MODELS = {
    "tiny": (20, ()),
    "tiny, briefly": (6, ("run.tokens=3072",)),
    "2 layers of the default": (20, ("model=small", "model.n_layers=2")),
}
"""Steps, and overrides."""

TWO_LAYERS = {"pipeline 2": ("parallel.schedule=1f1b",)}
"""Settings of layouts for so small a model: 2 layers and MTP are too few for two stages on each of two ranks."""

QUICK = ("pipeline 2", "tiny, briefly")
"""The quick one of the whole runs; one over sharding and experts is in test_folder_checkpoint."""

WHOLE = [QUICK, *((layout, model) for model in ("tiny", "2 layers of the default") for layout in RUNS)]


def norm(taken: Taken) -> float:
    return float(taken.sums["squares"] ** 0.5)


def assert_same_step(ours: Taken, one: Taken) -> None:
    assert ours.sums["nll"] == pytest.approx(one.sums["nll"], rel=1e-7)
    assert norm(ours) == pytest.approx(norm(one), rel=2e-4)  # FP32 sums of squares, in another order
    assert torch.equal(ours.counts, one.counts)
    assert ours.gradients.keys() == one.gradients.keys()
    for name, gradient in one.gradients.items():
        error = (ours.gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-20)
        assert error <= 1e-6, name


@pytest.mark.parametrize(
    "layout",  # of two ranks, check_parallel takes such steps in test_conformance
    [pytest.param(name, marks=pytest.mark.slow if sizes.world == 2 else ()) for name, sizes in LAYOUTS.items()],
)
def test_a_step_has_the_gradients_of_one_process(composed: Compose, workers: Workers, layout: str) -> None:
    config = composed("precision=fp32", "dispatch=all_to_all")
    one, sizes = take_step(config, None), LAYOUTS[layout]  # 3 micro-batches, which 2 and 4 ranks share with padding
    results = workers.run(take_step, config, sizes, ranks=sizes.world)
    assert len({norm(taken) for taken in results}) == 1, "every rank decides by the same norm"
    assert_same_step(results[0], one)


@pytest.mark.parametrize(
    "parts",
    [
        ["precision=fp32", "recompute=[norm,attention_up,swiglu]"],
        ["precision=fp32", "model.tie_embeddings=true"],
        pytest.param(["precision=fp32", "mtp=none", "attention=gqa"], marks=pytest.mark.slow),
        pytest.param(["precision=fp32", "experts=loop", "balancing=sequence_aux"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_whatever_the_parts_are(composed: Compose, workers: Workers, parts: list[str]) -> None:
    config = composed("dispatch=all_to_all", *parts)
    step = partial(take_step, micro_batches=4)
    assert_same_step(workers.run(step, config, LAYOUTS["experts 2 x sharded 2"])[0], step(config, None))


def run_of(composed: Compose, path: Path, *overrides: str) -> DictConfig:
    """Newton-Schulz in FP32, and an epsilon above the rounding of a gradient that is zero."""
    return composed(
        "precision=fp32", "optimizer.newton_schulz_dtype=float32", "optimizer.eps=1e-6", "data.micro_batches=4",
        "run.tokens=10240", "run.checkpoint_every_tokens=5120", "run.keep_checkpoints=9",
        "callbacks.monitor.every_tokens=2048",
        f"run.dir={path}", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_process(composed: Compose, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """A model in one process, trained once."""

    @cache
    def of_model(name: str) -> tuple[Trained, Path]:
        path = tmp_path_factory.mktemp("one")
        trained = train(run_of(composed, path, *MODELS[name][1]))
        assert trained is not None
        return trained, path

    return of_model


def assert_same_run(ours: Trained, one: Trained) -> None:
    assert ours.losses[0] == pytest.approx(one.losses[0], rel=1e-7)
    np.testing.assert_allclose(ours.losses, one.losses, rtol=2e-6)
    np.testing.assert_allclose(ours.bpb, one.bpb, rtol=2e-6)
    np.testing.assert_allclose(ours.routing, one.routing, rtol=1e-4, atol=1e-6)
    assert ours.loads == one.loads
    assert ours.biases == one.biases
    for mine, theirs in ((ours.weights, one.weights), (ours.averaged, one.averaged)):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("layout", "model"),
    [pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow) for case in WHOLE],
)
def test_a_run_is_the_run_of_one_process(
    composed: Compose, workers: Workers, tmp_path: Path, one_process: Alone, layout: str, model: str
) -> None:
    """Losses, loads, biases, held-out text, monitoring, averaged weights, and one checkpoint in the same format."""
    steps, overrides = MODELS[model]
    fitting = TWO_LAYERS.get(layout, ()) if "2 layers" in model else ()
    config = run_of(composed, tmp_path, *overrides, *RUNS[layout], *fitting)
    ours, *others = workers.run(train, config, ranks=config.trainer.devices)
    assert len(ours.losses) == steps
    assert others == [None] * len(others), "rank 0 writes"
    assert_same_run(ours, one_process(model)[0])


@pytest.mark.slow
def test_a_checkpoint_is_read_by_any_number_of_ranks(
    composed: Compose, workers: Workers, tmp_path: Path, one_process: Alone
) -> None:
    """4 ranks begin, 2 go on, 1 goes on, 4 end it: as if nothing had happened."""
    legs = [("experts 4 on 2 nodes", 5), ("sharded 2", 10), (None, 14), ("experts 2 x sharded 2", -1)]
    for layout, steps in legs:
        overrides = RUNS[layout] if layout else ()
        config = run_of(composed, tmp_path, f"trainer.max_steps={steps}", *overrides)
        ours = workers.run(train, config, ranks=config.trainer.devices)[0] if layout else train(config)
    one = one_process("tiny")[0]  # which has no interval and no score that ends with a leg
    at_end = ours.routing[:, 0] == one.routing[-1, 0]
    scores, routing = np.concatenate([ours.bpb[:3], ours.bpb[-6:]]), one.routing[one.routing[:, 0] == 2048]
    np.testing.assert_allclose(ours.routing[ours.routing[:, 0] == 2048], routing, rtol=1e-4, atol=1e-6)
    assert at_end.sum() == 3
    assert_same_run(ours._replace(bpb=scores, routing=one.routing), one)


def test_sizes_follow_from_the_launch() -> None:
    def sizes(devices: int, num_nodes: int = 1, **given: int | None) -> Sizes:
        settings = {"experts": 1, "nodes": None, "stages": 1, "schedule": "zbv"} | given
        return Parallel(**settings).sizes(devices, num_nodes)

    assert sizes(4) == Sizes(1, 4, 1, 1)
    assert sizes(4, experts=None) == Sizes(1, 1, 1, 4)
    assert sizes(8, 4, experts=None) == Sizes(1, 1, 4, 8)
    assert sizes(8, 2, experts=4) == Sizes(1, 4, 1, 4)
    assert sizes(8, 2, stages=4, experts=2) == Sizes(4, 2, 1, 2)
    assert sizes(8, 256, stages=16, experts=64) == Sizes(16, 2, 8, 8), "the report's: 2048 GPUs, PP16, EP64 on 8 nodes"
    for wrong, key in (({"experts": 3}, "experts"), ({"stages": 3}, "stages"), ({"experts": 4, "nodes": 3}, "nodes")):
        with pytest.raises(ValueError, match=rf"parallel\.{key}=3"):
            sizes(4, **wrong)
    with pytest.raises(ValueError, match="parallel=none is one process"):
        OneProcess().sizes(2, 1)
