"""The gate before every route: host names, body sizes, who asks, forged requests, security headers.

Everything but `OPEN` needs a session or an API key. A route that is added later is closed like all others.
"""

import hmac
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from dsv3.serving.accounts import Accounts
from dsv3.serving.openai_format import error

OPEN = frozenset({"/login", "/enter", "/health", "/static/login.js", "/static/style.css", "/static/icon.svg"})
OWN_NAMES = ("localhost",)
LARGEST_BODY = 2 * 2**20
TOO_LARGE = f"the body may have {LARGEST_BODY:,} bytes"
READS = ("GET", "HEAD")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


class Identity(NamedTuple):
    """Who asks."""

    account: str
    csrf: str | None  # of a session; None: an API key
    session: str | None


@dataclass
class Policy:
    hosts: Collection[str] = ()  # names under which the server may be asked, besides this machine's and addresses
    cookie: str = "dsv3-session"
    secure: bool = False  # cookies for HTTPS alone, and browsers told to stay with it: behind a TLS proxy


class Gate:
    """ASGI middleware."""

    def __init__(self, app: Any, *, accounts: Accounts, policy: Policy) -> None:
        self.app, self.accounts, self.policy = app, accounts, policy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no WebSockets

        async def guarded_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if self.policy.secure:
                    headers["Strict-Transport-Security"] = "max-age=31536000"
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, guarded_send)
            return
        await self.app(scope, limited(receive), guarded_send)

    def _refusal(self, scope: Any) -> Response | None:
        """What to answer instead of the route. Who asks is noted in `scope["state"]`."""
        request = Request(scope)
        if not may_be_host(request.headers.get("host", ""), self.policy.hosts):
            return refused(
                403, "this server does not answer under this host name; see hosts= of `python -m dsv3 serve`"
            )
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return refused(413, TOO_LARGE)
        identity = self._identity(request.headers, request.cookies)
        scope.setdefault("state", {})["identity"] = identity
        path, reads = scope["path"], request.method in READS
        if not reads and not is_own_origin(request.headers) and (identity is None or identity.session is not None):
            return refused(403, "a request from another site")
        if identity is None:
            if path in OPEN:
                return None
            if path == "/" and reads:
                return RedirectResponse("/login", status_code=303)
            return refused(401, "log in, or give an API key: Authorization: Bearer dsv3-...", code="invalid_api_key")
        if identity.session is not None and not reads and path not in OPEN:
            given = request.headers.get("x-csrf-token", "")
            if not hmac.compare_digest(given.encode(), (identity.csrf or "").encode()):
                return refused(403, "the X-CSRF-Token header is missing or wrong; reload the page")
        return None

    def _identity(self, headers: Headers, cookies: dict[str, str]) -> Identity | None:
        """An API key that is given counts alone, right or wrong."""
        authorization = headers.get("authorization")
        if authorization is not None:
            scheme, _, key = authorization.partition(" ")
            account = self.accounts.owner_of_key(key.strip()) if scheme.lower() == "bearer" else None
            return Identity(account, None, None) if account is not None else None
        token = cookies.get(self.policy.cookie)
        session = self.accounts.session(token) if token else None
        return Identity(session.account, session.csrf, token) if session is not None else None


def may_be_host(header: str, names: Collection[str]) -> bool:
    """Whether a Host header is an address, this machine, or one of the names: no other name, which may be a foreign
    site's that was made to resolve to this machine."""
    try:
        host = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if host in OWN_NAMES or host in names:
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_own_origin(headers: Headers) -> bool:
    """Whether a browser says that the request comes from a page of this server, or nothing says that it does not."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def limited(receive: Any) -> Any:
    """`receive`, until the body is larger than may be."""
    taken = 0

    async def counted() -> Any:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > LARGEST_BODY:
            raise HTTPException(413, TOO_LARGE)
        return message

    return counted


def refused(status: int, message: str, *, code: str | None = None) -> Response:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(error(message, kind=kind, code=code), status_code=status, headers=headers)
