"""What may come in with a request to the viewer: numbers, short texts, polygons, all within limits."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from seal_extract.errors import UsageError

if TYPE_CHECKING:
    from starlette.requests import Request

MOST_BODY = 64 * 1024
MOST_CORNERS = 1000
MOST_TYPED = 4000  # characters of a list of genes
LARGEST_L0 = 1e7  # of a coordinate: no slide is so wide


class ClientLeft(Exception):
    """Whoever asked has gone."""


class Missing(Exception):
    """There is nothing at that address."""


def path_number(request: Request, name: str) -> int:
    """A whole number out of the address.

    Raises:
        Missing: it is none.
    """
    text = request.path_params[name]
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Missing
    return int(text)


def query_text(request: Request, name: str) -> str:
    """A word behind the question mark; empty where it is not there.

    Raises:
        UsageError: it is too long.
    """
    text = request.query_params.get(name, "")
    if len(text) > MOST_TYPED:
        raise UsageError(f"{name} has {len(text)} characters; allowed: {MOST_TYPED}")
    return text


async def read_body(request: Request) -> bytes:
    """The body, of which no more is taken than is allowed.

    Raises:
        UsageError: it is longer.
    """
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY:
            raise UsageError(f"the request has more than {MOST_BODY} bytes; draw a simpler region")
    return body


def polygon_of(body: bytes) -> list[list[float]]:
    """The corners in ``{"polygon": [[x, y], ...]}``, in level-0 pixels.

    Raises:
        UsageError: it is something else, has too few or too many corners, or one that is no place.
    """
    try:
        corners = json.loads(body)["polygon"]
        polygon = [[float(x), float(y)] for x, y in corners]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as exc:
        raise UsageError('the request is no region; allowed: {"polygon": [[x, y], ...]}') from exc
    if not 3 <= len(polygon) <= MOST_CORNERS:
        raise UsageError(f"the region has {len(polygon)} corners; allowed: 3 to {MOST_CORNERS}")
    if not all(math.isfinite(v) and abs(v) <= LARGEST_L0 for corner in polygon for v in corner):
        raise UsageError("the region has a corner that is no place on a slide; allowed: level-0 pixels")
    return polygon
