"""A finished run in another layout: the same values, recognised again, nothing overwritten."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from cohort_fixtures import run_here
from feature_fixtures import CONSUMER_OF, DIM, files_in, grid_of, provenance_of, short_of, write

from seal_extract import extract, open_slide, read_features
from seal_extract.cli import main
from seal_extract.encoders.registry import bundled
from seal_extract.errors import UsageError
from seal_extract.features.export import EXPORTS, export
from seal_extract.features.layouts import LAYOUTS
from seal_extract.features.store import list_features, read_provenance
from seal_extract.run.cohort import extract_cohort
from seal_extract.run.options import ExtractOptions

FLOAT32 = [name for name in LAYOUTS if name != "stamp"]


@pytest.fixture
def run(tmp_path):
    """A finished run of two slides, one of them on two encoders."""
    out = tmp_path / "run"
    write(out, "trident", n=50, name="a", mpp=0.2485)
    write(out, "trident", n=33, name="b", seed=2)
    return out


def states(*args, **kwargs):
    return [e.state for e in export(*args, **kwargs)]


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("source", FLOAT32)
def test_any_layout_becomes_any_other_with_the_same_values(tmp_path, source, to):
    place, features, grid = write(tmp_path / "run", source, mpp=0.2485)
    (done,) = export(tmp_path / "run", to, tmp_path / "out")
    assert (done.state, done.patches) == ("written", 50)
    back, want = read_features(done.path), features.astype(np.float16) if to == "stamp" else features
    np.testing.assert_array_equal(back.features, want.astype(np.float32))
    np.testing.assert_array_equal(back.grid.xy_l0, grid.xy_l0)
    assert short_of(tmp_path / "out", CONSUMER_OF[to]) == []
    origin = back.provenance.pop("exported_from")
    assert tmp_path / "run" / origin == place.features("a", "tiny")
    assert back.provenance == read_provenance(place.features("a", "tiny"))


def test_an_export_is_what_the_run_itself_would_have_written(run, tmp_path):
    write(tmp_path / "direct", "clam", n=50, name="a", mpp=0.2485)
    write(tmp_path / "direct", "clam", n=33, name="b", seed=2)
    assert states(run, "clam", tmp_path / "out") == ["written", "written"]
    assert files_in(tmp_path / "out") == files_in(tmp_path / "direct")
    for name in ("a", "b"):
        tensors = [tmp_path / k / f"features_tiny/pt_files/{name}.pt" for k in ("out", "direct")]
        assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_rows_are_copied_in_pieces(run, tmp_path, monkeypatch):
    monkeypatch.setattr("seal_extract.features.store.PIECE_BYTES", 7 * 4 * DIM)
    assert states(run, "clam", tmp_path / "out") == ["written", "written"]
    want = read_features(run / "20x_256px_0px_overlap/features_tiny/a.h5").features
    tensor = torch.load(tmp_path / "out/features_tiny/pt_files/a.pt", weights_only=True)
    np.testing.assert_array_equal(tensor.numpy(), want)


@pytest.mark.parametrize("to", [*LAYOUTS, "anndata"])
def test_the_same_export_again_writes_nothing(run, tmp_path, to):
    out = tmp_path / "out"
    assert states(run, to, out) == ["written", "written"]
    before = {name: (out / name).stat().st_mtime_ns for name in files_in(out)}
    assert states(run, to, out) == ["finished before", "finished before"]
    assert {name: (out / name).stat().st_mtime_ns for name in files_in(out)} == before


def test_an_export_goes_on_where_it_was_stopped(run, tmp_path):
    out = tmp_path / "out"
    assert states(run, "clam", out) == ["written", "written"]
    (out / "features_tiny/h5_files/b.h5").unlink()
    (out / "features_tiny/pt_files/a.pt").unlink()
    assert states(run, "clam", out) == ["finished before", "written"]
    assert short_of(out, "clam") == []


@pytest.mark.parametrize("to", ["clam", "anndata"])
def test_other_files_are_not_replaced_without_overwrite(run, tmp_path, to):
    out = tmp_path / "out"
    assert states(run, to, out) == ["written", "written"]
    write(tmp_path / "newer", "trident", n=50, name="a", seed=9)
    (path,) = (tmp_path / "newer").rglob("features_tiny/a.h5")
    with h5py.File(path, "a") as file:
        file.attrs["seal_extract"] = json.dumps(provenance_of(grid_of(50)) | {"request": {"pipeline": 2}})
    (refused,) = export(tmp_path / "newer", to, out)
    assert refused.state == "failed"
    assert "was made from other features; type --overwrite" in str(refused)
    assert states(tmp_path / "newer", to, out, overwrite=True) == ["written"]
    assert states(tmp_path / "newer", to, out) == ["finished before"]


def test_a_foreign_file_is_not_replaced(run, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.zeros((1, DIM), np.float32)
    failed, written = export(run, "flat", tmp_path)
    assert str(failed) == (
        f"FAILED {tmp_path / 'a.h5'} exists and is of another tool; "
        "type --overwrite to replace it, or another -o"
    )
    assert written.state == "written"


def test_a_slide_without_patches_is_left_out_of_clams_folders_and_that_is_said(tmp_path):
    write(tmp_path / "run", "trident", n=0, name="glass")
    (done,) = export(tmp_path / "run", "clam", tmp_path / "out")
    assert str(done) == "glass.h5: no patches, left out"
    assert files_in(tmp_path / "out") == ["features_tiny/without_patches/glass.h5"]
    assert states(tmp_path / "out", "trident", tmp_path / "back") == ["written"]


def test_float16_never_becomes_float32(tmp_path):
    write(tmp_path / "run", "stamp")
    (refused,) = export(tmp_path / "run", "flat", tmp_path / "out")
    assert "holds float16 (STAMP's layout), but flat needs float32" in str(refused)
    assert not (tmp_path / "out").exists()
    assert states(tmp_path / "run", "stamp", tmp_path / "out") == ["written"]


def test_a_damaged_source_is_named_and_the_others_are_done(run, tmp_path, capsys):
    (path,) = run.rglob("features_tiny/a.h5")
    path.write_bytes(path.read_bytes()[:-900])
    assert main(["export", str(run), "--layout", "flat", "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert f"FAILED {path} cannot be read (" in said.err
    assert "1 of 2 files failed" in said.err
    assert said.out.startswith("b.h5: 33 patches")
    assert files_in(tmp_path / "out") == ["b.h5"]


def test_two_encoders_need_folders_of_their_own_in_the_flat_layout(run, tmp_path):
    write(run, "trident", name="a", encoder="other", seed=5)
    with pytest.raises(UsageError, match=r"would both become .*a\.h5; give the folder of one of them"):
        export(run, "flat", tmp_path / "out")
    assert states(run, "clam", tmp_path / "out") == ["written"] * 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "features_other",
        "features_tiny",
        "patches",
    ]


def test_a_run_may_be_exported_into_its_own_folder(run):
    assert states(run, "clam", run) == ["written", "written"]
    assert states(run, "stamp", run) == ["written", "written"]
    assert states(run, "clam", run) == ["finished before", "finished before"]


def test_an_extraction_takes_an_export_for_done(tmp_path, drawn_slides, encoder):
    extract_cohort(drawn_slides[0], encoder, tmp_path / "run")
    for layout in LAYOUTS:
        assert states(tmp_path / "run", layout, tmp_path / layout) in (["written"], ["finished before"])
        results, options = [], ExtractOptions(layout=layout)
        extract_cohort(drawn_slides[0], encoder, tmp_path / layout, options=options, on_result=results.append)
        assert [result.finished_before for result in results] == [True], layout


# --- what is given away -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private(drawn_slides, tmp_path_factory):
    """A finished run, one slide of it failed, in a folder whose name is nobody's business."""
    home = tmp_path_factory.mktemp("private") / "ward 7 of Jane Doe"
    shutil.copytree(Path(str(bundled()["seal-tiny"])), home / "encoder")
    (home / "slides").mkdir()
    for slide in drawn_slides[:2]:
        shutil.copy(slide, home / "slides")
    (home / "slides/bad.svs").write_text("a note")
    assert run_here(home / "slides", "-o", home / "out", "--encoder", home / "encoder").returncode == 1
    return home


