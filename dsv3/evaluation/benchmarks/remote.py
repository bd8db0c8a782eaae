"""A model behind an OpenAI-compatible URL as an lm-eval model.

    loglikelihood    /completions with `echo` and `logprobs`; a server without them is refused by name
    generate_until   /completions, or with `chat` /chat/completions
    play             episodes of an agent, by either

`OPENAI_API_KEY` is sent if it is set.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from dsv3.evaluation.agents.journal import Journal
from dsv3.evaluation.agents.play import REPLY_TOKENS, Game, play
from dsv3.evaluation.benchmarks.adapter import DEFAULT_TOKENS, Scored, Written, seed_of
from dsv3.evaluation.benchmarks.tasks import UnavailableError
from dsv3.inference.text import cut_at

SECONDS = 120
"""That an answer may take."""


class Server:
    """An OpenAI-compatible API."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        return self._ask(path, json.dumps(content).encode())

    def only_model(self) -> str:
        """The name of the one model that is served.

        Raises:
            ValueError: the server does not answer, or serves several.
        """
        try:
            names = [model["id"] for model in self._ask("/models", None)["data"]]
        except (UnavailableError, KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint={self.url}: must be the /v1 of an OpenAI-compatible server ({error})"
            ) from error
        if len(names) != 1:
            raise ValueError(f"served_model: must name one of the models at {self.url}: {', '.join(names)}")
        return str(names[0])

    def _ask(self, path: str, content: bytes | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, data=content, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise UnavailableError(
                f"{self.url}{path}: {error.code} {error.read(300).decode(errors='replace')}"
            ) from error
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{self.url}{path}: {error}") from error


class RemoteAdapter(LM):
    """`at_once`: requests that are open together. `served_model`: None takes the only one."""

    shares_prefixes = False
    max_length = 1_000_000  # the server itself refuses what is too long

    def __init__(self, url: str, *, served_model: str | None, at_once: int, seed: int, chat: bool) -> None:
        super().__init__()
        self.server, self.at_once, self.seed, self.chat = Server(url), at_once, seed, chat
        self.served = served_model or self.server.only_model()
        self.name = f"{self.served} at {self.server.url}"
        self.journal: Journal | None = None  # of episodes
        self.model = self  # as the adapter of a model that is loaded

    def steady(self) -> AbstractContextManager[None]:
        return nullcontext()

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Bytes: no fewer than there are tokens."""
        return list(text.encode())

    def tok_encode(self, text: str) -> list[int]:
        return self.encode(text, bos=True)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        return self._at_once(lambda request: self._score(*request.args), requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise UnavailableError("a text cannot be scored from its first token over /v1/completions")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        def answer(number: int) -> str:
            context, given = requests[number].args
            settings = dict(normalize_gen_kwargs(given, DEFAULT_TOKENS))
            temperature = settings["temperature"] if settings["do_sample"] else 0.0
            seed = seed_of(self.seed, number)
            return self._write(context, settings["until"], int(settings["max_gen_toks"]), temperature, seed)

        return self._at_once(answer, range(len(requests)))

    def play(self, requests: list[Instance]) -> list[dict[str, Any]]:
        games = [Game(name, seed, **how, draws=self.seed) for name, seed, how in (r.args for r in requests)]
        return play(games, self, journal=self.journal)

    def explained(self, result: dict[str, Any]) -> dict[str, Any]:
        """Experts are not told over a URL."""
        return result

    def action_scores(self, prompts: Sequence[str], actions: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `dsv3.evaluation.agents.play.Player`."""
        pairs = [(prompt, f" {action}") for prompt, legal in zip(prompts, actions, strict=True) for action in legal]
        scores = iter(self._at_once(lambda pair: self._score(*pair), pairs))
        return [[next(scores)[0] for _ in legal] for legal in actions]

    def replies(self, prompts: Sequence[str], seeds: Sequence[int], temperature: float) -> list[str]:
        asked = list(zip(prompts, seeds, strict=True))
        return self._at_once(lambda one: self._write(one[0], ["\n"], REPLY_TOKENS, temperature, one[1]), asked)

    def fits(self, prompt: str) -> bool:
        return True

    def _at_once(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(self.at_once) as threads:
            return list(threads.map(call, items))

    def _write(self, prompt: str, stop: list[str], max_tokens: int, temperature: float, seed: int) -> str:
        common = {"model": self.served, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        common |= {"stop": stop[:4]}  # the API takes no more
        if self.chat:
            messages = [{"role": "user", "content": prompt.strip()}]
            reply = self.server.post("/chat/completions", {**common, "messages": messages})
            text = reply["choices"][0]["message"]["content"] or ""
        else:
            reply = self.server.post("/completions", {**common, "prompt": prompt})
            text = reply["choices"][0]["text"]
        shown = cut_at(stop, text)
        truncated = shown == text and reply["choices"][0].get("finish_reason") == "length"
        return Written(shown, truncated=truncated)

    def _score(self, context: str, continuation: str) -> Scored:
        """Of the tokens that begin in the continuation."""
        if self.chat:
            raise UnavailableError(
                "/v1/chat/completions gives no likelihoods: use chat=false, or for agents actions=text"
            )
        whole = context + continuation
        asked = {"model": self.served, "prompt": whole, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        found = self.server.post("/completions", asked)["choices"][0].get("logprobs") or {}
        offsets, values = found.get("text_offset"), found.get("token_logprobs")
        if not offsets or not values or offsets[0] != 0 or values[0] is not None:
            raise UnavailableError(
                f"{self.server.url}/completions: likelihoods need `echo` with `logprobs`, which this server does not "
                "give; agents also play with actions=text"
            )
        inside = [i for i, offset in enumerate(offsets) if len(context) <= offset < len(whole)]
        likeliest = found.get("top_logprobs") or [None] * len(offsets)
        greedy = all(likeliest[i] and max(likeliest[i].values()) <= values[i] for i in inside)
        return sum(values[i] for i in inside), greedy
