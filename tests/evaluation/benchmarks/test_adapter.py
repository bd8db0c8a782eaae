"""The adapter against direct computation, and against lm-eval's own model of transformers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from omegaconf import DictConfig

from dsv3.build import build_model
from dsv3.evaluation.benchmarks.adapter import Adapter
from dsv3.evaluation.benchmarks.infill import BEGIN, END, HOLE, parse_infilling
from dsv3.evaluation.benchmarks.models import HFModel, NativeModel
from dsv3.inference.generation import generate
from dsv3.inference.prefixes import common_prefix, group_by_prefix
from dsv3.inference.sampling import Settings, choice_of
from dsv3.inference.text import cut_at
from dsv3.prompts.infilling import infilling_prompt
from tests.evaluation.benchmarks.conftest import suite_of
from tests.synthetic import ByteTokenizer

SHOTS = "Q: two and two?\nA: four\n\n" * 4  # longer than SHORTEST_SHARED bytes


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


def direct(model: NativeModel, context: str, continuation: str) -> tuple[float, bool]:
    """One row, one pass, FP64 sum."""
    before, after = model.encode(context, bos=True), model.encode(continuation, bos=False)
    ids = torch.tensor([before + after])
    logits = model.model.decode(ids, model.model.new_caches([0]))[0, len(before) - 1 : -1]
    logp = logits.double().log_softmax(-1)
    wanted = torch.tensor(after)
    return float(logp.gather(1, wanted[:, None]).sum()), bool((logp.argmax(-1) == wanted).all())


REQUESTS = [
    *((SHOTS + question, answer) for question in ("Q: one?\nA:", "Q: three and one?\nA:") for answer in (" a", " bcd")),
    *((context, answer) for context in ("x", "hello") for answer in ("y", "zz z")),
    (SHOTS.rstrip(), " the answer"),
    ("same", "1"),
    ("same", "2"),
]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@torch.no_grad()
def test_loglikelihood_equals_one_row_at_a_time(own_model: NativeModel, batch_size: int) -> None:
    adapter = Adapter(own_model, batch_size=batch_size, seed=0)
    scores = adapter.loglikelihood([request("loglikelihood", *pair) for pair in REQUESTS])
    for (logp, greedy), pair in zip(scores, REQUESTS, strict=True):
        wanted, wanted_greedy = direct(own_model, *pair)
        assert logp == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy


def test_shared_prefixes_are_computed_once(own_model: NativeModel) -> None:
    """Tokens that go through the model: the shots once, not once for each of ten requests."""
    requests = [request("loglikelihood", f"{SHOTS}Q: {i}?\nA:", " yes") for i in range(10)]
    decoder, tokens = own_model.model, []

    def count(module: Any, inputs: Any) -> None:
        tokens.append(inputs[0].numel())

    handle = decoder.embed_tokens.register_forward_pre_hook(count)
    with own_model.steady():
        shared = Adapter(own_model, batch_size=4, seed=0).loglikelihood(requests)
    with_sharing = sum(tokens)
    own_model.shares_prefixes = False  # type: ignore[misc]
    tokens.clear()
    alone = Adapter(own_model, batch_size=4, seed=0).loglikelihood(requests)
    handle.remove()
    assert sum(tokens) > 10 * len(SHOTS)
    assert with_sharing < 2 * len(SHOTS) + 10 * 20
    for a, b in zip(shared, alone, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4)
        assert a[1] == b[1]


def test_the_endings_of_several_questions_are_scored_together(own_model: NativeModel) -> None:
    """Three passes: what all questions begin with, the rest of each question, and the endings."""
    same = 70 * "a"
    questions = [f"{same}{letter * 80}{'.' * i}" for i, letter in enumerate("bcd")]
    requests = [request("loglikelihood", q, ending) for q in questions for ending in (" yes", " no", " perhaps")]
    passes: list[torch.Size] = []
    handle = own_model.model.embed_tokens.register_forward_pre_hook(lambda _, given: passes.append(given[0].shape))
    with own_model.steady():
        found = Adapter(own_model, batch_size=9, seed=0).loglikelihood(requests)
    handle.remove()
    assert passes == [(1, 71), (3, 80 + 1), (9, 8)]
    for (logp, greedy), each in zip(found, requests, strict=True):
        assert (pytest.approx(logp, abs=1e-4), greedy) == direct(own_model, *each.args)


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=12), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_groups_part_the_rows_and_share_what_they_say(heads: list[list[int]], shortest: int) -> None:
    groups = group_by_prefix(heads, shortest)
    assert sorted(i for group in groups for i in group.members) == list(range(len(heads)))
    for shared, members in groups:
        if shared:
            assert shared >= shortest
            assert len(members) > 1
            assert shared <= common_prefix([heads[i] for i in members])


def test_likelihood_of_too_long_a_text_is_scored_in_parts(own_model: NativeModel) -> None:
    """Windows of the model's length; each part sees what is before it, as far as the model reaches."""
    adapter = Adapter(own_model, batch_size=4, seed=0)
    text = "abcdefg hij " * 40
    ((logp, _),) = adapter.loglikelihood([request("loglikelihood", "x", text)])
    ids = own_model.encode("x" + text, bos=True)
    wanted = 0.0
    for start in range(2, len(ids), 128):
        end = min(start + 128, len(ids))
        window = ids[max(0, end - 257) : end]
        logits = own_model.logits([window[:-1]], [end - start], [0])[0].double().log_softmax(-1)
        wanted += float(logits.gather(1, torch.tensor(window[start - end :])[:, None]).sum())
    assert logp == pytest.approx(wanted, rel=1e-5)