def telling(folder):
    """The files below a folder that say where they were made."""
    parts = (b"Jane Doe", os.fsencode(Path.home()) + b"/", os.fsencode(folder.parent))
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files
    return [p for p in files if any(part in p.read_bytes() for part in parts)]


@pytest.mark.parametrize("layout", EXPORTS)
def test_an_export_names_no_folder_of_the_machine(private, tmp_path, layout):
    if layout == "spatialdata":
        pytest.importorskip("spatialdata", reason='pip install ".[scverse]"')
    out, words = tmp_path / "out", ("export", private / "out", "--layout", layout, "-o", tmp_path / "out")
    assert run_here(*words).returncode == 0
    assert telling(out) == []
    assert run_here(*words).stdout.count("finished before") == 2


def test_tables_of_genes_and_the_page_name_no_folder_of_the_machine(private, tmp_path):
    words = ("genes", private / "out", "--genes", "EPCAM", "--write", "h5,h5ad,geojson,png")
    assert run_here(*words, "-o", tmp_path / "genes").returncode == 0
    assert telling(tmp_path / "genes") == []
    assert run_here(*words, "-o", tmp_path / "genes").returncode == 0  # they are known again
    page = (private / "out/report.html").read_text(encoding="utf-8")
    assert "bad.svs" in page
    assert "Jane Doe" not in page
    assert telling(private / "out/20x_224px_0px_overlap/patches") == []


