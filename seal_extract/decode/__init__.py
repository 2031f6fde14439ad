"""Slide and grid rows in, uint8 patches [B, 3, S, S] on the device out.

A way to decode is what threads `read` on the host, and how that becomes patches, `to_patches`, on the device.
"""

from __future__ import annotations

import torch

from seal_extract.decode.regions import RegionDecoder
from seal_extract.grid import PatchGrid
from seal_extract.slide import Slide

__all__ = ["RegionDecoder", "open_decoder"]


def open_decoder(slide: Slide, grid: PatchGrid, device: torch.device) -> RegionDecoder:
    """The way to decode that fits the file and the device: regions through its reader, for every format."""
    return RegionDecoder(slide, grid, resize_early=device.type == "cpu")
