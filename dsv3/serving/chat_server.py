"""The server's parts together: models, accounts, limits, and the thread that drives the engines."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3.serving.accounts import Accounts
from dsv3.serving.answers_stream import Answers
from dsv3.serving.conversations import Conversations
from dsv3.serving.database import Database
from dsv3.serving.engine_thread import EngineThread
from dsv3.serving.openai_format import error
from dsv3.serving.requests import ChatRequest, CompletionRequest, Request
from dsv3.serving.scheduler import BusyError
from dsv3.serving.served_model import Served
from dsv3.serving.throttle import Rate

MOST_TEXTS = 64
"""Texts of one request."""


class ApiError(Exception):
    """An answer with OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body = error(message, kind=kind, param=param, code=code)


def error_of_field(mistake: ValueError) -> ApiError:
    """A message that begins with the name of its field, as `name: ...` or `name=value: ...`."""
    field_ = re.match(r"\w+(?=[:=])", str(mistake))
    return ApiError(400, str(mistake), param=field_[0] if field_ else None)


@dataclass
class Quota:
    """Of one account."""

    requests_per_minute: int = 600
    tokens_per_day: int = 0  # read and written; 0: no limit


@dataclass
class Service:
    models: dict[str, Served]
    database: Database
    engine: EngineThread
    quota: Quota = field(default_factory=Quota)
    seconds: float = 600.0  # that a text may take

    def __post_init__(self) -> None:
        self.accounts = Accounts(self.database)
        self.conversations = Conversations(self.database)
        self.rate = Rate(self.quota.requests_per_minute)

    def start(self) -> None:
        models = list(self.models.values())
        self.engine.start([served.scheduler for served in models], [served.steady for served in models])

    def close(self) -> None:
        """End all texts, and close the database."""
        self.engine.stop()
        for served in self.models.values():
            served.close()
        self.database.close()

    def model(self, name: str) -> Served:
        if name not in self.models:
            known = ", ".join(self.models)
            message = f"model={name}: this server has {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]

    def admit(self, account: str) -> None:
        """Raises ApiError where the account has used up its requests or tokens, or the engine is dead."""
        if not self.engine.alive:
            raise ApiError(503, "the engine has stopped", kind="server_error")
        if wait := self.rate.wait(account):
            message = f"more than {self.quota.requests_per_minute} requests in a minute"
            raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=wait)
        most = self.quota.tokens_per_day
        if most and self.accounts.tokens_today(account) >= most:
            raise ApiError(
                429,
                f"the account has used its {most:,} tokens of today",
                kind="rate_limit_error",
                code="insufficient_quota",
                retry_after=self.accounts.seconds_of_day_left(),
            )

    def begin(self, request: Request, account: str, loop: asyncio.AbstractEventLoop) -> Answers:
        """Texts of a request, waiting for their turn.

        Raises ApiError.
        """
        served = self.model(request.model)
        try:
            answers = self._planned(request, self._answers(request, served, account, loop))
        except ValueError as mistake:
            raise error_of_field(mistake) from None
        try:
            answers.submit()
        except BusyError as busy:
            kind = "rate_limit_error"
            raise ApiError(429, str(busy), kind=kind, code="server_busy", retry_after=busy.retry_after) from None
        except RuntimeError as dead:
            raise ApiError(503, str(dead), kind="server_error") from None
        return answers

    def _answers(self, request: Request, served: Served, account: str, loop: asyncio.AbstractEventLoop) -> Answers:
        outbox = self.engine.outbox
        return Answers(served, account, seconds=self.seconds, streams=request.stream, outbox=outbox, loop=loop)

    def _planned(self, request: Request, answers: Answers) -> Answers:
        served = answers.served
        prompts = prompts_of(request, served)
        if len(prompts) * request.n > MOST_TEXTS:
            raise ValueError(f"n: {len(prompts)} prompts with n={request.n} are more than {MOST_TEXTS} texts")
        schema = request.response_format.schema_of_text() if request.response_format is not None else None
        for name, asked in (("logprobs", request.best), ("response_format", schema)):
            if asked is not None and name in served.lacks:
                raise ValueError(f"{name}: {served.name} has none with this engine; leave it out")
        echo = isinstance(request, CompletionRequest) and request.echo
        for prompt, shown in prompts:
            most = self._room(request, served, prompt)
            for _ in range(request.n):
                index = len(answers.answers)
                drafts = served.drafts if request.drafts is None else min(request.drafts, served.most_drafts)
                settings = request.settings(
                    max_tokens=most,
                    eos=tuple(served.model.eos),
                    drafts=0 if schema is not None else drafts,
                    index=index,
                )
                answers.add(
                    prompt,
                    settings,
                    best=request.best,
                    grammar=served.grammars.grammar(schema) if schema is not None else None,
                    reads=echo and request.best is not None,
                    experts=request.experts,
                    shown_prompt=shown if echo else "",
                )
        return answers

    @staticmethod
    def _room(request: Request, served: Served, prompt: Sequence[int]) -> int:
        """Tokens that may be written."""
        if not prompt:
            raise ValueError("prompt: must have at least one token")
        if not all(0 <= token < served.vocabulary for token in prompt):
            raise ValueError(f"prompt: token ids must lie in 0..{served.vocabulary - 1}")
        asked = request.max_tokens
        if isinstance(request, ChatRequest):
            asked = request.max_completion_tokens or asked or max(1, served.context - len(prompt))
        elif asked is None:
            asked = 16
        if len(prompt) + asked > served.context:
            message = (
                f"max_tokens={asked}: with a prompt of {len(prompt):,} tokens it exceeds the context of "
                f"{served.context:,} tokens of {served.name}"
            )
            raise ApiError(400, message, param="max_tokens", code="context_length_exceeded")
        return max(1, asked)


def prompts_of(request: Request, served: Served) -> list[tuple[list[int], str]]:
    """Ids to be continued, and the text that they were given as."""
    prompts = served.prompts
    if isinstance(request, ChatRequest):
        return [(prompts.chat([message.message() for message in request.messages]), "")]
    assert isinstance(request, CompletionRequest)
    if request.suffix and request.echo:
        raise ValueError("echo: leave it out with a suffix")
    found = []
    for given in request.prompts():
        text = given if isinstance(given, str) else served.model.decode(given)
        if request.suffix:
            found.append((prompts.infill(text, request.suffix), text))
        else:
            found.append((prompts.text(given) if isinstance(given, str) else given, text))
    return found
