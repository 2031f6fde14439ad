"""Open a slide, whatever its format, with the reader that knows most about it.

A slide whose µm/px is missing or cannot be true is refused, because every later length depends on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from seal_extract.errors import (
    ResolutionError,
    SealExtractError,
    SlideError,
    SlideOpenError,
    UsageError,
    first_line,
)
from seal_extract.slides.extras import EXTRAS, ExtraReader, MissingExtra, plugin_readers
from seal_extract.slides.images import ImageReader
from seal_extract.slides.ngff import is_store
from seal_extract.slides.ome_zarr import OmeZarrReader
from seal_extract.slides.patch_files import TABLES
from seal_extract.slides.readers import STATED_MPP, Array, Level, OpenSlideReader, TiffSlideReader, check_mpp
from seal_extract.slides.remote import address, public
from seal_extract.slides.tiff import TIFF_HEADS, refuse_impossible, refuse_truncated
from seal_extract.slides.tiff_pixels import check_ome, has_jpeg_tiles

READERS = (OpenSlideReader, TiffSlideReader, ImageReader)
FORMATS = (
    "SVS, NDPI, MRXS, SCN, BIF, VMS, AVS, CZI, Philips or generic tiled TIFF, OME-TIFF, OME-Zarr, DICOM, "
    "iSyntax, KFB, VSI, PNG, JPEG"
)
HEST_KEYS = ("pixel_size_um_estimated", "pixel_size_um_embedded")  # HEST takes the first itself
MOST_METADATA_BYTES = 2**24  # a file of HEST has some 2,000


class Slide(Protocol):
    """A slide that is open: geometry in level-0 pixels, resolution in µm/px.

    Attributes:
        path: the file.
        reader: ``"openslide"``, ``"tiffslide"`` or ``"pillow"``, with the library's version.
        size_l0: (width, height) of level 0.
        bounds_l0: (x, y, width, height) of the scanned area; the whole slide where the file names none.
        mpp: µm/px at level 0.
        mpp_source: where that number was read.
        mpp_conflict: a sentence about another statement of µm/px that contradicts it; empty if there is none.
        levels: finest first.
    """

    path: Path
    reader: str
    size_l0: tuple[int, int]
    bounds_l0: tuple[int, int, int, int]
    mpp: float
    mpp_source: str
    mpp_conflict: str
    levels: tuple[Level, ...]

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
        """Read ``size_px`` (width, height) pixels of ``level`` whose top-left corner is ``xy_l0``.

        Safe to call from several threads. Pixels outside the slide are black.

        Returns:
            uint8 [height, width, 3], RGB.

        Raises:
            ReadError: the file is damaged there.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...

    def __enter__(self) -> Slide: ...

    def __exit__(self, *_: object) -> None: ...


def open_slide(
    path: str | os.PathLike[str], *, mpp: float | None = None, origin: Path | None = None
) -> Slide:
    """Open a slide with the reader that knows most about it.

    Args:
        path: a slide file (or the ``.mrxs``, ``.vms`` or one ``.dcm`` file of a slide of several files), or
            an OME-Zarr store, which may be at a URL.
        mpp: µm/px at level 0 that is used in place of the file's.
        origin: the slide that ``path`` is a copy of, if it is one; the metadata of HEST lie beside that.

    Raises:
        SlideOpenError: the file is missing, is not a slide, or is damaged.
        UnsupportedSlideError: the slide is not 8-bit RGB.
        ResolutionError: the slide has no plausible µm/px, and none is given.
    """
    where = address(path)
    if mpp is not None:
        check_mpp(mpp, "--slide-mpp", Path(path))
    if is_store(where):
        return _warned(OmeZarrReader(where, mpp))
    path = Path(path)
    check_path(path)
    if path.suffix.lower() in TABLES:
        raise SlideOpenError(
            f"{path} is no slide; ready-cut patches are embedded with --patches, and there is no slide to "
            "draw them on"
        )
    refuse_impossible(path)
    check_ome(path)
    stated = hest_mpp(origin or path) if mpp is None else None
    refusals: list[str] = []
    without_mpp: ResolutionError | None = None
    for reader in _readers_for(path):
        try:
            slide = reader(path, mpp if stated is None else stated[1])
        except ResolutionError as exc:  # another reader may know more
            without_mpp = without_mpp or exc
        except MissingExtra as exc:
            raise SlideOpenError(f"{path}: {'; '.join([*refusals, str(exc)])}") from exc
        except SlideOpenError as exc:
            refuse_truncated(path)
            refusals.append(str(exc))
        else:
            if stated is not None:
                slide.mpp_source = slide.mpp_source.replace("given", stated[0], 1)
            return _warned(slide)
    raise without_mpp or SlideOpenError(
        f"{path}: no reader opens it ({'; '.join(refusals)}); {_looks_like(path)}; allowed: {FORMATS}"
    )


def _readers_for(path: Path) -> Iterator[Callable[..., Slide]]:
    """What may open a file, in the order in which it is tried; the readers of plugins by their suffixes."""
    suffix = path.suffix.lower()
    extra = next((reader for reader in EXTRAS if suffix in reader.suffixes), None)
    yield from READERS if extra is None else READERS[:1]
    if (plugin := plugin_readers().get(suffix)) is not None:
        yield partial(_open_by_plugin, plugin)
    if extra is not None:
        yield extra


