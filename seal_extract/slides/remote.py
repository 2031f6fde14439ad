"""Slides at URLs: list those below a folder, ask for the size and version of one, copy one.

The protocols are fsspec's. Readers need files, so a URL is copied before it is read.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from seal_extract.errors import SealExtractError, SlideOpenError, UsageError, first_line

PACKAGES = {
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
}
HTTP = ("http", "https")
STORE = ".zarr"  # ends the name of a folder that is one slide
CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # whose container stands before the @
_HOST = re.compile(r"(\[[\da-fA-F:.]*\]|[^:@]*)(:\d*)?")
CONNECT_S, SILENT_S = 30, 60  # aiohttp's own limit is 5 minutes for a file, too short for a slide
VERSIONS = (  # attributes of storages that change with the file, the surest first
    *("ETag", "etag", "md5Hash", "md5", "Content-MD5", "Digest", "crc32c"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created"),
)


@dataclass(frozen=True)
class RemoteFile:
    """Size and version of a file in a storage.

    Attributes:
        size: in bytes.
        version: changes when the file does; empty if the storage states none.
    """

    size: int
    version: str


def address(source: str | os.PathLike[str]) -> str | Path:
    """A URL as text, anything else as a path; ``file://`` is a path of this machine."""
    text = os.fspath(source)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        return Path(source)
    if _protocol(text) in ("file", "local"):
        return Path(unquote(text.partition("://")[2].removeprefix("localhost")))
    return text


def public(url: str) -> str:
    """Scheme, host and path of a URL, and of each link of a chained one (``zip://a.svs::https://…``).

    User, password, query and fragment, which may be secrets, are left out. Of a URL that cannot be parsed
    only the scheme is left.
    """
    return "::".join(_public(link) for link in _links(url))


def _links(url: str) -> list[str]:
    return re.split(r"::(?=[A-Za-z][\w+.-]*(?:://|::|$))", url)


def _public(link: str) -> str:
    scheme, mark, rest = link.partition("://")
    while True:
        host, path = re.fullmatch(r"([^/?#]*)(.*)", rest, re.S).groups()  # type: ignore[union-attr]
        user, at, host = host.rpartition("@")
        if _HOST.fullmatch(host):
            break
        _, at, rest = rest.partition("@")  # a password with a slash
        if not at:
            return scheme + mark
    if scheme.lower() in CONTAINERS and ":" not in user:
        host = user + at + host
    if scheme.lower() in HTTP:
        path = re.sub(r";[^/;]*=[^/;]*", "", re.split(r"[?#]", path)[0])
    return scheme + mark + host + re.sub(r"\?.*=.*", "", path)  # elsewhere ? may belong to a name


def place(url: str) -> Path:
    """A path that looks like the URL, for names: ``s3://bucket/a.svs`` is ``s3/bucket/a.svs``."""
    links = (link.replace("://", "/", 1) for link in reversed(_links(public(url))) if "://" in link)
    text = "/".join(unquote(link) if _protocol(url) in HTTP else link for link in links)
    return Path(PurePosixPath(text.replace(":", "_")))


def check_protocol(url: str) -> None:
    """Refuse a protocol that is unknown, or whose package is not installed.

    Raises:
        UsageError: the protocol cannot be used.
    """
    from fsspec import get_filesystem_class

    protocol = _protocol(url)
    try:
        get_filesystem_class(protocol)
    except ImportError as exc:
        package = PACKAGES.get(protocol)
        hint = f"type: pip install {package}" if package else first_line(exc)
        raise UsageError(f"{public(url)}: {protocol}:// needs a package that is missing; {hint}") from exc
    except ValueError as exc:
        raise UsageError(
            f"{public(url)}: {protocol}:// is unknown to fsspec; allowed: https://, s3://, gs:// and others"
        ) from exc


def has_magic(url: str) -> bool:
    """Whether it is a pattern; ``?`` begins the parameters of a web address."""
    text = re.sub(r"//\[[\da-fA-F:.]*\]", "", public(url))  # an address of IPv6
    return any(mark in text for mark in ("*[" if _protocol(url) in HTTP else "*?["))


