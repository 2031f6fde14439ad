"""Decode many JPEG tiles at once on the device: what their header states, and the steps to pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.patches.codecs import EOI, SOI, JpegCodec, TileError
from seal_extract.patches.compressed import Compressed, Numbers

BASELINE = (0xC0, 0xC1)  # sequential Huffman codes, 8 bits
OTHER_FRAMES = {*range(0xC2, 0xD0)} - {0xC4, 0xC8, 0xCC}
QUANTISATION, HUFFMAN, RESTART, SCAN = 0xDB, 0xC4, 0xDD, 0xDA
SHORT_BITS = 9  # of codes that the first table holds
LANES = 8  # tiles of one program that reads coefficients, on a GPU
STEPS = 64  # codes between two looks at whether all tiles have ended
EOI_BYTES = np.frombuffer(EOI, np.uint8)
THREADS = 512  # rows, columns or pixels of a program of the other kernels
INTERPRETED = 2**15  # of them on the CPU, where each step of a program costs milliseconds
# the place of each coefficient in its block: along the diagonals, in turn upwards and downwards
NATURAL = sorted(range(64), key=lambda at: (at // 8 + at % 8, at // 8 if (at // 8 + at % 8) % 2 else at % 8))


@dataclass(frozen=True)
class Frame:
    """What a JPEG header states, if this file can decode it.

    Attributes:
        size_px: (width, height).
        sampling: luma blocks (across, down) of an MCU: (1, 1), (2, 1) or (2, 2).
        ycbcr: whether the components are YCbCr; else they are RGB.
        quantisation: int32 [3, 64], in natural order.
        codes: int16 [6, 65536], see `jpeg_kernels.read_coefficients`.
    """

    size_px: tuple[int, int]
    sampling: tuple[int, int]
    ycbcr: bool
    quantisation: NDArray[np.int32]
    codes: NDArray[np.int16]

    @property
    def per_mcu(self) -> int:
        """Blocks of an MCU."""
        return self.sampling[0] * self.sampling[1] + 2

    @property
    def mcus(self) -> tuple[int, int]:
        """MCUs (across, down)."""
        (width, height), (h, v) = self.size_px, self.sampling
        return -(-width // (8 * h)), -(-height // (8 * v))

    @property
    def blocks(self) -> int:
        """Blocks of all components."""
        return self.mcus[0] * self.mcus[1] * self.per_mcu


def header_bytes(stream: bytes) -> int:
    """The length of a stream's header: where its entropy-coded data begin.

    Raises:
        TileError: there are none.
    """
    end = 0
    for marker, _, end in segments(stream):
        if marker == SCAN:
            return end
    raise TileError("has no entropy-coded data")


def read_frame(header: bytes) -> Frame:
    """Read a complete header.

    Raises:
        TileError: it is damaged, or states a JPEG of a kind that is not decoded here; the message says which.
    """
    try:
        return _read_frame(header)
    except (KeyError, IndexError, ValueError, struct.error) as exc:
        raise TileError(f"its header is damaged ({type(exc).__name__})") from exc


def segments(stream: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Each segment of a header, of JPEG or JPEG 2000: its marker, what it holds, and where it ends."""
    at = len(SOI)
    while stream[at : at + 1] == b"\xff" and len(stream) >= at + 4:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        yield stream[at + 1], stream[at + 4 : end], end
        at = end


