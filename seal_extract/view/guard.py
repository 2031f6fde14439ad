"""What every request must pass, a token and this machine's own address, and every response carries."""

from __future__ import annotations

import json
from hmac import compare_digest
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

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
REQUEST_S = 5.0  # for a request to come in whole


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
        said: dict[str, str] = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        why = self._refusal(scope, said)
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

    def _refusal(self, scope: Any, said: dict[str, str]) -> str | None:
        if said.get("host", "").lower() not in self._hosts:
            return f"this viewer answers as {sorted(self._hosts)[0]} only"
        if said.get("origin", "").removeprefix("http://") not in self._hosts | {""}:
            return "this viewer answers its own page only"
        foreign = said.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if foreign and scope["path"] != "/":
            return "this viewer answers its own page only"
        if not any(compare_digest(text.encode(), self._token.encode()) for text in self._tokens(scope, said)):
            return "this viewer answers its user only; open the whole address that the command printed"
        return None

    def _tokens(self, scope: Any, said: dict[str, str]) -> list[str]:
        """What a request gives as the token: in its address, or as the cookie."""
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        try:
            cookie = SimpleCookie(said.get("cookie", "")).get(self._cookie)
        except CookieError:
            cookie = None
        return asked if cookie is None else [*asked, cookie.value]


async def _refuse(send: Any, why: str) -> None:
    body = json.dumps({"error": why}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **HEADERS}
    await send({"type": "http.response.start", "status": 403, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def prompt_protocol() -> type[Any]:
    """HTTP that drops a connection on which no whole request comes in time, since half-open ones pile up."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Prompt(H11Protocol):
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

    return Prompt
