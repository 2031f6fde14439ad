"""A volume of known expression: it follows from the planes above and below, never from a plane itself."""

import json

import numpy as np
from PIL import Image
from section_files import make_section, square
from train_fixtures import TINY

from seal_extract.demo import untrained_encoder

SIDE, TILES, GENES = 32, 12, 8
PANEL = tuple(f"GENE{i}" for i in range(GENES))
SPACING_UM = 16.0


def write_volume(folder, planes=6, seed=0):
    """Planes of tiles of one colour each, with noise; returns the JSON file and the expression of each plane.

    Tiles are as large as a patch at 0.5 µm/px. Expression [Z, N, G] of a tile is a mixture of the difference
    between the colours above and below it, of which the plane itself shows nothing.
    """
    rng = np.random.default_rng(seed)
    colours = rng.uniform(60, 200, (planes, TILES, TILES, 3))
    noise = rng.normal(0, 6, (planes, TILES * SIDE, TILES * SIDE, 3))
    pictures = (colours.repeat(SIDE, 1).repeat(SIDE, 2) + noise).clip(0, 255).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"plane_{i}.png")
    entries = [{"slide": f"plane_{i}.png", "name": f"P{i}"} for i in range(planes)]
    path = folder / "volume.json"
    path.write_text(json.dumps({"planes": entries, "mpp": 0.5, "spacing_um": SPACING_UM}))
    around = [[max(i - 1, 0), min(i + 1, planes - 1)] for i in range(planes)]
    above, below = (colours[[pair[j] for pair in around]].reshape(planes, -1, 3) for j in (0, 1))
    mixing = np.random.default_rng(7).normal(size=(3, GENES))
    return path, np.maximum((above - below) / 60 @ mixing / 2 + 2, 0)


def section(path, plane, expression):
    """The measured section of a plane, a spot in each tile."""
    places = square(TILES, TILES)
    return make_section(
        name=f"P{plane}",
        slide=path.with_name(f"plane_{plane}.png"),
        genes=PANEL,
        counts=expression[plane].astype(np.float32),
        scale="log1p",
        xy_l0=(places[:, ::-1] + 0.5) * SIDE,
        barcodes=tuple(f"{r}x{c}" for r, c in places),
        array_rc=places,
    )


def write_encoder(folder):
    """A tiny encoder of random weights, frozen in these tests."""
    untrained_encoder(TINY).save_pretrained(folder)
    return folder
