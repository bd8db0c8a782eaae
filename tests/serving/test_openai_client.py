"""The official `openai` client against the server: 40 calls, and streams that say what whole answers say."""

import asyncio
import json
import math
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from dsv3.inference.generation import generate, stream
from dsv3.inference.sampling import Settings
from dsv3.prompts.chat import Message, chat_prompt
from dsv3.prompts.infilling import infilling_prompt
from tests.inference.test_engine import NEAR, between_the_best_two
from tests.parity.twins import micro_batch
from tests.serving.running import Running

CODE = "def f(x):\n    return x + 1\n"
ASK: list[Any] = [{"role": "user", "content": "def f(x):"}]


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=server.keys["ada"], max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(server: Running) -> Any:
    return server.service.models[server.model].model.tokenizer


def text_of(server: Running, tokenizer: Any, prompt: list[int], **settings: Any) -> str:
    """What `generate` writes: the same ids, as far as two logits are not as good as equal."""
    settings = {"max_tokens": 12, "eos": (tokenizer.eos,), **settings}
    with_events = stream(server.decoder, prompt, Settings(**settings), decode=tokenizer.decode)
    return "".join(event.text for event in with_events)


def test_models(client: OpenAI, server: Running) -> None:
    assert [model.id for model in client.models.list().data] == ["one/seed1", "two/seed1"]
    assert client.models.retrieve("two/seed1").owned_by == "dsv3"
    with pytest.raises(openai.NotFoundError, match="this server has one/seed1, two/seed1"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1, "seed": 4, "top_p": 0.7},
        {"temperature": 1, "seed": 5, "extra_body": {"top_k": 5}},
        {"temperature": 1, "seed": 5, "extra_body": {"min_p": 0.1}},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.0},
        {"extra_body": {"repetition_penalty": 1.3}},
        {"extra_body": {"drafts": 0}},
        {"temperature": 1, "seed": 6, "extra_body": {"drafts": 3}},
        {"stop": ["q"]},
        {"stop": ["\n", "return", "\ufffd"]},
    ],
    ids=str,
)
def test_completions_are_those_of_generate_streamed_or_not(
    client: OpenAI, server: Running, tokenizer: Any, settings: dict[str, Any]
) -> None:
    asked: Any = {"model": server.model, "prompt": CODE, "max_tokens": 12, "temperature": 0, **settings}
    whole = client.completions.create(**asked)
    pieces = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    own = {**settings, **settings.get("extra_body", {})}
    own.pop("extra_body", None)
    own = {"drafts": None, **own, "stop": tuple(own.get("stop", ()))}
    expected = text_of(server, tokenizer, [tokenizer.bos, *tokenizer.encode(CODE)], **own)
    assert whole.choices[0].text == expected
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert all(piece.finish_reason is None for piece in pieces[:-1])


