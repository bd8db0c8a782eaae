"""The ONNX graph computes what the model does and writes what eager decoding writes; what it lacks is named."""

import logging
import random

import numpy as np
import pytest
import torch

from dsv3.checkpoint.families import Parts
from dsv3.inference import engines
from dsv3.inference.backend import DecoderBackend
from dsv3.inference.engine import PREFILL, Engine, complete
from dsv3.inference.engines import chosen_engine, source_of
from dsv3.inference.onnx_backend import OnnxBackend
from dsv3.inference.sampling import Settings
from dsv3.inference.slots import SlotCaches
from dsv3.model.layers import CACHE_BLOCK
from dsv3.rollout.sampler import sample
from tests.inference.test_engine import assert_equal_text, prompts_of
from tests.parity.test_decoder import SHAPES
from tests.parity.twins import configured, micro_batch, random_model

YARN = {"factor": 4.0, "original_length": 16, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
OPTIONS = [
    ((), {}),
    ((), {"q_lora_rank": None, "yarn": YARN, "tie_embeddings": True}),
    (("attention=gqa",), {"yarn": YARN, "n_shared_experts": 0}),
    (("attention=gqa",), {"n_kv_heads": 2, "n_dense_layers": 2}),
    (("router=softmax",), {"n_shared_experts": 2}),
    (("router=softmax_group_limited", "router.normalise_gates=true"), {"n_groups": 4, "topk_groups": 2}),
    (("router.biased_groups=false", "router.group_score_top=1", "experts=loop"), {"n_groups": 4, "moe_inter_dim": 7}),
    (("mtp.concat=hidden_embedding", "balancing=none"), {"n_groups": 1, "topk_groups": 1}),
]
ROUNDING = 2e-5


def made(*chosen, seed=1, **shapes):
    config = configured(*chosen, **SHAPES | shapes)
    return config, random_model(config, seed=seed)


def graph_of(config, model, *, drafts=False):
    return OnnxBackend.of(model, Parts.of(config), drafts=drafts)


@pytest.mark.parametrize(("chosen", "shapes"), OPTIONS)
def test_logits_and_chosen_experts_are_those_of_the_model(chosen, shapes):
    """Three rows, read in ragged pieces."""
    config, model = made(*chosen, **shapes)
    tokens_BT = torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forward = model(micro_batch(tokens_BT, tokens_BT), with_mtp=False)
        expected_BTV = model.logits(forward.hidden_BTD)
    backend, rows = graph_of(config, model), [0, 1, 2]
    for row in rows:
        backend.add(row, drafts=False)
    logits, experts = [[], [], []], [{}, {}, {}]
    for ends in ((20, 13, 1), (21, 14, 33), (40, 40, 40)):
        pieces = [tokens_BT[row, backend.main.caches.lengths[row] : end].tolist() for row, end in zip(rows, ends)]
        for row, found in enumerate(backend.read(rows, pieces, [len(piece) for piece in pieces])):
            logits[row].append(found)
        for row, chosen_by in enumerate(backend.chosen_experts()):
            for name, chosen_TK in chosen_by.items():
                experts[row].setdefault(name, []).append(chosen_TK)
    assert (torch.stack([torch.cat(row) for row in logits]) - expected_BTV).abs().max() < ROUNDING
    assert list(experts[0]) == list(backend.routed) == list(forward.routings)
    assert backend.experts == (config.model.n_routed_experts if forward.routings else 0)
    for name, routing in forward.routings.items():
        assert torch.equal(torch.cat([torch.cat(row[name]) for row in experts]), routing.experts_NK)


def test_equal_affinities_choose_the_lower_index():
    config, model = made(n_groups=4)
    for _, moe in model.moe_layers():
        torch.nn.init.zeros_(moe.router.weight)
        for buffer in moe.balancing.buffers():
            buffer.zero_()
    backend = graph_of(config, model)
    backend.add(0, drafts=False)
    backend.read([0], [[1, 2, 3]], [1])
    (chosen,) = backend.chosen_experts()
    assert all((chosen_TK == torch.tensor([0, 1])).all() for chosen_TK in chosen.values())


@pytest.mark.parametrize(
    "chosen",
    [(), ("attention=gqa", "mtp.depth=2", "mtp.after_final_norm=false")],
    ids=" ".join,
)
def test_rows_write_what_they_write_eagerly(chosen):
    """Prompts of unequal length, some longer than what is read at once; every other row with drafts."""
    config, model = made(*chosen)
    prompts = prompts_of(10, PREFILL + 40)
    settings = [Settings(max_tokens=6 + 3 * i, drafts=3 * (i % 2)) for i in range(len(prompts))]
    backend = graph_of(config, model, drafts=True)
    eager, onnx = (complete(b, prompts, settings, decode=str, at_once=5) for b in (DecoderBackend(model), backend))
    for prompt, one, other in zip(prompts, onnx, eager, strict=True):
        assert one.finished == other.finished
        assert_equal_text(model, prompt, one.ids, other.ids)
    assert not backend.main.caches.lengths
    assert all(not cache.lengths for cache in backend.drafter.caches)


def test_fifty_greedy_texts():
    config, model = made()
    prompts, settings = prompts_of(50, 30, seed=3), [Settings(max_tokens=64)] * 50
    backends = DecoderBackend(model), graph_of(config, model)
    eager, onnx = (complete(backend, prompts, settings, decode=str, at_once=25) for backend in backends)
    assert [text.ids for text in onnx] == [text.ids for text in eager]


def test_rows_that_leave_in_the_middle():
    """A row writes the same whether its neighbours are cancelled or not."""
    config, model = made()
    prompts, settings = prompts_of(6, 20), Settings(max_tokens=30)
    engine = Engine(graph_of(config, model))
    rows = [engine.add(prompt, settings) for prompt in prompts]
    written: dict[int, list[int]] = {row: [] for row in rows}
    leaving = [0, 4, 2]
    while engine.rows:
        for event in engine.step():
            written[event.row] += event.ids
        if leaving:
            engine.cancel(rows[leaving.pop()])
    for i in (1, 3, 5):
        alone = complete(DecoderBackend(model), [prompts[i]], [settings], decode=str, at_once=1)[0].ids
        assert len(alone) == len(written[rows[i]]) == 30
        assert_equal_text(model, prompts[i], written[rows[i]], alone)


def test_a_graph_keeps_the_weights_that_it_was_made_with():
    config, model = made()
    before, prompt, settings = graph_of(config, model), [[1, 2, 3]], [Settings(max_tokens=20)]
    first = complete(before, prompt, settings, decode=str, at_once=1)[0].ids
    other = random_model(config, seed=2)
    model.load_state_dict(other.state_dict())
    assert complete(before, prompt, settings, decode=str, at_once=1)[0].ids == first
    after, eager = graph_of(config, model), DecoderBackend(other)
    found, expected = (complete(b, prompt, settings, decode=str, at_once=1)[0].ids for b in (after, eager))
    assert found == expected != first


def test_rollouts_are_those_of_the_model():
    class Tokenizer:
        eos = 0

        def decode(self, ids):
            return ""

    config, model = made()
    prompts, seeds = prompts_of(6, 20), list(range(6))
    eager, onnx = (
        sample(source, Tokenizer(), prompts, seeds, max_tokens=12, temperature=0.7)
        for source in (model, source_of(model, config, "onnx"))
    )
    assert [one.ids for one in onnx] == [one.ids for one in eager]
    log_probs = [torch.tensor([p for one in side for p in one.log_probs]) for side in (eager, onnx)]
    assert (log_probs[0] - log_probs[1]).abs().max() < ROUNDING


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LACKING = ["memory=ngram", "router=hash", "precision=fp8_blockwise"]


@pytest.mark.parametrize("option", LACKING)
def test_what_the_graph_lacks_is_named(option, caplog):
    config = configured(option)
    kind = option.partition("=")[0]
    with pytest.raises(ValueError, match=f"^engine=onnx: {kind}._target_=plugins.*engine=eager decodes every model"):
        chosen_engine("onnx", config, CPU)
    engines._say.cache_clear()  # another test may have been told
    with caplog.at_level(logging.INFO):
        assert chosen_engine("auto", config, CPU) == "eager"
        assert chosen_engine("auto", config, CPU) == "eager"
    lines = [record.message for record in caplog.records if kind in record.message]
    assert len(lines) == 1


def test_the_rule():
    config = configured()
    assert chosen_engine("auto", config, CPU) == chosen_engine("onnx", config, CPU) == "onnx"
    assert chosen_engine("auto", config, CUDA) == chosen_engine("eager", config, CPU) == "eager"
    with pytest.raises(ValueError, match="device=cuda: the graph runs on the CPU"):
        chosen_engine("onnx", config, CUDA)
    assert chosen_engine("auto", configured("router=hash", n_dense_layers=4, n_layers=4), CPU) == "eager"
    assert chosen_engine("auto", configured("router=hash", "mtp=none", n_dense_layers=4), CPU) == "onnx"


def test_slots_hold_what_each_row_holds():
    """Random rows that come, grow, are copied, shortened, rest and leave, against a list of numbers each."""
    draw, caches, held = random.Random(0), SlotCaches({"a": 1, "b": 2}), {}
    for step in range(600):
        action = draw.choice(["add", "copy", "drop", "rewind", "rest", "read", "read"])
        row = draw.choice(list(held)) if held else None
        if row in caches.resting and action in ("rewind", "rest"):
            continue
        if action == "add" or row is None:
            caches.add(step)
            held[step] = []
        elif action == "copy":
            length = draw.randint(0, len(held[row]))
            caches.add(step)
            caches.copy(row, step, length)
            held[step] = held[row][:length]
        elif action == "drop":
            caches.drop(row)
            del held[row]
        elif action == "rewind":
            length = draw.randint(0, len(held[row]))
            caches.rewind(row, length)
            held[row] = held[row][:length]
        elif action == "rest":
            caches.rest(row)
        else:
            if not caches.order:
                continue
            rows, count = draw.sample(caches.order, draw.randint(1, len(caches.order))), draw.choice([1, 1, 2, 70])
            first = caches.together(rows, count)
            assert sorted(caches.order[first : first + len(rows)]) == sorted(rows)
            for slot, one in enumerate(caches.order[first : first + len(rows)], start=first):
                start, new = caches.lengths[one], [draw.random() for _ in range(count)]
                for name, array in caches.held.items():
                    array[slot, start : start + count] = np.array(new)[:, None] * (1 if name == "a" else -1)
                caches.lengths[one] += count
                held[one] = held[one] + new
        assert caches.lengths == {row: len(numbers) for row, numbers in held.items()}
        for slot, one in enumerate(caches.order):
            numbers = np.array(held[one], np.float32)
            assert (caches.held["a"][slot, : len(numbers), 0] == numbers).all()
            assert (caches.held["b"][slot, : len(numbers), 1] == -numbers).all()
        for row, arrays in caches.resting.items():
            assert (arrays["a"][:, 0] == np.array(held[row], np.float32)).all()
        if len(held) > 12:
            for old in list(held)[:9]:
                caches.drop(old)
                del held[old]
    for old in list(held):
        caches.drop(old)
    row = -1
    caches.add(row)
    caches.together([row], 1)
    assert caches.room == CACHE_BLOCK
    assert caches.slots <= 8
