"""The web chat's files, and the routes that keep its conversations."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field

from dsv3.serving.chat_server import ApiError, Service

STATIC = Path(__file__).parent / "static"


class Conversation(BaseModel):
    title: str = Field(max_length=200)
    content: dict[str, Any]


def pages_router(service: Service) -> APIRouter:
    router, kept = APIRouter(), service.conversations

    def missing() -> ApiError:
        return ApiError(404, "there is no such conversation", code="not_found")

    @router.get("/")
    def chat() -> Response:
        return FileResponse(STATIC / "chat.html")

    @router.get("/api/conversations")
    def listed(request: Request) -> list[dict[str, Any]]:
        return kept.listed(request.state.identity.account)

    @router.get("/api/export")
    def export(request: Request) -> Response:
        headers = {"Content-Disposition": 'attachment; filename="conversations.json"'}
        return JSONResponse(kept.export(request.state.identity.account), headers=headers)

    @router.get("/api/conversations/{id}")
    def get(id: str, request: Request) -> dict[str, Any]:
        found = kept.get(request.state.identity.account, id)
        if found is None:
            raise missing()
        return found

    @router.post("/api/conversations")
    def add(given: Conversation, request: Request) -> dict[str, Any]:
        try:
            return {"id": kept.add(request.state.identity.account, given.title, given.content)}
        except ValueError as mistake:
            raise ApiError(400, str(mistake)) from None

    @router.put("/api/conversations/{id}")
    def change(id: str, given: Conversation, request: Request) -> dict[str, Any]:
        try:
            known = kept.change(request.state.identity.account, id, given.title, given.content)
        except ValueError as mistake:
            raise ApiError(400, str(mistake)) from None
        if not known:
            raise missing()
        return {"id": id}

    @router.delete("/api/conversations/{id}")
    def delete(id: str, request: Request) -> dict[str, Any]:
        if not kept.delete(request.state.identity.account, id):
            raise missing()
        return {}

    @router.delete("/api/conversations")
    def delete_all(request: Request) -> dict[str, Any]:
        return {"deleted": kept.delete(request.state.identity.account, None)}

    return router


def static_files() -> StaticFiles:
    return StaticFiles(directory=STATIC)
