"""The way to read the patches of a slide: the fastest that gives the pixels of the slide's reader."""

from __future__ import annotations

from typing import Literal

import torch

from seal_extract.errors import UsageError
from seal_extract.patches.gpu_tiles import GpuTileReader
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.regions import PatchReader, RegionReader
from seal_extract.patches.resample import Resampling, kernels_run_on
from seal_extract.patches.taps import Filter
from seal_extract.patches.tiled import Unsuitable
from seal_extract.patches.tiles import TileReader
from seal_extract.slides.slide import Slide


def open_patch_reader(
    slide: Slide,
    grid: PatchGrid,
    device: torch.device,
    *,
    filter: Filter = "bicubic",
    fast: bool = False,
    gpu_decode: Literal["auto", "on", "off"] = "auto",
) -> PatchReader:
    """Open the fastest way to read patches that gives the pixels of the slide's reader.

    Args:
        slide: stays open as long as the patch reader.
        grid: rows to read.
        device: where the patches will be used.
        filter: of the resampling, ``"bicubic"`` or ``"area"``.
        fast: decode JPEG at reduced scale if patches shrink by a multiple of 2; the pixels differ.
        gpu_decode: whether a GPU decodes the tiles: ``"auto"`` where it can, ``"on"``, ``"off"``.

    Raises:
        UsageError: ``"on"``, and the GPU cannot decode this slide's tiles to the same pixels.
    """
    resampling = Resampling(grid.patch_px, filter, early=device.type == "cpu")
    why_not = "--gpu-decode off"
    if gpu_decode != "off" and len(grid):
        try:
            if fast:
                raise Unsuitable("--fast-decode")
            if not kernels_run_on(device):
                raise Unsuitable(f"Triton's kernels do not run on {device}")
            return GpuTileReader(slide, grid, resampling, device)
        except Unsuitable as exc:
            why_not = str(exc)
            if gpu_decode == "on":
                raise UsageError(
                    f"{slide.path}: the GPU cannot decode its tiles ({exc}); type --gpu-decode auto"
                ) from exc
    try:
        reader = TileReader(slide, grid, resampling, fast)
    except Unsuitable as exc:
        return RegionReader(slide, grid, resampling, str(exc))
    if device.type == "cuda":
        reader.name += f", not on the GPU: {why_not}"
    return reader
