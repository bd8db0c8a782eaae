"""The benchmark program at a size of seconds: what it compares is the same model, and every case gives its figures."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from dsv3.bench import (
    compared,
    decoding,
    drafts,
    gpu_check,
    head_loss,
    on_device,
    onnx_decoding,
    scoring,
    training_step,
)
from dsv3.bench.compared import Size
from dsv3.bench.gpu_check import COMBINATIONS
from dsv3.bench.measuring import Figure, interleaved
from dsv3.build import build_model
from dsv3.checkpoint.loading import Loaded, load_run
from dsv3.cli import main
from dsv3.runtime import resident
from dsv3.tools.bench import GPU_CHECK
from dsv3.training.run import build_run
from tests.parity.runs import write_run
from tests.parity.test_export import SMALL
from tests.parity.twins import configured, random_model
from tests.synthetic import TARGETS

CPU = torch.device("cpu")
TINY = Size(("model=tiny", "tokenizer.vocab_size=512", "router.group_score_top=2"), rows=2, length=32)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compared, "STANDARD", TINY)
    monkeypatch.setattr(decoding, "STANDARD", TINY)
    monkeypatch.setattr(training_step, "PEAK_SIZE", 64)
    monkeypatch.setattr(decoding, "CONTEXT", 24)
    monkeypatch.setattr(decoding, "TOKENS", 3)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("experts", compared.EXPERTS)
def test_both_sides_are_the_same_function(experts: str) -> None:
    config, model = compared.ours(TINY, "precision=fp32", "mtp=none", device=CPU)
    twin = compared.theirs(config, model, dtype=torch.float32, experts=experts)
    batch = next(compared.batches(TINY, config.model.vocab_size, device=CPU))
    with torch.no_grad():
        mine = model.lm_head(model(batch, with_mtp=False).hidden_BTD)
        other = twin(input_ids=batch.tokens_BT).logits
    assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.usefixtures("tiny")
def test_every_case_gives_its_figures() -> None:
    figures = [*training_step.train(1, CPU), *decoding.decode(1, CPU), *training_step.experts(1, CPU)]
    assert {figure.case for figure in figures} == {"train", "decode", "experts"}
    assert all(figure.value > 0 for figure in figures)
    shares = [figure for figure in figures if figure.what.startswith("share")]
    assert len(shares) == 4


def test_torchs_ways_of_the_heads_loss_compute_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"TOKENS": 96, "WIDTH": 16, "VOCABULARY": 64}.items():
        monkeypatch.setattr(head_loss, name, size)
    hidden_ND, weight_VD, targets_N = head_loss.inputs(torch.float32, CPU)
    found = []
    for loss in (head_loss.ours, *map(head_loss.torchs, head_loss.WAYS.values())):
        head_loss.step(loss, hidden_ND, weight_VD, targets_N)()
        assert hidden_ND.grad is not None
        assert weight_VD.grad is not None
        found.append((loss(hidden_ND, weight_VD, targets_N).detach(), hidden_ND.grad, weight_VD.grad))
    for theirs in found[1:]:
        torch.testing.assert_close(theirs, found[0])
    assert [figure.value > 0 for figure in head_loss.head(1, CPU)] == [True] * 4


def test_speculation_compares_the_same_texts(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_run(composed(f"run.dir={tmp_path}", "run.tokens=512"))
    made.trainer.fit(made.module, made.data)
    monkeypatch.setattr(drafts, "held_out_data", lambda loaded: made.data)
    monkeypatch.setattr(Loaded, "tokenizer", lambda self: made.data.tokenizer)
    monkeypatch.setattr(drafts, "load_run", partial(load_run, allow=TARGETS))
    monkeypatch.setattr(drafts, "PROMPTS", 3)
    monkeypatch.setattr(drafts, "TOKENS", 6)
    for name, value in (("LAYERS", (2,)), ("CALLS", 2), ("CONTEXT", 16)):
        monkeypatch.setattr(drafts, name, value)
    figures = list(drafts.speculation(1, CPU, tmp_path))
    assert min(figure.value for figure in figures) > 0
    assert sum("3 of 3 texts the same" in figure.note for figure in figures) == 2
    assert [figure.what for figure in figures[-2:]] == [
        f"2 layers, {name}, (1 + a) / (c + d)" for name in ("eager", "onnx")
    ]
    monkeypatch.setattr(onnx_decoding, "held_out_data", lambda loaded: made.data)
    monkeypatch.setattr(onnx_decoding, "INT8_SIZES", ((16, 1.0),))
    monkeypatch.setattr(onnx_decoding, "VOCABULARY", 256)
    loaded = load_run(tmp_path, allow=TARGETS)
    values = {figure.what: figure.value for figure in onnx_decoding.quantised(loaded, loaded.model, 1)}
    assert 0 < values["INT8: mean KL to FP32, trained run"] < 0.01
    assert values["INT8: equal likeliest tokens"] > 0.9
    assert values["INT8, 1 row at 16, eager over onnx"] > 0


def test_benchmarks_are_compared_with_lm_evals_own_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = configured("router.group_score_top=2", **SMALL)
    run = write_run(tmp_path / "run", config, random_model(config, seed=5))
    tokens = torch.randint(97, 123, (4, 64), generator=torch.Generator().manual_seed(0)).flatten().tolist()
    sizes = {"DOCUMENTS": 3, "BEGINNING": 20, "ENDING": 3, "CHOICES": 2, "PROMPT": 8, "ANSWER": 4}
    for name, value in (sizes | {"held_out_data": id, "held_out_tokens": lambda data: tokens}).items():
        monkeypatch.setattr(scoring, name, value)
    choice, generation = scoring.evaluation(1, CPU, run)
    assert choice.value > 0
    assert "3 of 3 answers the same" in choice.note
    assert generation.value > 0  # the export is in BF16, so that texts may differ


def test_the_graph_is_compared_with_eager_decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = {"SIZES": ((2, 16, 1.0),), "TEXTS": 3, "TEXT_TOKENS": 4, "ROLLOUTS": 2, "ROLLOUT_TOKENS": 3}
    for name, value in (sizes | {"RUN": tmp_path / "none"}).items():
        monkeypatch.setattr(onnx_decoding, name, value)
    figures = {figure.what: figure for figure in onnx_decoding.onnx_decoding(1, CPU)}
    assert len(figures) == 4
    assert figures["equal greedy texts of 4 tokens, of 3"].value == 3
    assert all(figure.value > 0 for figure in figures.values())


def test_memory_is_that_of_a_process_of_its_own() -> None:
    assert resident("VmHWM") >= resident("VmRSS") > 0


def test_turns_are_interleaved_and_the_median_is_taken() -> None:
    turns: list[str] = []
    seconds = interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, repeats=2)
    assert turns == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}


def test_a_goal_is_a_bound_from_either_side() -> None:
    assert Figure("c", "w", 3.0, "x", 3.0).reached
    assert not Figure("c", "w", 3.1, "x", 3.0, at_most=True).reached
    assert Figure("c", "w", 1.0, "x").reached is None


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "only=trian"])
    assert stopped.value.code == 2
    assert "'trian' must be one of train, memory" in capsys.readouterr().err


def test_what_a_case_lacks_is_said_before_the_first_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "FINISHED", tmp_path / "summary.json")
    with pytest.raises(SystemExit):
        main(["bench", "only=train,speculation"])
    errors = capsys.readouterr().err
    assert "run `make train`" in errors
    assert "train ..." not in errors


@pytest.mark.slow
def test_gpu_check_comes_through_on_a_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert main(["bench", "only=gpu_check", "repeats=1", "device=cpu", f"out={out}", "format=json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    figures = printed["figures"]
    assert {figure["case"]: figure["value"] for figure in figures if figure["case"] in GPU_CHECK} == dict.fromkeys(
        GPU_CHECK, 1
    )
    assert {figure["goal"] for figure in figures if figure["case"] not in GPU_CHECK} == {None}
    differences = [figure["value"] for figure in figures if figure["case"] == "works"]
    assert differences == [0] * len(COMBINATIONS), "the CPU against itself"
    reasons = [figure["note"] for figure in figures if figure["what"].startswith(("fp8_te", "fp8_gpu"))]
    assert len(reasons) == 4
    assert all("GPU" in reason for reason in reasons)


def test_a_part_that_fails_is_a_line_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(repeats: int, device: torch.device) -> Iterator[Figure]:
        yield Figure("works", "one part", 0.5, "", 2.0)
        raise RuntimeError("no kernel image\nis available")

    def passes(repeats: int, device: torch.device) -> Iterator[Figure]:
        yield Figure("waits", "another", 3.0, "", 2.0, at_most=True)

    monkeypatch.setattr(gpu_check, "works", fails)
    monkeypatch.setattr(gpu_check, "waits", passes)
    monkeypatch.setattr(training_step, "PEAK_SIZE", 64)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "only=gpu_works,gpu_waits", "device=cpu"])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "RuntimeError: no kernel image is available" in printed.out
    assert "another" in printed.out
    assert "Traceback" in printed.err


def test_predictable_tokens_follow_from_those_before() -> None:
    batch = gpu_check.predictable(next(compared.batches(TINY, gpu_check.PREDICTABLE, device=CPU)))
    assert torch.equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    assert torch.equal(batch.tokens_BT[:, 1::2], (batch.tokens_BT[:, ::2] * 7 + 3) % gpu_check.PREDICTABLE)
    assert batch.document_ids_BT.unique().tolist() == [1, 2, 3, 4]
    parts = gpu_check.cut(batch, 1)
    assert torch.equal(torch.cat([part.tokens_BT for part in parts]), batch.tokens_BT)


@pytest.mark.parametrize("size", [on_device.ON_GPU, on_device.ON_CPU])
def test_the_sizes_are_of_models_that_there_are(size: Size) -> None:
    with torch.device("meta"):
        model = build_model(compared.configured(size, "precision=bf16"), init=False)
    assert model.device.type == "meta"
    assert all(buffer.device.type == "meta" for buffer in model.buffers()), "made on the device that is asked for"


@pytest.mark.slow
def test_the_program_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "only=experts,memory", "repeats=1", "format=json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [figure["case"] for figure in figures] == ["experts", "memory", "memory", "memory"]
    assert figures[-1]["value"] < 1, "what is recomputed is not kept"
