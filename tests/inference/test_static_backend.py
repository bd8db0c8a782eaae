"""Rows in places of fixed shape write what each writes over its own cache; on a GPU the steps are recorded."""

import random

import pytest
import torch

from dsv3.inference import static_backend
from dsv3.inference.backend import DecoderBackend
from dsv3.inference.engine import Engine, complete
from dsv3.inference.engines import decoder_backend
from dsv3.inference.sampling import Settings
from dsv3.inference.static_backend import StaticBackend, StaticRows
from dsv3.model.layers import cached_weight_casts
from tests.inference.test_engine import assert_equal_text, model_of, prompts_of, run
from tests.training.test_no_waiting import no_waiting

OPTIONS = [(), ("attention=gqa", "mtp=none"), ("model.q_lora_rank=null", "router=softmax", "balancing=switch_aux")]
options = pytest.mark.parametrize("chosen", OPTIONS, ids=" ".join)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")],
    ),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that grows often."""
    monkeypatch.setattr(static_backend, "BLOCK", 16)


@options
@pytest.mark.parametrize("device", DEVICES)
def test_rows_write_what_each_writes_over_its_own_cache(chosen: tuple[str, ...], device: str) -> None:
    """Rows join and leave all the time, a quarter of them with drafts, which are read over their own caches."""
    model, prompts = model_of(*chosen), prompts_of(24, 60)
    draw = random.Random(3)
    drafting = [i % 4 == 0 and "mtp=none" not in chosen for i in range(len(prompts))]
    settings = [Settings(max_tokens=draw.randint(1, 30), drafts=int(drafts)) for drafts in drafting]
    with cached_weight_casts(model):
        alone = [
            complete(DecoderBackend(model), [prompt], [one], decode=str, at_once=1)[0].ids
            for prompt, one in zip(prompts, settings, strict=True)
        ]
    model.to(device)
    backend = StaticBackend(model)
    with cached_weight_casts(model):
        found = complete(backend, prompts, settings, decode=str, at_once=7, experts=True)
        model.cpu()
    for prompt, one, other in zip(prompts, found, alone, strict=True):
        assert_equal_text(model, prompt, one.ids, other)
    assert not backend.seated
    assert not backend.lengths
    assert not backend.caches.lengths


@options
def test_experts_and_logits_are_those_of_the_other_backend(chosen: tuple[str, ...]) -> None:
    model = model_of(*chosen)
    both = DecoderBackend(model), StaticBackend(model)
    with cached_weight_casts(model), torch.inference_mode():
        for backend in both:
            for row in range(3):
                backend.add(row, drafts=False)
            backend.read([0, 1, 2], [[1, 2, 3], [4], [5, 6]], [1, 1, 0])
        for rows in ([0, 2], [1], [2, 1, 0], [1, 2], [0]):
            given = [[row + 7] for row in rows]
            expected, found = (backend.read(rows, given, [1] * len(rows)) for backend in both)
            torch.testing.assert_close(found, expected)
            for one, other in zip(*(backend.chosen_experts() for backend in both), strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)
    assert both[1].seated == [0, 2, 1]


def test_a_row_is_copied_rewound_and_dropped_with_what_it_read_in_its_place() -> None:
    model = model_of()
    both = DecoderBackend(model), StaticBackend(model)
    logits = []
    with cached_weight_casts(model), torch.inference_mode():
        for backend in both:
            for row in (0, 1, 2):
                backend.add(row, drafts=False)
            backend.read([0, 1], [[1, 2], [3]], [1, 1])
            for token in range(20):
                backend.read([1, 0], [[token], [token + 5]], [1, 1])
            backend.copy(0, 2, 15)
            backend.rewind(0, 9)
            backend.drop(1)
            logits.append(backend.read([0, 2], [[8], [9]], [1, 1]))
            logits[-1] += backend.read([2], [[10, 11, 12]], [2])
    torch.testing.assert_close(logits[1], logits[0])


def test_rows_are_cancelled_between_steps_and_leave_nothing() -> None:
    """An engine drops them outside of its step."""
    model, draw, backend = model_of(), random.Random(1), StaticBackend(model_of())
    engine, added, kept = Engine(backend), 0, {}
    prompts, settings = prompts_of(40, 20), Settings(max_tokens=12)
    with cached_weight_casts(backend.model):
        while added < len(prompts) or engine.rows:
            while added < len(prompts) and len(engine.rows) < 6:
                engine.add(prompts[added], settings)
                added += 1
            for row in draw.sample(sorted(engine.rows), len(engine.rows) // 5):
                engine.cancel(row)
                kept.pop(row, None)
            for event in engine.step():
                if event.finished != "cancelled":
                    kept.setdefault(event.row, []).extend(event.ids)
    assert not backend.seated
    assert not backend.caches.lengths
    assert len(kept) > 5
    for row, ids in kept.items():
        with cached_weight_casts(model):
            alone = complete(DecoderBackend(model), [prompts[row]], [settings], decode=str, at_once=1)[0].ids
        assert_equal_text(model, prompts[row], ids, alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_a_recorded_step_computes_what_it_was_recorded_of(attention: str) -> None:
    """Also after the weights have changed between two uses."""
    model = model_of(f"attention={attention}", "precision=bf16").to("cuda")
    recorded, computed = StaticRows(model, 4, 64), StaticRows(model, 4, 64)
    computed.records = False
    for turn in range(2):
        with cached_weight_casts(model):
            for place in range(40):
                given = [place, place + 1, 5], [place, place + 2, 2 * (place // 2)]
                torch.testing.assert_close(recorded.step(*given).logits_BV, computed.step(*given).logits_BV)
        assert recorded.records
        assert [step.graph is not None for step in recorded.steps.values()] == [True]
        recorded.steps.clear()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01 + turn)


def test_finished_rows_are_kept_for_prompts_that_begin_alike() -> None:
    model, prompts = model_of(), prompts_of(9, 40)
    texts = []
    for backend in (DecoderBackend(model), StaticBackend(model)):
        with cached_weight_casts(model):
            engine = Engine(backend, kept_positions=500)
            for prompt in [*prompts, *prompts]:
                engine.add(prompt, Settings(max_tokens=6))
                texts.append(run(engine)[0])
            assert engine.kept_positions > 0
    half = len(texts) // 2
    assert texts[half:] == texts[:half]


def test_a_step_needs_nothing_on_the_host() -> None:
    model = model_of()
    with cached_weight_casts(model), torch.inference_mode():
        rows = StaticRows(model, 4, 16)
        expected = rows.step([1, 2, 3], [0, 5, 9]).logits_BV
        with no_waiting():
            found = rows._computed(4).logits_BV
    assert torch.equal(found, expected)


@pytest.mark.parametrize("chosen", [("memory=ngram", "memory.rows=97"), ("attention.decode=naive",)], ids=" ".join)
def test_models_that_cannot_are_decoded_without(chosen: tuple[str, ...]) -> None:
    model = model_of(*chosen)
    with pytest.raises(ValueError, match="of this model"):
        StaticBackend(model)
    assert type(decoder_backend(model)) is DecoderBackend
