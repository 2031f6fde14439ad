"""Every plane predicted: features and genes as of slides, one OME-Zarr, and files that are continued."""

import csv
import json

import cv2
import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from synthetic_volume import GENES, PANEL, SIDE, SPACING_UM, TILES, section, write_zarr

from seal_extract import ExtractOptions, extract
from seal_extract.cli import main
from seal_extract.errors import SealExtractError
from seal_extract.features.store import list_features
from seal_extract.slides.planes import Stack
from seal_extract.view.pictures import GAP_PX, PATCH_PX, TITLE_PX
from seal_extract.volume.model import load_volume_encoder
from seal_extract.volume.patches import depth_pairs
from seal_extract.volume.predict import predict_volume
from seal_extract.volume.volume import open_volume


def test_every_plane_is_predicted_through_depth(world, tmp_path):
    path, expression, models = world
    volume, model = open_volume(path), load_volume_encoder(models[3])
    lines = []
    store = predict_volume(volume, model, tmp_path, all_tissue=True, log=lines.append)
    assert len(lines) == len(volume)
    array = zarr.open(str(store), mode="r")["0"]
    dense = array[:]  # float32 (gene, z, y, x)
    assert dense.shape == (GENES, len(volume), TILES, TILES)
    genes = model.decoder.genes
    for plane in (0, 3):  # spots lie in the middle of each tile, so that patches are tiles
        pairs = depth_pairs(
            [(volume, section(path, plane, expression))], PANEL, 3, SIDE, 0.5, encoder=model.encoder
        )
        decoded = model.depth.decoded_embedding(torch.from_numpy(pairs.embeddings)).numpy()
        np.testing.assert_allclose(
            dense[:, plane].reshape(GENES, -1).T, model.decoder.predict(decoded), atol=1e-5
        )
    attributes = json.loads((store / ".zattrs").read_text())
    (scale,) = attributes["multiscales"]
    assert [axis["name"] for axis in scale["axes"]] == ["c", "z", "y", "x"]
    assert scale["datasets"][0]["coordinateTransformations"] == [
        {"type": "scale", "scale": [1.0, SPACING_UM, 16.0, 16.0]},
        {"type": "translation", "translation": [0.0, 0.0, 8.0, 8.0]},
    ]
    assert [channel["label"] for channel in attributes["omero"]["channels"]] == list(genes)
    origin = json.loads(attributes["seal_extract"])
    assert origin["planes"] == [f"P{i}" for i in range(6)]
    assert origin["made_of"][0]["request"]["encoder"]["name"] == "deep-depth3"
    assert str(tmp_path) not in json.dumps(attributes)


def test_domains_are_clusters_of_all_planes_together(world, tmp_path):
    path, _, models = world
    volume, model = open_volume(path), load_volume_encoder(models[3])
    store = predict_volume(volume, model, tmp_path, genes=["GENE1"], all_tissue=True, domains=3)
    labels = zarr.open(str(store), mode="r")["labels/domains/0"][:]
    assert labels.shape == (len(volume), TILES, TILES)
    assert set(np.unique(labels)) == {1, 2, 3}
    features = np.concatenate([one.features for one in list_features(tmp_path)[0]])
    rows = (features - features.mean(0)) / features.std(0)
    centres = np.stack([rows[labels.ravel() == i].mean(0) for i in (1, 2, 3)])
    nearest = ((rows[:, None] - centres) ** 2).sum(2).argmin(1) + 1
    assert (nearest == labels.ravel()).mean() > 0.98
    with pytest.raises(SealExtractError, match="--domains is 1; allowed: 2 to 100"):
        predict_volume(volume, model, tmp_path, genes=["GENE1"], all_tissue=True, domains=1)


def test_one_plane_gives_the_features_of_a_slide_bit_for_bit(world, tmp_path):
    path, _, models = world
    model = load_volume_encoder(models[1])
    predict_volume(open_volume(path), model, tmp_path / "volume", all_tissue=True)
    roi = tmp_path / "all.geojson"
    side = TILES * SIDE
    ring = [[0, 0], [side, 0], [side, side], [0, side], [0, 0]]
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    options = ExtractOptions(patch_px=SIDE, mpp=0.5, slide_mpp=0.5, roi=roi, plan_timeout_s=0)
    for one in list_features(tmp_path / "volume")[0]:
        two_d = extract(path.with_name(one.path.stem.replace("P", "plane_") + ".png"), model.encoder,
                        tmp_path / "slides", options=options)  # fmt: skip
        np.testing.assert_array_equal(one.grid.xy_l0, two_d.grid.xy_l0)
        np.testing.assert_array_equal(one.features, two_d.features)


