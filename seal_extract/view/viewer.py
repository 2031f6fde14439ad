"""A results folder in the browser: served to this machine alone, and of its files only the slides given.

Slides are addressed by number and the page's own files by name in a fixed table, so that no path from a
request reaches the disk. A few threads do the work; a request is dropped if its client disconnects while it
waits for one.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from seal_extract.errors import SealExtractError, UsageError, how_to_install
from seal_extract.names import shown
from seal_extract.view.gallery import Gallery
from seal_extract.view.guard import Guard, NotFound, Query, http_with_time_limit
from seal_extract.view.pages import VIEWER_SCRIPTS, VOLUME_SCRIPTS, leaflet_folder, render, web_text

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MEDIA = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
BYTES = "application/octet-stream"
CACHED = "private, max-age=86400, immutable"  # for addresses with a version, which the page makes
BACKLOG = 2048  # connections that wait
WORKERS = max(2, min(4, os.cpu_count() or 1))

Answer = Callable[[Query], Any]  # to JSON, or (content, media type)
Endpoint = Callable[["Request"], Awaitable["Response"]]


def make_app(gallery: Gallery, port: int, token: str) -> Guard:
    """The application of the server; a volume is shown first then, and its planes as slides at ``/slides``.

    Raises:
        UsageError: its libraries are not installed.
    """
    _check_installed()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route

    workers = _Workers()
    answers = {path: workers.endpoint(answer) for path, answer in _answers(gallery).items()}
    region = workers.endpoint(lambda q: gallery.region(q.number("slide"), q.polygon()))
    routes = [
        *(Route(path, endpoint) for path, endpoint in answers.items()),
        Route("/api/slides/{slide}/region", region, methods=["POST"]),
        *(Route(path, endpoint) for path, endpoint in _page_files(gallery.volume is not None).items()),
    ]
    errors = (SealExtractError, NotFound, ClientDisconnect, HTTPException, Exception)
    return Guard(Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, _one_line)), port, token)


def _answers(gallery: Gallery) -> dict[str, Answer]:
    """What is asked of the gallery at each address."""
    slide = "/api/slides/{slide}"
    patch, layer = f"{slide}/patches/{{patch}}", f"{slide}/layers/{{kind}}"

    def patch_of(q: Query) -> tuple[int, int]:
        return q.number("slide"), q.number("patch")

    def layer_of(q: Query) -> tuple[int, str, str]:
        return q.number("slide"), q.word("kind"), q.text("of")

    def tile_of(q: Query) -> tuple[int, int, int, int]:
        return q.number("slide"), q.number("zoom"), q.number("column"), q.number("row")

    def map_of(q: Query) -> tuple[str, str]:
        return q.word("kind"), q.text("of")

    volume, codes = "/api/volume", "/api/volume/maps/{kind}"

    return {
        volume: lambda q: gallery.describe_volume(),
        f"{volume}/planes/{{plane}}/{{size}}": lambda q: (
            gallery.plane_picture(q.number("plane"), q.word("size")),
            "image/jpeg",
        ),
        f"{codes}/legend": lambda q: gallery.volume_map(*map_of(q))[0],
        f"{codes}/codes": lambda q: (gallery.volume_map(*map_of(q))[1].tobytes(), BYTES),
        "/api/slides": lambda q: gallery.slides(),
        "/api/genes": lambda q: gallery.genes.state(),
        "/api/suggest": lambda q: gallery.genes.suggest(q.text("typed")),
        "/api/check": lambda q: gallery.genes.check(q.text("typed")),
        slide: lambda q: gallery.slide(q.number("slide")),
        f"{slide}/thumbnail": lambda q: (gallery.thumbnail(q.number("slide")), "image/jpeg"),
        f"{slide}/tiles/{{zoom}}/{{column}}/{{row}}": lambda q: gallery.tile(*tile_of(q)),
        f"{slide}/patches": lambda q: (gallery.patches(q.number("slide")), BYTES),
        patch: lambda q: gallery.patch(*patch_of(q)),
        f"{patch}/image": lambda q: (gallery.patch_image(*patch_of(q)), "image/jpeg"),
        f"{patch}/alike": lambda q: gallery.alike(*patch_of(q), q.text("scope")),
        f"{layer}/legend": lambda q: gallery.layer(*layer_of(q)).legend,
        f"{layer}/picture": lambda q: (gallery.layer_png(*layer_of(q)), "image/png"),
        f"{layer}/values": lambda q: (gallery.layer_values(*layer_of(q)), BYTES),
    }


class _Workers:
    """A few threads that answer requests."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="viewer")
        self._free = asyncio.Semaphore(WORKERS)

    def endpoint(self, answer: Answer) -> Endpoint:
        """Let a thread answer when one is free, unless the client has disconnected by then."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse, Response

        async def respond(request: Request) -> Response:
            query = await Query.read(request)
            async with self._free:
                if await request.is_disconnected():
                    raise ClientDisconnect
                found = await asyncio.get_running_loop().run_in_executor(self._threads, answer, query)
            if not isinstance(found, tuple):
                return JSONResponse(found, headers={"Cache-Control": "no-store"})
            cached = CACHED if request.query_params.get("v") else "no-store"
            return Response(found[0], media_type=found[1], headers={"Cache-Control": cached})

        return respond


def _page_files(of_volume: bool) -> dict[str, Endpoint]:
    """The pages and all that they load, read once."""
    from starlette.responses import Response

    def file(content: str, suffix: str) -> Endpoint:
        async def respond(_: Request) -> Response:
            return Response(content, media_type=MEDIA[suffix], headers={"Cache-Control": "no-cache"})

        return respond

    leaflet = leaflet_folder("viewer")
    contents = {name: web_text(name) for name in ("slide.css", "volume.css", "icon.svg")}
    contents |= {name: (leaflet / name).read_text(encoding="utf-8") for name in ("leaflet.js", "leaflet.css")}
    contents |= {"slide.js": web_text(*VIEWER_SCRIPTS), "volume.js": web_text(*VOLUME_SCRIPTS)}
    files = {f"/static/{name}": file(text, name.rpartition(".")[2]) for name, text in contents.items()}
    pages = {"/": "volume.html", "/slides": "slide.html"} if of_volume else {"/": "slide.html"}
    for path, page in pages.items():
        files[path] = file("".join(render(page, report=False, name="", of_volume=of_volume)), "html")
    return files


async def _one_line(_: Request, exc: Exception) -> Response:
    """A failure as one line of JSON."""
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse

    if isinstance(exc, SealExtractError):
        status, message = 400 if isinstance(exc, UsageError) else 422, " ".join(str(exc).split())
    elif isinstance(exc, NotFound) or (isinstance(exc, HTTPException) and exc.status_code == 404):
        status, message = 404, "there is nothing at this address"
    elif isinstance(exc, HTTPException):
        status, message = exc.status_code, exc.detail
    elif isinstance(exc, ClientDisconnect):
        status, message = 499, "the client disconnected"
    else:
        status, message = 500, f"unexpected {type(exc).__name__}; start with --debug to see where"
    return JSONResponse({"error": shown(message)}, status, headers={"Cache-Control": "no-store"})


def _check_installed() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as exc:
        raise UsageError(f"the viewer needs {exc.name}; {how_to_install('view')}") from exc


# --- running --------------------------------------------------------------------------------------


def listen(port: int) -> socket.socket:
    """A socket that listens on this machine's own address; port 0 takes a free one.

    Raises:
        UsageError: the port is in use, or may not be used.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen(BACKLOG)  # clients that come before the server runs are answered by it
    except (OSError, OverflowError) as exc:
        sock.close()
        reason = getattr(exc, "strerror", None) or exc
        raise UsageError(f"port {port}: {reason}; type another --port, or none for a free one") from exc
    return sock


def make_server(gallery: Gallery, sock: socket.socket, token: str, *, debug: bool = False) -> Any:
    """A server of uvicorn; ``run(sockets=[sock])`` answers requests that have the token until Ctrl-C.

    With ``debug``, unexpected errors go to standard error with their traceback.

    Raises:
        UsageError: its libraries are not installed.
    """
    app = make_app(gallery, sock.getsockname()[1], token)
    import uvicorn

    config = uvicorn.Config(
        app,
        http=http_with_time_limit(),
        log_level="error" if debug else "critical",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        backlog=BACKLOG,
        server_header=False,
    )
    _allow_files()
    return uvicorn.Server(config)


def _allow_files() -> None:
    """Let this process hold some thousand connections, if the system lets it choose."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
