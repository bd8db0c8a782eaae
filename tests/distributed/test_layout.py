"""Bytes per rank: what `layout` counts is what ranks hold after a step, and what the plan computes."""

import io
import json
import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from dsv3.build import build_model
from dsv3.cli import main
from dsv3.config.part import part
from dsv3.contracts import Step
from dsv3.distributed.imagined import RankLayout, layouts
from dsv3.distributed.mesh import make_mesh
from dsv3.distributed.parallel import Sizes
from dsv3.distributed.rank_bytes import Held, held_by, layout_line
from dsv3.distributed.shard import shard
from dsv3.model.layers import local
from dsv3.planning.recipe import FORMATS, REPORT
from dsv3.planning.stages import parts_of_pipeline
from dsv3.planning.zero3 import sharded_states, whole_gradients
from dsv3.testing.small_model import micro_batch
from dsv3.training.run import build_run
from dsv3.training.step import Losses, take_gradients
from tests.distributed.ranks import fitted
from tests.distributed.workers import Workers
from tests.planning.models import config, skeleton

Compose = Callable[..., DictConfig]


def imagined(composed: DictConfig, sizes: Sizes) -> list[RankLayout]:
    schedule = "1f1b" if sizes.stages > 1 else None
    build = lambda: build_model(composed, init=False)  # noqa: E731
    return layouts(build, sizes, schedule, part(composed.optimizer), averaged=True)


def storage(tensors: list[Tensor]) -> int:
    """Bytes of the memory that they are parts of."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors) if s.nbytes()}.values())


def measured(config: DictConfig, sizes: Sizes) -> tuple[Held, Held]:
    """What this rank is expected to hold before a step, and what it holds after it."""
    model = build_model(config)
    optimizer = part(config.optimizer)
    if dist.is_initialized():
        shard(model, make_mesh(sizes, "cpu"))
    expected = held_by(model, optimizer, averaged=True)
    made = optimizer(model.named_parameters())
    objective = part(config.objective)(token_bytes_V=torch.ones(config.model.vocab_size, dtype=torch.int64))
    take_gradients(
        Losses(model, objective), Step([micro_batch(2, 32, seed=0, vocab_size=config.model.vocab_size)], 0, {})
    )
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
    held_gradients = storage(gradients)
    del gradients
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    made.step()
    state = [local(t) for s in made.state.values() for t in s.values() if isinstance(t, Tensor) and t.ndim]
    parts = [local(p.detach()) for p in model.parameters()]
    average = [part.to("cpu", copy=True) for part in parts]
    return expected, Held(storage(parts), held_gradients, storage(state), storage(average))


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        pytest.param(Sizes(1, 3, 1, 1), ["memory=ngram"], marks=pytest.mark.slow),  # 3 divides few shapes
        (Sizes(1, 2, 1, 2), ["optimizer=adamw", "optimizer.moments_dtype=bfloat16"]),
        pytest.param(Sizes(1, 3, 1, 1), ["optimizer=adamw"], marks=pytest.mark.slow),
        pytest.param(Sizes(1, 1, 2, 2), [], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_hold_what_was_expected(composed: Compose, workers: Workers, sizes: Sizes, parts: list[str]) -> None:
    composition = composed("precision=fp32", "dispatch=all_to_all", *parts)
    results = workers.run(measured, composition, sizes, ranks=sizes.world)
    for expected, found in results:
        assert found == expected
    first, last = imagined(composition, sizes)
    assert first.held == results[0][1], "as an imagined rank of the same number"
    assert last.held == results[-1][1]
    assert first.held.total == max(found.total for _, found in results)
    assert last.held.total == min(found.total for _, found in results)


@pytest.mark.parametrize(
    ("sizes", "formats", "model"),
    [
        (Sizes(1, 7, 1, 1), "fp32", ["model=tiny"]),
        (Sizes(1, 4, 1, 1), "bf16", ["model=tiny", "memory=ngram"]),
        (Sizes(1, 2, 1, 4), "fp8", ["model=tiny", "mtp=none"]),
        (Sizes(1, 3, 1, 4), "bf16", ["model=small", "model.tie_embeddings=true", "attention=gqa"]),
        (Sizes(3, 2, 1, 2), "fp8", ["model=tiny"]),
        pytest.param(Sizes(1, 32, 8, 8), "fp8", ["model=v3_671b"], marks=pytest.mark.slow),
        pytest.param(Sizes(1, 2048, 1, 1), "bf16", ["model=v3_671b"], marks=pytest.mark.slow),
        pytest.param(Sizes(16, 2, 8, 8), "fp8", ["model=v3_671b"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_plan_computes_what_ranks_hold(sizes: Sizes, formats: str, model: list[str]) -> None:
    """ZeRO-3, on the first and last rank of every stage; formats=fp8 has moments in BF16, as the report."""
    moments = "bfloat16" if formats == "fp8" else "float32"
    overrides = ["dispatch=all_to_all", "optimizer=adamw", f"optimizer.moments_dtype={moments}", *model]
    s = skeleton(*model)
    r = replace(
        REPORT, gpus=sizes.world, pp=sizes.stages, ep=sizes.experts, zero_stage=3, pipeline="1f1b",
        formats=FORMATS[formats],
    )  # fmt: skip
    found = imagined(config(*overrides), sizes)
    parts = parts_of_pipeline(s, pp=r.pp, pipeline=r.pipeline)
    planned = [(part, rank) for part in parts for rank in (0, r.dp - 1)]
    assert [tuple(sharded_states(s, r, part, rank=rank)) for part, rank in planned] == [tuple(f.held) for f in found]
    assert [whole_gradients(s, r, part) for part, _ in planned] == [f.whole_gradients for f in found]


def printed(*arguments: str) -> Any:
    with redirect_stdout(io.StringIO()) as out:
        assert main([*arguments, "format=json"]) == 0
    return json.loads(out.getvalue())


@pytest.mark.slow
def test_the_tools_agree_on_671b() -> None:
    model = ("model=v3_671b", "optimizer=adamw")
    ranks = ("parallel=experts", "parallel.experts=64", "trainer.devices=8", "trainer.num_nodes=256")
    layout = printed("layout", *model, *ranks)
    plan = printed("plan", *model, "pp=1", "zero_stage=3", "pipeline=1f1b", "formats=bf16", "num_microbatches=1")
    assert layout["sizes"]["world"] == plan["recipe"]["gpus"] == 2048
    first, memory = layout["rank_zero"], plan["memory_per_gpu"]
    assert (first["parameters"], first["gradients"], first["optimiser"]) == (
        memory["weights"], memory["gradients"], memory["optimiser"],
    )  # fmt: skip


def line_of(config: DictConfig) -> list[str]:
    """What a run says when it starts, on this rank."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("dsv3.training.run")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        fitted(config, build_run).folder.release()
    finally:
        log.removeHandler(handler)
    return said


