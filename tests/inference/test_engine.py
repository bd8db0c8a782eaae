"""Rows among others write what each writes alone; they join, leave, copy beginnings, and leave nothing behind."""

import random

import pytest
import torch

from dsv3.inference.backend import DecoderBackend
from dsv3.inference.engine import PREFILL, Engine, complete
from dsv3.inference.generation import generate, stream
from dsv3.inference.prefixes import SHORTEST_SHARED
from dsv3.inference.sampling import Settings
from dsv3.inference.speculation import Speculation
from dsv3.model.layers import CACHE_BLOCK, cached_weight_casts
from tests.inference.test_generation import Watched, prompt_of
from tests.parity.test_decoder import SHAPES
from tests.parity.twins import configured, copied, distance, micro_batch, random_model

OPTIONS = [
    (),
    ("attention=gqa", "mtp.depth=2", "mtp.after_final_norm=false"),
    ("attention.decode=naive", "memory=ngram", "memory.rows=97"),
]
options = pytest.mark.parametrize("chosen", OPTIONS, ids=" ".join)
DRAFTING = [(), ("mtp.depth=2", "mtp.after_final_norm=false"), ("mtp.depth=3", "attention=gqa")]
NEAR = 1e-4


@copied
def model_of(*chosen, seed=1, vocabulary=50):
    return random_model(configured("precision=fp32", *chosen, **SHAPES | {"vocab_size": vocabulary}), seed=seed)


def prompts_of(count, longest, seed=0):
    """Of unequal length, every third with the beginning of another."""
    draw = random.Random(seed)
    beginning = [draw.randrange(50) for _ in range(SHORTEST_SHARED + 5)]
    lengths = [draw.randint(1, longest) for _ in range(count)]
    return [beginning * (i % 3 == 0) + [draw.randrange(50) for _ in range(length)] for i, length in enumerate(lengths)]


def parts(backend):
    drafter = backend.drafter
    return [*backend.caches.parts(), *drafter.caches, *drafter.states]


def run(engine):
    """Ids and ends of the rows that are there."""
    ids, ends = {row: [] for row in engine.rows}, {}
    while engine.rows:
        for event in engine.step():
            assert event.row not in ends
            ids[event.row] += event.ids
            if event.finished is not None:
                ends[event.row] = event.finished
    return ids, ends


@torch.no_grad()
def between_the_best_two(model, ids):
    """How far apart the two largest logits are after these ids, in a pass over the whole row."""
    ids_1T = torch.tensor([ids])
    logits_V = model.logits(model(micro_batch(ids_1T, ids_1T), with_mtp=False).hidden_BTD[0, -1])
    best, second = logits_V.topk(2).values.tolist()
    return best - second


def assert_equal_text(model, prompt, found, alone):
    """Equal ids, up to where the two best logits are as good as equal."""
    for i, (one, other) in enumerate(zip(found, alone, strict=True)):
        if one != other:
            gap = between_the_best_two(model, [*prompt, *alone[:i]])
            assert gap < NEAR, f"the texts part at token {i}, where the two best logits differ by {gap}"
            return


@options
def test_rows_write_among_others_what_each_writes_alone(chosen):
    """50 prompts, some longer than what is read at once, joining in threes while others write, half with drafts."""
    model, prompts = model_of(*chosen), prompts_of(50, PREFILL + 40)
    settings = [Settings(max_tokens=4 + i % 9, drafts=(0, 2, 0, 3)[i % 4]) for i in range(50)]
    engine, rows, ids = Engine(DecoderBackend(model)), {}, {}
    together = 0
    with cached_weight_casts(model):
        while len(rows) < 50 or engine.rows:
            for i in range(len(rows), min(len(rows) + 3, 50)):
                rows[engine.add(prompts[i], settings[i])] = i
            together = max(together, len(engine.rows))
            for event in engine.step():
                ids.setdefault(rows[event.row], []).extend(event.ids)
        assert together > 10
        for i, (prompt, one) in enumerate(zip(prompts, settings, strict=True)):
            alone = list(generate(model, prompt, Settings(max_tokens=one.max_tokens)))
            assert_equal_text(model, prompt, ids[i], alone)


