"""What may reach the viewer: requests with its token, from its own page, in time, with values in limits."""

from __future__ import annotations

import json
import math
from hmac import compare_digest
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from seal_extract.errors import UsageError

if TYPE_CHECKING:
    from starlette.requests import Request

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
NAMES = ("127.0.0.1", "localhost")
REQUEST_S = 5.0  # in which a whole request has to come
MOST_BODY = 64 * 1024
MOST_CORNERS = 1000
MOST_TYPED = 4000  # characters of a list of genes
LARGEST_L0 = 1e7


class Guard:
    """Refuses requests without the token, by another name than this machine's, or from another site's page.

    All users of this machine can reach its ports. The token in the address that the command prints tells its
    user from the others; the page sets it as a cookie, so that what the page asks for has it too.

    A page elsewhere may let its own name point at 127.0.0.1 (DNS rebinding); the browser then sends that name
    as Host. It may also embed our addresses; the browser then says so in Sec-Fetch-Site.
    """

    def __init__(self, app: Any, port: int, token: str) -> None:
        self._app, self._token = app, token
        self._cookie = f"seal_extract_{port}"  # cookies are those of all ports
        self._hosts = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == 80 else set())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        why = self._refusal(scope, headers)
        if why is not None:
            await _refuse(send, why)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = dict(HEADERS)
                if scope["path"] == "/":
                    headers["Set-Cookie"] = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
                message["headers"] = [*message.get("headers", []), *_encoded(headers)]
            await send(message)

        await self._app(scope, receive, guarded)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> str | None:
        if headers.get("host", "").lower() not in self._hosts:
            return f"this viewer answers as {sorted(self._hosts)[0]} only"
        foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        other_origin = headers.get("origin", "").removeprefix("http://") not in self._hosts | {""}
        if other_origin or (foreign and scope["path"] != "/"):
            return "this viewer answers its own page only"
        given = self._tokens(scope, headers)
        if not any(compare_digest(text.encode(), self._token.encode()) for text in given):
            return "this viewer answers its user only; open the whole address that the command printed"
        return None

    def _tokens(self, scope: Any, headers: dict[str, str]) -> list[str]:
        """The tokens in the address and in the cookie of a request."""
        tokens = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            cookie = None
        return tokens if cookie is None else [*tokens, cookie.value]


async def _refuse(send: Any, why: str) -> None:
    body = json.dumps({"error": why}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **HEADERS}
    await send({"type": "http.response.start", "status": 403, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def http_with_time_limit() -> type[Any]:
    """HTTP for uvicorn that drops a connection if no whole request comes in time: half-open ones pile up."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimeLimited(H11Protocol):
        overdue: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.expect(True)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.expect(self.conn.their_state in (h11.IDLE, h11.SEND_BODY))

        def connection_lost(self, exc: Exception | None) -> None:
            self.expect(False)
            super().connection_lost(exc)

        def expect(self, more: bool) -> None:
            if more and self.overdue is None:
                self.overdue = self.loop.call_later(REQUEST_S, self.transport.abort)
            elif not more and self.overdue is not None:
                self.overdue.cancel()
                self.overdue = None

    return TimeLimited


# --- values in a request --------------------------------------------------------------------------


class NotFound(Exception):
    """There is nothing at the address of a request."""


class Query:
    """The values in the address and the body of a request, each checked when it is read.

    Raises, in each method:
        NotFound: a number in the address is something else.
        UsageError: a value, the body or its polygon is too long, malformed or impossible.
    """

    def __init__(self, request: Request, body: bytes) -> None:
        self._request, self._body = request, body

    @classmethod
    async def read(cls, request: Request) -> Query:
        """Take in a request; of a body that is too long no more is read."""
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BODY:
                raise UsageError(f"the request has more than {MOST_BODY} bytes; draw a simpler region")
        return cls(request, body)

    def number(self, name: str) -> int:
        """A whole number in the address."""
        text = self.word(name)
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise NotFound
        return int(text)

    def word(self, name: str) -> str:
        """A part of the address."""
        return str(self._request.path_params[name])

    def text(self, name: str) -> str:
        """A value of the query string; empty if it is missing."""
        text = self._request.query_params.get(name, "")
        if len(text) > MOST_TYPED:
            raise UsageError(f"{name} has {len(text)} characters; allowed: {MOST_TYPED}")
        return text

    def polygon(self) -> list[list[float]]:
        """The body's polygon: corners (x, y) in level-0 pixels."""
        try:
            corners = json.loads(self._body)["polygon"]
            polygon = [[float(x), float(y)] for x, y in corners]
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as exc:
            raise UsageError('the request is no region; allowed: {"polygon": [[x, y], ...]}') from exc
        if not 3 <= len(polygon) <= MOST_CORNERS:
            raise UsageError(f"the region has {len(polygon)} corners; allowed: 3 to {MOST_CORNERS}")
        if not all(math.isfinite(v) and abs(v) <= LARGEST_L0 for corner in polygon for v in corner):
            raise UsageError("the region has a corner that is no place on a slide; allowed: level-0 pixels")
        return polygon
