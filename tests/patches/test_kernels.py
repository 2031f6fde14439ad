"""Triton's kernels, on a CPU by its interpreter: the pixels of torch's integers, which are Pillow's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_file

from seal_extract.encoders import find_spec, transform
from seal_extract.patches.taps import by_taps

pytest.importorskip("triton", reason="Triton is for Linux")
from seal_extract.patches.kernels import Cut, resample_cut

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def noise(*shape):
    pixels = np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(pixels).to(DEVICE)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "area"])
@pytest.mark.parametrize(("side", "to"), [(64, 32), (96, 24), (64, 56), (57, 28), (40, 50), (31, 31)])
def test_regions_are_resized_as_by_taps(filter, side, to):
    if filter == "area" and to > side:
        pytest.skip("area only shrinks")
    regions = noise(2, side, side, 3).permute(0, 3, 1, 2)
    got = resample_cut(Cut.regions(regions), (to, to), filter)
    assert torch.equal(got, by_taps(regions, (to, to), filter))


def test_sides_may_differ_and_memory_may_be_in_planes():
    regions = noise(2, 3, 30, 44)
    got = resample_cut(Cut.regions(regions), (20, 11))
    assert torch.equal(got, by_taps(regions, (20, 11)))


@pytest.mark.parametrize("filter", ["bicubic", "area"])
@pytest.mark.parametrize(
    ("tile_px", "side", "to"), [((16, 16), 40, 20), ((24, 16), 33, 28), ((64, 64), 40, 40)]
)
def test_patches_are_cut_out_of_shuffled_tiles(filter, tile_px, side, to):
    """The corner of one patch is a tile's, others lie anywhere, and one reaches beyond the last tile."""
    (h, w), across, down = tile_px, 6, 5
    picture = noise(down * h, across * w, 3)
    order = torch.randperm(across * down, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tiles = picture.view(down, h, across, w, 3).transpose(1, 2).reshape(-1, h, w, 3)[order]
    place = order.argsort().int().view(down, across)
    corners = [(w, h), (w - 5, 3), (across * w - side + 7, down * h - side)]
    spans = (2 + side // h, 2 + side // w)
    padded = torch.nn.functional.pad(place, (0, spans[1], 0, spans[0]), value=-1)
    slots = torch.stack([padded[y // h : y // h + spans[0], x // w : x // w + spans[1]] for x, y in corners])
    inside = torch.tensor([(x % w, y % h) for x, y in corners], dtype=torch.int32, device=DEVICE)
    got = resample_cut(Cut(tiles, slots.contiguous(), inside, (side, side)), (to, to), filter)
    black = torch.nn.functional.pad(picture, (0, 0, 0, side, 0, side))
    regions = torch.stack([black[y : y + side, x : x + side] for x, y in corners]).permute(0, 3, 1, 2)
    assert torch.equal(got, by_taps(regions, (to, to), filter))


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_normalising_by_one_kernel_gives_the_bits_that_autocast_gives(precision, monkeypatch):
    images = noise(2, 3, 40, 24)
    images.view(-1)[: 3 * 256] = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(3)
    row = find_spec("conch")
    mean, std = (torch.tensor(of, device=DEVICE).view(3, 1, 1) for of in (row.mean, row.std))
    monkeypatch.setattr(transform, "kernels_run_on", lambda device: True)
    got = transform.normalise(images, mean, std, precision)
    monkeypatch.setattr(transform, "kernels_run_on", lambda device: False)
    assert got.dtype == precision
    assert torch.equal(got, transform.normalise(images, mean, std, precision).to(precision))


@pytest.mark.parametrize(
    "generation",
    [90, *(pytest.param(older_or_newer, marks=pytest.mark.slow) for older_or_newer in (75, 80, 100))],
)
def test_every_kernel_compiles_for_gpus_that_are_not_here(generation):
    """Hopper; and Turing, Ampere, Blackwell."""
    done = run_file(str(Path(__file__).with_name("compile_kernels.py")), generation)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines
    for kernel, _, registers, spilled in lines:
        assert int(registers) <= 128, kernel
        assert spilled == "0", kernel