def _read_frame(header: bytes) -> Frame:
    quantisation: dict[int, NDArray[np.int32]] = {}
    codes: dict[int, NDArray[np.int16]] = {}
    size_px, components, scan = (0, 0), {}, []
    transform: int | None = None  # Adobe's
    jfif = False
    for marker, body, _ in segments(header):
        if marker == QUANTISATION:
            quantisation |= _quantisation_tables(body)
        elif marker == HUFFMAN:
            codes |= _code_tables(body)
        elif marker == RESTART and any(body):
            raise TileError("JPEG with restart intervals")
        elif marker == 0xE0:
            jfif |= body[:5] == b"JFIF\0"
        elif marker == 0xEE and body[:5] == b"Adobe":
            transform = body[11]
        elif marker in OTHER_FRAMES:
            raise TileError("JPEG that is not baseline")
        elif marker in BASELINE:
            bits, height, width, count = struct.unpack_from(">BHHB", body)
            if (bits, count) != (8, 3):
                raise TileError(f"JPEG of {count} components of {bits} bits")
            size_px = (width, height)
            components = {body[i]: (body[i + 1] >> 4, body[i + 1] & 15, body[i + 2]) for i in (6, 9, 12)}
        elif marker == SCAN:
            scan = [(body[i], body[i + 1] >> 4, body[i + 1] & 15) for i in range(1, 2 * body[0], 2)]
    if [component for component, *_ in scan] != list(components) or not min(size_px):
        raise TileError("JPEG with a scan for each component")
    (h, v, _), *chroma = components.values()
    if (h, v) not in ((1, 1), (2, 1), (2, 2)) or any(c[:2] != (1, 1) for c in chroma):
        raise TileError("JPEG of another subsampling than 4:4:4, 4:2:2 and 4:2:0")
    return Frame(
        size_px,
        (h, v),
        # libjpeg's rules: JFIF is YCbCr; else Adobe's marker counts; else the names of the components
        jfif or (transform != 0 if transform is not None else bytes(components) != b"RGB"),
        np.stack([quantisation[table] for _, _, table in components.values()]),
        np.stack([codes[table] for _, dc, ac in scan for table in (dc, 16 | ac)]),
    )


def _quantisation_tables(body: bytes) -> dict[int, NDArray[np.int32]]:
    tables = {}
    while body:
        kind = ">u2" if body[0] >> 4 else "u1"
        values = np.frombuffer(body, kind, 64, 1)
        tables[body[0] & 15] = np.empty(64, np.int32)
        tables[body[0] & 15][NATURAL] = values
        body = body[1 + values.nbytes :]
    return tables


def _code_tables(body: bytes) -> dict[int, NDArray[np.int16]]:
    tables = {}
    while body:
        counts, symbols = body[1:17], body[17 : 17 + sum(body[1:17])]
        table, at, used = np.zeros(2**16, np.int16), 0, 0
        for length, count in enumerate(counts, 1):
            for symbol in symbols[used : used + count]:
                table[at : at + (2 ** (16 - length))] = length << 8 | symbol
                at += 2 ** (16 - length)
            used += count
        if used != len(symbols) or at > 2**16:
            raise TileError("its header is damaged (Huffman table)")
        tables[body[0]] = table
        body = body[17 + used :]
    return tables