@options
def test_prompts_read_in_one_pass_with_texts(chosen):
    """Pieces of few tokens, without padding, next to texts with drafts and without."""
    model, prompts = model_of(*chosen), prompts_of(9, 20, seed=4)
    engine, ids, flat = Engine(DecoderBackend(model), prefill=9), {}, 0
    with cached_weight_casts(model):
        rows = [engine.add(prompt, Settings(max_tokens=9, drafts=2 * (i % 2))) for i, prompt in enumerate(prompts)]
        while engine.rows:
            before = engine.backend.places
            for event in engine.step():
                ids.setdefault(event.row, []).extend(event.ids)
            places = engine.backend.places
            counts = [place.stop - place.start for place in places]
            flat += places is not before and len(set(counts)) > 1 and places[-1].stop == sum(counts)
        assert flat > 5
        for row, prompt in zip(rows, prompts, strict=True):
            assert_equal_text(model, prompt, ids[row], list(generate(model, prompt, Settings(max_tokens=9))))


@options
def test_what_is_drawn_does_not_depend_on_the_neighbours(chosen):
    model, prompts = model_of(*chosen), prompts_of(12, 40)
    settings = [
        Settings(max_tokens=10, temperature=(0.0, 1.0, 0.7)[i % 3], top_p=0.9, seed=i // 2, drafts=(0, 2)[i % 2])
        for i in range(12)
    ]
    found = complete(DecoderBackend(model), prompts, settings, decode=str, at_once=5)
    for prompt, one, completion in zip(prompts, settings, found, strict=True):
        assert completion.ids == list(generate(model, prompt, one))
        assert completion.finished == "length"


@options
def test_a_thousand_rows_come_and_go_and_leave_nothing(chosen):
    model, draw = model_of(*chosen), random.Random(0)
    backend = DecoderBackend(model)
    engine, ended, added = Engine(backend), {}, 0
    beginning = [1] * (SHORTEST_SHARED + 1)
    with cached_weight_casts(model):
        for _ in range(1000):
            if draw.random() < 0.5 and len(engine.rows) < 6:
                prompt = draw.choice([beginning, []]) + [draw.randrange(50) for _ in range(draw.randint(1, 9))]
                engine.add(prompt, Settings(max_tokens=draw.randint(1, 6), drafts=draw.choice((0, 0, 2))))
                added += 1
            elif engine.rows and draw.random() < 0.6:
                engine.cancel(draw.choice(list(engine.rows)))
            elif draw.random() < 0.3:
                for event in engine.step():
                    if event.finished:
                        ended[event.row] = event.finished
            for part in parts(backend):
                assert set(part.lengths) <= set(engine.rows)
        for row in list(engine.rows):
            engine.cancel(row)
        ended |= {event.row: event.finished for event in engine.step()}
    assert set(ended) == set(range(added))
    assert set(ended.values()) == {"length", "cancelled"}
    assert not engine.rows
    assert all(not part.lengths for part in parts(backend))


@options
def test_rows_are_allocated_with_their_texts(chosen):
    model, prompts = model_of(*chosen), prompts_of(6, 90)
    backend = DecoderBackend(model)
    engine = Engine(backend)
    for prompt in prompts:
        engine.add(prompt, Settings(max_tokens=70, drafts=3))
    with cached_weight_casts(model):
        while engine.rows:
            engine.step()
            for part in parts(backend):
                for held in part.rows.values():
                    assert held.held.shape[-2] <= held.length + CACHE_BLOCK
            for row in engine.rows.values():
                assert backend.caches.lengths[row.number] == row.read


def test_the_end_of_a_row():
    model, prompt = model_of(), [1, 2, 3]
    whole = list(generate(model, prompt, Settings(max_tokens=9)))
    eos = whole[4]
    first = whole.index(eos)
    engine = Engine(DecoderBackend(model))
    by_length, by_eos = (
        engine.add(prompt, Settings(max_tokens=9)),
        engine.add(prompt, Settings(max_tokens=9, eos=(eos,))),
    )
    cancelled, late = engine.add(prompt, Settings(max_tokens=9)), engine.add(prompt, Settings(max_tokens=9))
    engine.step()
    engine.cancel(cancelled)
    engine.cancel(cancelled)
    ids, ends = {}, {}
    while engine.rows:
        for event in engine.step():
            ids.setdefault(event.row, []).extend(event.ids)
            ends |= {event.row: event.finished} if event.finished else {}
    engine.cancel(late)
    assert engine.step() == []
    assert ends == {by_length: "length", by_eos: "eos", cancelled: "cancelled", late: "length"}
    assert ids[by_length] == ids[late] == whole[1:]
    assert ids[by_eos] == whole[1:first]
    assert ids[cancelled] == []


@pytest.mark.parametrize("drafts", [0, 2])
def test_beginnings_are_computed_once(drafts):
    """A row copies what one that writes, or one that is still being read, holds; its text stays the same."""
    model, shared = model_of(), [int(i) for i in torch.randint(50, (PREFILL + 30,))]
    prompts, tokens = [[*shared, i, i + 1] for i in range(5)], []
    settings = Settings(max_tokens=6, drafts=drafts)
    alone = [list(generate(model, prompt, settings)) for prompt in prompts]
    handle = model.embed_tokens.register_forward_pre_hook(lambda module, given: tokens.append(given[0].numel()))
    engine = Engine(DecoderBackend(model))
    for prompt in prompts[:4]:
        engine.add(prompt, settings)
    ids, _ = run_with_one_more(engine, prompts[4], settings)
    handle.remove()
    for prompt, found, expected in zip(prompts, ids.values(), alone, strict=True):
        assert_equal_text(model, prompt, found, expected)
    readers = 1 + (drafts > 0)  # the main model and the MTP module
    assert sum(tokens) < readers * (len(shared) + 5 * 6 * (1 + drafts) + 5 * 9 * (1 + drafts))


def run_with_one_more(engine, prompt, settings):
    """A row joins while others write."""
    early = {}
    for _ in range(4):
        for event in engine.step():
            early.setdefault(event.row, []).extend(event.ids)
        assert engine.backend.caches.lengths == {number: row.read for number, row in engine.rows.items()}
    engine.add(prompt, settings)
    ids, ends = run(engine)
    return {row: early.get(row, []) + ids[row] for row in ids}, ends


@pytest.mark.parametrize("chosen", DRAFTING, ids=" ".join)
@torch.no_grad()
def test_drafts_of_rows_together_are_those_of_whole_rows(chosen):
    """Module k's logits without any cache, for rows of unequal length and number of drafts, some begun by copying."""
    model, kept_counts, copied = model_of(*chosen, vocabulary=4), set(), []
    beginning = prompt_of(0, SHORTEST_SHARED + 9)
    prompts = [prompt_of(1, 3), [*beginning, 1], [*beginning[:-2], 3, 0, 2], prompt_of(2, 40), beginning, [2]]
    engine, watching = Engine(DecoderBackend(model)), {}
    copy = engine.backend.copy
    engine.backend.copy = lambda source, row, length: (copied.append((source, row, length)), copy(source, row, length))
    for i, prompt in enumerate(prompts):
        watched = Watched()
        watching[engine.add(prompt, Settings(max_tokens=9 + i, drafts=1 + i % 4), choice=watched)] = watched
    while engine.rows:
        engine.step()
    assert copied == [(1, 2, SHORTEST_SHARED + 7), (1, 4, SHORTEST_SHARED + 8)]
    for watched, prompt in zip(watching.values(), prompts, strict=True):
        tokens = list(prompt)
        for logits, drafts, kept, token in watched.passes:
            for k, found in enumerate(logits[: model.mtp.depth], start=1):
                ids = torch.tensor([[*tokens, *drafts[: k - 1]]])
                hidden_BSD = model(micro_batch(ids, ids), with_mtp=True).predictions[k - 1].hidden_BSD
                assert distance(found, model.logits(hidden_BSD[0, -1])) <= 1e-4
            tokens = [*tokens, *drafts[:kept], token]
            kept_counts.add(kept)
    assert {0, 1} <= kept_counts


def test_drafts_are_counted_over_all_rows():
    model, prompts, counts = model_of(seed=2), prompts_of(8, 30), Speculation()
    engine = Engine(DecoderBackend(model), speculation=counts)
    for i, prompt in enumerate(prompts):
        engine.add(prompt, Settings(max_tokens=20, drafts=i % 4))
    ids, _ = run(engine)
    written = sum(map(len, ids.values()))
    assert written == 8 * 20 == counts.passes + counts.kept
    assert 0 < counts.kept <= counts.made


def test_more_prompts_than_rows_at_once():
    model, prompts = model_of(), prompts_of(9, 20)
    settings = [Settings(max_tokens=3 + i) for i in range(9)]
    backend, most = DecoderBackend(model), []
    model.register_forward_pre_hook(lambda *_: most.append(len(backend.caches.lengths)))
    found = complete(backend, prompts, settings, decode=lambda ids: "".join(map(chr, ids)), at_once=4)
    for prompt, one, completion in zip(prompts, settings, found, strict=True):
        assert completion.ids == list(generate(model, prompt, one))
        assert completion.text == "".join(map(chr, completion.ids))
    assert not backend.caches.lengths


def letters(ids):
    return "".join(chr(97 + token % 26) for token in ids)


@pytest.mark.parametrize("drafts", [0, 3])
def test_stop_strings_end_a_text_over_token_borders(drafts):
    model, prompt = model_of(), [4, 8]
    whole = letters(generate(model, prompt, Settings(max_tokens=30)))
    for start in range(5, 20, 3):
        stop = whole[start : start + 3]
        settings = Settings(max_tokens=30, stop=(stop, "0"), drafts=drafts)
        events = list(stream(model, prompt, settings, decode=letters))
        wanted = whole[: whole.index(stop)]
        shown = ""
        for event in events:
            shown += event.text
            assert wanted.startswith(shown), "no part of a stop string may be shown"
        assert shown == wanted
        assert events[-1].finished == "stop"
        assert letters(token for event in events for token in event.ids) == wanted + stop
        (completion,) = complete(DecoderBackend(model), [prompt], [settings], decode=letters, at_once=1)
        assert (completion.text, completion.finished) == (wanted, "stop")


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.8}, {"presence_penalty": 3.0, "frequency_penalty": 1.5}])
def test_penalties_count_what_was_written(penalty):
    """Greedy, against a loop over whole rows; drafts are verified with the penalties of their places."""
    model, prompt, tokens = model_of(vocabulary=6), [3, 3, 1], 30
    settings = Settings(max_tokens=tokens, **penalty)
    expected = []
    for _ in range(tokens):
        ids_1T = torch.tensor([[*prompt, *expected]])
        with torch.no_grad():
            logits = model.logits(model(micro_batch(ids_1T, ids_1T), with_mtp=False).hidden_BTD[0, -1]).tolist()
        for token in range(len(logits)):
            count = expected.count(token)
            if token in prompt or count:
                factor = settings.repetition_penalty
                logits[token] = logits[token] * factor if logits[token] < 0 else logits[token] / factor
            logits[token] -= settings.presence_penalty * (count > 0) + settings.frequency_penalty * count
        expected.append(logits.index(max(logits)))
    assert list(generate(model, prompt, settings)) == expected
    assert expected != list(generate(model, prompt, Settings(max_tokens=tokens)))
    counts = Speculation()
    drafted = Settings(max_tokens=tokens, drafts=3, **penalty)
    assert list(generate(model, prompt, drafted, speculation=counts)) == expected
    assert counts.made > counts.kept > 0


def test_what_cannot_be_added():
    engine = Engine(DecoderBackend(model_of("mtp=none")))
    with pytest.raises(ValueError, match="an empty prompt"):
        engine.add([], Settings(max_tokens=1))
    with pytest.raises(ValueError, match="this one has none"):
        engine.add([1], Settings(max_tokens=1, drafts=1))
    with pytest.raises(ValueError, match="without `decode`"):
        engine.add([1], Settings(max_tokens=1, stop=("a",)))
    assert not engine.rows
    assert not engine.backend.caches.lengths
