"""A volume of known expression: it follows from the planes above and below, never from a plane itself."""

import json

import numpy as np
import pytest
from PIL import Image
from section_files import make_section, square
from train_fixtures import TINY

from seal_extract.demo import untrained_encoder

SIDE, TILES, GENES = 32, 12, 8
PANEL = tuple(f"GENE{i}" for i in range(GENES))
MPP, SPACING_UM = 0.5, 16.0


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
    path.write_text(json.dumps({"planes": entries, "mpp": MPP, "spacing_um": SPACING_UM}))
    around = [[max(i - 1, 0), min(i + 1, planes - 1)] for i in range(planes)]
    above, below = (colours[[pair[j] for pair in around]].reshape(planes, -1, 3) for j in (0, 1))
    mixing = np.random.default_rng(7).normal(size=(3, GENES))
    return path, np.maximum((above - below) / 60 @ mixing / 2 + 2, 0)


def write_zarr(path, planes, unit="micrometer", shape=(1, 3, 2, 32, 32)):
    """Two levels (t, c, z, y, x) of OME-Zarr 0.4; the coarse one is the corner of every other pixel."""
    import zarr

    written = {"zarr_format": 2} if zarr.__version__ >= "3" else {}
    group = zarr.open_group(str(path), mode="w", **written)
    create = group.create_array if written else group.create_dataset
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": unit} for axis in "zyx"]
    datasets = []
    for level, step in enumerate((1, 2)):
        values = planes[:, ::step, ::step].transpose(3, 0, 1, 2)[None]
        array = create(str(level), shape=values.shape, chunks=shape, dtype="u1")
        array[:] = values
        scale = {"type": "scale", "scale": [1.0, 1.0, SPACING_UM, MPP * step, MPP * step]}
        datasets.append({"path": str(level), "coordinateTransformations": [scale]})
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    return path


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


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A volume of six planes, its expression, and models of one and of three planes, hardly trained."""
    from seal_extract.train.config import LoopOptions, OmicsOptions
    from seal_extract.volume.config import DepthOptions, VolumeConfig, VolumeData
    from seal_extract.volume.train import train_volume

    folder = tmp_path_factory.mktemp("world")
    path, expression = write_volume(folder / "volume")
    encoder, models = write_encoder(folder / "encoder"), {}
    for planes in (1, 3):
        config = VolumeConfig(
            name="deep",
            encoder=str(encoder),
            out=str(folder / f"model{planes}"),
            voi=VolumeData(str(path), sections=()),
            genes=GENES,
            patch_px=SIDE,
            batch_size=64,
            epochs=(0, 0, 1),
            depth=DepthOptions(planes=planes, width=16),
            omics=OmicsOptions(hidden=(16, 8), epochs=0),
            loop=LoopOptions(lr=1e-2),
        )
        measured = [section(path, 2, expression)]
        models[planes] = train_volume(config, sections={str(path): measured}).path
    return path, expression, models


@pytest.fixture(scope="session")
def predicted(world, tmp_path_factory):
    """The folder of a prediction of that volume through three planes, with three domains."""
    from seal_extract.volume.model import load_volume_encoder
    from seal_extract.volume.predict import predict_volume
    from seal_extract.volume.volume import open_volume

    path, _, models = world
    out = tmp_path_factory.mktemp("predicted") / "out"
    predict_volume(open_volume(path), load_volume_encoder(models[3]), out, all_tissue=True, domains=3)
    return out
