"""Single rows of features files, read by their position in the file.

Opening a file as HDF5 takes 2 ms, so reading the rows that a search found would take longer than the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from seal_extract.errors import OutputError
from seal_extract.features.store import SlideFeatures, rows_of
from seal_extract.hdf5 import DAMAGED, open_hdf5
from seal_extract.publish import file_state

LAYABLE = ("<f4", "<f2")
Count = Annotated[int, Meta(ge=0, lt=2**62)]


@dataclass(frozen=True)
class RowPlaces:
    """Positions of the rows of a features file, which this package writes in chunks of whole rows.

    Attributes:
        dtype: ``"<f4"`` or ``"<f2"``.
        dim: columns.
        chunk_rows: rows in a chunk.
        chunks: byte at which each chunk begins; empty if the rows can only be read through HDF5.
        checked: whether a checksum follows each chunk.
    """

    dtype: str
    dim: Count
    chunk_rows: Annotated[int, Meta(ge=1, lt=2**62)]
    chunks: tuple[Count, ...] = ()
    checked: bool = False

    @classmethod
    def of(cls, path: Path) -> RowPlaces:
        """Find the rows of a file.

        Raises:
            OutputError: the file cannot be read.
        """
        try:
            with open_hdf5(path) as file:
                rows = rows_of(file)
                (count, dim), dtype, chunk = rows.shape, rows.dtype.str, rows.chunks
                checked = rows.fletcher32
                plain = rows.id.get_create_plist().get_nfilters() == int(checked)
                if not (plain and chunk and chunk[1] == dim and dtype in LAYABLE):
                    return cls(dtype, dim, 1)
                starts = range(0, count, chunk[0])
                places = tuple(rows.id.get_chunk_info_by_coord((row, 0)).byte_offset for row in starts)
                return cls(dtype, dim, chunk[0], () if None in places else places, checked)
        except DAMAGED as exc:
            raise OutputError(f"{path} cannot be read ({exc}); encode that slide again") from exc

    def read(
        self, slide: SlideFeatures, rows: NDArray[np.int64], state: tuple[int, int]
    ) -> NDArray[np.float32]:
        """Read some rows, float32 [B, D].

        Args:
            slide: the file.
            rows: numbers of the rows.
            state: the `file_state` of the file when its rows were found.

        Raises:
            OutputError: the file has changed since, or a checksum is wrong.
        """
        try:
            with slide.path.open("rb", buffering=0) as file:
                if file_state(file.fileno()) != state:
                    raise OSError("it was replaced")
                if self.chunks:
                    read = [self._row(file, row) for row in rows.tolist()]
                    return np.array(read, np.float32).reshape(-1, self.dim)
            with open_hdf5(slide.path) as opened:
                read = [rows_of(opened)[row] for row in rows.tolist()]
                return np.array(read, np.float32).reshape(-1, self.dim)
        except DAMAGED as exc:
            raise OutputError(
                f"{slide.path} has changed since the index was opened; type --index build to update it"
            ) from exc

    def _row(self, file: FileIO, row: int) -> NDArray[Any]:
        width = self.dim * np.dtype(self.dtype).itemsize
        start, within = self.chunks[row // self.chunk_rows], row % self.chunk_rows * width
        if not self.checked:
            file.seek(start + within)
            return np.frombuffer(file.read(width) or b"", self.dtype, self.dim)
        file.seek(start)
        chunk = file.read(self.chunk_rows * width + 4) or b""
        if not _checksum_fits(chunk):
            raise OutputError(
                f"{file.name} is damaged at row {row}; encode that slide again with --overwrite"
            )
        return np.frombuffer(chunk, self.dtype, self.dim, within)


def _checksum_fits(chunk: bytes) -> bool:
    """Whether the last four bytes are HDF5's fletcher32 of the others, modulo 65535."""
    words = np.frombuffer(chunk[:-4], ">u2").astype(np.int64)
    stored = int.from_bytes(chunk[-4:], "little")
    first, second = int(words.sum()), int((words * np.arange(len(words), 0, -1)).sum())
    return (
        len(chunk) > 4 and (first - (stored & 0xFFFF)) % 65535 == 0 and (second - (stored >> 16)) % 65535 == 0
    )
