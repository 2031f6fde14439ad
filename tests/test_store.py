"""The HDF5 files: what each consumer's reader takes from them, and that none is ever half there."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from seal_extract.errors import OutputError
from seal_extract.grid import PatchGrid, read_grid
from seal_extract.store import (
    PROVENANCE,
    TridentLayout,
    grid_fields,
    read_features,
    read_provenance,
    write_coords,
    write_features,
)

DIM = 24


def grid_of(n, patch_size_l0=512):
    xy = np.stack([np.arange(n) * patch_size_l0, np.arange(n) % 7], axis=1).astype(np.int64)
    return PatchGrid(xy, 256, 0.5, patch_size_l0, 0, 0, patch_size_l0)


def provenance_of(grid):
    return {"grid": grid_fields(grid), "encoder": {"name": "tiny"}, "request": {}}


def write(path, slide, grid, features=None):
    features = (
        np.random.default_rng(1).standard_normal((len(grid), DIM)).astype(np.float32)
        if features is None
        else features
    )
    with write_features(path, slide, grid, "tiny", DIM, provenance_of(grid)) as writer:
        for start in range(0, len(grid), 16):
            writer.append(features[start : start + 16])
    return features


@pytest.fixture
def slide(drawn):
    slide = drawn(4000, 30)
    return slide


# --- contracts of the readers, written from their description ----------------------------------


def test_trident_features(tmp_path, slide):
    path, grid = tmp_path / "features_tiny" / "drawn.h5", grid_of(50)
    features = write(path, slide, grid)
    with h5py.File(path) as file:
        assert isinstance(file["features"], h5py.Dataset)
        assert file["features"].dtype == np.float32
        np.testing.assert_array_equal(file["features"][()], features)
        assert file["coords"].dtype == np.int64
        np.testing.assert_array_equal(file["coords"][()], grid.xy_l0)
        assert dict(file["features"].attrs) == {
            "name": "drawn",
            "savetodir": str(path.parent),
            "encoder": "tiny",
        }
        assert dict(file["coords"].attrs) == {
            "patch_size": 256,
            "patch_size_level0": 512,
            "level0_magnification": 40,
            "target_magnification": 20,
            "overlap": 0,
            "name": "drawn",
            "savetodir": str(path.parent),
            "level0_width": 4000,
            "level0_height": 30,
        }
        assert np.issubdtype(type(file["coords"].attrs["patch_size_level0"]), np.integer)


def test_trident_coordinates(tmp_path, slide):
    path, grid = tmp_path / "patches" / "drawn_patches.h5", grid_of(7)
    write_coords(path, slide, grid, provenance_of(grid))
    with h5py.File(path) as file:
        assert set(file) == {"coords"}
        assert file["coords"].attrs["patch_size_level0"] == 512
    back = read_grid(path, slide)
    np.testing.assert_array_equal(back.xy_l0, grid.xy_l0)
    assert (back.patch_px, back.patch_size_l0, back.mpp) == (256, 512, 0.5)


def test_patho_bench_fuses_slides_of_one_patient(tmp_path, drawn):
    """Early fusion asserts one patch_size_level0 over the slides of a patient."""
    sizes = set()
    for i, mpp in enumerate((0.25, 0.2485, 0.2522)):
        slide = drawn(4000, 30, mpp=mpp)
        write(tmp_path / f"{i}.h5", slide, grid_of(5))
        with h5py.File(tmp_path / f"{i}.h5") as file:
            sizes.add(int(file["coords"].attrs["patch_size_level0"]))
    assert sizes == {512}


def test_clam_trains_on_it(tmp_path, slide):
    """CLAM's loader takes features and coords as arrays, then a float32 tensor into float32 layers."""
    write(tmp_path / "drawn.h5", slide, grid_of(20))
    with h5py.File(tmp_path / "drawn.h5", "r") as file:
        features, coords = torch.from_numpy(file["features"][:]), file["coords"][:]
    assert torch.nn.Linear(DIM, 2)(features).shape == (20, 2)
    assert coords.shape == (20, 2)


def test_nothing_at_the_root_misleads_stamp(tmp_path, slide):
    write(tmp_path / "drawn.h5", slide, grid_of(3))
    with h5py.File(tmp_path / "drawn.h5") as file:
        assert set(file.attrs) == {PROVENANCE}
        assert json.loads(file.attrs[PROVENANCE])["encoder"]["name"] == "tiny"