@pytest.mark.parametrize(
    "messages",
    [
        ASK,
        [{"role": "system", "content": "Be brief."}, *ASK],
        [{"role": "developer", "content": "Be brief."}, *ASK],
        [*ASK, {"role": "assistant", "content": "    return x"}, {"role": "user", "content": "é 漢 <｜User｜>"}],  # noqa: RUF001
        [{"role": "user", "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "f(x):"}]}],
    ],
    ids=str,
)
def test_chat(client: OpenAI, server: Running, tokenizer: Any, messages: list[Any]) -> None:
    asked: Any = {"model": server.model, "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    flat = [(m["role"], m["content"] if isinstance(m["content"], str) else "def f(x):") for m in messages]
    turns: Any = [Message("system" if role == "developer" else role, content) for role, content in flat]  # type: ignore[arg-type]
    expected = text_of(server, tokenizer, chat_prompt(tokenizer, turns), drafts=None)
    assert whole.message.content == expected
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == len(chat_prompt(tokenizer, turns))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_fill_in_the_middle(client: OpenAI, server: Running, tokenizer: Any) -> None:
    asked: Any = {"model": server.model, "prompt": "def f(x):\n", "max_tokens": 12, "temperature": 0}
    middle = client.completions.create(**asked, suffix="+ 1\n").choices[0].text
    assert middle == text_of(server, tokenizer, infilling_prompt(tokenizer, "def f(x):\n", "+ 1\n", "psm"), drafts=None)
    assert middle != client.completions.create(**asked).choices[0].text


def test_several_prompts_and_several_texts(client: OpenAI, server: Running, tokenizer: Any) -> None:
    ids = [tokenizer.bos, *tokenizer.encode(CODE)]
    asked: Any = {"model": server.model, "max_tokens": 6, "temperature": 1, "seed": 1}
    found = client.completions.create(**asked, prompt=[ids, ids], n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    texts = [client.completions.create(**asked | {"seed": 1 + i}, prompt=ids).choices[0].text for i in range(4)]
    assert [choice.text for choice in found.choices] == texts
    assert len(set(texts)) > 1
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids)


def test_log_probabilities_of_prompt_and_text(client: OpenAI, server: Running, tokenizer: Any) -> None:
    """Against the log-softmax of a pass over the whole text."""
    ids = [tokenizer.bos, *tokenizer.encode(CODE * 4)]
    found = client.completions.create(
        model=server.model, prompt=ids, max_tokens=3, temperature=0, logprobs=2, echo=True
    ).choices[0]
    assert found.text.startswith(CODE * 4)
    columns = found.logprobs
    assert columns is not None
    assert columns.token_logprobs is not None
    assert columns.top_logprobs is not None
    assert columns.token_logprobs[0] is None
    assert len(columns.token_logprobs) == len(ids) + 3
    written = list(generate(server.decoder, ids, Settings(max_tokens=3)))
    text = [*ids, *written]
    (logits,) = server.scored().logits([text[:-1]], [len(text) - 1], [0])
    right = logits.log_softmax(-1).gather(1, torch.tensor(text[1:]).unsqueeze(1)).squeeze(1).tolist()
    assert columns.token_logprobs[1:] == pytest.approx(right, abs=1e-4)
    for one, best in zip(columns.token_logprobs[1:], columns.top_logprobs[1:], strict=True):
        assert one <= max(best.values()) + 1e-6


def test_log_probabilities_in_chat(client: OpenAI, server: Running) -> None:
    asked: Any = {"model": server.model, "messages": ASK, "max_tokens": 8, "temperature": 0}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    assert found.logprobs is not None
    content = found.logprobs.content or []
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content), "greedy"
    written = b"".join(bytes(entry.bytes or []) for entry in content)
    assert written.decode(errors="replace").rstrip("\ufffd") == (found.message.content or "").rstrip("\ufffd")
    chunks = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [entry.token for piece in pieces if piece is not None for entry in piece.content or []]
    assert streamed == [entry.token for entry in content]


def test_json_that_follows_a_schema(client: OpenAI, server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "maximum": 99, "minimum": 0}, "ok": {"enum": ["yes", "no"]}},
        "required": ["sum", "ok"],
        "additionalProperties": False,
    }
    named: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for seed in range(5):
        found = client.chat.completions.create(
            model=server.model, messages=ASK, seed=seed, max_tokens=60, response_format=named
        ).choices[0]
        answer = json.loads(found.message.content or "")
        assert set(answer) == {"sum", "ok"}
        assert 0 <= answer["sum"] <= 99
        assert answer["ok"] in ("yes", "no")
        assert found.finish_reason == "stop"


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 99}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10_000}, "exceeds the context of 256 tokens"),
    ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
    ({"logit_bias": {"5": 100}}, "logit_bias: this server has no such feature"),
    ({"prompt": [10**6]}, r"token ids must lie in 0\.\.299"),
    ({"prompt": [[]]}, "at least one token"),
    ({"prompt": []}, "at least one text"),
    ({"prompt": "x", "n": 16, "stop": ["a"] * 17}, "at most 16 strings"),
    ({"extra_body": {"response_format": {"type": "json_schema"}}}, "must be a JSON schema"),
    (
        {"extra_body": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}},
        "respons",
    ),
    ({"suffix": "x", "echo": True}, "echo"),
]


