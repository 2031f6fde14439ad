"""A results folder in the browser: served to this machine alone, and of its files only the slides given.

Slides are addressed by number, the page's own files by name out of a fixed table: no path from a request
reaches the disk. Work is done by a few threads; whoever asked and left while waiting is not worked for.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from seal_extract.errors import SealExtractError, UsageError, how_to_install
from seal_extract.names import shown
from seal_extract.view.gallery import Gallery
from seal_extract.view.guard import Guard, prompt_protocol
from seal_extract.view.requests import (
    ClientLeft,
    Missing,
    path_number,
    polygon_of,
    query_text,
    read_body,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

HERE = Path(__file__).parent
SCRIPTS = (
    *("", "_api", "_combo", "_draw", "_figure", "_legend", "_map", "_panels", "_parts", "_regions", "_tiles"),
)
OWN_FILES = ("viewer.html", "viewer.css", "viewer_icon.svg", *(f"viewer{part}.js" for part in SCRIPTS))
LEAFLET = ("leaflet.js", "leaflet.css")
MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
KEPT = "private, max-age=86400, immutable"  # the page asks for it by a version of its own
WORKERS = max(2, min(4, os.cpu_count() or 1))

T = TypeVar("T")
Answer = Callable[["Request"], Awaitable["Response"]]


def make_app(gallery: Gallery, port: int, token: str) -> Guard:
    """The application that `serve` runs.

    Raises:
        UsageError: its libraries are not installed.
    """
    _check_installed()
    from starlette.applications import Starlette
    from starlette.routing import Route

    desk = _Desk(gallery)
    slide = "/api/slides/{slide}"
    routes = [
        Route("/", desk.page),
        Route("/static/{name}", desk.static),
        Route("/api/slides", desk.slides),
        Route("/api/genes", desk.genes),
        Route("/api/suggest", desk.suggest),
        Route("/api/check", desk.check),
        Route(slide, desk.slide),
        Route(f"{slide}/thumbnail", desk.thumbnail),
        Route(f"{slide}/tiles/{{zoom}}/{{column}}/{{row}}", desk.tile),
        Route(f"{slide}/patches", desk.patches),
        Route(f"{slide}/patches/{{patch}}", desk.patch),
        Route(f"{slide}/patches/{{patch}}/image", desk.patch_image),
        Route(f"{slide}/patches/{{patch}}/alike", desk.alike),
        Route(f"{slide}/layers/{{kind}}/{{part}}", desk.layer),
        Route(f"{slide}/region", desk.region, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes, exception_handlers=_handlers()), port, token)


class _Desk:
    """Requests to questions, answers to responses."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._files = _page_files()
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="viewer")
        self._free = asyncio.Semaphore(WORKERS)

    async def _work(self, request: Request, work: Callable[[], T]) -> T:
        """Let a thread do it when one is free, unless the client has left by then."""
        async with self._free:
            if await request.is_disconnected():
                raise ClientLeft
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _json(self, request: Request, work: Callable[[], Any]) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse(await self._work(request, work), headers={"Cache-Control": "no-store"})

    async def _bytes(self, request: Request, work: Callable[[], bytes], media: str) -> Response:
        return _kept(request, await self._work(request, work), media)

    # --- the page -------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The one page."""
        return self._file("viewer.html")

    async def static(self, request: Request) -> Response:
        """Its style and scripts."""
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        from starlette.responses import Response

        if name not in self._files:
            raise Missing
        content, media = self._files[name]
        return Response(content, media_type=media, headers={"Cache-Control": "no-cache"})

    # --- slides ---------------------------------------------------------------------------------------

    async def slides(self, request: Request) -> Response:
        """The list."""
        return await self._json(request, self._gallery.slides)

    async def slide(self, request: Request) -> Response:
        """One slide."""
        index = path_number(request, "slide")
        return await self._json(request, lambda: self._gallery.slide(index))

    async def thumbnail(self, request: Request) -> Response:
        """Its small picture."""
        index = path_number(request, "slide")
        return await self._bytes(request, lambda: self._gallery.thumbnail(index), "image/jpeg")

    async def tile(self, request: Request) -> Response:
        """A tile."""
        place = [path_number(request, name) for name in ("slide", "zoom", "column", "row")]
        content, media = await self._work(request, lambda: self._gallery.tile(*place))
        return _kept(request, content, media)

    async def patches(self, request: Request) -> Response:
        """Where its patches lie."""
        index = path_number(request, "slide")
        return await self._bytes(request, lambda: self._gallery.patches(index), "application/octet-stream")

    async def layer(self, request: Request) -> Response:
        """A layer's legend, picture or values."""
        index, kind, of = (
            path_number(request, "slide"),
            request.path_params["kind"],
            query_text(request, "of"),
        )
        part = request.path_params["part"]
        if part == "picture":
            return await self._bytes(request, lambda: self._gallery.layer_png(index, kind, of), "image/png")
        if part == "values":
            return await self._bytes(
                request, lambda: self._gallery.layer_values(index, kind, of), "application/octet-stream"
            )
        if part != "legend":
            raise Missing
        return await self._json(request, lambda: self._gallery.layer(index, kind, of).legend)

    # --- patches and regions --------------------------------------------------------------------------

    async def patch(self, request: Request) -> Response:
        """A patch and its genes."""
        index, row = path_number(request, "slide"), path_number(request, "patch")
        return await self._json(request, lambda: self._gallery.patch(index, row))

    async def patch_image(self, request: Request) -> Response:
        """Its picture."""
        index, row = path_number(request, "slide"), path_number(request, "patch")
        return await self._bytes(request, lambda: self._gallery.patch_image(index, row), "image/jpeg")

    async def alike(self, request: Request) -> Response:
        """The patches that look like it."""
        index, row, scope = (
            path_number(request, "slide"),
            path_number(request, "patch"),
            query_text(request, "scope"),
        )
        return await self._json(request, lambda: self._gallery.alike(index, row, scope))

    async def region(self, request: Request) -> Response:
        """What a polygon holds."""
        index, polygon = path_number(request, "slide"), polygon_of(await read_body(request))
        return await self._json(request, lambda: self._gallery.region(index, polygon))

    # --- genes ----------------------------------------------------------------------------------------

    async def genes(self, request: Request) -> Response:
        """Whether there are any."""
        return await self._json(request, self._gallery.genes.state)

    async def suggest(self, request: Request) -> Response:
        """What a name may go on as."""
        typed = query_text(request, "typed")
        return await self._json(request, lambda: self._gallery.genes.suggest(typed))

    async def check(self, request: Request) -> Response:
        """Whether what was typed can be shown, and if not what is near."""
        typed = query_text(request, "typed")
        return await self._json(request, lambda: self._gallery.genes.check(typed))