def test_rolling_likelihood_counts_every_byte_once(own_model: NativeModel) -> None:
    """With uniform weights each byte costs log V, however many windows there are."""
    with torch.no_grad():
        own_model.model.get_parameter("lm_head.weight").zero_()
    text = "some text, longer than a window. " * 20
    (logp,) = Adapter(own_model, batch_size=4, seed=0).loglikelihood_rolling([request("loglikelihood_rolling", text)])
    assert logp == pytest.approx(-len(text) * math.log(262), rel=1e-5)


def test_generation_equals_one_prompt_at_a_time(own_model: NativeModel) -> None:
    prompts = [*(SHOTS + question for question in ("Q: a", "Q: longer question", "Q: b")), "short", "another"]
    arguments = {"until": [], "max_gen_toks": 12, "do_sample": False}
    together = Adapter(own_model, batch_size=5, seed=0).generate_until(
        [request("generate_until", prompt, arguments) for prompt in prompts]
    )
    for prompt, text in zip(prompts, together, strict=True):
        ids = own_model.encode(prompt, bos=True)
        alone = list(generate(own_model.model, ids, Settings(max_tokens=12, eos=(own_model.tokenizer.eos,))))
        assert text == own_model.decode(alone)


def test_sampling_depends_on_seed_and_request_not_on_the_batch(own_model: NativeModel) -> None:
    arguments = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = [request("generate_until", prompt, arguments) for prompt in ("one", "two", "longer one", "one")]
    texts = [
        Adapter(own_model, batch_size=size, seed=seed).generate_until(requests)
        for size, seed in [(4, 1), (1, 1), (4, 2)]
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][3]


def test_generation_ends_before_a_stop_sequence(own_model: NativeModel) -> None:
    free = {"until": [], "max_gen_toks": 30, "do_sample": False}
    (text,) = Adapter(own_model, batch_size=1, seed=0).generate_until([request("generate_until", "abc", free)])
    stop = text[4:6]
    stopped = Adapter(own_model, batch_size=1, seed=0).generate_until(
        [request("generate_until", "abc", free | {"until": [stop]})]
    )
    assert stopped == [text[: text.index(stop)]]
    assert cut_at(["b", "a"], "xxbya") == "xx"


def test_top_p_cuts_the_unlikely_tail() -> None:
    logits = torch.tensor([[math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]])
    settings = [Settings(max_tokens=1, temperature=1.0, top_p=0.7, seed=i) for i in range(200)]
    drawn = {choice_of(one).verify(logits, [])[1] for one in settings}
    assert drawn == {0, 1}


def test_infilling_prompts_are_those_of_training(own_model: NativeModel) -> None:
    """From the written form to ids; too long a prompt loses its far ends and keeps what is next to the gap."""
    tokenizer = ByteTokenizer()
    written = f"{BEGIN}def f(x):\n    {HOLE}\n    return y{END}"
    assert parse_infilling(written) == ("def f(x):\n    ", "\n    return y")
    ids = own_model.encode_framed(written, 200)
    assert ids == infilling_prompt(tokenizer, "def f(x):\n    ", "\n    return y", "psm")
    long = f"{BEGIN}{'a' * 300}before{HOLE}after{'b' * 300}{END}"
    ids = own_model.encode_framed(long, 100)
    assert ids is not None
    assert len(ids) == 100
    hole = ids.index(tokenizer.fim_hole)
    assert bytes(ids[hole - 6 : hole]) == b"before"
    assert bytes(ids[hole + 1 : hole + 6]) == b"after"
    assert own_model.encode_framed("plain text", 100) is None


