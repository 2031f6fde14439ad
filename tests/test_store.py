"""The HDF5 files: what is read back from them, and that none is ever half there."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from seal_extract.errors import OutputError
from seal_extract.grid import PatchGrid
from seal_extract.layouts.pixels import write_pixel_features
from seal_extract.store import (
    SlideLabel,
    find_features,
    grid_fields,
    read_features,
    read_pieces,
    read_provenance,
    write_rows,
)

DIM = 24


def grid_of(n, patch_size_l0=512):
    xy = np.stack([np.arange(n) * patch_size_l0, np.arange(n) % 7], axis=1).astype(np.int64)
    return PatchGrid(xy, 256, 0.5, patch_size_l0, 0, 0, patch_size_l0)


def provenance_of(grid):
    return {"grid": grid_fields(grid), "encoder": {"name": "tiny"}, "request": {}}


def write(path, grid, features=None):
    features = (
        np.random.default_rng(1).standard_normal((len(grid), DIM)).astype(np.float32)
        if features is None
        else features
    )
    with write_pixel_features(path, SLIDE, grid, "tiny", DIM, provenance_of(grid)) as writer:
        for start in range(0, len(grid), 16):
            writer.append(features[start : start + 16])
    return features


SLIDE = SlideLabel("drawn", (4000, 30), 0.25)


def test_a_slide_without_tissue_has_no_rows_but_all_columns(tmp_path):
    write(tmp_path / "drawn.h5", grid_of(0))
    with h5py.File(tmp_path / "drawn.h5") as file:
        assert file["features"].shape == (0, DIM)
        assert file["coords"].shape == (0, 2)
        assert file["coords"].attrs["patch_size_level0"] == 512


def test_chunks_hold_many_rows(tmp_path):
    write(tmp_path / "drawn.h5", grid_of(100))
    with h5py.File(tmp_path / "drawn.h5") as file:
        assert file["features"].chunks == (100, DIM)


def test_read_features_gives_back_what_was_written(tmp_path):
    features = write(tmp_path / "drawn.h5", grid_of(9))
    back = read_features(tmp_path / "drawn.h5")
    np.testing.assert_array_equal(back.features, features)
    np.testing.assert_array_equal(back.grid.xy_l0, grid_of(9).xy_l0)
    assert back.grid.patch_size_l0 == 512
    assert repr(back) == "SlideFeatures(drawn.h5: 9 patches, tiny, 0.5 µm/px)"


def test_pieces_put_together_are_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("seal_extract.store.PIECE_BYTES", 7 * 4 * DIM)
    features = write(tmp_path / "drawn.h5", grid_of(30))
    pieces = list(read_pieces(tmp_path / "drawn.h5"))
    assert [len(piece) for piece in pieces] == [7, 7, 7, 7, 2]
    np.testing.assert_array_equal(np.concatenate(pieces), features)


def test_a_feature_that_float16_cannot_hold_is_refused(tmp_path):
    rows = np.array([[1.0, 70_000.0]], np.float32)
    file = write_rows(tmp_path / "a.h5", "feats", (1, 2), np.float16, {}, lambda file: None)
    with pytest.raises(OutputError, match=r"a feature of 7e\+04 does not fit float16"), file as writer:
        writer.append(rows)
    assert os.listdir(tmp_path) == []


def test_files_of_others_are_told_apart(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((2, 3))
    assert read_provenance(path) is None
    assert read_provenance(tmp_path / "no.h5") is None
    with pytest.raises(OutputError, match="no features file of seal_extract"):
        read_features(path)


def test_a_file_whose_coordinates_are_gone_is_no_features_file(tmp_path):
    write(tmp_path / "a.h5", grid_of(9))
    assert len(find_features(tmp_path / "a.h5", "features").grid) == 9
    assert find_features(tmp_path / "a.h5", "feats") is None
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["coords"]
    assert find_features(tmp_path / "a.h5") is None
    with pytest.raises(OutputError, match="no features file of seal_extract"):
        read_features(tmp_path / "a.h5")


# --- nothing half-written ---------------------------------------------------------------------


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    grid = grid_of(40)
    with (
        pytest.raises(ZeroDivisionError),
        write_pixel_features(tmp_path / "a.h5", SLIDE, grid, "tiny", DIM, {}) as writer,
    ):
        writer.append(np.zeros((16, DIM), np.float32))
        assert not (tmp_path / "a.h5").exists()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("rows", [[16], [16, 16, 16]])
def test_rows_missing_or_too_many_leave_nothing(tmp_path, rows):
    file = write_pixel_features(tmp_path / "a.h5", SLIDE, grid_of(40), "tiny", DIM, {})
    with pytest.raises(OutputError, match=r"nothing was kept"), file as writer:
        for n in rows:
            writer.append(np.zeros((n, DIM), np.float32))
    assert os.listdir(tmp_path) == []


def test_an_older_file_survives_a_failed_run(tmp_path):
    features = write(tmp_path / "a.h5", grid_of(9))
    with (
        pytest.raises(OutputError),
        write_pixel_features(tmp_path / "a.h5", SLIDE, grid_of(40), "tiny", DIM, {}),
    ):
        pass
    np.testing.assert_array_equal(read_features(tmp_path / "a.h5").features, features)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"a part of the path is a file; choose another -o"):
        write(tmp_path / "file" / "features" / "a.h5", grid_of(3))


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("seal_extract.store.Disk.__init__", refuse)
    with pytest.raises(OutputError, match=r"this user may not write there; choose another -o"):
        write(tmp_path / "a.h5", grid_of(3))


FULL = """
import resource, sys; sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_store import grid_of, write
from seal_extract.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    write(Path(sys.argv[1]) / "a.h5", grid_of(8000))
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
