"""vLLM in the place of `Engine`: what the scheduler asks of an engine, each row a stream of a vLLM server.

Prompts go out as ids and tokens come back as ids, so that prompts, stop strings and characters are those of the other
engines. Each owner's prompts have a salt of their own: vLLM shares what they begin with among themselves alone.
"""

import itertools
import json
import queue
import secrets
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from dsv3.inference.row import Event, Row, Watch
from dsv3.inference.sampling import Choice, Settings
from dsv3.inference.speculation import Speculation
from dsv3.inference.text import Decode, TextStream
from dsv3.serving.vllm_process import MODEL, VLLMProcess

LONGEST_WAIT = 0.02
"""Seconds of a step in which nothing comes."""


class Heard(NamedTuple):
    row: int
    ids: list[int]
    finish: str | None  # as vLLM names it
    error: str = ""


class VLLMEngine:
    """The engine of one vLLM process. `step` returns what has come, and waits for it a moment."""

    def __init__(self, process: VLLMProcess, *, decode: Decode) -> None:
        self.process, self.decode = process, decode
        self.speculation, self.rows = Speculation(), dict[int, Row]()
        self.client = process.client()
        self._numbers = itertools.count()
        # vLLM shares beginnings of prompts with one salt: an owner's.
        self._salts: defaultdict[str, str] = defaultdict(lambda: secrets.token_hex(16))
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()

    @property
    def kept_positions(self) -> int:
        """Which vLLM knows."""
        return 0

    def check(self) -> None:
        self.process.check()

    def add(
        self,
        prompt: Sequence[int],
        settings: Settings,
        *,
        choice: Choice | None = None,
        owner: str = "",
        watch: Watch | None = None,
        experts: bool = False,
    ) -> int:
        """As `Engine.add`. vLLM chooses, not `choice`, and tells no experts.

        Raises ValueError where `watch` is given.
        """
        if watch is not None:
            raise ValueError("echo with logprobs: engine=vllm does not give them")
        assert choice is not None
        number = next(self._numbers)
        stream = TextStream(self.decode, settings.stop)
        self.rows[number] = row = Row(number, settings, choice, list(prompt), len(prompt), stream, owner, None)
        asked = asked_of(row) | {"cache_salt": self._salts[owner]}
        threading.Thread(target=self._follow, args=(row, asked), name=f"vllm row {number}", daemon=True).start()
        return number

    def cancel(self, row: int) -> None:
        """Its thread closes the connection, on which vLLM ends the text."""
        self.rows.pop(row, None)

    def step(self) -> list[Event]:
        events = []
        try:
            heard = [self._heard.get(timeout=LONGEST_WAIT)]
            while not self._heard.empty():
                heard.append(self._heard.get())
        except queue.Empty:
            return []
        for one in heard:
            if one.row not in self.rows:
                continue
            if one.error:
                self.check()
            event = self._written(self.rows[one.row], one)
            if event.finished is not None:
                del self.rows[one.row]
            events.append(event)
        return events

    def _written(self, row: Row, heard: Heard) -> Event:
        if heard.error:
            return Event(row.number, [], "", "cancelled")
        ended = heard.finish == "stop" and heard.ids[-1:] != [row.settings.eos[0]]
        return row.write([*heard.ids, row.settings.eos[0]] if ended else heard.ids)

    def _follow(self, row: Row, asked: dict[str, Any]) -> None:
        """In a thread of its own: read the row's stream to its end."""
        try:
            with self.client.stream("POST", "/v1/completions", json=asked, timeout=None) as response:
                if not response.is_success:
                    response.read()
                    raise httpx.HTTPError(response.text[:300])
                for line in response.iter_lines():
                    if row.number not in self.rows:
                        return
                    if line.startswith("data: {"):
                        self._hear(row, json.loads(line.removeprefix("data: ")))
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self._heard.put(Heard(row.number, [], None, str(error) or type(error).__name__))

    def _hear(self, row: Row, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            raise ValueError(str(chunk["error"]))
        for choice in chunk["choices"]:
            self._heard.put(Heard(row.number, choice.get("token_ids") or [], choice["finish_reason"]))

    def close(self) -> None:
        self.rows.clear()
        self.client.close()
        self.process.close()


def asked_of(row: Row) -> dict[str, Any]:
    settings = row.settings
    return {
        "model": MODEL,
        "prompt": row.tokens[: row.prompt],
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k or -1,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
        "seed": settings.seed,
        "stop_token_ids": list(settings.eos),
        "stream": True,
        "return_token_ids": True,
    }
