"""Triton kernels: cut patches out of decoded tiles and resample them in two passes, with Pillow's integers;
the colours of JPEG 2000; and normalisation.

The pixels equal those of `seal_extract.patches.taps.by_taps` bit for bit. Read at 512 px and wanted at 256, a
patch moves 1.8 MB of memory; the same sums in torch move 71 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from seal_extract.patches.codecs import BLUE_OF_CB, GREEN_OF_CB, GREEN_OF_CR, RED_OF_CR
from seal_extract.patches.taps import Filter, taps

BLOCK = (4, 128)  # new pixels (rows, columns) of a program, on a GPU
LANES = 1024  # pixels or values of a program that converts colours or normalises, on a GPU
BLOCK_INTERPRETED = (64, 256)  # on a CPU each step of a program costs milliseconds, whatever its size


@dataclass(frozen=True)
class Cut:
    """Where patches lie in tiles; a region that was read as a whole is a patch that has a tile to itself.

    Attributes:
        tiles: uint8 [T, h, w, 3], in any memory order.
        slots: int32 [B, rows, columns], the tiles under each patch; -1 for none, which is black.
        corners: int32 [B, 2], (x, y) of each patch in the first of its tiles.
        size_px: (height, width) of what is cut.
    """

    tiles: Tensor
    slots: Tensor
    corners: Tensor
    size_px: tuple[int, int]

    @classmethod
    def regions(cls, pixels: Tensor) -> Cut:
        """Take regions as they are, uint8 [B, 3, h, w]."""
        count, device = len(pixels), pixels.device
        slots = torch.arange(count, dtype=torch.int32, device=device).view(count, 1, 1)
        corners = torch.zeros(count, 2, dtype=torch.int32, device=device)
        return cls(pixels.permute(0, 2, 3, 1), slots, corners, (pixels.shape[2], pixels.shape[3]))


def resample_cut(cut: Cut, size_px: tuple[int, int], filter: Filter = "bicubic") -> Tensor:
    """Cut and resize.

    Args:
        cut: of patches on a CUDA device, or on the CPU if Triton interprets (``TRITON_INTERPRET=1``).
        size_px: (height, width) wanted; for area no larger than before.
        filter: see `seal_extract.patches.resample.resample`.

    Returns:
        uint8 [B, 3, height, width].
    """
    (before, read_px), (height, width), device = cut.size_px, size_px, cut.tiles.device
    columns, rows = taps(read_px, width, filter, device), taps(before, height, filter, device)
    exact = filter == "area"
    area = columns.total * rows.total if exact else 1
    wide = 256 * area >= 2**31
    count, (block_y, block_x) = len(cut.slots), BLOCK
    if device.type != "cuda":
        fitting = (triton.next_power_of_2(max(before, height)), triton.next_power_of_2(width))
        block_y, block_x = map(min, BLOCK_INTERPRETED, fitting)
    kind = (torch.int64 if wide else torch.int32) if exact else torch.uint8
    between = torch.empty(count, 3, before, width, dtype=kind, device=device)
    patches = torch.empty(count, 3, height, width, dtype=torch.uint8, device=device)
    block = {"ROWS": block_y, "COLUMNS": block_x}
    with torch.cuda.device_of(patches):
        _across[count, triton.cdiv(before, block_y), triton.cdiv(width, block_x)](
            *(
                cut.tiles,
                *cut.tiles.stride(),
                *cut.tiles.shape[1:3],
                cut.slots,
                *cut.slots.shape[1:],
                cut.corners,
            ),
            *(columns.pixels, columns.weights, between, before, width),
            **(block | {"TAPS": len(columns.weights), "EXACT": exact}),
        )
        _down[count * 3, triton.cdiv(height, block_y), triton.cdiv(width, block_x)](
            *(between, before, rows.pixels, rows.weights, patches, height, width, area),
            **(block | {"TAPS": len(rows.weights), "EXACT": exact, "WIDE": wide}),
        )
    return patches


@triton.jit
def _rounded(sums):
    """Half up, as Pillow does, then clipped to 8 bits; 22 bits are its weights'."""
    return tl.minimum(tl.maximum(sums + (1 << 21) >> 22, 0), 255)


