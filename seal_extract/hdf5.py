"""HDF5 files: reading one never reads another file, and a file is written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
from numpy.typing import NDArray

from seal_extract.publish import publish

DAMAGED = (OSError, RuntimeError, ValueError, KeyError)  # of h5py and json over damaged files
MOST_COMPRESSED = 2000  # times smaller than its values; deflate reaches 1032
SMALL_BYTES = 2**20  # what a dataset may claim without having stored it


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading, after checking that all its values are stored in it.

    Raises:
        OSError: the file cannot be opened, or is no HDF5 file.
        ValueError: a link, a dataset or a virtual dataset of it takes its data from another file, or a
            dataset claims more values than the file can hold.
    """
    with h5py.File(path, "r") as file:
        if (refusal := _refusal(file, os.path.getsize(path))) is not None:
            raise ValueError(refusal)
        yield file


def _refusal(file: h5py.File, file_bytes: int) -> str | None:
    names: list[bytes] = []
    h5py.h5o.visit(file.id, names.append)
    refusals = (_refuse_dataset(file.id, name, file_bytes) for name in names)
    return file.id.links.visit(_refuse_link, info=True) or next(filter(None, refusals), None)


def _refuse_link(name: bytes, info: Any) -> str | None:  # raising in it would be an error of h5py's own
    if info.type in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT):
        return None
    return f"{name.decode(errors='replace')!r} is a link to another file, which is not followed"


def _refuse_dataset(file: Any, name: bytes, file_bytes: int) -> str | None:
    dataset = h5py.h5o.open(file, name)  # h5py's own objects would take longer than all the rest
    if not isinstance(dataset, h5py.h5d.DatasetID):
        return None
    shown, plist = repr(name.decode(errors="replace")), dataset.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        return f"the values of {shown} are in another file, which is not read"
    claimed = dataset.get_space().get_simple_extent_npoints() * dataset.get_type().get_size()
    if claimed > SMALL_BYTES:
        filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
        most = MOST_COMPRESSED if filters - {h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_SHUFFLE} else 1
        stored = min(dataset.get_storage_size(), file_bytes)
        if claimed > stored * most:
            return f"{shown} claims {list(dataset.shape)} values, but only {stored} bytes are stored"
    return None


class Disk(FileIO):
    """A file that remembers an error instead of raising it, over which HDF5 could not close."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or remember why not."""
        try:
            view = memoryview(data)
            while len(view) and self.failure is None:
                view = view[super().write(view) :]  # a disk about to be full takes a part
        except OSError as exc:
            self.failure = exc
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, or remember why not."""
        try:
            return super().truncate(size)
        except OSError as exc:
            self.failure = self.failure or exc
            return size or 0

    def check(self) -> None:
        """Raise the first error since the file was opened."""
        if self.failure is not None:
            raise self.failure


def checked(values: NDArray[Any]) -> dict[str, bool]:
    """The option of a dataset of these values for checksums; HDF5 has none for an empty one."""
    return {"fletcher32": True} if values.size else {}


@contextmanager
def new_hdf5(path: Path, keep: Callable[[Path], bool] | None = None) -> Iterator[tuple[h5py.File, Disk]]:
    """A new HDF5 file that appears under its name, complete, when the block ends; see `publish`.

    Raises:
        OutputError: the file cannot be written, or ``keep`` returned False.
    """
    with publish(path, keep) as part, Disk(part, "w+") as disk:
        with h5py.File(disk, "w") as file:
            yield file, disk
        disk.check()