class JpegDecoder:
    """Decodes tiles that share a header, on one device."""

    def __init__(self, frame: Frame, device: torch.device) -> None:
        """Put the frame's tables on the device."""
        self.frame, self._device = frame, device
        short = frame.codes[:, :: 2 ** (16 - SHORT_BITS)].copy()
        short[short >> 8 > SHORT_BITS] = 0
        self._short, self._full = torch.from_numpy(short).to(device), torch.from_numpy(frame.codes).to(device)
        self._quantisation = torch.from_numpy(frame.quantisation).to(device)
        self._natural = torch.tensor(NATURAL, dtype=torch.int32, device=device)

    def decode(self, raw: Tensor, places: Tensor, words: int) -> tuple[Tensor, Tensor]:
        """Decode tiles.

        Args:
            raw: uint8 on the device, the entropy-coded data of all tiles, without their end markers.
            places: int32 [T, 3] on the device: the first byte of a tile, the number of bytes, and its first
                word in memory of ``words``; two words more than the bytes fill are needed. No bytes: odd.
            words: of memory for the data of all tiles.

        Returns:
            pixels: uint8 [T, h, w, 3].
            odd: int32 [T], 1 where the data are damaged or of another kind, so that the pixels mean nothing.
        """
        from seal_extract.patches import jpeg_kernels as kernels

        frame, device, tiles = self.frame, self._device, len(places)
        (width, height), (h, v), blocks = frame.size_px, frame.sampling, frame.blocks
        on_gpu = device.type == "cuda"
        packed = torch.empty(words, dtype=torch.int32, device=device)
        bits = torch.empty(tiles, dtype=torch.int32, device=device)
        coefficients = torch.zeros(tiles, blocks, 64, dtype=torch.int16, device=device)
        samples = torch.empty(tiles, blocks, 64, dtype=torch.uint8, device=device)
        pixels = torch.empty(tiles, height, width, 3, dtype=torch.uint8, device=device)
        odd = (places[:, 1] == 0).int()
        across, in_tile = blocks * tiles * 8, width * height
        lanes = LANES if on_gpu else _power_of_two(tiles)
        of_all, of_tile = (
            THREADS if on_gpu else min(INTERPRETED, _power_of_two(count)) for count in (across, in_tile)
        )
        with torch.cuda.device_of(pixels):  # type: ignore[no-untyped-call]
            kernels.unstuff[tiles,](raw, places, packed.view(torch.uint8), bits, odd, CHUNK=1024)
            kernels.read_coefficients[-(-tiles // lanes),](
                *(packed, places, bits, self._short, self._full, self._natural, coefficients, odd),
                *(tiles, blocks),
                **{"LUMA": h * v, "LANES": lanes, "STEPS": STEPS if on_gpu else 1, "num_warps": 1},
            )
            kernels.columns[-(-across // of_all),](
                *(coefficients, self._quantisation, odd, across, blocks),
                **{"PER_MCU": frame.per_mcu, "LANES": of_all},
            )
            kernels.rows[-(-across // of_all),](coefficients, samples, across, LANES=of_all)
            kernels.colours[tiles, -(-in_tile // of_tile)](
                *(samples, pixels, width, height, frame.mcus[0], blocks),
                **{"H": h, "V": v, "YCBCR": frame.ycbcr, "LANES": of_tile},
            )
        return pixels, odd


class JpegTiles:
    """Decodes the JPEG tiles of a level to libjpeg's pixels; see `DeviceDecoder`."""

    tolerance = (0, 0.0)
    takes_bytes = True

    def __init__(
        self, codec: JpegCodec, size_px: tuple[int, int], sample: bytes, device: torch.device
    ) -> None:
        """Take the header of a sample for that of all tiles.

        Raises:
            TileError: it is damaged, or of a kind that is not decoded here.
        """
        self._header = sample[: header_bytes(sample)]
        self._decoder = JpegDecoder(read_frame(codec.complete(self._header)), device)
        if self._decoder.frame.size_px != size_px:
            raise TileError("JPEG of another size than the tiles")

    def places(self, read: Compressed) -> Numbers:
        """See `JpegDecoder.decode`; a tile of another header, or without an end marker, has no bytes."""
        header = np.frombuffer(self._header, np.uint8)
        at = np.flatnonzero(read.count > len(header) + len(EOI))
        same = (read.data[read.first[at, None] + np.arange(len(header))] == header).all(1)
        ends = read.first[at, None] + read.count[at, None] + np.arange(-len(EOI), 0)
        at = at[same & (read.data[ends] == EOI_BYTES).all(1)]
        count = np.zeros_like(read.count)
        count[at] = read.count[at] - len(header) - len(EOI)
        words = -(-count // 4) + 2
        return np.stack([read.first + len(header), count, np.cumsum(words) - words], 1)

    def decode(
        self, read: Compressed, places: Numbers, there: Tensor, places_there: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `DeviceDecoder.decode`."""
        _, bytes_of_last, first_word = places[-1].tolist()
        return self._decoder.decode(there, places_there, first_word - (-bytes_of_last // 4) + 2)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
