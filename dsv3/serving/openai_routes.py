"""/v1: OpenAI's API."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dsv3.serving.answers_stream import Answer, Answers
from dsv3.serving.chat_server import ApiError, Service
from dsv3.serving.gate import Identity
from dsv3.serving.openai_format import ChatFormat, Format, TextFormat, error, timings, usage
from dsv3.serving.requests import ChatRequest, CompletionRequest
from dsv3.serving.served_model import Served

BROKEN = {
    "timeout": (504, "the text was not complete in time"),
    "failed": (503, "the engine has stopped"),
    "cancelled": (503, "the text was cancelled"),
}


def openai_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(served) for served in service.models.values()]}

    @router.get("/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        return card(service.model(name))

    @router.post("/completions")
    async def completions(given: CompletionRequest, request: Request) -> Response:
        return await respond(service, given, request, TextFormat())

    @router.post("/chat/completions")
    async def chat(given: ChatRequest, request: Request) -> Response:
        return await respond(service, given, request, ChatFormat())

    return router


def card(served: Served) -> dict[str, Any]:
    """`max_model_len` as vLLM names it."""
    return {
        "id": served.name, "object": "model", "created": served.opened, "owned_by": "dsv3",
        "max_model_len": served.context, "drafts": served.drafts, "experts": served.experts,
        "expert_layers": served.expert_layers,
    }  # fmt: skip


async def respond(
    service: Service, given: CompletionRequest | ChatRequest, request: Request, format: Format
) -> Response:
    identity: Identity = request.state.identity
    service.admit(identity.account)
    answers = await asyncio.to_thread(service.begin, given, identity.account, asyncio.get_running_loop())
    head = {"id": format.prefix + secrets.token_hex(12), "created": int(time.time()), "model": given.model}
    ending = Ending(service, answers, address=request.client.host if request.client else "")
    if given.stream:
        return Stream(events(answers, head, format, with_usage=given.includes_usage), ending)
    try:
        return await whole(answers, head, format, request)
    finally:
        ending()


class Ending:
    """What has to be done when a request is over, however it ends: stop what still runs, count tokens."""

    def __init__(self, service: Service, answers: Answers, *, address: str) -> None:
        self.service, self.answers, self.address = service, answers, address

    def __call__(self) -> None:
        answers, accounts = self.answers, self.service.accounts
        answers.cancel()
        accounts.count_tokens(answers.account, answers.tokens)
        detail = f"{answers.served.name} texts={len(answers.answers)} tokens={answers.tokens}"
        accounts.note("completion", account=answers.account, address=self.address, detail=detail)


class Stream(StreamingResponse):
    """Server-sent events. `ending` is called even where the client has gone before the first one."""

    def __init__(self, content: AsyncIterator[str], ending: Ending) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self.ending = ending

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ending()


async def events(answers: Answers, head: dict[str, Any], format: Format, *, with_usage: bool) -> AsyncIterator[str]:
    prompts = answers.served.prompts
    beginning = json.dumps({**head, "object": format.chunk}).removesuffix("}")  # the same in every event

    def line(choices: str, more: str = "") -> str:
        return f'data: {beginning}, "choices": [{choices}]{more}}}\n\n'

    def event(answer: Answer, start: int, text: str) -> str:
        if answer.end in BROKEN:
            status, message = BROKEN[answer.end]
            return f"data: {json.dumps(error(message, kind='server_error', code=str(status)))}\n\n"
        return line(json.dumps(format.piece(answer, text, start, prompts) | routed(answer, start, answers.served)))

    for answer in answers.answers:
        if (opening := format.opening(answer, prompts)) is not None:
            yield line(json.dumps(opening))
    async for pieces in answers.news():
        yield "".join(event(*piece) for piece in pieces)
        if any(piece.answer.end in BROKEN for piece in pieces):
            return
    if with_usage:
        figures = {"usage": usage(answers), "timings": timings(answers, answers.served.scheduler.clock())}
        yield line("", ", " + json.dumps(figures)[1:-1])
    yield "data: [DONE]\n\n"


def routed(answer: Answer, start: int, served: Served) -> dict[str, Any]:
    """Tokens from `start` on, with the experts of each, where they were asked for."""
    if not answer.job.experts:
        return {}
    texts = [served.prompts.token_bytes(token).decode(errors="replace") for token in answer.ids[start:]]
    experts = answer.experts_of(start, len(answer.ids))
    return {"tokens": [{"text": text, "experts": chosen} for text, chosen in zip(texts, experts, strict=True)]}


async def whole(answers: Answers, head: dict[str, Any], format: Format, request: Request) -> Response:
    """One response, or none where the client goes."""

    async def collect() -> None:
        async for pieces in answers.news():
            for answer, _, _ in pieces:
                if answer.end in BROKEN:
                    status, message = BROKEN[answer.end]
                    raise ApiError(status, message, kind="server_error")

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(collect()), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return Response(status_code=499)  # as nginx logs it; nobody reads it
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
    served = answers.served
    choices = [{**format.choice(answer, served.prompts), **routed(answer, 0, served)} for answer in answers.answers]
    more = {"usage": usage(answers), "timings": timings(answers, served.scheduler.clock())}
    return JSONResponse({**head, "object": format.whole, "choices": choices, **more})