def test_a_run_says_how_it_is_laid_out(composed: Compose, workers: Workers, tmp_path: Path) -> None:
    parts = ("precision=fp32", "parallel=experts", "trainer.devices=2")
    composition = composed(*parts, f"run.dir={tmp_path}/run")
    first, second = workers.run(line_of, composition, ranks=2)
    sizes = Sizes(1, 1, 1, 2)
    assert first == [layout_line(sizes, imagined(composition, sizes)[0].held)]
    assert second == []


def test_one_process_holds_everything(composed: Compose) -> None:
    composition = composed("optimizer=adamw")
    (only,) = imagined(composition, Sizes(1, 1, 1, 1))
    size = 4 * sum(p.numel() for p in build_model(composition, init=False).parameters())
    assert only.held == Held(size, size, 2 * size, size)


def test_the_line_of_a_run() -> None:
    held = Held(1_900_000, 1_900_000, 3_800_000, 0)
    assert layout_line(Sizes(1, 1, 2, 2), held) == (
        "4 ranks: experts over 4 (2 nodes), the rest over 4; 1.9 MB of parameters, 1.9 MB of gradients, 3.8 MB of "
        "optimiser state per rank"
    )
    assert layout_line(Sizes(1, 2, 1, 1), held).startswith("2 ranks: all weights over 2;")


def test_what_cannot_be_divided_names_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["layout", "model=tiny", "parallel=experts", "dispatch=local", "trainer.devices=2"])
    assert "parallel.experts=2: LocalDispatch" in capsys.readouterr().err
