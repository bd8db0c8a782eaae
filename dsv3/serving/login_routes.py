"""Log-in, log-out, and change of password."""

import asyncio
import hmac
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from pydantic import BaseModel

from dsv3.serving.accounts import LOCAL, SESSION_SECONDS
from dsv3.serving.chat_server import ApiError, Service
from dsv3.serving.gate import Identity, Policy
from dsv3.serving.pages import STATIC
from dsv3.serving.throttle import Failures

AT_ONCE, WAITING = 2, 16
"""Passwords that are verified at once, 64 MiB each, and that wait for it."""


class Credentials(BaseModel):
    name: str
    password: str


class NewPassword(BaseModel):
    old: str
    new: str


class Door:
    """The one-time token of this machine's user, and passwords verified a few at a time."""

    def __init__(self, service: Service, token: str | None) -> None:
        self.service, self.token = service, token
        self.of_pair, self.of_address = Failures(free=5), Failures(free=20)
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._verifying = 0

    def take(self, token: str) -> bool:
        """Whether it is the token; it is used up then."""
        if self.token is None or not hmac.compare_digest(token.encode(), self.token.encode()):
            return False
        self.token = None
        return True

    async def verify(self, name: str, password: str, address: str) -> bool:
        """Raises ApiError where there were too many failures, or too many wait."""
        pair = f"{name[:40]} {address}"
        wait = max(self.of_pair.wait(pair), self.of_address.wait(address))
        if wait or self._verifying >= AT_ONCE + WAITING:
            message = "too many failed log-ins" if wait else "too many log-ins at once"
            raise ApiError(429, f"{message}; wait {wait or 1} s", kind="rate_limit_error", retry_after=wait or 1)
        self.of_pair.begin(pair)
        self.of_address.begin(address)
        self._verifying += 1
        try:
            async with self._slots:
                right = await asyncio.to_thread(self.service.accounts.verify, name, password)
        finally:
            self._verifying -= 1
        if right:
            self.of_pair.succeeded(pair)  # not of the address, or an account of one's own would buy more tries
        return right


def login_router(service: Service, policy: Policy, door: Door) -> APIRouter:
    router, accounts = APIRouter(), service.accounts

    def address_of(request: Request) -> str:
        return request.client.host if request.client else ""

    def begin_session(response: Response, account: str) -> Response:
        response.set_cookie(
            policy.cookie,
            accounts.new_session(account),
            max_age=int(SESSION_SECONDS),
            httponly=True,
            samesite="strict",
            secure=policy.secure,
        )
        return response

    @router.get("/login")
    def page() -> Response:
        return FileResponse(STATIC / "login.html")

    @router.get("/enter")
    def enter(request: Request, token: str = "") -> Response:
        if not door.take(token):
            accounts.note("token refused", account="", address=address_of(request))
            return RedirectResponse("/login?used", status_code=303)
        accounts.note("log-in by token", account=LOCAL, address=address_of(request))
        return begin_session(RedirectResponse("/", status_code=303), LOCAL)

    @router.post("/login")
    async def log_in(given: Credentials, request: Request) -> Response:
        address = address_of(request)
        right = await door.verify(given.name, given.password, address)
        accounts.note("log-in" if right else "log-in failed", account=given.name, address=address)
        if not right:
            raise ApiError(401, "wrong name or password", kind="authentication_error")
        return begin_session(JSONResponse({"account": given.name}), given.name)

    @router.post("/logout")
    def log_out(request: Request) -> Response:
        identity: Identity = request.state.identity
        if identity.session is not None:
            accounts.end_session(identity.session)
        accounts.note("log-out", account=identity.account, address=address_of(request))
        response = JSONResponse({})
        response.delete_cookie(policy.cookie, httponly=True, samesite="strict", secure=policy.secure)
        return response

    @router.post("/api/password")
    async def change_password(given: NewPassword, request: Request) -> Response:
        identity: Identity = request.state.identity
        if identity.session is None:
            raise ApiError(403, "an API key cannot change the password; log in")
        if not await door.verify(identity.account, given.old, address_of(request)):
            raise ApiError(403, "old: wrong password", param="old")
        try:
            await asyncio.to_thread(accounts.set_password, identity.account, given.new)
        except ValueError as mistake:
            raise ApiError(400, str(mistake), param="new") from None
        accounts.note("password changed", account=identity.account, address=address_of(request))
        return begin_session(JSONResponse({}), identity.account)

    @router.get("/api/me")
    def me(request: Request) -> dict[str, Any]:
        identity: Identity = request.state.identity
        return {"account": identity.account, "csrf": identity.csrf, "has_password": identity.account != LOCAL}

    return router
