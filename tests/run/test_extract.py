"""The whole way, from a slide file to HDF5: the numbers, the files, what is recognised, what is left."""

import json
import shutil
from dataclasses import fields, replace
from importlib import import_module
from math import inf, nan

import h5py
import numpy as np
import openslide
import pytest
import torch
from cohort_fixtures import write_untrained_encoder
from conftest import shared
from feature_fixtures import files_in
from PIL import Image
from synthetic_slide import write_synthetic_slide

from seal_extract import ExtractOptions, extract, load_encoder, read_features
from seal_extract.demo import UNTRAINED, untrained_encoder
from seal_extract.errors import GeometryError, OutputError, ReadError, UsageError
from seal_extract.run.cohort import extract_cohort


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    return write_synthetic_slide(tmp_path_factory.mktemp("svs") / "small.svs", (4000, 3000), mpp=0.25)


@pytest.fixture(scope="module")
def finished(svs, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return extract(svs, encoder, out), out


# --- the result -------------------------------------------------------------------------------


def test_features_are_the_encoders_for_the_regions_at_the_written_coordinates(finished, svs, encoder):
    result, _ = finished
    assert result.features.dtype == np.float32
    assert result.features.shape == (len(result.grid), 192)
    assert len(result.grid) > 5
    with openslide.OpenSlide(svs) as reference:
        images = [
            reference.read_region(xy, 0, (448, 448))
            .convert("RGB")
            .resize((224, 224), Image.Resampling.BICUBIC)
            for xy in result.grid.xy_l0.tolist()
        ]
    want = encoder.encode(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(result.features, want, atol=0.02)  # one grey level in a few pixels
    assert np.abs(result.features - want).mean() < 1e-3


def test_all_files_of_a_slide_are_there_and_nothing_else(finished):
    _, out = finished
    assert files_in(out) == [
        "20x_224px_0px_overlap/features_untrained-demo/small.h5",
        "20x_224px_0px_overlap/patches/small_patches.h5",
        "contours/small.jpg",
        "contours_geojson/20x_224px_0px_overlap/small.geojson",
        "contours_geojson/small.geojson",
        "overlays/20x_224px_0px_overlap/small.jpg",
    ]
    with Image.open(out / "overlays/20x_224px_0px_overlap/small.jpg") as picture:
        assert max(picture.size) >= 1000
    assert json.loads((out / "contours_geojson/small.geojson").read_text())["features"]


def test_provenance_says_what_made_the_file(finished, svs):
    result, _ = finished
    provenance = read_features(result.path).provenance
    assert provenance["slide"]["mpp"] == 0.25
    assert provenance["slide"]["mpp_source"] == "openslide.mpp-x"
    assert provenance["slide"]["reader"].startswith("openslide")
    assert provenance["slide"]["decoder"] == "JPEG tiles"
    assert provenance["encoder"]["name"] == "untrained-demo"
    assert len(provenance["encoder"]["weights"][0]["sha256"]) == 64
    assert provenance["request"]["slide"]["bytes"] == svs.stat().st_size
    assert provenance["grid"]["patch_size_l0"] == 448
    assert provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    assert provenance["read_errors"] == 0


def test_rows_do_not_depend_on_batch_size_or_threads(finished, svs, encoder, tmp_path):
    result, _ = finished
    again = extract(svs, encoder, tmp_path, options=ExtractOptions(batch_size=5, workers=3))
    np.testing.assert_array_equal(again.grid.xy_l0, result.grid.xy_l0)
    np.testing.assert_array_equal(again.features, result.features)


def test_an_encoder_may_be_given_by_name(svs, tmp_path):
    result = extract(svs, "seal-tiny", tmp_path)
    assert result.path.parent.name == "features_seal-tiny"
    assert result.features.shape == (len(result.grid), 128)
    written = result.path.stat().st_mtime_ns
    assert extract(svs, "seal-tiny", tmp_path).path.stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="seal-tinny"):
        extract(svs, "seal-tinny", tmp_path)


def test_progress_counts_patches(svs, encoder, tmp_path):
    calls = []
    result = extract(
        svs, encoder, tmp_path, options=ExtractOptions(batch_size=4), progress=lambda *a: calls.append(a)
    )
    n = len(result.grid)
    assert calls == [(min(done, n), n) for done in range(4, n + 4, 4)]


def test_a_slide_without_tissue_is_written_with_no_rows(encoder, tmp_path):
    Image.fromarray(np.full((900, 900, 3), 244, np.uint8)).save(tmp_path / "glass.png")
    result = extract(tmp_path / "glass.png", encoder, tmp_path / "out", options=ExtractOptions(slide_mpp=0.5))
    assert result.features.shape == (0, 192)
    assert (tmp_path / "out/overlays/20x_224px_0px_overlap/glass.jpg").exists()


def test_real_slide_at_half_a_micrometre(encoder, tmp_path):
    path = shared("data/wsi/CMU-1-Small-Region.svs")
    result = extract(path, encoder, tmp_path)
    assert result.grid.patch_size_l0 == 224
    assert 40 <= len(result.grid) <= 70  # of 9 x 13; the rest is glass
    assert np.isfinite(result.features).all()


# --- given tissue, given coordinates ----------------------------------------------------------


def test_tissue_edited_in_qupath_takes_the_place_of_the_found(svs, encoder, tmp_path):
    square = [[448, 448], [2240, 448], [2240, 2240], [448, 2240], [448, 448]]
    roi = tmp_path / "small.geojson"
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [square]}))
    for given in (roi, tmp_path):
        result = extract(svs, encoder, tmp_path / f"out-{given.name}", options=ExtractOptions(roi=given))
        assert result.grid.xy_l0.tolist() == [
            [x, y] for y in range(448, 2240, 448) for x in range(448, 2240, 448)
        ]


