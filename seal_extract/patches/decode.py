"""Slide and grid rows in, uint8 patches [B, 3, S, S] on the device out.

A way to decode is what threads `read` on the host, and how that becomes patches, `to_patches`, on the device.
There are two: compressed tiles, each decoded once, and regions through the slide's reader, for every format.
"""

from __future__ import annotations

import torch

from seal_extract.patches.decoder import Decoded, Decoder, Finish
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.regions import RegionDecoder
from seal_extract.patches.resample import Filter
from seal_extract.patches.tiled import Unsuitable
from seal_extract.patches.tiles import TileDecoder
from seal_extract.slides.slide import Slide

__all__ = ["Decoded", "Decoder", "Finish", "RegionDecoder", "TileDecoder", "open_decoder"]


def open_decoder(
    slide: Slide, grid: PatchGrid, device: torch.device, *, filter: Filter = "bicubic", fast: bool = False
) -> Decoder:
    """The fastest way to decode that gives the reader's own pixels.

    Args:
        slide: stays open as long as the decoder.
        grid: rows to read.
        device: where the patches will be used.
        filter: of the resampling, ``"bicubic"`` or ``"area"``.
        fast: decode JPEG at reduced scale where patches shrink by a multiple of 2; other pixels, see README.
    """
    on_gpu = device.type == "cuda"
    finish = Finish(grid.patch_px, filter, early=device.type == "cpu", pinned=on_gpu)
    try:
        return TileDecoder(slide, grid, finish, fast)
    except Unsuitable as exc:
        return RegionDecoder(slide, grid, finish, str(exc))