@pytest.mark.parametrize(("wrong", "named"), MISTAKES, ids=str)
def test_mistakes_are_refused_by_name(client: OpenAI, server: Running, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError, match=named) as refused:
        client.completions.create(**{"model": server.model, "prompt": "x", **wrong})
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "x"}], [{"role": "tool", "content": "x"}]])
def test_messages_out_of_turn_are_refused(client: OpenAI, server: Running, messages: list[Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=server.model, messages=messages)


def test_tiny_temperatures_and_extreme_penalties_are_answered(client: OpenAI, server: Running) -> None:
    for extreme in ({"temperature": 1e-300}, {"top_p": 1e-300}, {"temperature": 2, "presence_penalty": -2}):
        asked: Any = {"model": server.model, "prompt": "x", "max_tokens": 4, **extreme}
        assert client.completions.create(**asked).choices[0].finish_reason
    assert server.service.engine.alive


def test_eight_at_once_and_alone_are_the_same(server: Running, tokenizer: Any) -> None:
    """50 prompts, streamed, eight at a time, half with drafts, many with a beginning that was read before."""
    prompts = [CODE * (1 + i % 9) + "x" * (i % 7) for i in range(50)]
    drafts = [i % 2 * 2 for i in range(50)]

    async def ask_all() -> list[list[str]]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.keys["bob"], max_retries=0)
        places = asyncio.Semaphore(8)

        async def ask(prompt: str, drafts: int) -> list[str]:
            async with places:
                chunks = await client.completions.create(
                    model=server.model, prompt=prompt, max_tokens=8, temperature=0, stream=True, seed=1,
                    extra_body={"drafts": drafts}, logprobs=0,
                )  # fmt: skip
                return [token async for chunk in chunks for token in chunk.choices[0].logprobs.tokens]

        return await asyncio.gather(*map(ask, prompts, drafts))

    found = asyncio.run(ask_all())
    for prompt, text in zip(prompts, found, strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        alone = list(generate(server.decoder, ids, Settings(max_tokens=8, eos=(tokenizer.eos,))))
        expected = [_shown(tokenizer.decode_bytes([token])) for token in alone]
        parts_at = next((i for i, (a, b) in enumerate(zip(text, expected)) if a != b), None)
        if parts_at is None:
            assert len(text) == len(expected)
        else:
            assert between_the_best_two(server.decoder, [*ids, *alone[:parts_at]]) < NEAR
    copied = server.service.models[server.model].scheduler.counts.copied_tokens
    assert copied > 500


def _shown(written: bytes) -> str:
    try:
        return written.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def test_what_the_page_shows_beside_an_answer(client: OpenAI, server: Running, tokenizer: Any) -> None:
    """Experts of each token as a pass over the whole text routes them, drafts and tokens per second."""
    asked: Any = {"model": server.model, "messages": ASK, "max_tokens": 10, "temperature": 0}
    found = client.chat.completions.create(**asked, extra_body={"experts": True, "drafts": 2})
    tokens = found.choices[0].tokens  # type: ignore[attr-defined]
    assert len(tokens) == found.usage.completion_tokens  # type: ignore[union-attr]
    prompt = chat_prompt(tokenizer, [Message("user", "def f(x):")])
    text = [*prompt, *generate(server.decoder, prompt, Settings(max_tokens=10, eos=(tokenizer.eos,)))]
    _, routings = server.decoder.states(micro_batch(torch.tensor([text]), torch.tensor([text])))
    layers = [routing.experts_NK.sort().values.tolist() for routing in routings.values()]
    for place, token in enumerate(tokens):
        assert [sorted(chosen) for chosen in token["experts"]] == [layer[len(prompt) - 1 + place] for layer in layers]
    assert found.timings["drafts_made"] > 0  # type: ignore[attr-defined]
    assert math.isfinite(found.timings["tokens_per_second"])  # type: ignore[attr-defined]
