"""The HDF5 files: what is read back from them, and that none is ever half there."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from feature_fixtures import DIM, SIZE, grid_of, provenance_of

from seal_extract.errors import GeometryError, OutputError
from seal_extract.features.feature_file import SlideLabel, write_rows
from seal_extract.features.layouts import FlatLayout, layout_of_grid
from seal_extract.features.store import (
    find_features,
    has_coords,
    list_features,
    read_features,
    read_pieces,
    read_provenance,
)
from seal_extract.features.verify import verify
from seal_extract.genes.feature_rows import RowPlaces
from seal_extract.patches.grid import read_grid

SLIDE = SlideLabel("drawn", SIZE, 0.25)


def written(path, grid):
    """A feature file of the flat layout while it is being written."""
    label = replace(SLIDE, name=path.stem)
    return FlatLayout(path.parent).write_features(label, grid, "tiny", DIM, provenance_of(grid))


def write(path, grid):
    """Write a feature file; returns its rows."""
    features = np.random.default_rng(1).standard_normal((len(grid), DIM)).astype(np.float32)
    with written(path, grid) as writer:
        for start in range(0, len(grid), 16):
            writer.append(features[start : start + 16])
    return features


def test_chunks_hold_many_rows(tmp_path):
    write(tmp_path / "drawn.h5", grid_of(100))
    with h5py.File(tmp_path / "drawn.h5") as file:
        assert file["features"].chunks == (100, DIM)


def test_features_introduce_themselves(tmp_path):
    write(tmp_path / "drawn.h5", grid_of(9))
    features = read_features(tmp_path / "drawn.h5")
    assert repr(features) == "SlideFeatures(drawn.h5: 9 patches, tiny, 0.5 µm/px)"


def test_pieces_put_together_are_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("seal_extract.features.store.PIECE_BYTES", 7 * 4 * DIM)
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
    with pytest.raises(OutputError, match="not a feature file of seal_extract"):
        read_features(path)


@pytest.mark.parametrize("provenance", ["[1]", '"x"', "{"])
def test_coordinates_beside_provenance_that_is_none_are_not_ours(tmp_path, provenance):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = grid_of(3).xy_l0
        file.attrs["seal_extract"] = provenance
    assert not has_coords(tmp_path / "a.h5", grid_of(3))


def test_a_file_whose_coordinates_are_gone_is_damaged(tmp_path):
    write(tmp_path / "a.h5", grid_of(9))
    assert len(find_features(tmp_path / "a.h5", "features").grid) == 9
    assert find_features(tmp_path / "a.h5", "feats") is None
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["coords"]
    with pytest.raises(OutputError, match=r"a\.h5 cannot be read .*coords.*; encode that slide again"):
        read_features(tmp_path / "a.h5")


def test_damaged_features_are_told_apart_from_files_of_others(tmp_path):
    for name in ("good", "short", "zeros", "odd"):
        write(tmp_path / f"features_tiny/{name}.h5", grid_of(9))
    short, zeros, odd = (tmp_path / f"features_tiny/{name}.h5" for name in ("short", "zeros", "odd"))
    short.write_bytes(short.read_bytes()[:-100])
    zeros.write_bytes(bytes(5000))
    with h5py.File(odd, "a") as file:
        file.attrs["seal_extract"] = json.dumps({"grid": 5, "encoder": "none"})
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches/a_patches.h5").write_bytes(b"no features, whatever it is")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["features"] = np.zeros((2, 3))
    features, damaged = list_features(tmp_path)
    assert [f.path.stem for f in features] == ["good"]
    assert list(damaged) == [odd, short, zeros]
    for path, error in damaged.items():
        assert str(error).startswith(f"{path} cannot be read (")
        assert "\n" not in str(error)


def test_a_folder_of_damaged_features_alone_says_so(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"short")
    with pytest.raises(OutputError, match=r"holds no feature file of seal_extract \(.*a\.h5 cannot be read"):
        list_features(tmp_path)


@pytest.mark.parametrize("layout", ["trident", "clam", "stamp", "flat"])
@pytest.mark.parametrize("dataset", ["rows", "coords"])
def test_values_that_changed_on_the_disk_are_one_line_to_every_reader(tmp_path, layout, dataset):
    grid, place = grid_of(50), layout_of_grid(layout, tmp_path, grid_of(50))
    rows = np.random.default_rng(1).standard_normal((50, DIM)).astype(np.float32)
    with place.write_features(SLIDE, grid, "tiny", DIM, provenance_of(grid)) as writer:
        writer.append(rows)
    path = place.features("drawn", "tiny")
    good, places = read_features(path), RowPlaces.of(path)
    with h5py.File(path) as file:
        at = file[place.dataset if dataset == "rows" else "coords"].id.get_chunk_info(0).byte_offset + 40
    state = (path.stat().st_size, path.stat().st_mtime_ns)
    same = places.read(good, np.array([7, 49]), state)
    np.testing.assert_array_equal(same, rows[[7, 49]].astype(places.dtype))
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    folder = tmp_path if layout == "clam" else path.parent
    (finding,) = (f for f in verify(folder, VERIFIED[layout]) if f.path == path)
    assert "cannot be read to its end" in finding.problem
    with pytest.raises(OutputError, match=r"cannot be read .*; encode that slide again"):
        read_features(path).features.sum()
    if dataset == "rows":
        with pytest.raises(OutputError, match=r"damaged at row 7; encode that slide again"):
            places.read(good, np.array([7]), (path.stat().st_size, path.stat().st_mtime_ns))


VERIFIED = {"trident": "patho-bench", "clam": "clam", "stamp": "stamp", "flat": "patho-bench"}


# --- hostile files ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x/../../PWN", "..", "a\nb", "", "C:\\x", 7])
def test_an_encoder_s_name_that_would_lead_elsewhere_is_refused(tmp_path, name):
    write(tmp_path / "a.h5", grid_of(9))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["seal_extract"] = json.dumps(provenance_of(grid_of(9)) | {"encoder": {"name": name}})
    for read in (read_features, read_provenance):
        with pytest.raises(OutputError, match=r"a\.h5 cannot be read \("):
            read(tmp_path / "a.h5")


def external_link(file, secret):
    file["features"] = h5py.ExternalLink(secret, "secret")


def external_storage(file, secret):
    file.create_dataset("features", (9, DIM), np.float32, external=[(secret, 0, h5py.h5f.UNLIMITED)])


def virtual_source(file, secret):
    layout = h5py.VirtualLayout((9, DIM), np.float32)
    layout[:] = h5py.VirtualSource(secret, "secret", (9, DIM))
    file.create_virtual_dataset("features", layout)


@pytest.mark.parametrize("hide", [external_link, external_storage, virtual_source])
def test_what_lies_in_another_file_is_not_read(tmp_path, hide):
    secret = str(tmp_path / "secret.h5")
    with h5py.File(secret, "w") as file:
        file["secret"] = np.ones((9, DIM), np.float32)
    write(tmp_path / "a.h5", grid_of(9))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["features"]
        hide(file, secret)
    with pytest.raises(OutputError, match=r"another file, which is not (read|followed)"):
        read_features(tmp_path / "a.h5")
    with pytest.raises(OutputError, match=r"another file, which is not (read|followed)"):
        list(read_pieces(tmp_path / "a.h5"))


def test_coordinates_that_lie_in_another_file_are_not_read(tmp_path, drawn):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = h5py.ExternalLink(str(tmp_path / "b.h5"), "coords")
    with pytest.raises(GeometryError, match="is a link to another file, which is not followed"):
        read_grid(tmp_path / "a.h5", drawn(600, 600))


def test_rows_that_are_claimed_and_not_stored_are_refused_at_once(tmp_path):
    write(tmp_path / "a.h5", grid_of(9))
    for name, gzip in (("features", None), ("coords", "gzip")):
        with h5py.File(tmp_path / "a.h5", "a") as file:
            del file[name]
            file.create_dataset(name, (2**40, 2), np.int64, chunks=(1024, 2), compression=gzip)
        with pytest.raises(OutputError, match=rf"'{name}' claims \[1099511627776, 2\] values, but only 0"):
            read_features(tmp_path / "a.h5")
        (finding,) = verify(tmp_path, "mil-lab")
        assert "but only 0 bytes are stored" in finding.problem
        write(tmp_path / "a.h5", grid_of(9))


# --- nothing half-written ---------------------------------------------------------------------


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), written(tmp_path / "a.h5", grid_of(40)) as writer:
        writer.append(np.zeros((16, DIM), np.float32))
        assert not (tmp_path / "a.h5").exists()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("rows", [[16], [16, 16, 16]])
def test_rows_missing_or_too_many_leave_nothing(tmp_path, rows):
    with (
        pytest.raises(OutputError, match="nothing was written"),
        written(tmp_path / "a.h5", grid_of(40)) as w,
    ):
        for n in rows:
            w.append(np.zeros((n, DIM), np.float32))
    assert os.listdir(tmp_path) == []


FULL = """
import resource, sys; sys.path[:0] = sys.argv[2:]
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
    words = (tmp_path, *Path(__file__).parents[:2])  # the folders of this file and of the fixtures
    done = subprocess.run([sys.executable, "-c", FULL, *words], capture_output=True, text=True)
    assert "larger than this system allows" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert os.listdir(tmp_path) == []
