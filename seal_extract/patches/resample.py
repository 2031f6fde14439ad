"""Resize 8-bit patches on the device that holds them, to the pixels that Pillow gives.

Pillow filters rows with weights rounded to 22 bits, rounds to 8 bits, then filters columns. Torch's uint8
kernel on the CPU has coarser weights: it is within 1 grey level at whole factors, and sometimes 2 off at
others. So the CPU uses that kernel at whole factors and Pillow itself at others. For other devices torch has
no uint8 kernel; they compute Pillow's integer arithmetic exactly, on CUDA by two kernels in Triton where they
run, else by torch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seal_extract.errors import UsageError
from seal_extract.patches.codecs import memory_for_pixels
from seal_extract.patches.taps import Filter, by_taps

# what torch.nn.functional.interpolate calls with antialias=True; it takes no memory for the result
BY_TORCH = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Memory:
    """Memory of the host for pixels, as torch and as NumPy see it.

    Attributes:
        tensor: uint8 [B, 3, side, side], channels last.
        array: uint8 [B, side, side, 3].
    """

    tensor: Tensor
    array: NDArray[np.uint8]

    def __getitem__(self, some: slice) -> Memory:
        return Memory(self.tensor[some], self.array[some])


@dataclass(frozen=True)
class Resampling:
    """How regions become patches, and where.

    Attributes:
        patch_px: side of a patch.
        filter: of the resampling.
        early: resample in the reading threads, for patches that stay on the host.
    """

    patch_px: int
    filter: Filter = "bicubic"
    early: bool = True

    def regions(self, rows: int, side_px: int, out: Memory | None) -> NDArray[np.uint8]:
        """Memory for regions, uint8 [rows, side, side, 3]: ``out`` unless that is for smaller patches."""
        if out is not None and out.array.shape[1] == side_px:
            return out.array
        return memory_for_pixels(rows, side_px, side_px, 3)

    def in_thread(self, regions: NDArray[np.uint8], out: Memory | None = None) -> Tensor:
        """What a reading thread hands over: patches if ``early``, else the regions; [B, 3, side, side].

        Patches that are not regions already go to ``out`` if it is given.
        """
        if out is not None and regions is out.array:
            return out.tensor  # with no call of torch, which costs 0.1 ms after other work
        pixels = torch.from_numpy(regions).permute(0, 3, 1, 2)
        if not self.early:
            return pixels
        size_px = (self.patch_px, self.patch_px)
        return resample(pixels, size_px, self.filter, None if out is None else out.tensor)

    def on_device(self, pixels: Tensor) -> Tensor:
        """Resample regions to patches on their device."""
        return resample(pixels, (self.patch_px, self.patch_px), self.filter)


def resample(
    patches: Tensor, size_px: tuple[int, int], filter: Filter = "bicubic", out: Tensor | None = None
) -> Tensor:
    """Resize with antialiasing, within 1 grey level of ``PIL.Image.resize`` with the same filter.

    Args:
        patches: uint8 [B, 3, H, W] on any device.
        size_px: (height, width) wanted.
        filter: ``"bicubic"``, ``"bilinear"``, or ``"area"``, the mean over a new pixel, which only shrinks.
        out: on the CPU, channels-last memory for the result, uint8 [B, 3, height, width].

    Returns:
        uint8 [B, 3, height, width] on the same device; the input itself if it has that size already.

    Raises:
        UsageError: another dtype, shape or filter; or ``"area"`` would enlarge.
    """
    if patches.dtype != torch.uint8 or patches.ndim != 4:
        raise UsageError(f"patches are {patches.dtype} {list(patches.shape)}; give uint8 [B, 3, H, W]")
    if filter not in get_args(Filter):
        raise UsageError(f"filter is {filter!r}; allowed: {', '.join(get_args(Filter))}")
    before = (patches.shape[2], patches.shape[3])
    if before == size_px:
        return patches
    if not len(patches):
        return patches.new_empty((0, patches.shape[1], *size_px))
    if filter == "area":
        _check_shrinks(before, size_px)
    if kernels_run_on(patches.device):
        from seal_extract.patches.kernels import Cut, resample_cut

        return resample_cut(Cut.regions(patches), size_px, filter)
    if patches.device.type != "cpu":
        return by_taps(patches, size_px, filter)
    if out is None:
        shape = (*patches.shape[:2], *size_px)
        out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    # channels-last memory takes torch's vectorised kernel: three times faster than NCHW
    packed = patches.contiguous(memory_format=torch.channels_last)
    if filter != "area" and all(b % a == 0 for b, a in zip(before, size_px, strict=True)):
        BY_TORCH[filter](packed, size_px, False, None, None, out=out)
        return out
    images, resized = (pixels.permute(0, 2, 3, 1).numpy() for pixels in (packed, out))
    for image, to in zip(images, resized, strict=True):
        if filter == "area":  # rounded once
            cv2.resize(image, (size_px[1], size_px[0]), dst=to, interpolation=cv2.INTER_AREA)
        else:
            to[:] = resize_region(image, size_px, filter)
    return out


@lru_cache
def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device and give exact pixels there, found by a trial."""
    if device.type != "cuda":
        return False
    try:
        from seal_extract.patches.kernels import Cut, resample_cut

        trial = torch.arange(3 * 40 * 40, device=device).mul_(7919).to(torch.uint8).view(1, 3, 40, 40)
        exact = torch.equal(resample_cut(Cut.regions(trial), (24, 24)), by_taps(trial, (24, 24)))
        problem = "" if exact else "they give other pixels"
    except Exception as exc:  # no Triton, no C compiler, a GPU too old: each has errors of its own
        problem = f"{type(exc).__name__}: {exc}".partition("\n")[0]
    if problem:
        warnings.warn(
            f"Triton's kernels do not run on {device} ({problem}); torch resamples instead, more slowly",
            stacklevel=2,
        )
    return not problem


def resize_region(
    region: NDArray[np.uint8], size_px: tuple[int, int], filter: Filter = "bicubic"
) -> NDArray[np.uint8]:
    """Pillow's resize of one uint8 [H, W, 3] to (height, width); other threads run meanwhile."""
    return np.asarray(Image.fromarray(region).resize((size_px[1], size_px[0]), PILLOW[filter]))


def _check_shrinks(before: tuple[int, int], after: tuple[int, int]) -> None:
    if before[0] < after[0] or before[1] < after[1]:
        raise UsageError(f"area cannot enlarge {before[1]} px to {after[1]}; type --resample bicubic")