def _open_by_plugin(plugin: Callable[..., Slide], path: Path, mpp: float | None) -> Slide:
    try:
        slide = plugin(path, mpp)
        check_mpp(slide.mpp, slide.mpp_source, path)
    except SealExtractError:
        raise
    except Exception as exc:  # third-party code may raise anything
        raise SlideOpenError(
            f"the plugin for {path.suffix}: {type(exc).__name__}: {first_line(exc)}"
        ) from exc
    return slide


def _warned(slide: Slide) -> Slide:
    if slide.mpp_conflict:
        warnings.warn(f"{slide.path}: {slide.mpp_conflict}", stacklevel=3)
    return slide


def open_with_another_reader(slide: Slide) -> Slide | None:
    """The same slide with the same levels through another library; None if no other can open it.

    Tiffslide decodes the rest of a damaged JPEG silently, so it is not used for JPEG. A slide that is not its
    file alone, such as a plane of a stack, has no other reader.
    """
    if not isinstance(slide, READERS):
        return None
    for reader in READERS:
        if isinstance(slide, reader):
            continue
        with contextlib.suppress(SlideError, OSError):
            if reader is TiffSlideReader and has_jpeg_tiles(slide.path):
                continue
            other: Slide = reader(slide.path, slide.mpp)
            if [level.size_px for level in other.levels] == [level.size_px for level in slide.levels]:
                return other
            other.close()
    return None


def coarsest_level(slide: Slide, downsample: float) -> int:
    """The coarsest faithful level that is still as fine as ``downsample`` (level-0 px per px wanted).

    Level downsamples are seldom whole numbers (4.0001, 2.0005), so 1 % counts as equal.
    """
    fine_enough = [
        i for i, level in enumerate(slide.levels) if level.faithful and level.downsample <= downsample * 1.01
    ]
    return max(fine_enough, key=lambda i: slide.levels[i].downsample, default=0)


def absolute(path: Path) -> Path:
    """The path with all links resolved; `Path.resolve` raises where a link leads to itself."""
    return Path(os.path.realpath(path))


def check_path(path: Path) -> None:
    """Refuse a path that is no regular file, for which a library might wait for ever.

    Raises:
        SlideOpenError: the path is missing, a folder, empty, a FIFO or a device; or one is among the files of
            its slide.
    """
    if path.is_dir():
        raise SlideOpenError(f"{path} is a folder; give a slide file, for example {path / 'slide.svs'}")
    if not path.exists():
        if isinstance(url := address(str(path).replace(":/", "://", 1)), str):
            raise SlideOpenError(
                f"{public(url)} is a URL, which only runs read; download it and give the file"
            )
        raise SlideOpenError(f"{path} does not exist; check the path")
    if not os.access(path, os.R_OK):
        raise SlideOpenError(f"{path} may not be read by this user; check its permissions")
    if not path.is_file():
        raise SlideOpenError(f"{path} is no regular file (a FIFO, a device or a socket); give a slide file")
    if path.stat().st_size == 0:
        raise SlideOpenError(f"{path} is empty (0 bytes); copy it again")

    for beside in _files_of(path):
        if beside.exists() and not (beside.is_file() or beside.is_dir()):
            raise SlideOpenError(f"{beside} is no regular file, and {path.name} may be made of it; remove it")


def parts_folder(path: Path) -> Path | None:
    """The folder beside a slide that holds its pixels, for formats that have one."""
    named = {".mrxs": path.stem, ".vsi": f"_{path.stem}_"}.get(path.suffix.lower())
    return path.with_name(named) if named else None


def _files_of(path: Path) -> Iterable[Path]:
    """The files that OpenSlide opens beside the one that it is given."""
    with path.open("rb") as file:
        head = file.read(132)
    if (parts := parts_folder(path)) is not None:
        return parts.glob("*")
    several = head.endswith(b"DICM") or head.lstrip()[:1] == b"["  # VMS and VMU are of [sections]
    return path.parent.iterdir() if several else ()


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] in TIFF_HEADS:
        return "it begins as a TIFF"
    if head.isascii() and all(c >= 32 or c in b"\t\r\n" for c in head):
        return f"it is text, beginning {head[:16].decode()!r}"
    return f"it begins with the bytes {head[:8].hex(' ')}"


# --- µm/px by HEST-1k (Jaume et al. 2024), which keeps it in metadata/NAME.json beside wsis/NAME.tif -------


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a section; nothing where the file is missing.

    Raises:
        UsageError: the file is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MOST_METADATA_BYTES:
            raise ValueError(f"it has more than {MOST_METADATA_BYTES} bytes")
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise UsageError(f"{path} is no JSON: {exc}; download it again") from exc
    return meta if isinstance(meta, dict) else {}


def stated_mpp(meta: dict[str, Any]) -> tuple[str, float] | None:
    """The first µm/px that metadata give, with its key."""
    for key in HEST_KEYS:
        value = meta.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6:  # NaN is not
            return key, float(value)
    return None


def hest_mpp(slide: Path) -> tuple[str, float] | None:
    """The µm/px that HEST's metadata give a slide of a HEST folder, and where; None for any other slide.

    Raises:
        UsageError: the metadata are not JSON.
        ResolutionError: they give a µm/px that cannot be true.
    """
    if slide.parent.name != "wsis":
        return None
    path = slide.parent.parent / "metadata" / f"{slide.stem}.json"
    stated = stated_mpp(read_metadata(path))
    if stated is None:
        return None
    check_mpp(stated[1], stated[0], path, STATED_MPP)
    return f"{stated[0]} of metadata/{path.name}", stated[1]


_: Callable[..., Slide] = OpenSlideReader  # mypy checks the readers against the protocol
_ = TiffSlideReader
_ = ImageReader
_ = OmeZarrReader
_ = ExtraReader