def test_infilling_answers_are_scored_after_the_prompt(own_model: NativeModel) -> None:
    written = f"{BEGIN}ab{HOLE}ef{END}"
    ((logp, _),) = Adapter(own_model, batch_size=1, seed=0).loglikelihood([request("loglikelihood", written, "cd")])
    ids = [*infilling_prompt(ByteTokenizer(), "ab", "ef", "psm"), *b"cd"]
    logits = own_model.logits([ids[:-1]], [2], [0])[0].log_softmax(-1)
    assert logp == pytest.approx(float(logits[0, ord("c")] + logits[1, ord("d")]), abs=1e-4)


def test_what_is_kept_of_a_prefix_goes_with_the_weights_it_was_made_by(own_model: NativeModel) -> None:
    """As in training: scored, trained further, scored again."""
    shared = "".join(chr(97 + i % 26) for i in range(80))
    requests = [request("loglikelihood", shared, ending) for ending in ("abc", "xyz", "mno")]
    adapter = Adapter(own_model, batch_size=4, seed=0)
    with own_model.steady():
        before = adapter.loglikelihood(requests)
    with torch.no_grad():
        for parameter in own_model.model.parameters():
            parameter.mul_(1.5)
    with own_model.steady():
        after = adapter.loglikelihood(requests)
    assert [score for score, _ in after] != [score for score, _ in before]
    alone = [direct(own_model, shared, ending)[0] for ending in ("abc", "xyz", "mno")]
    assert [score for score, _ in after] == pytest.approx(alone, rel=1e-4)


def test_a_failed_task_leaves_nothing_of_its_prefix(own_model: NativeModel) -> None:
    requests = [request("loglikelihood", "a" * 80, ending) for ending in ("abc", "xyz")]

    def fail() -> None:
        with own_model.steady():
            Adapter(own_model, batch_size=4, seed=0).loglikelihood(requests)
            assert own_model._scoring is not None
            assert own_model._scoring.first
            raise RuntimeError("the task fails")

    with pytest.raises(RuntimeError, match="the task fails"):
        fail()
    assert own_model._scoring is None


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_every_attentions_cache_can_be_widened(composed: Callable[..., DictConfig], attention: str) -> None:
    decoder = build_model(composed("precision=fp32", "model.init_std=0.2", f"attention={attention}")).eval()
    model = NativeModel(decoder, ByteTokenizer(), name="tiny", max_length=256)
    rows = [model.encode(SHOTS + question, bos=True) for question in ("Q: one?", "Q: another?", "Q: 3")]
    together = model.logits(rows, [2, 2, 2], [len(SHOTS)] * 3)
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(logits, model.logits([row], [2], [0])[0], atol=1e-4, rtol=1e-4)


TASKS = ["hellaswag_100", "gsm8k_100_answers", "rg_arithmetic", "rg_bbh_formal_fallacies", "rolling_text"]


@pytest.mark.parametrize("name", TASKS)
def test_scores_equal_lm_evals_own_to_the_last_digit(hugging_face_folder: Path, tmp_path: Path, name: str) -> None:
    """The same tasks, model and batch size through lm-eval's `hf` model: equal floats, equal generations."""
    (tmp_path / "texts.jsonl").write_text('{"text": "def f(x):\\n    return x\\n"}\n{"text": "one two three"}\n' * 3)
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling_text\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/texts.jsonl}}\n"
        "test_split: train\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - {metric: bits_per_byte}\n"
    )
    models = [
        Adapter(HFModel(hugging_face_folder), batch_size=4, seed=0),
        HFLM(pretrained=str(hugging_face_folder), batch_size=4, device="cpu"),
    ]
    outcomes: list[Any] = []
    for model in models:
        suite = suite_of(models[0].model, str(tmp_path))
        loaded = suite.finder.load(name, suite.sandbox)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1)
        outcomes.append(evaluate(model, loaded, limit=6, bootstrap_iters=0))
    ours, theirs = outcomes
    assert ours["results"] == theirs["results"]
    for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
        assert mine["arguments"] == other["arguments"]
        assert mine["resps"] == other["resps"]