# what changes from batch to batch must not make Triton compile anew
@triton.jit(
    do_not_specialize=["slots_y", "slots_x"], do_not_specialize_on_alignment=["tiles", "slots", "corners"]
)
def _across(
    tiles, tile_stride, y_stride, x_stride, colour_stride, tile_h, tile_w, slots, slots_y, slots_x, corners,
    pixels, weights, between, height, width,
    TAPS: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gather a block of rows of one patch and filter it along x: [B, 3, height, width]."""
    patch = tl.program_id(0).to(tl.int64)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (y < height)[:, None] & (x < width)[None, :]
    y_px = y + tl.load(corners + 2 * patch + 1)
    slot_y = tl.minimum(y_px // tile_h, slots_y - 1)
    row = slots + ((patch * slots_y + slot_y) * slots_x)[:, None]
    line = tiles + ((y_px - slot_y * tile_h) * y_stride)[:, None]
    left = tl.load(corners + 2 * patch)
    red = tl.zeros((ROWS, COLUMNS), tl.int32)
    green = tl.zeros((ROWS, COLUMNS), tl.int32)
    blue = tl.zeros((ROWS, COLUMNS), tl.int32)
    for k in range(TAPS):
        weight = tl.load(weights + k * width + x, mask=x < width, other=0)[None, :]
        x_px = left + tl.load(pixels + k * width + x, mask=x < width, other=0)
        slot_x = x_px // tile_w
        tile = tl.load(row + slot_x[None, :], mask=inside, other=-1).to(tl.int64)
        pixel = line + tile * tile_stride + ((x_px - slot_x * tile_w) * x_stride)[None, :]
        red += weight * tl.load(pixel, mask=tile >= 0, other=0).to(tl.int32)
        green += weight * tl.load(pixel + colour_stride, mask=tile >= 0, other=0).to(tl.int32)
        blue += weight * tl.load(pixel + 2 * colour_stride, mask=tile >= 0, other=0).to(tl.int32)
    if not EXACT:
        red, green, blue = _rounded(red), _rounded(green), _rounded(blue)
    plane = height * width
    to = between + patch * 3 * plane + y[:, None] * width + x[None, :]
    tl.store(to, red.to(between.dtype.element_ty), mask=inside)
    tl.store(to + plane, green.to(between.dtype.element_ty), mask=inside)
    tl.store(to + 2 * plane, blue.to(between.dtype.element_ty), mask=inside)


@triton.jit
def _down(
    between, before, pixels, weights, patches, height, width, area,
    TAPS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Filter a block of one plane along y: [B * 3, height, width]."""
    plane = tl.program_id(0).to(tl.int64)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (y < height)[:, None] & (x < width)[None, :]
    column = between + plane * before * width + x[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.int64 if WIDE else tl.int32)
    for k in range(TAPS):
        weight = tl.load(weights + k * height + y, mask=y < height, other=0)[:, None]
        y_px = tl.load(pixels + k * height + y, mask=y < height, other=0)[:, None]
        sums += weight * tl.load(column + y_px * width, mask=inside, other=0).to(sums.dtype)
    sums = (sums + area // 2) // area if EXACT else _rounded(sums)
    tl.store(patches + (plane * height + y[:, None]) * width + x[None, :], sums.to(tl.uint8), mask=inside)


def ycbcr_to_rgb(pixels: Tensor) -> None:
    """Convert JPEG 2000 tiles in their place by the host's tables: uint8 [T, h, w, 3], contiguous."""
    device, count = pixels.device, pixels.numel() // 3
    lanes = LANES if device.type == "cuda" else triton.next_power_of_2(count)
    with torch.cuda.device_of(pixels):
        _to_rgb[triton.cdiv(count, lanes),](pixels, _colour_tables(device), count, LANES=lanes)


@lru_cache
def _colour_tables(device: torch.device) -> Tensor:
    """Int32 [4, 256]: red of Cr, blue of Cb, green of Cb, green of Cr."""
    tables = np.stack([RED_OF_CR, BLUE_OF_CB, GREEN_OF_CB, GREEN_OF_CR]).astype(np.int32)
    return torch.from_numpy(tables).to(device)


@triton.jit(do_not_specialize=["count"])
def _to_rgb(pixels, tables, count, LANES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = at < count
    pixel = pixels + at * 3
    y = tl.load(pixel, mask=mask, other=0).to(tl.int32)
    cb = tl.load(pixel + 1, mask=mask, other=0).to(tl.int32)
    cr = tl.load(pixel + 2, mask=mask, other=0).to(tl.int32)
    red = y + tl.load(tables + cr)
    green = y + ((tl.load(tables + 512 + cb) + tl.load(tables + 768 + cr)) >> 16)
    blue = y + tl.load(tables + 256 + cb)
    tl.store(pixel, tl.minimum(tl.maximum(red, 0), 255).to(tl.uint8), mask=mask)
    tl.store(pixel + 1, tl.minimum(tl.maximum(green, 0), 255).to(tl.uint8), mask=mask)
    tl.store(pixel + 2, tl.minimum(tl.maximum(blue, 0), 255).to(tl.uint8), mask=mask)


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """``table[colour, value]``, read in one pass.

    Args:
        images: uint8 [B, 3, H, W].
        table: [3, 256], contiguous, on their device.

    Returns:
        [B, 3, H, W] in the dtype of the table.
    """
    images, count = images.contiguous(), images.numel()
    found = torch.empty(images.shape, dtype=table.dtype, device=images.device)
    lanes = LANES if images.device.type == "cuda" else triton.next_power_of_2(count)
    with torch.cuda.device_of(images):
        _look_up[triton.cdiv(count, lanes),](images, table, found, images[0, 0].numel(), count, LANES=lanes)
    return found


@triton.jit(do_not_specialize=["count"])
def _look_up(images, table, found, plane, count, LANES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = at < count
    value = tl.load(images + at, mask=mask, other=0).to(tl.int32)
    entry = table + (at // plane) % 3 * 256 + value
    tl.store(found + at, tl.load(entry, mask=mask, other=0), mask=mask)
