"""Requests of OpenAI's API as this server reads them, and what it makes of their fields."""

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dsv3.inference.sampling import Settings
from dsv3.prompts.chat import Message

UNSUPPORTED = ("tools", "functions", "tool_choice", "function_call", "logit_bias", "audio", "prediction", "best_of")
"""Fields that would change the answer: refused by name. Other fields that are not known are ignored."""
COLDEST = 0.01
"""Lower temperatures are greedy decoding: logits divided by them would overflow."""
MOST_TOKENS, MOST_STOPS, LONGEST_STOP = 16, 16, 200

Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    def schema_of_text(self) -> dict[str, Any] | None:
        """The JSON schema that the text must follow; None: any text.

        Raises ValueError where `json_schema` has none.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        schema = (self.json_schema or {}).get("schema")
        if not isinstance(schema, dict):
            raise ValueError("response_format: json_schema.schema must be a JSON schema")
        return schema


class Request(BaseModel):
    """What both kinds of request have. `drafts` and `experts` are this server's own."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    n: int = Field(1, ge=1, le=16)
    stop: list[str] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    drafts: int | None = Field(None, ge=0)
    experts: bool = False

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, given: Any) -> Any:
        """Fields that are null count as not given; a single stop string is a list of one."""
        if not isinstance(given, dict):
            return given
        json.dumps(given, ensure_ascii=False).encode()  # a ValueError where a text is no Unicode
        fields = {name: value for name, value in given.items() if value is not None}
        for name in UNSUPPORTED:
            if fields.get(name) not in (None, [], {}, "none", "auto"):
                raise ValueError(f"{name}: this server has no such feature; leave it out")
        if isinstance(fields.get("stop"), str):
            fields["stop"] = [fields["stop"]]
        return fields

    @model_validator(mode="after")
    def _check_stops(self) -> "Request":
        self.stop = [stop for stop in self.stop if stop]
        if len(self.stop) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in self.stop):
            raise ValueError(f"stop: at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters")
        return self

    @property
    def best(self) -> int | None:
        """How many of the likeliest tokens to give with each; None: no log-probabilities."""
        return None

    def settings(self, *, max_tokens: int, eos: tuple[int, ...], drafts: int | None, index: int) -> Settings:
        """Of the `index`-th text."""
        seed = secrets.randbits(62) if self.seed is None else self.seed + index
        return Settings(
            max_tokens=max_tokens,
            temperature=0.0 if self.temperature < COLDEST else self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop=tuple(self.stop),
            eos=eos,
            seed=seed,
            drafts=drafts,
        )

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    """/v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_TOKENS)
    echo: bool = False

    @property
    def best(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each a text, or ids. Raises ValueError where there is none."""
        given: Any = self.prompt
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        prompts: list[str | list[int]] = [given] if single else given
        if not prompts:
            raise ValueError("prompt: must have at least one text")
        return prompts


class Part(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def message(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role: Any = "system" if self.role == "developer" else self.role
        return Message(role, content)


class ChatRequest(Request):
    """/v1/chat/completions"""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOKENS)

    @property
    def best(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