def test_a_slide_without_tissue_has_no_rows_but_all_columns(tmp_path, slide):
    write(tmp_path / "drawn.h5", slide, grid_of(0))
    with h5py.File(tmp_path / "drawn.h5") as file:
        assert file["features"].shape == (0, DIM)
        assert file["coords"].shape == (0, 2)
        assert file["coords"].attrs["patch_size_level0"] == 512


def test_chunks_hold_many_rows(tmp_path, slide):
    write(tmp_path / "drawn.h5", slide, grid_of(100))
    with h5py.File(tmp_path / "drawn.h5") as file:
        assert file["features"].chunks == (100, DIM)


def test_folders_are_tridents(tmp_path):
    layout = TridentLayout(tmp_path, 256, 0.5, 0)
    assert layout.features("a", "seal-conch") == tmp_path / "20x_256px_0px_overlap/features_seal-conch/a.h5"
    assert layout.coords("a") == tmp_path / "20x_256px_0px_overlap/patches/a_patches.h5"
    assert TridentLayout(tmp_path, 512, 1.0, 64).folder.name == "10x_512px_64px_overlap"
    assert TridentLayout(tmp_path, 224, 0.4, 0).folder.name == "25x_224px_0px_overlap"


def test_read_features_gives_back_what_was_written(tmp_path, slide):
    features = write(tmp_path / "drawn.h5", slide, grid_of(9))
    back = read_features(tmp_path / "drawn.h5")
    np.testing.assert_array_equal(back.features, features)
    np.testing.assert_array_equal(back.grid.xy_l0, grid_of(9).xy_l0)
    assert back.grid.patch_size_l0 == 512
    assert repr(back) == "SlideFeatures(drawn.h5: 9 patches, tiny, 0.5 µm/px)"


def test_files_of_others_are_told_apart(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((2, 3))
    assert read_provenance(path) is None
    assert read_provenance(tmp_path / "no.h5") is None
    with pytest.raises(OutputError, match="no features file of seal_extract"):
        read_features(path)


# --- nothing half-written ---------------------------------------------------------------------


def test_an_error_on_the_way_leaves_nothing(tmp_path, slide):
    grid = grid_of(40)
    with (
        pytest.raises(ZeroDivisionError),
        write_features(tmp_path / "a.h5", slide, grid, "tiny", DIM, {}) as writer,
    ):
        writer.append(np.zeros((16, DIM), np.float32))
        assert not (tmp_path / "a.h5").exists()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("rows", [[16], [16, 16, 16]])
def test_rows_missing_or_too_many_leave_nothing(tmp_path, slide, rows):
    file = write_features(tmp_path / "a.h5", slide, grid_of(40), "tiny", DIM, {})
    with pytest.raises(OutputError, match=r"nothing was kept"), file as writer:
        for n in rows:
            writer.append(np.zeros((n, DIM), np.float32))
    assert os.listdir(tmp_path) == []


def test_an_older_file_survives_a_failed_run(tmp_path, slide):
    features = write(tmp_path / "a.h5", slide, grid_of(9))
    with pytest.raises(OutputError), write_features(tmp_path / "a.h5", slide, grid_of(40), "tiny", DIM, {}):
        pass
    np.testing.assert_array_equal(read_features(tmp_path / "a.h5").features, features)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, slide):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"a part of the path is a file; choose another -o"):
        write(tmp_path / "file" / "features" / "a.h5", slide, grid_of(3))


def test_a_folder_without_permission_is_one_line(tmp_path, slide, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("seal_extract.store._Disk.__init__", refuse)
    with pytest.raises(OutputError, match=r"this user may not write there; choose another -o"):
        write(tmp_path / "a.h5", slide, grid_of(3))


FULL = """
import resource, sys; sys.path.insert(0, sys.argv[2])
from pathlib import Path
import numpy as np
from conftest import DrawnSlide
from test_store import grid_of, write
from seal_extract.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
slide = DrawnSlide(np.zeros((10, 10, 3), np.uint8))
try:
    write(Path(sys.argv[1]) / "a.h5", slide, grid_of(8000))
except OutputError as exc:
    print(exc)
"""


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: HDF5 meets the same failed write."""
    tests = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), tests], capture_output=True, text=True)
    assert "larger than this system allows" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert os.listdir(tmp_path) == []
