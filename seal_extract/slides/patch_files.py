"""Ready-cut patches of a slide: HDF5 as HEST writes it, NPZ, or a folder of pictures."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import h5py
import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image

from seal_extract.errors import SlideOpenError, UnsupportedSlideError, UsageError, first_line
from seal_extract.hdf5 import DAMAGED, open_hdf5
from seal_extract.slides.readers import PLAUSIBLE_MPP

PICTURES = (".png", ".jpg", ".jpeg")
TABLES = (".h5", ".hdf5", ".npz")
SAME_MPP = 0.02  # relative; what counts as the µm/px that the file states
LARGEST_PX = 8192
UNREADABLE = (*DAMAGED, BadZipFile, EOFError, TypeError, zlib.error)  # of HDF5 and NPZ
FORMS = (
    "an HDF5 or NPZ file with one array uint8 [N, S, S, 3], and coords [N, 2] and barcode [N] if it has "
    "them; or a folder of PNG or JPEG squares of one size"
)


@dataclass(frozen=True, repr=False)
class PatchFile:
    """Ready-cut patches of one slide; nothing of their pixels is in memory.

    Attributes:
        path: the file or folder.
        patch_px: side of a patch.
        mpp: µm/px of a patch.
        mpp_source: who states it.
        slide_mpp: µm/px of the pixels of `xy_l0`.
        xy_l0: int64 [N, 2], top-left corners; if none are known, places on a sheet in the patches' order.
        patch_size_l0: side of a patch in those pixels.
        barcodes: one name per patch, that of its spot or picture; None if there is none.
        places_known: whether `xy_l0` are places on the slide.
    """

    path: Path
    patch_px: int
    mpp: float
    mpp_source: str
    slide_mpp: float
    xy_l0: NDArray[np.int64]
    patch_size_l0: int
    barcodes: tuple[str, ...] | None
    places_known: bool

    def __len__(self) -> int:
        return len(self.xy_l0)

    def __repr__(self) -> str:
        return (
            f"PatchFile({self.path.name}: {len(self)} patches of {self.patch_px} px at {self.mpp:.4g} µm/px "
            f"by {self.mpp_source})"
        )

    @property
    def size_l0(self) -> tuple[int, int]:
        """(width, height) of what the patches cover."""
        width, height = (self.xy_l0.max(0) + self.patch_size_l0).tolist()
        return width, height

    def sha256(self) -> str:
        """Hex digest of all that is in the file, or in the pictures of the folder and their names."""
        digest = hashlib.sha256()
        for path in _pictures(self.path) if self.path.is_dir() else [self.path]:
            digest.update(path.name.encode(errors="surrogateescape"))
            with path.open("rb") as file:
                while piece := file.read(2**22):
                    digest.update(piece)
        return digest.hexdigest()

    def read(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """All patches in order, ``count`` at a time: uint8 [B, S, S, 3], RGB.

        Raises:
            SlideOpenError: one cannot be read; the message names it.
        """
        if self.path.is_dir():
            pictures = _pictures(self.path)
            for start in range(0, len(pictures), count):
                yield np.stack([_read_picture(path) for path in pictures[start : start + count]])
            return
        try:
            with _open_table(self.path) as table:
                images = table[_name_of_images(self.path, table)]
                images = images if isinstance(images, h5py.Dataset) else np.asarray(images)
                for start in range(0, len(self), count):
                    yield images[start : start + count]
        except UNREADABLE as exc:
            raise _damaged(self.path, exc) from exc


def open_patches(
    path: str | os.PathLike[str], *, mpp: float | None = None, slide_mpp: float | None = None
) -> PatchFile:
    """Open ready-cut patches.

    Args:
        path: an HDF5 file such as HEST's ``patches/NAME.h5``, an NPZ file, or a folder of PNG or JPEG.
        mpp: µm/px of the patches, where the file does not state it.
        slide_mpp: µm/px of the slide in whose pixels the file's ``coords`` are, where it does not state it.

    Raises:
        SlideOpenError: the file is missing, damaged, or of another kind.
        UnsupportedSlideError: the images are not 8-bit RGB squares of one size.
        UsageError: a µm/px that nobody states, or that contradicts the file.
    """
    path = Path(path)
    if not path.exists():
        raise SlideOpenError(f"{path} does not exist; give {FORMS}")
    if not path.is_dir() and path.suffix.lower() not in TABLES:
        raise SlideOpenError(f"{path} holds no ready-cut patches; give {FORMS}")
    held = _look_at_pictures(path) if path.is_dir() else _look_at_table(path)
    stated = held.stated.get("mpp")
    if stated is None and {"pixel_size", "downsample"} <= held.stated.keys():  # HEST's
        stated = held.stated["pixel_size"] * held.stated["downsample"]
    used = mpp if stated is None else stated
    if used is None:
        raise UsageError(f"{path} does not state the µm/px of its patches; type it, for example --mpp 0.5")
    if mpp is not None and abs(mpp / used - 1) > SAME_MPP:
        raise UsageError(f"{path} states {used:.4g} µm/px for its patches, not {mpp:.4g}; leave --mpp out")
    pixel_size = held.stated.get("pixel_size", slide_mpp)
    for value in (used, held.stated.get("pixel_size", used)):
        if not PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1]:
            raise UsageError(
                f"{path}: {value:.4g} µm/px cannot be true; type the true one, such as --mpp 0.5"
            )
    source = "--mpp" if stated is None else "the file"
    if held.xy_l0 is None:
        columns = math.ceil(math.sqrt(held.patches))
        order = np.arange(held.patches, dtype=np.int64)
        sheet = np.stack([order % columns, order // columns], axis=1) * held.side
        return PatchFile(path, held.side, used, source, used, sheet, held.side, held.barcodes, False)
    if pixel_size is None:
        raise UsageError(
            f"{path} has coords in pixels of a slide whose µm/px it does not state; type it, for example "
            "--slide-mpp 0.25"
        )
    size_l0 = max(1, round(held.stated.get("patch_size_src", held.side * used / pixel_size)))
    return PatchFile(path, held.side, used, source, pixel_size, held.xy_l0, size_l0, held.barcodes, True)


class _Held(NamedTuple):
    """What a file or folder holds, before its µm/px is settled."""

    patches: int
    side: int  # px
    stated: Mapping[str, float]  # µm/px and the like, by the file's own keys
    xy_l0: NDArray[np.int64] | None
    barcodes: tuple[str, ...] | None


# --- HDF5 and NPZ -------------------------------------------------------------------------------------


def _look_at_table(path: Path) -> _Held:
    try:
        with _open_table(path) as table:
            name = _name_of_images(path, table)
            count, side = table[name].shape[:2]
            stated = _stated(table, name)
            coords = np.asarray(table["coords"]) if "coords" in table else None
            barcodes = next((np.asarray(table[k]) for k in ("barcode", "barcodes") if k in table), None)
    except UNREADABLE as exc:
        raise _damaged(path, exc) from exc
    return _Held(count, side, stated, _places(path, coords, count), _names(path, barcodes, count))


def _open_table(path: Path) -> Any:
    """A mapping of names to arrays; nothing in it is unpickled."""
    if path.suffix.lower() == ".npz":
        return NpzFile(path, allow_pickle=False)  # type: ignore[arg-type]  # as numpy.load calls it
    return open_hdf5(path)


def _name_of_images(path: Path, table: Any) -> str:
    """The one array of images; an `UnsupportedSlideError` if there is none, or more than one."""
    arrays = {name: table[name] for name in table}
    shapes = {name: f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items() if hasattr(a, "shape")}
    images = [n for n in shapes if len(arrays[n].shape) == 4 and arrays[n].dtype == np.uint8]
    good = [n for n in images if arrays[n].shape[1] == arrays[n].shape[2] and arrays[n].shape[3] == 3]
    if len(good) != 1 or len(images) != 1 or 0 in arrays[good[0]].shape:
        there = ", ".join(shapes.values()) or "nothing"
        raise UnsupportedSlideError(f"{path} holds {there}; allowed: one array of images uint8 [N, S, S, 3]")
    return str(good[0])


def _stated(table: Any, name: str) -> dict[str, float]:
    """The numbers that the file states of its images: attributes in HDF5, ``mpp`` in NPZ."""
    if not isinstance(table, h5py.File):
        return {"mpp": float(table["mpp"].item())} if "mpp" in table else {}
    stated: dict[str, float] = {}
    for holder in (table.get("coords"), table[name], table):
        for key in ("mpp", "pixel_size", "downsample", "patch_size_src"):
            value = None if holder is None else holder.attrs.get(key)
            if isinstance(value, int | float | np.integer | np.floating) and value > 0:
                stated[key] = float(value)
    return stated


def _places(path: Path, coords: NDArray[Any] | None, n: int) -> NDArray[np.int64] | None:
    if coords is None:
        return None
    is_number = coords.dtype.kind in "iuf" and np.isfinite(coords).all()
    if coords.shape != (n, 2) or not is_number or np.abs(coords).max() > 2**40:
        raise UnsupportedSlideError(
            f"{path}: coords are {coords.dtype} {list(coords.shape)}; allowed: [{n}, 2], x and y in pixels "
            "of the slide"
        )
    places: NDArray[np.int64] = np.rint(coords).astype(np.int64)
    return places


def _names(path: Path, barcodes: NDArray[Any] | None, n: int) -> tuple[str, ...] | None:
    if barcodes is None:
        return None
    if barcodes.size != n or barcodes.dtype.kind not in "OSU":
        raise UnsupportedSlideError(
            f"{path}: barcode is {barcodes.dtype} {list(barcodes.shape)}; allowed: one text for each of {n} "
            "patches"
        )
    return tuple(b.decode("utf-8", "replace") if isinstance(b, bytes) else str(b) for b in barcodes.ravel())


def _damaged(path: Path, exc: Exception) -> SlideOpenError:
    return SlideOpenError(f"{path} cannot be read ({first_line(exc)}); copy it again")


# --- pictures -----------------------------------------------------------------------------------------


def _pictures(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.name[0] != ".")
    except OSError as exc:
        raise _damaged(folder, exc) from exc


def _look_at_pictures(folder: Path) -> _Held:
    """The side that all pictures have, read from their headers, and their names."""
    pictures = _pictures(folder)
    if not pictures:
        raise SlideOpenError(f"{folder} holds no PNG or JPEG; give {FORMS}")
    side = 0
    for path in pictures:
        try:
            with Image.open(path) as image:
                (width, height), mode = image.size, image.mode
        except (OSError, ValueError, Image.DecompressionBombError) as exc:
            raise _damaged(path, exc) from exc
        side = side or width
        if (width, height) != (side, side) or side > LARGEST_PX:
            raise UnsupportedSlideError(
                f"{path} is {width} x {height} px; allowed: squares of one size, up to {LARGEST_PX} px, as "
                f"the first, {pictures[0].name}; for a whole image leave --patches out"
            )
        if mode[0] in "IF":
            raise UnsupportedSlideError(f"{path} is of mode {mode}; allowed: 8 bits per channel")
    stems = tuple(path.stem for path in pictures)
    names = stems if len(set(stems)) == len(stems) else tuple(path.name for path in pictures)
    return _Held(len(pictures), side, {}, None, names)


def _read_picture(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as exc:
        raise _damaged(path, exc) from exc