def _handlers() -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """Every failure as one line of JSON."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    def line(status: int, message: str) -> Response:
        return JSONResponse({"error": shown(message)}, status, headers={"Cache-Control": "no-store"})

    async def refused(_: Request, exc: Exception) -> Response:
        return line(400 if isinstance(exc, UsageError) else 422, " ".join(str(exc).split()))

    async def missing(_: Request, exc: Exception) -> Response:
        return line(404, "there is nothing at this address")

    async def other(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return line(
            exc.status_code, "there is nothing at this address" if exc.status_code == 404 else exc.detail
        )

    async def left(_: Request, exc: Exception) -> Response:
        return line(499, "the client left")

    async def unexpected(_: Request, exc: Exception) -> Response:
        return line(500, f"unexpected {type(exc).__name__}; start with --debug to see where")

    return {
        SealExtractError: refused,
        Missing: missing,
        ClientLeft: left,
        HTTPException: other,
        Exception: unexpected,
    }


def _kept(request: Request, content: bytes, media: str) -> Response:
    """Kept by the browser where the page gave the address a version."""
    from starlette.responses import Response

    keep = KEPT if request.query_params.get("v") else "no-store"
    return Response(content, media_type=media, headers={"Cache-Control": keep})


# --- the page's files -------------------------------------------------------------------------------


def _page_files() -> dict[str, tuple[bytes, str]]:
    """Content and media type of all that the page loads, read once."""
    from xstatic.pkg import leaflet

    files = [HERE / name for name in OWN_FILES] + [Path(leaflet.BASE_DIR) / name for name in LEAFLET]
    return {path.name: (path.read_bytes(), MEDIA[path.suffix]) for path in files}


def _check_installed() -> None:
    try:
        import starlette
        import uvicorn  # noqa: F401
        from xstatic.pkg import leaflet  # noqa: F401
    except ImportError as exc:
        raise UsageError(f"the viewer needs {exc.name}; {how_to_install('view')}") from exc
    del starlette


# --- running ----------------------------------------------------------------------------------------


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 takes a free one.

    Raises:
        UsageError: the port is in use, or may not be used.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as exc:
        sock.close()
        reason = getattr(exc, "strerror", None) or exc
        raise UsageError(f"port {port}: {reason}; type another --port, or none for a free one") from exc
    return sock


def make_server(gallery: Gallery, sock: socket.socket, token: str, *, debug: bool = False) -> Any:
    """The server that `serve` runs, of uvicorn."""
    app = make_app(gallery, sock.getsockname()[1], token)
    import uvicorn

    config = uvicorn.Config(
        app,
        http=prompt_protocol(),
        log_level="error" if debug else "critical",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        backlog=2048,
        server_header=False,
    )
    return uvicorn.Server(config)


def serve(
    gallery: Gallery,
    sock: socket.socket,
    token: str,
    started: Callable[[], None] = lambda: None,
    *,
    debug: bool = False,
) -> None:
    """Answer whoever has the token, on a socket from `listen`, until Ctrl-C.

    ``started`` is called once it answers. With ``debug``, what was unexpected goes to standard error with its
    traceback.

    Raises:
        UsageError: its libraries are not installed.
    """
    server = make_server(gallery, sock, token, debug=debug)
    _allow_files()
    with _told(server, started):
        server.run(sockets=[sock])


@contextmanager
def _told(server: Any, started: Callable[[], None]) -> Iterator[None]:
    """Call ``started`` when the server has begun."""
    begin = server.startup

    async def startup(sockets: Any = None) -> None:
        await begin(sockets=sockets)
        started()

    server.startup = startup
    yield


def _allow_files() -> None:
    """Let this process hold some thousand connections, where the system lets it choose."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