def test_a_chunk_of_several_planes_is_decoded_once_in_bounded_memory(world, tmp_path, monkeypatch):
    """And the features are those of the same planes as pictures."""
    path, _, models = world
    listed, model = open_volume(path), load_volume_encoder(models[3])
    pixels = []
    for plane in listed.planes:
        with plane.open() as slide:
            pixels.append(slide.read_region((0, 0), 0, slide.size_l0))
    monkeypatch.setattr("seal_extract.patches.stream.available_cores", lambda: 1)  # no thread falls behind
    monkeypatch.setattr("seal_extract.slides.planes.LEAST_VALUES", 0)
    monkeypatch.setattr("seal_extract.slides.planes.CACHE_BYTES", 8 * 3 * 64 * 64 * 3)  # of 36 * 2 chunks
    volume = open_volume(write_zarr(tmp_path / "v.zarr", np.stack(pixels), shape=(1, 3, 3, 64, 64)))
    assert volume.planes[0].content() == volume.planes[1].content()
    decoded, decode = [], Stack._decode
    monkeypatch.setattr(Stack, "_decode", lambda self, *place: decoded.append(place) or decode(self, *place))
    predict_volume(volume, model, tmp_path / "out", all_tissue=True)
    assert len(decoded) == len(set(decoded)) == 72
    predict_volume(listed, model, tmp_path / "listed", all_tissue=True)
    for ours, theirs in zip(*(list_features(tmp_path / name)[0] for name in ("out", "listed")), strict=True):
        np.testing.assert_array_equal(ours.features, theirs.features)


def test_planes_coarser_than_the_model_need_a_word(world, tmp_path):
    path, _, models = world
    coarse = path.with_name("coarse.json")
    coarse.write_text(json.dumps(json.loads(path.read_text()) | {"mpp": 0.6}))
    volume, model = open_volume(coarse), load_volume_encoder(models[1])
    with pytest.raises(SealExtractError, match=r"has only 0.6; .*--allow-upsampling"):
        predict_volume(volume, model, tmp_path, all_tissue=True)
    store = predict_volume(volume, model, tmp_path, genes=["GENE1"], all_tissue=True, allow_upsampling=True)
    assert zarr.open(str(store), mode="r")["0"].shape[:2] == (1, len(volume))


def test_finished_planes_are_kept_and_other_requests_refused(world, tmp_path):
    path, _, models = world
    volume, model = open_volume(path), load_volume_encoder(models[3])
    store = predict_volume(volume, model, tmp_path, genes=["GENE1"], all_tissue=True)
    files = [one.path for one in list_features(tmp_path)[0]]
    times = {file: file.stat().st_mtime_ns for file in files}
    files[2].unlink()
    predict_volume(volume, model, tmp_path, genes=["GENE3", "GENE1"], all_tissue=True)
    assert [f.stat().st_mtime_ns == times[f] for f in files] == [True, True, False, True, True, True]
    assert zarr.open(str(store), mode="r")["0"].shape[0] == 2
    with pytest.raises(SealExtractError, match=r"options min_tissue 0.5, now 0.4.*--overwrite"):
        predict_volume(volume, model, tmp_path, min_tissue=0.4, all_tissue=True)
    with pytest.raises(SealExtractError, match="GENE9 is not among the genes"):
        predict_volume(volume, model, tmp_path, genes=["GENE9"], all_tissue=True)
    (store / ".zattrs").write_text("{}")
    with pytest.raises(SealExtractError, match="exists and is not ours"):
        predict_volume(volume, model, tmp_path, all_tissue=True)


def test_the_commands_from_training_to_search(world, tmp_path, capsys):
    """A stack of glass and of tissue; its planes are searched and shown by the commands for slides."""
    _, _, models = world
    rng = np.random.default_rng(0)
    tissue = cv2.GaussianBlur(rng.normal(0, 90, (3, 400, 400, 3)).astype(np.float32)[0], (0, 0), 3) * 4
    planes = np.full((3, 1000, 1000, 3), 240, np.uint8)
    planes[1, 300:700, 200:600] = (np.array([170, 110, 160]) + tissue).clip(0, 255)
    planes[2] = planes[1, :, :, ::-1]
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 5.0}
    tifffile.imwrite(tmp_path / "v.ome.tif", planes, metadata={"axes": "ZYXS", **sizes}, photometric="rgb")
    out = tmp_path / "out"
    command = ["volume", "predict", str(tmp_path / "v.ome.tif"), "--model", str(models[3]), "-o", str(out)]
    assert main([*command, "--genes", "GENE1,GENE2"]) == 0
    assert "3 planes of 1000 x 1000 px" in capsys.readouterr().out
    dense = zarr.open(str(out / "deep-depth3.ome.zarr"), mode="r")["0"][:]
    there = np.isfinite(dense[0])
    assert there[1:, 11:20, 8:17].all()
    assert not there[0].any()  # bare glass
    assert not there[:, :7].any()
    found = tmp_path / "found"
    assert main(["search", str(out), "--gene", "GENE2", "-o", str(found), "-k", "1"]) == 0
    (best,) = csv.DictReader((found / "found.csv").read_text().splitlines())
    z, x, y = int(best["slide"].removeprefix("z")), int(best["x_l0"]), int(best["y_l0"])
    patch = Image.fromarray(planes[z, y : y + SIDE, x : x + SIDE])
    cut = np.asarray(patch.resize((PATCH_PX, PATCH_PX), Image.Resampling.LANCZOS))
    sheet = cv2.imread(str(found / "contact_sheet.png"))[..., ::-1]
    np.testing.assert_array_equal(sheet[TITLE_PX:][:PATCH_PX, GAP_PX:][:, :PATCH_PX], cut)
    assert main([*command[:-1], str(tmp_path / "none"), "--min-tissue", "0.9", "--window", "x"]) == 2
    assert main(["volume", "predict", str(tmp_path / "gone"), "--model", str(models[3])]) == 2
