"""Resampling gives Pillow's pixels, on the CPU's uint8 kernel and in the integers of other devices."""

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from seal_extract.errors import UsageError
from seal_extract.patches.resample import resample
from seal_extract.patches.taps import by_taps

PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIDES = [(512, 256), (448, 224), (896, 224), (256, 224), (451, 224), (493, 224), (226, 224), (163, 224)]


def tissue(side, n=4):
    """Real H&E, uint8 [n, 3, side, side]."""
    image = np.asarray(Image.open(shared("data/he/high-nuclei-score-level0.png")).convert("RGB"))
    image = np.tile(image, (2, 2, 1))
    starts = np.linspace(0, 500, n).astype(int)
    return torch.from_numpy(np.stack([image[s : s + side, s : s + side] for s in starts])).permute(0, 3, 1, 2)


def channels_last(patches):
    return patches.permute(0, 2, 3, 1).numpy().astype(int)


def pillow(patches, side, filter):
    images = [Image.fromarray(p) for p in patches.permute(0, 2, 3, 1).contiguous().numpy()]
    return np.stack([np.asarray(i.resize((side, side), PILLOW[filter])) for i in images]).astype(int)


def noise(side, n=2):
    return torch.from_numpy(np.random.default_rng(side).integers(0, 256, (n, 3, side, side), dtype=np.uint8))


@pytest.mark.parametrize("patches", [tissue, noise])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "to"), SIDES)
def test_equals_pillow_within_one_grey_level(patches, filter, side, to):
    difference = np.abs(
        channels_last(resample(patches(side), (to, to), filter)) - pillow(patches(side), to, filter)
    )
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "to"), SIDES)
def test_taps_equal_pillow_bit_for_bit(filter, side, to):
    got = channels_last(by_taps(noise(side), (to, to), filter))
    np.testing.assert_array_equal(got, pillow(noise(side), to, filter))


def test_taps_take_sides_that_differ():
    got = channels_last(by_taps(noise(64)[:, :, :40], (30, 24)))
    image = Image.fromarray(noise(64)[0].permute(1, 2, 0)[:40].contiguous().numpy())
    np.testing.assert_array_equal(got[0], np.asarray(image.resize((24, 30), PILLOW["bicubic"])))


def test_right_size_is_left_alone_and_none_stays_none():
    patches = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert resample(patches, (32, 32)) is patches
    assert resample(patches[:0], (16, 16)).shape == (0, 3, 16, 16)


def test_other_inputs_are_refused():
    with pytest.raises(UsageError, match=r"float32 \[1, 3, 4, 4\]; give uint8"):
        resample(torch.zeros(1, 3, 4, 4), (2, 2))
    with pytest.raises(UsageError, match=r"nearest.*allowed: bicubic, bilinear"):
        resample(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), "nearest")


@pytest.mark.parametrize(("side", "to"), [(512, 256), (448, 112), (301, 224), (224, 223), (90, 7)])
def test_area_is_the_mean_over_each_new_pixel_on_every_device(side, to):
    patches = noise(side)
    on_host, elsewhere = (channels_last(f(patches, (to, to), "area")) for f in (resample, by_taps))
    assert np.abs(on_host.astype(int) - elsewhere).max() <= 1
    if side % to == 0:
        blocks = channels_last(patches).reshape(len(patches), to, side // to, to, side // to, 3)
        assert np.abs(blocks.mean((2, 4)) - on_host).max() <= 0.51


@pytest.mark.parametrize(("side", "to"), [(16, 14), (90, 7), (13, 12)])
def test_area_elsewhere_is_the_exact_mean_with_halves_rounded_up(side, to):
    patches = noise(side)
    fine = patches.numpy().astype(int).repeat(to, 2).repeat(to, 3)  # each new pixel is side x side of these
    sums = fine.reshape(len(patches), 3, to, side, to, side).sum((3, 5))
    np.testing.assert_array_equal(by_taps(patches, (to, to), "area"), (2 * sums + side**2) // (2 * side**2))


def test_an_area_beyond_32_bits_is_exact_too():
    white = torch.full((1, 3, 3001, 3001), 255, dtype=torch.uint8)
    assert (by_taps(white, (4, 4), "area") == 255).all()


@pytest.mark.parametrize("filter", ["bicubic", "area"])
def test_taps_need_no_floating_point(filter):
    """Some devices have no float64: there nothing else would be exact."""

    class Integers(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            assert not (isinstance(result, torch.Tensor) and result.is_floating_point()), op
            return result

    with Integers():
        by_taps(noise(61), (40, 40), filter)


def test_area_does_not_enlarge():
    with pytest.raises(UsageError, match="area cannot enlarge 32 px to 64; type --resample bicubic"):
        resample(noise(32), (64, 64), "area")


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "to"), SIDES)
def test_cuda_equals_pillow_bit_for_bit(side, to):
    got = channels_last(resample(noise(side).cuda(), (to, to)).cpu())
    np.testing.assert_array_equal(got, pillow(noise(side), to, "bicubic"))
