"""A server with the part of vLLM's API that `VLLMEngine` uses: after token n comes n + 1, below 50, then an end.

It writes what it was asked, and which texts were broken off, into its folder.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

REFUSED = 13
"""A prompt of this token alone gets an error within the stream."""
app = FastAPI()


def note(entry: Any) -> None:
    with Path("asked.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


@app.get("/health")
def health() -> str:
    return "ok"


@app.post("/v1/completions")
async def completions(asked: dict[str, Any]) -> StreamingResponse:
    note(asked)
    return StreamingResponse(events(asked), media_type="text/event-stream")


async def events(asked: dict[str, Any]) -> AsyncIterator[str]:
    token, complete = asked["prompt"][-1], False
    try:
        for count in range(1, asked["max_tokens"] + 1):
            await asyncio.sleep(0.002)
            token += 1
            if asked["prompt"] == [REFUSED]:
                yield f"data: {json.dumps({'error': {'message': 'no'}})}\n\n"
                return
            last = count == asked["max_tokens"]
            finish = "stop" if token >= 50 else "length" if last else None
            ids = [] if token >= 50 else [token]
            yield f"data: {json.dumps({'choices': [{'token_ids': ids, 'text': '', 'finish_reason': finish}]})}\n\n"
            if finish:
                break
        complete = True
        yield "data: [DONE]\n\n"
    finally:
        if not complete:
            note("broken off")


if __name__ == "__main__":
    arguments = dict(zip(sys.argv, sys.argv[1:]))
    if "--die" in sys.argv:
        raise SystemExit("ValueError: no such model")
    uvicorn.run(app, uds=arguments["--uds"], log_level="warning")
