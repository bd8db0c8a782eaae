"""ONNX graphs, served: texts and experts are those of eager decoding, with beginnings shared and drafts."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.loading import load_run
from dsv3.inference.generation import generate
from dsv3.inference.onnx_backend import OnnxBackend
from dsv3.inference.prefixes import SHORTEST_SHARED
from dsv3.inference.sampling import Settings
from dsv3.model.decoder import Decoder
from dsv3.model.layers import cached_weight_casts
from dsv3.serving.chat_server import Service
from dsv3.serving.database import Database
from dsv3.serving.routed_backend import RoutedBackend
from dsv3.serving.scheduler import Job, Limits, News
from dsv3.serving.served_model import ModelSettings, Served, open_model
from dsv3.tools.export import Options as ExportOptions
from dsv3.tools.export import run_onnx
from dsv3.tools.serve import Options, open_service
from tests.inference.test_engine import assert_equal_text, prompts_of
from tests.serving.running import write_model

ENGINES = ["of the run", "of a folder"]
LONGEST = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    write_model(folder / "one" / "seed1")
    run_onnx(ExportOptions(checkpoint=str(folder / "one" / "seed1"), out=str(folder / "graphs")))
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    paths = {"checkpoint": str(folder / "one" / "seed1"), "compare": str(folder / "graphs")}
    database = Database(folder / "accounts.sqlite")
    service = open_service(Options(**paths, engine="onnx", drafts=2, slots=8), database)
    yield service
    service.database.close()


def backend_of(served: Served) -> RoutedBackend:
    assert isinstance(served.backend, RoutedBackend)
    return served.backend


@pytest.fixture(scope="module")
def eager_texts(folder: Path) -> tuple[Decoder, list[tuple[list[int], list[int]]]]:
    """The model, and 50 prompts, half of them beginning alike, with the text of each."""
    model, draw = load_run(folder / "one" / "seed1").model, random.Random(0)
    beginning = [draw.randrange(50) for _ in range(SHORTEST_SHARED + 9)]
    prompts = [[*beginning * (i % 2), *prompt] for i, prompt in enumerate(prompts_of(50, 30))]
    with cached_weight_casts(model):
        return model, [(prompt, list(generate(model, prompt, Settings(max_tokens=LONGEST)))) for prompt in prompts]


@pytest.mark.parametrize("which", [0, 1], ids=ENGINES)
def test_texts_of_many_are_those_of_eager_decoding(service: Service, eager_texts: Any, which: int) -> None:
    """They join while others write, of two accounts, half with drafts."""
    (model, texts), served = eager_texts, list(service.models.values())[which]
    backend, scheduler, prompts = backend_of(served), served.scheduler, [prompt for prompt, _ in texts]
    assert isinstance(backend.backend, OnnxBackend)
    written: list[list[int]] = [[] for _ in prompts]
    jobs = []
    for i, prompt in enumerate(prompts):
        settings = Settings(max_tokens=5 + i % (LONGEST - 4), drafts=(0, 2)[i // 2 % 2])

        def deliver(news: News, ids: list[int] = written[i]) -> None:
            ids += news.ids

        jobs.append(Job("ab"[i // 4 % 2], prompt, settings, deliver))
        scheduler.submit(jobs[-1])
        if i % 3 == 2:
            scheduler.step()
    while scheduler.step():
        pass
    for (prompt, alone), job, ids in zip(texts, jobs, written, strict=True):
        assert_equal_text(model, prompt, ids, alone[: job.settings.max_tokens])
    kept = scheduler.engine.kept
    assert scheduler.counts.copied_tokens > 10 * SHORTEST_SHARED
    assert served.speculation.kept > 0
    assert set(backend.backend.caches.lengths) == set(kept.rows)
    assert not any(caches.order for caches in backend.backend._slots), "finished texts take no slots"
    kept.clear()
    assert not any(caches.lengths for caches in backend.backend._slots)


def test_experts_are_those_of_eager_decoding(service: Service, folder: Path) -> None:
    """Of each text and in all, also where other rows are shorter."""
    eager = open_model(str(folder / "one" / "seed1"), ModelSettings(engine="eager"), Limits(), lambda: None)
    found = []
    for served in (eager, *service.models.values()):
        jobs = [Job("a", prompt, Settings(max_tokens=5), lambda news: None) for prompt in prompts_of(3, 20)]
        before = {name: load_E.clone() for name, load_E in backend_of(served).load.items()}
        for job in jobs:
            job.experts = True
            served.scheduler.submit(job)
        while served.scheduler.step():
            pass
        records = [job.row.experts.by_layer for job in jobs if job.row is not None and job.row.experts is not None]
        load = {name: (load_E - before[name]).tolist() for name, load_E in backend_of(served).load.items()}
        found.append((served.expert_layers, served.experts, len(records), records, load))
    assert found[0][2] == 3
    assert sum(map(sum, found[0][4].values())) > 0
    assert found[1] == found[2] == found[0]


def test_memory_of_kept_texts_is_as_promised(service: Service) -> None:
    """Bytes that resting rows take, for each position."""
    served = next(iter(service.models.values()))
    backend, scheduler = backend_of(served).backend, served.scheduler
    for length in (70, 130):
        scheduler.submit(Job("c", list(range(length)), Settings(max_tokens=9, drafts=2), lambda news: None))
    while scheduler.step():
        pass
    assert isinstance(backend, OnnxBackend)
    held = [array.nbytes for caches in backend._slots for row in caches.resting.values() for array in row.values()]
    states = sum(part.position_bytes for part in backend.drafter.states)
    assert sum(held) <= (backend.position_bytes - states) * scheduler.engine.kept.positions
    assert scheduler.engine.kept.positions >= 200
    scheduler.engine.kept.clear()


def test_engines_that_cannot_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for checkpoint, engine, message in (
        (tmp_path, "onnx", "engine=onnx: .* is a Hugging Face checkpoint"),
        (folder / "graphs", "eager", "engine=eager: .* holds ONNX graphs"),
    ):
        with pytest.raises(ValueError, match=message):
            open_model(str(checkpoint), ModelSettings(engine=engine), None, lambda: None)  # type: ignore[arg-type]