def test_coordinates_of_a_former_run_give_the_same_features(finished, svs, encoder, tmp_path):
    result, out = finished
    folder = out / "20x_224px_0px_overlap" / "patches"
    again = extract(svs, encoder, tmp_path, options=ExtractOptions(coords=folder))
    np.testing.assert_array_equal(again.features, result.features)
    assert again.path.relative_to(tmp_path) == result.path.relative_to(out)
    assert again.grid.origin == "TRIDENT"


def test_coordinates_of_clam_decide_patch_size_and_folder(svs, encoder, tmp_path):
    with h5py.File(tmp_path / "small.h5", "w") as file:
        file["coords"] = np.array([[512, 512], [1024, 512]])
        file["coords"].attrs.update(patch_level=0, patch_size=256)
    with pytest.warns(UserWarning, match=r"trained on .*224 px at 0.5 µm/px; these are 256 px at 0.25 µm/px"):
        result = extract(svs, encoder, tmp_path / "out", options=ExtractOptions(coords=tmp_path))
    assert result.provenance["encoder"]["mismatch"].startswith("untrained-demo was trained on")
    assert result.path.parts[-3:] == ("40x_256px_0px_overlap", "features_untrained-demo", "small.h5")
    assert result.features.shape == (2, 192)


def test_given_files_that_are_not_there_are_named(svs, encoder, tmp_path):
    for option in ("roi", "coords"):
        with pytest.raises(GeometryError, match=rf"--{option} .* is neither a file nor a folder with small"):
            extract(svs, encoder, tmp_path, options=ExtractOptions(**{option: tmp_path}))
    with pytest.raises(UsageError, match="--roi and --coords both"):
        ExtractOptions(roi=tmp_path, coords=tmp_path)


def test_with_coordinates_and_two_encoders_a_slide_is_opened_once_and_its_coordinates_are_read_once(
    finished, svs, encoder, tmp_path, monkeypatch
):
    job, calls = import_module("seal_extract.run.job"), []
    for name in ("open_entry", "read_grid"):
        real = getattr(job, name)
        monkeypatch.setattr(job, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    options = ExtractOptions(coords=finished[1] / "20x_224px_0px_overlap/patches", plan_timeout_s=0)
    second, third = (untrained_encoder(replace(UNTRAINED, name=name), seed=7) for name in ("b", "c"))
    for encoders, now in (
        ([encoder, second], ["open_entry", "read_grid"]),
        ([encoder, second], []),
        ([encoder, second, third], ["open_entry", "read_grid"]),  # for the one that is new
    ):
        calls.clear()
        assert len(extract_cohort(svs, encoders, tmp_path, options=options).done) == 1
        assert calls == now
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["coords"] = finished[0].grid.xy_l0[:2]
        file["coords"].attrs.update(patch_size=224, patch_size_level0=448)
    with pytest.raises(OutputError, match=r"made with another request \(options coords "):
        extract(svs, encoder, tmp_path, options=ExtractOptions(coords=other))


@pytest.mark.parametrize("name", [field.name for field in fields(ExtractOptions)])
def test_an_option_of_another_kind_is_refused(name):
    option = f"--{name.replace('_', '-')}"
    for value in (object(), [], b"2"):
        with pytest.raises(UsageError, match=rf"{option} is .*; allowed: ") as refused:
            ExtractOptions(**{name: value})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("patch_px", (-1, 0, 224.5, "224", True, None)),
        ("mpp", (nan, inf, 0, -0.5, "20x", None)),
        ("overlap_px", (-1, 1.5, 224, None)),
        ("min_tissue", (2, -0.1, nan, None)),
        ("mpp_tolerance", (-0.1, nan, inf, None)),
        ("slide_mpp", (nan, inf, 0, -0.25, 1e4)),
        ("override_mpp", (nan, inf, 0, -0.25, 1e4)),
        ("edges", ("cut", None)),
        ("resample", ("nearest", None)),
        ("overlay", ("filled", None)),
        ("layout", ("tridnet", None)),
        ("max_read_errors", (-1, 0.5, None)),
        ("batch_size", (0, -8, 0.5)),
        ("workers", (0, -1, 1.5)),
        ("stage_gb", (0, -1, nan, inf, None)),
        ("plan_timeout_s", (-1, nan, inf, None)),
        ("allow_upsampling", (1, "no", None)),
        ("fast_decode", (1, "no", None)),
        ("overwrite", (1, "no", None)),
        ("tokens", (1, "no", None)),
    ],
)
def test_an_option_out_of_range_is_refused(name, values):
    for value in values:
        with pytest.raises(UsageError, match="allowed: "):
            ExtractOptions(**{name: value})


