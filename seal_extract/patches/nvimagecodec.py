"""Decode JPEG 2000 tiles on a GPU by NVIDIA's nvImageCodec, an optional part.

It cannot be trusted with damaged data. A wrong header can end the process, and of damage behind the header
it need not report what OpenJPEG reports. So a tile goes there only if its header is that of a sample which
OpenJPEG has decoded, and if OpenJPEG reads all its packets to the coarsest resolution, which takes a fortieth
of the time of decoding and reports the same damage.
"""

from __future__ import annotations

import io
import os
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seal_extract.errors import how_to_install
from seal_extract.patches.codecs import Jpeg2000Codec, TileError
from seal_extract.patches.compressed import Compressed, Numbers
from seal_extract.patches.jpeg import segments
from seal_extract.patches.kernels import ycbcr_to_rgb

CODING_STYLE, COMMENT, TILE_PART = 0x52, 0x64, 0x90  # the second bytes of markers: COD, COM, SOT
START_OF_DATA, END = b"\xff\x93", b"\xff\xd9"
TURN = threading.Lock()  # its decoder is for one thread at a time


class Jpeg2000Tiles:
    """Decodes the JPEG 2000 tiles of a level; see `DeviceDecoder`.

    The wavelets are computed in floats, which each library rounds in its own way. One grey level in each of
    Y, Cb and Cr makes three in blue.
    """

    tolerance = (3, 0.1)
    takes_bytes = False

    def __init__(
        self, codec: Jpeg2000Codec, size_px: tuple[int, int], sample: bytes, device: torch.device
    ) -> None:
        """Take the header of a sample for that of all tiles.

        Raises:
            TileError: the sample is damaged, or nvImageCodec is not installed.
        """
        self._codec, self._device = codec, device
        self._shape = (size_px[1], size_px[0], 3)
        codec.decode(sample, np.empty(self._shape, np.uint8))
        self._header = _header(sample)
        if not self._header:
            raise TileError("JPEG 2000 of several tile parts")
        self._coarsest = next(body[5] for marker, body, _ in segments(sample) if marker == CODING_STYLE)
        try:
            self._library, self._decoder = _open(device)
        except ImportError as exc:
            raise TileError(f"nvImageCodec is not installed; {how_to_install('gpu')}") from exc

    def places(self, read: Compressed) -> Numbers:
        """See `DeviceDecoder.places`."""
        sound = [self._is_sound(read.bytes_of(i)) for i in range(len(read.tiles))]
        return np.stack([read.first, np.where(sound, read.count, 0), np.zeros_like(read.count)], 1)

    def _is_sound(self, data: bytes) -> bool:
        if _header(data) != self._header:
            return False
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG2000",)) as image:
                image.reduce = self._coarsest
                image.load()
        except Exception:  # whatever Pillow makes of damage
            return False
        return True

    def decode(
        self, read: Compressed, places: Numbers, there: Tensor, places_there: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `DeviceDecoder.decode`."""
        library, on_gpu = self._library, self._device.type == "cuda"
        pixels = torch.empty(len(places), *self._shape, dtype=torch.uint8, device=self._device)
        stream = torch.cuda.current_stream(self._device).cuda_stream if on_gpu else 0
        sound = np.flatnonzero(places[:, 1])
        streams = [library.CodeStream(read.data[a : a + n]) for a, n, _ in places[sound].tolist()]
        targets = [pixels[i] if on_gpu else pixels[i].numpy() for i in sound.tolist()]
        raw = library.DecodeParams(
            apply_exif_orientation=False,
            color_spec=library.ColorSpec.UNCHANGED,
            sample_format=library.SampleFormat.I_UNCHANGED,
        )
        odd = torch.ones(len(places), dtype=torch.int32)
        if streams:
            with TURN:
                images = library.as_images(targets, cuda_stream=stream)
                done = self._decoder.decode(streams, images=images, params=raw, cuda_stream=stream)
            odd[sound] = torch.tensor([image is None for image in done], dtype=torch.int32)
        if self._codec.ycbcr:
            ycbcr_to_rgb(pixels)
        return pixels, odd


def _header(data: bytes) -> list[bytes]:
    """The header without comments and lengths, which all tiles share; empty if lengths or order are wrong."""
    parts: list[bytes] = []
    for marker, body, end in segments(data):
        if marker == TILE_PART:  # which has to be the only one
            ends_at = end - 12 + int.from_bytes(body[2:6], "big")
            is_whole = data[end : end + 2] == START_OF_DATA and data[ends_at:] == END
            return [*parts, body[:2], body[6:]] if is_whole else []
        if marker != COMMENT:
            parts.append(bytes([marker]) + body)
    return []


@lru_cache
def _open(device: torch.device) -> tuple[Any, Any]:
    """The library, and a decoder that leaves nothing to the host; on a CPU, for tests, the host's own."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # what is damaged is told by `decode`
    from nvidia import nvimgcodec

    kinds = [nvimgcodec.GPU_ONLY, nvimgcodec.HYBRID_CPU_GPU]
    number = -1 if device.index is None else device.index
    if device.type == "cpu":
        kinds, number = [nvimgcodec.CPU_ONLY], nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
    return nvimgcodec, nvimgcodec.Decoder(
        device_id=number, backends=[nvimgcodec.Backend(kind) for kind in kinds]
    )
