"""What every request must pass and every response carries: this machine's own address, a strict policy."""

from __future__ import annotations

import json
from typing import Any

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


class Guard:
    """Refuses requests that came by another name than this machine's own, or from another site's page.

    A page elsewhere may let its own name point at 127.0.0.1 (DNS rebinding); the browser then sends that name
    as Host. It may also embed our addresses; the browser then says so in Sec-Fetch-Site.
    """

    def __init__(self, app: Any, port: int) -> None:
        self._app = app
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
                message["headers"] = [*message.get("headers", []), *_encoded(HEADERS)]
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
        return None


async def _refuse(send: Any, why: str) -> None:
    body = json.dumps({"error": why}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **HEADERS}
    await send({"type": "http.response.start", "status": 403, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]