# --- resuming ---------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """Fail if tissue or patches are touched."""

    def refuse(*args, **kwargs):
        raise AssertionError("work was done again")

    story = import_module("seal_extract.run.extract")  # the package has a function of that name
    monkeypatch.setattr(story.slide_process, "open_with_grid", refuse)
    monkeypatch.setattr(story, "open_patch_reader", refuse)


def test_the_same_request_is_recognised_without_work(finished, svs, encoder, no_work):
    result, out = finished
    before = result.path.stat().st_mtime_ns
    again = extract(svs, encoder, out, options=ExtractOptions(batch_size=3, workers=1))
    assert again.path == result.path
    assert again.path.stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.features, result.features)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"min_tissue": 0.1}, "options min_tissue 0.5, now 0.1"),
        ({"mpp_tolerance": 0.0}, "options mpp_tolerance 0.05, now 0.0"),
        ({"override_mpp": 0.2501}, "slide mpp 0.25, now 0.2501"),
    ],
)
def test_a_file_of_other_options_is_not_taken_for_done(finished, svs, encoder, no_work, options, difference):
    with pytest.raises(OutputError, match=rf"made with another request \({difference}\); type --overwrite"):
        extract(svs, encoder, finished[1], options=ExtractOptions(**options))


def with_request(finished, folder, change):
    """A features file in the flat layout whose request was changed."""
    path = folder / finished[0].path.name
    path.write_bytes(finished[0].path.read_bytes())
    with h5py.File(path, "r+") as file:
        provenance = json.loads(file.attrs["seal_extract"])
        change(provenance["request"])
        file.attrs["seal_extract"] = json.dumps(provenance)
    return path


def test_an_option_that_an_older_version_did_not_have_counts_as_its_default(
    finished, svs, encoder, tmp_path, no_work
):
    older = with_request(finished, tmp_path, lambda request: request["options"].pop("overlap_px"))
    assert extract(svs, encoder, tmp_path, options=ExtractOptions(layout="flat")).path == older
    with pytest.raises(OutputError, match=r"\(options overlap_px 0, now 32\)"):
        extract(svs, encoder, tmp_path, options=ExtractOptions(layout="flat", overlap_px=32))


def test_a_fingerprint_of_a_newer_version_is_refused(finished, svs, encoder, tmp_path, no_work):
    with_request(finished, tmp_path, lambda request: request.update(version=2))
    with pytest.raises(OutputError, match="version 2 of the fingerprint, of a newer seal-extract"):
        extract(svs, encoder, tmp_path, options=ExtractOptions(layout="flat"))


def test_a_file_of_other_weights_is_not_taken_for_done(finished, svs, tmp_path, no_work):
    other = load_encoder(write_untrained_encoder(tmp_path, seed=1), device="cpu")
    with pytest.raises(OutputError, match=r"\(encoder weights "):
        extract(svs, other, finished[1])


def test_another_slide_of_the_same_name_gets_a_name_and_features_of_its_own(finished, encoder, tmp_path):
    first, out = finished[0].path, shutil.copytree(finished[1], tmp_path / "out")
    other = write_synthetic_slide(tmp_path / "small.svs", (3000, 2000), mpp=0.25, seed=3)
    made = extract(other, encoder, out)
    assert made.path.name == f"{tmp_path.name}__small.h5"
    assert made.provenance["slide"]["path"] == str(other.resolve())
    assert (out / first.relative_to(finished[1])).read_bytes() == first.read_bytes()


def test_a_file_of_another_tool_is_not_touched_without_overwrite(svs, encoder, tmp_path):
    path = tmp_path / "20x_224px_0px_overlap/features_untrained-demo/small.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((1, 192), np.float32)
    with pytest.raises(OutputError, match="exists and is not ours; type --overwrite"):
        extract(svs, encoder, tmp_path)
    assert len(extract(svs, encoder, tmp_path, options=ExtractOptions(overwrite=True)).grid) > 5


def test_overwrite_replaces(svs, encoder, tmp_path):
    first, second = (
        extract(svs, encoder, tmp_path, options=ExtractOptions(min_tissue=share, overwrite=True))
        for share in (0.9, 0.1)
    )
    assert first.path == second.path
    assert len(first.grid) < len(second.grid) == len(read_features(first.path).grid)


# --- bad slides leave no features -------------------------------------------------------------


def test_a_truncated_slide_fails_and_leaves_no_features(svs, encoder, tmp_path):
    cut = tmp_path / "small.svs"
    data = bytearray(svs.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 20_000] = bytes(20_000)
    cut.write_bytes(data)
    with pytest.raises(ReadError, match=r"at level-0 \(\d+, \d+\)"):
        extract(cut, encoder, tmp_path / "out")
    assert not [f for f in files_in(tmp_path) if "features_" in f or f.endswith(".part")]


def test_the_untrained_encoder_says_so():
    assert "untrained" in UNTRAINED.name
    assert "never for science" in UNTRAINED.licence
