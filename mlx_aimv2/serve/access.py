"""Who may use the server, and how much of it: an ASGI middleware in front of every route.

As in Jupyter: a token printed with the page's address, kept by the browser in a cookie, or sent as `Authorization:
Bearer`. Host and Origin are checked, so neither another site's page nor a name pointed at this machine (DNS rebinding)
can use the cookie. The browser loads files only from this server.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, TypeAlias
from urllib.parse import parse_qs

from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 32 << 20
"""Bytes of a request."""

MAX_SECONDS = 30.0
"""For a request to arrive."""

MAX_AT_ONCE = 96
"""Requests that are answered at once, the thumbnails included."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Lets through to `app` the requests that may pass, and answers the others."""

    def __init__(self, app: App, *, token: str, hosts: Iterable[str] | None, port: int) -> None:
        """`hosts` are the names that the server has; None where others than this machine may use it by any name."""
        self.app, self.token = app, token
        self.hosts = None if hosts is None else {f"{host}:{port}" for host in hosts}
        self.cookie = f"mlx-aimv2-{port}"
        self.running = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self._answer(scope, receive, _with_headers(send))
            except HTTPException as error:
                await _refusal(error.status_code, error.detail)(scope, receive, _with_headers(send))

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        response: Response | None = self._refused(headers)
        given = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("token")
        if response is None and scope["path"] == "/" and given:
            if not self._is_token(given[0]):
                response = _refusal(401, "this is not the token that mlx-aimv2 serve printed")
            else:  # the address that is left in the browser's history opens nothing without the cookie
                response = RedirectResponse("/", 303)
                response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
        elif response is None and not self._knows(headers):
            response = _refusal(401, "open the address that mlx-aimv2 serve printed, with its ?token=…")
        if response is None and self.running >= MAX_AT_ONCE:
            response = _refusal(503, f"{MAX_AT_ONCE} requests are being answered: try again in a moment")
        if response is not None:
            await response(scope, receive, send)
            return
        self.running += 1
        try:
            await self.app(scope, _Bounded(receive, headers), send)
        finally:
            self.running -= 1

    def _refused(self, headers: dict[str, str]) -> Response | None:
        """What a request hears that comes from elsewhere."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and host.lower() not in self.hosts:
            return _refusal(403, f"the server is at {min(self.hosts)}, not at {host[:80]}")
        if origin is not None and origin.lower() != f"http://{host.lower()}":
            return _refusal(403, "another page may not use this server")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _refusal(403, "another page may not use this server")
        return None

    def _knows(self, headers: dict[str, str]) -> bool:
        """Whether a request brings the token, as a cookie or as a bearer."""
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            cookie = None
        given = [bearer if kind.lower() == "bearer" else "", cookie.value if cookie is not None else ""]
        return any(map(self._is_token, given))

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode("utf-8", "replace"), self.token.encode())


class _Bounded:
    """`receive` for a body that is neither larger nor slower than one may be."""

    def __init__(self, receive: Receive, headers: dict[str, str]) -> None:
        self.receive = receive
        self.left = MAX_BODY
        self.is_whole = False
        self.deadline = asyncio.get_running_loop().time() + MAX_SECONDS
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")[:20]) > MAX_BODY:
            raise HTTPException(413, f"a request has at most {MAX_BODY >> 20} MB")

    async def __call__(self) -> Message:
        if self.is_whole:
            return await self.receive()
        left = self.deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.0, left))
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {MAX_SECONDS:g} seconds") from None
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise HTTPException(413, f"a request has at most {MAX_BODY >> 20} MB")
        self.is_whole = message["type"] == "http.request" and not message.get("more_body", False)
        return message


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message["headers"] = [*message.get("headers", []), *own]
        await send(message)

    return wrapped


def _refusal(status: int, words: str) -> Response:
    if status == 401:
        return PlainTextResponse(words, status)
    return error_response(status, words)


def error_response(status: int, words: str) -> JSONResponse:
    """An error as OpenAI's API has it; one that says "later" says when."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"retry-after": "1"} if status == 503 else None
    return JSONResponse({"error": {"message": words, "type": kind}}, status, headers)