def list_files(url: str) -> list[str]:
    """All files below a folder, or that match a pattern; a folder that is named ``.zarr`` is one of them.

    Raises:
        SlideOpenError: the folder cannot be listed.
    """
    with _asking(url, "listed"):
        storage, path = storage_of(url)
        if has_magic(url):
            found = [
                p.rstrip("/")
                for p, info in storage.glob(path, detail=True).items()
                if info["type"] == "file" or p.rstrip("/").lower().endswith(STORE)
            ]
            if not found:
                storage.ls(
                    re.split(r"[*?[]", path)[0].rpartition("/")[0]
                )  # raises the error that glob() hides
        else:
            found = []
            for _, folders, files in storage.walk(path, detail=True, on_error="raise"):  # find() hides errors
                stores = [folders.pop(name) for name in list(folders) if name.lower().endswith(STORE)]
                found += [info["name"].rstrip("/") for info in (*files.values(), *stores)]
        front, path = url.rstrip("/"), path.rstrip("/")
        if front.endswith(path):  # keeps a host that the storage leaves out of its paths
            return sorted(front.removesuffix(path) + p for p in found)
        return sorted(storage.unstrip_protocol(p) for p in found)


def look(url: str, *, fresh: bool = False) -> RemoteFile:
    """Size and version of a file.

    Args:
        url: of the file.
        fresh: ask even if it was in a listing.

    Raises:
        SlideOpenError: the file is missing, or its size is unknown.
    """
    with _asking(url):
        storage, path = storage_of(url)
        if fresh:
            storage.invalidate_cache(path)
        info = storage.info(path)
    if info.get("size") is None:
        raise SlideOpenError(
            f"{public(url)}: its server does not say how large it is; download it and give the file"
        )
    version = next((f"{key} {info[key]}" for key in VERSIONS if info.get(key)), "")
    return RemoteFile(int(info["size"]), version)


def fetch(url: str, expected: RemoteFile, copy: Path, is_stopped: Callable[[], bool]) -> None:
    """Copy a file, all of it.

    Args:
        url: of the file.
        expected: from `look`.
        copy: the path of the copy; a part of it may be left when an error is raised.
        is_stopped: asked now and then; the copy ends once it returns True.

    Raises:
        SlideOpenError: the copy is incomplete, the file was changed meanwhile, or ``is_stopped``.
    """
    from fsspec.callbacks import Callback

    def watch(_: int | None, done: int, **__: object) -> None:
        if is_stopped():
            raise SlideOpenError(f"{public(url)}: the run was stopped")
        if done > expected.size:
            raise OSError(f"more came than the {expected.size} bytes announced")

    with _asking(url):
        storage, path = storage_of(url)
        storage.get_file(path, str(copy), callback=Callback(hooks={"watch": watch}))
        if (size := copy.stat().st_size) != expected.size:
            raise OSError(f"{size} bytes came, {expected.size} were announced")
    if look(url, fresh=True) != expected:
        raise SlideOpenError(f"{public(url)} was changed while it was copied; run again")


# --- fsspec -------------------------------------------------------------------------------------------


def _protocol(url: str) -> str:
    return url.partition("://")[0].lower()


def storage_of(url: str) -> tuple[Any, str]:
    """The file system of fsspec for a URL, and the path in it."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    check_protocol(url)
    options = {}
    if _protocol(url) in HTTP:
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {
            "timeout": ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S),
            "trust_env": True,  # proxies
            **conf.get(_protocol(url), {}).get("client_kwargs", {}),
        }
    storage, path = url_to_fs(url, **options)
    return storage, path


@contextmanager
def _asking(url: str, what: str = "fetched") -> Iterator[None]:
    try:
        yield
    except SealExtractError:
        raise
    except Exception as exc:  # each protocol raises errors of its own
        reason = reason_of(exc.__cause__ or exc, url)  # fsspec calls whatever fails "not found"
        is_full = isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space in --stage-dir" if is_full else "check the URL and the network"
        raise SlideOpenError(f"{public(url)} cannot be {what}: {reason}; {advice}, then run again") from exc


def reason_of(exc: BaseException, url: str) -> str:
    """The reason of an error without any URL, which may be another spelling of this one or its redirect."""
    if isinstance(status := getattr(exc, "status", None), int):  # aiohttp's
        return f"HTTP {status} {getattr(exc, 'message', '')}".rstrip()
    text = re.split(r"[^\s]*://", first_line(exc))[0].strip(" ,:('\"")
    hidden = [word for word in re.split(r"\W+", unquote(url)) if word and word not in unquote(public(url))]
    if text and not any(word in unquote(text) for word in hidden):
        return text
    named: dict[Any, str] = {FileNotFoundError: "there is no such file", PermissionError: "access was denied"}
    return named.get(type(exc), type(exc).__name__)