def test_an_export_serves_the_other_commands(private, tmp_path, monkeypatch):
    assert run_here("export", private / "out", "--layout", "trident", "-o", tmp_path).returncode == 0
    again = run_here(private / "slides", "-o", tmp_path, "--encoder", private / "encoder")
    assert again.stdout.count("finished before") == 2, again
    monkeypatch.chdir(private / "slides")  # a file of that name here is not taken for the slide
    told = run_here("report", tmp_path, "--no-genes")
    assert told.returncode == 1
    assert "the slide 0.svs has no recorded folder, because this is an export; give the folder" in told.stderr
    assert run_here("report", tmp_path, "--no-genes", "--slides", private / "slides").returncode == 0


def test_an_export_of_an_older_version_counts_beside_its_original_and_without(run, tmp_path):
    assert states(run, "flat", run) == ["written", "written"]
    for name in "ab":
        with h5py.File(run / f"{name}.h5", "a") as file:
            (original,) = run.rglob(f"features_tiny/{name}.h5")
            made = read_provenance(original) | {"exported_from": str(original.resolve())}
            made["slide"]["path"] = f"/home/jane/{name}.svs"
            file.attrs["seal_extract"] = json.dumps(made)
    assert [f.path.parent.name for f in list_features(run)[0]] == ["features_tiny"] * 2
    assert states(run, "flat", run) == ["finished before", "finished before"]
    run.rename(tmp_path / "moved")
    assert [f.path.parent.name for f in list_features(tmp_path / "moved")[0]] == ["features_tiny"] * 2


# --- scverse ----------------------------------------------------------------------------------


def test_an_h5ad_has_the_form_that_anndata_documents(run, tmp_path):
    (done, _) = export(run, "anndata", tmp_path / "out")
    assert done.path == tmp_path / "out/a.h5ad"
    kinds = {}
    with h5py.File(done.path) as file:
        assert file.attrs["encoding-type"] == "anndata"
        file.visititems(lambda name, item: kinds.update({name: item.attrs.get("encoding-type")}))
        assert list(file["obs"].attrs["column-order"]) == ["x_l0", "y_l0"]
        assert file["obs/_index"].asstr()[:2].tolist() == ["a_0", "a_1"]
        np.testing.assert_array_equal(file["X"][()], read_features(done.source).features)
        np.testing.assert_array_equal(file["obsm/spatial"][:2], [[256, 256], [768, 256]])
    assert set(kinds.values()) == {
        *("array", "dataframe", "string-array", "dict", "string", "numeric-scalar"),
    }


@pytest.mark.parametrize("n", [50, 0])
def test_anndata_reads_it(tmp_path, n):
    anndata = pytest.importorskip("anndata", reason='pip install ".[scverse]"')
    _, features, grid = write(tmp_path / "run", "trident", n=n, mpp=0.2485)
    (done,) = export(tmp_path / "run", "anndata", tmp_path / "out")
    data = anndata.read_h5ad(done.path)
    np.testing.assert_array_equal(data.X, features)
    np.testing.assert_array_equal(data.obsm["spatial"], grid.xy_l0 + 256)
    np.testing.assert_array_equal(data.obs[["x_l0", "y_l0"]].to_numpy(), grid.xy_l0)
    assert data.var_names[0] == "tiny_0"
    assert (data.uns["mpp"], data.uns["patch_size_l0"], data.uns["encoder"]) == (0.2485, 512, "tiny")
    assert data.uns["patch_um"] == pytest.approx(512 * 0.2485)
    assert json.loads(data.uns["seal_extract"])["request"] == {"pipeline": 1}


def test_spatialdata_reads_patches_in_pixels_and_micrometres(run, tmp_path):
    spatialdata = pytest.importorskip("spatialdata", reason='pip install ".[scverse]"')
    write(run, "trident", n=0, name="glass")
    assert states(run, "spatialdata", tmp_path / "out") == ["written", "written", "left out"]
    data = spatialdata.read_zarr(tmp_path / "out/a.zarr")
    source = read_features(run / "20x_256px_0px_overlap/features_tiny/a.h5")
    np.testing.assert_array_equal(np.asarray(data["table"].X), source.features)
    np.testing.assert_array_equal(data["patches"].bounds.to_numpy()[:, :2], source.grid.xy_l0)
    in_um = spatialdata.transform(data["patches"], to_coordinate_system="um")
    np.testing.assert_allclose(in_um.bounds.to_numpy()[:, :2], source.grid.xy_l0 * 0.2485)
    assert states(run, "spatialdata", tmp_path / "out") == ["finished before"] * 2 + ["left out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.zarr", "b.zarr"]


