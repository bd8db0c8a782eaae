"""The web application: routes, errors in OpenAI's format, and the gate before them."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from dsv3.serving.chat_server import ApiError, Service
from dsv3.serving.gate import Gate, Policy
from dsv3.serving.login_routes import Door, login_router
from dsv3.serving.metrics import registry
from dsv3.serving.openai_format import error
from dsv3.serving.openai_routes import openai_router
from dsv3.serving.pages import pages_router, static_files


def build_application(
    service: Service, *, policy: Policy, token: str | None = None, origins: Sequence[str] = ()
) -> FastAPI:
    """`token`: of `/enter`, once. `origins`: sites whose pages may use the API with a key."""
    app = FastAPI(title="dsv3", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(openai_router(service))
    app.include_router(login_router(service, policy, Door(service, token)))
    app.include_router(pages_router(service))
    app.mount("/static", static_files())
    app.add_middleware(Gate, accounts=service.accounts, policy=policy)
    if origins:  # the outermost: a browser asks without a key whether it may ask
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    figures = registry(service.models)

    @app.get("/health")
    def health() -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, status_code=200 if alive else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(figures), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    return app


def _api_error(request: Request, raised: Any) -> Response:
    headers = {"Retry-After": str(raised.retry_after)} if raised.retry_after is not None else None
    return JSONResponse(raised.body, status_code=raised.status, headers=headers)


def _invalid(request: Request, raised: Any) -> Response:
    """The first mistake; what was given is not repeated."""
    first = raised.errors()[0]
    places = [str(place) for place in first["loc"][1:]]
    message = str(first["msg"]).removeprefix("Value error, ")
    param = ".".join(places) or message.partition(":")[0]
    shown = f"{param}: {message}" if places else message
    return JSONResponse(error(shown, kind="invalid_request_error", param=param), status_code=400)


def _http_error(request: Request, raised: Any) -> Response:
    body = error(str(raised.detail), kind="invalid_request_error")
    return JSONResponse(body, status_code=raised.status_code, headers=raised.headers)