@pytest.fixture(scope="module")
def of_a_slide(drawn_slides, tiny, tmp_path_factory):
    """Features of a slide that is there, and the colour of each patch."""
    features = extract(drawn_slides[2], tiny, tmp_path_factory.mktemp("of_a_slide"))
    with open_slide(drawn_slides[2]) as slide:
        size = (features.grid.patch_size_l0,) * 2
        patches = [slide.read_region(tuple(xy), 0, size) for xy in features.grid.xy_l0.tolist()]
    return features, np.array([patch.mean((0, 1)) for patch in patches])


def seen_at(rgb, scale, features):
    """The colour of each patch in a picture, by its pixels per level-0 pixel."""
    xy_l0, size = features.grid.xy_l0, features.grid.patch_size_l0
    boxes = np.round(np.hstack([xy_l0, xy_l0 + size]) * scale)
    return np.array([rgb[y0:y1, x0:x1].mean((0, 1)) for x0, y0, x1, y1 in boxes.astype(int)])


def test_anndata_holds_the_slide_as_scanpy_and_squidpy_look_for_it(of_a_slide, tmp_path):
    features, colours = of_a_slide
    (done,) = export(features.path.parent, "anndata", tmp_path)
    with h5py.File(done.path) as file:
        spatial = file[f"uns/spatial/{done.path.stem}"]
        assert spatial["scalefactors/spot_diameter_fullres"][()] == features.grid.patch_size_l0
        for name in ("hires", "lowres"):
            scale = spatial[f"scalefactors/tissue_{name}_scalef"][()]
            rgb = spatial[f"images/{name}"][()]
            assert (rgb.dtype, rgb.shape[2]) == (np.uint8, 3)
            np.testing.assert_allclose(seen_at(rgb, scale, features), colours, atol=3)


def test_spatialdata_holds_the_slide(of_a_slide, tmp_path):
    spatialdata = pytest.importorskip("spatialdata", reason='pip install "seal-extract[scverse]"')
    features, colours = of_a_slide
    (done,) = export(features.path.parent, "spatialdata", tmp_path)
    image = spatialdata.read_zarr(done.path)["slide"]
    axes = ("x", "y")
    to_l0 = spatialdata.transformations.get_transformation(image, "global").to_affine_matrix(axes, axes)
    rgb = np.moveaxis(np.asarray(image), 0, 2)
    np.testing.assert_allclose(seen_at(rgb, 1 / to_l0[0, 0], features), colours, atol=3)


def test_a_slide_that_has_moved_costs_its_picture_and_that_is_said(of_a_slide, tmp_path):
    features, _ = of_a_slide
    slide = Path(features.provenance["slide"]["path"])
    slide.rename(tmp_path / slide.name)
    try:
        (done,) = export(features.path.parent, "anndata", tmp_path / "out")
        assert (done.state, "without the slide's picture: the slide" in str(done)) == ("written", True)
        with h5py.File(done.path) as file:
            assert "spatial" not in file["uns"]
        command = ["export", str(features.path.parent), "--layout", "anndata", "-o", str(tmp_path / "out")]
        assert main([*command, "--overwrite", "--slides", str(tmp_path)]) == 0
        with h5py.File(done.path) as file:
            assert "spatial" in file["uns"]
    finally:
        (tmp_path / slide.name).rename(slide)


@pytest.mark.skipif(find_spec("spatialdata") is not None, reason="spatialdata is installed")
def test_a_missing_extra_is_one_line(run, tmp_path, capsys):
    status = main(["export", str(run), "--layout", "spatialdata", "-o", str(tmp_path / "out")])
    assert status == 2
    assert capsys.readouterr().err == (
        "seal-extract: spatialdata is not installed; type, in your clone of seal-extract: "
        'pip install ".[scverse]"\n'
    )


# --- the command ------------------------------------------------------------------------------


def test_the_command_prints_a_line_per_file(run, tmp_path, capsys):
    command = ["export", str(run), "--layout", "clam", "-o", str(tmp_path / "out")]
    assert main(command) == 0
    folder = tmp_path / "out/features_tiny/h5_files"
    assert capsys.readouterr().out.splitlines() == [
        f"a.h5: 50 patches -> {folder / 'a.h5'}",
        f"b.h5: 33 patches -> {folder / 'b.h5'}",
    ]
    assert main(command) == 0
    assert all("finished before" in line for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("folder", "layout", "message"),
    [
        ("run", "clem", f"--layout is 'clem'; allowed: {', '.join(EXPORTS)}"),
        ("no", "clam", "no is not a folder; give the -o of a finished run"),
        ("empty", "clam", "empty holds no finished feature file of seal_extract"),
    ],
)
def test_bad_requests_are_one_line_and_exit_with_2(run, tmp_path, capsys, folder, layout, message):
    (tmp_path / "empty").mkdir()
    assert main(["export", str(tmp_path / folder), "--layout", layout, "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
