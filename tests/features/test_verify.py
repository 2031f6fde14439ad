"""What a folder lacks for a reader: one line per file and problem, whoever wrote the files."""

import json

import h5py
import numpy as np
import pytest
import torch
from feature_fixtures import CONSUMER_OF, DIM, SIZE, provenance_of, short_of, write

from seal_extract.cli import main
from seal_extract.errors import UsageError
from seal_extract.features.feature_file import PROVENANCE, SlideLabel
from seal_extract.features.layouts import layout_of_grid
from seal_extract.features.verify import CONSUMERS, LOOKED_FOR, verify
from seal_extract.patches.grid import PatchGrid

LAYOUT_FOR = {consumer: layout for layout, consumer in CONSUMER_OF.items()} | {"mil-lab": "flat"}


SERVES = {c: c for c in CONSUMERS} | {"patho-bench": "trident", "mil-lab": "flat"}


def lines(folder, consumer, *, warnings=True):
    """(file, problem) of each finding."""
    found = verify(folder, consumer)
    return [(f.path.name, f.problem) for f in found if warnings or not f.is_warning]


def write_foreign(path, n=30, **changes):
    """A file as another tool might write it; ``changes`` replace datasets and attributes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    xy = np.stack([np.arange(n) % 10, np.arange(n) // 10], axis=1).astype(np.int64) * 512
    features = np.random.default_rng(0).standard_normal((n, DIM)).astype(np.float32)
    parts = {"features": features, "coords": xy, "patch_size_level0": 512} | changes
    with h5py.File(path, "w") as file:
        for name in ("features", "feats", "coords"):
            if parts.get(name) is not None:
                file[name] = parts[name]
        if parts["patch_size_level0"] is not None:
            file["coords"].attrs["patch_size_level0"] = parts["patch_size_level0"]
    return features, xy


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_what_a_layout_wrote_is_as_its_reader_takes_it(tmp_path, consumer):
    for i, n in enumerate((50, 1, 13)):
        write(tmp_path, LAYOUT_FOR[consumer], n=n, name=str(i))
    assert short_of(tmp_path, consumer) == []


def test_tridents_features_folder_is_patho_benchs(tmp_path):
    place, _, _ = write(tmp_path, "trident")
    assert verify(place.features("a", "tiny").parent, "patho-bench") == ()
    assert verify(place.features("a", "tiny").parent, "mil-lab") == ()


@pytest.mark.parametrize(
    ("consumer", "problem", "is_warning"),
    [
        ("trident", "no patches", True),
        ("stamp", "no patches", True),
        ("patho-bench", "a bag without rows cannot be trained on", False),
        ("mil-lab", "a bag without rows cannot be trained on", False),
    ],
)
def test_empty_slides_are_named_where_they_lie_in_the_way(tmp_path, consumer, problem, is_warning):
    write(tmp_path, LAYOUT_FOR[consumer], n=0)
    found = verify(tmp_path, consumer)
    assert {f.is_warning for f in found} == {is_warning}
    assert all(problem in f.problem for f in found)


def test_an_empty_slide_of_ours_is_not_in_clams_way_and_a_foreign_one_is(tmp_path):
    write(tmp_path, "clam", n=0, name="ours")
    write(tmp_path, "clam", n=9, name="full")
    assert short_of(tmp_path, "clam") == []
    write_foreign(tmp_path / "features_tiny/h5_files/foreign.h5", n=0)
    torch.save(torch.zeros(0, DIM), tmp_path / "features_tiny/pt_files/foreign.pt")
    assert [name for name, _ in lines(tmp_path, "clam", warnings=False)] == ["foreign.h5", "foreign.pt"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"features": None},
            "'features' is missing, there is ['coords']; expected: a dataset float32 [N, D]",
        ),
        ({"features": np.zeros((1, 30, DIM), np.float32)}, "'features' is float32 [1, 30, 24]; expected"),
        ({"features": np.ones((30, DIM), np.float16)}, "'features' is float16 [30, 24]; expected: float32"),
        ({"features": np.ones((29, DIM), np.float32)}, "30 coordinates for 29 rows of features"),
        ({"features": np.full((30, DIM), np.nan, np.float32)}, "30 of 30 rows hold NaN or infinity"),
        ({"coords": np.zeros((30, 2), np.float32)}, "'coords' is float32 [30, 2]; expected: integers [N, 2]"),
        ({"coords": np.zeros((30, 5), np.int32)}, "'coords' is int32 [30, 5]; expected: integers [N, 2]"),
        ({"patch_size_level0": None}, "attribute patch_size_level0 on 'coords' is None; expected: a whole"),
        ({"patch_size_level0": 511.5}, "attribute patch_size_level0 on 'coords' is 511.5; expected: a whole"),
    ],
)
def test_what_falls_short_in_a_foreign_file_is_one_line(tmp_path, changes, problem):
    write_foreign(tmp_path / "a.h5", **changes)
    ((name, line),) = lines(tmp_path, "patho-bench", warnings=False)
    assert name == "a.h5"
    assert problem in line


def test_a_group_in_place_of_features_is_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features/uni"] = np.zeros((3, DIM), np.float32)
    assert lines(tmp_path, "mil-lab") == [
        ("a.h5", "'features' is a group, there is ['features']; expected: a dataset float32 [N, D]")
    ]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
@pytest.mark.parametrize("consumer", ["patho-bench", "clam", "stamp", "trident"])
def test_a_truncated_file_is_found_wherever_it_is_cut(tmp_path, consumer, share):
    place, _, _ = write(tmp_path, LAYOUT_FOR[consumer])
    path = place.features("a", "tiny")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    ((name, line),) = lines(tmp_path, consumer, warnings=False)
    assert name == "a.h5"
    assert line.startswith("cannot be read to its end: truncated, damaged or no HDF5")


def test_coordinates_of_a_lower_level_are_found(tmp_path):
    _, xy = write_foreign(tmp_path / "a.h5")
    write_foreign(tmp_path / "a.h5", coords=xy // 4)
    assert lines(tmp_path, "patho-bench") == [
        (
            "a.h5",
            "neighbouring coordinates are 128 apart, but patch_size_level0 means 512: "
            "they are not level-0 pixels",
        )
    ]


def test_overlapping_patches_are_level_0_all_the_same(tmp_path):
    _, xy = write_foreign(tmp_path / "a.h5")
    write_foreign(tmp_path / "a.h5", coords=xy // 2)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["coords"].attrs.update(patch_size=256, overlap=128)
    assert lines(tmp_path, "patho-bench") == []


def test_coordinates_outside_the_slide_are_found(tmp_path):
    place, _, _ = write(tmp_path, "trident")
    with h5py.File(place.coords("a"), "a") as file:
        file["coords"].attrs["level0_width"] = 3000
    assert lines(tmp_path, "trident") == [
        ("a_patches.h5", "20 of 50 coordinates lie outside the slide of 3000 x 6000 px")
    ]


def test_missing_attributes_are_listed(tmp_path):
    place, _, _ = write(tmp_path, "trident")
    with h5py.File(place.coords("a"), "a") as file:
        del file["coords"].attrs["overlap"], file["coords"].attrs["savetodir"]
    with h5py.File(place.features("a", "tiny"), "a") as file:
        del file["features"].attrs["encoder"]
    assert lines(tmp_path, "trident") == [
        ("a_patches.h5", "attributes missing on 'coords': overlap, savetodir"),
        ("a.h5", "attributes missing on 'features': encoder"),
    ]


def test_patch_sizes_that_differ_and_zero_rows_are_warnings(tmp_path):
    for name in "abc":
        write_foreign(tmp_path / f"{name}.h5")
    write_foreign(tmp_path / "d.h5", patch_size_level0=515)
    features = np.ones((30, DIM), np.float32)
    features[3:5] = 0
    write_foreign(tmp_path / "a.h5", features=features)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs[PROVENANCE] = json.dumps({"read_errors": 2})
    assert lines(tmp_path, "patho-bench") == [
        ("a.h5", "2 of 30 rows are zeros, 2 recorded as unreadable; leave them out of training"),
        (
            "d.h5",
            "patch_size_level0 is 515, most files have 512; Patho-Bench fuses slides of one patient only if "
            "it is the same",
        ),
    ]
    assert lines(tmp_path, "patho-bench", warnings=False) == []


def test_features_of_another_width_are_found(tmp_path):
    for name in "abc":
        write_foreign(tmp_path / f"{name}.h5")
    write_foreign(tmp_path / "d.h5", features=np.ones((30, 9), np.float32))
    assert lines(tmp_path, "mil-lab") == [
        ("d.h5", "features of 9 columns, most files have 24; one model takes one width")
    ]


# --- CLAM and STAMP ---------------------------------------------------------------------------


def test_clam_misses_tensors_and_takes_no_others(tmp_path):
    for name in "abcd":
        write(tmp_path, "clam", name=name)
    tensors = tmp_path / "features_tiny/pt_files"
    (tensors / "a.pt").unlink()
    torch.save(torch.zeros(50, DIM, dtype=torch.float16), tensors / "b.pt")
    torch.save(torch.ones(49, DIM), tensors / "c.pt")
    (tensors / "d.pt").write_bytes((tensors / "d.pt").read_bytes()[:900])
    found = dict(lines(tmp_path, "clam", warnings=False))
    assert found["a.pt"] == "missing, though h5_files/a.h5 is there; CLAM trains on it"
    assert found["b.pt"] == "holds torch.float16 [50, 24]; expected: a tensor float32 [N, D]"
    assert found["c.pt"] == "49 rows, but h5_files/c.h5 has 50"
    assert found["d.pt"].startswith("torch.load finds no tensor")
    assert len(found) == 4


def test_a_tensor_as_torch_wrote_it_before_1_6_is_read(tmp_path):
    write(tmp_path, "clam", name="a")
    path = tmp_path / "features_tiny/pt_files/a.pt"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert lines(tmp_path, "clam", warnings=False) == []


def test_coordinates_at_which_clam_needs_a_resize_are_told_once_per_folder(tmp_path):
    for name in "ab":
        write(tmp_path, "clam", name=name)
    ((folder, line),) = lines(tmp_path, "clam")
    assert folder == "patches"
    assert line.startswith("in 2 files CLAM reads 512 px for a patch of 256 px and does not resize")
    assert "encoder.transform_for(256), not encoder.transform" in line
    assert "(seal-conch, seal-phikon2, conch, phikon2) silently see a wrong scale" in line
    assert "level" not in line


def test_coordinates_of_another_level_than_ours_are_told(tmp_path):
    """As the version before wrote them for every slide, and as they are where OpenSlide is not the reader."""
    grid = PatchGrid(np.zeros((1, 2), np.int64), 224, 0.5, 448, 0, 1, 224)
    layout_of_grid("clam", tmp_path, grid).write_coords(
        SlideLabel("a", SIZE, 0.25), grid, provenance_of(grid)
    )
    ((_, line),) = lines(tmp_path, "clam")
    assert "CLAM reads 448 px for a patch of 224 px" in line
    assert "it reads level 0, seal_extract read level 1, so that embeddings differ by some 1 %" in line


def test_coordinates_of_clams_layout_may_overlap(tmp_path):
    xy = np.stack([np.arange(30) % 10, np.arange(30) // 10], axis=1).astype(np.int64) * 128
    grid = PatchGrid(xy, 256, 0.5, 256, 128, 0, 256)
    layout_of_grid("clam", tmp_path, grid).write_coords(
        SlideLabel("a", SIZE, 0.5), grid, provenance_of(grid, 0.5)
    )
    assert lines(tmp_path, "clam") == []


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "pt_files").mkdir()
    torch.save(Trap(), tmp_path / "pt_files/a.pt")
    ((name, line),) = lines(tmp_path, "clam")
    assert name == "a.pt"
    assert line.startswith("torch.load finds no tensor")
    assert not (tmp_path / "sprung").exists()


def test_tridents_coordinates_are_not_clams(tmp_path):
    write_foreign(tmp_path / "patches/a.h5", features=None)
    assert lines(tmp_path, "clam") == [
        ("a.h5", "attribute patch_size on 'coords' is None; expected: a whole number"),
        ("a.h5", "attribute patch_level on 'coords' is None; expected: a whole number"),
    ]


def test_pixels_under_stamps_names_are_found(tmp_path):
    place, _, grid = write(tmp_path, "stamp")
    with h5py.File(place.features("a", "tiny"), "a") as file:
        file["coords"][...] = grid.xy_l0
    assert lines(tmp_path, "stamp") == [
        (
            "a.h5",
            "neighbouring coordinates are 512 apart, but tile_size_um means 128: they are not micrometres",
        )
    ]


def test_root_attributes_that_mislead_stamp_are_found(tmp_path):
    place, _, _ = write(tmp_path, "stamp")
    with h5py.File(place.features("a", "tiny"), "a") as file:
        file.attrs.update(encoder="tiny", stamp_version="9.9", unit="px", feat_type="slide")
        del file.attrs["tile_size_px"]
    assert [line.split(";")[0] for _, line in lines(tmp_path, "stamp")] == [
        "root attribute 'encoder'",
        "root attribute 'stamp_version'",
        "root attribute unit is 'px'",
        "root attribute tile_size_px is None",
        "root attribute feat_type is 'slide'",
    ]


# --- the command ------------------------------------------------------------------------------


def test_the_command_prints_a_line_per_problem_and_exits_with_1_only_if_one_falls_short(tmp_path, capsys):
    write(tmp_path, "flat")
    assert main(["verify", str(tmp_path), "--for", "patho-bench"]) == 0
    assert capsys.readouterr().out == "1 of 1 files are as patho-bench expects\n"
    write_foreign(tmp_path / "b.h5", features=None)
    assert main(["verify", str(tmp_path), "--for", "patho-bench"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'b.h5'}: 'features' is missing")
    assert out.count("\n") == 1
    assert err == "seal-extract: 1 of 2 files are not as patho-bench expects\n"


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_foreign_folder_exits_with_2_and_says_what_was_looked_for(tmp_path, consumer, capsys):
    (tmp_path / "slide.svs").write_text("no features")
    assert main(["verify", str(tmp_path), "--for", consumer]) == 2
    assert capsys.readouterr().err == (
        f"seal-extract: {tmp_path} holds nothing that {consumer} reads: looked for {LOOKED_FOR[consumer]}; "
        f"convert a finished run with: seal-extract export {tmp_path} --layout {SERVES[consumer]} "
        f"-o {SERVES[consumer]}\n"
    )


def test_unknown_consumers_and_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--for is 'clem'; allowed: clam, trident, patho-bench, stamp"):
        verify(tmp_path, "clem")
    with pytest.raises(UsageError, match="no is not a folder; give the one that clam would read"):
        verify(tmp_path / "no", "clam")


def test_patho_bench_s_files_are_found_in_a_default_run(tmp_path):
    place, _, _ = write(tmp_path, "trident")
    assert verify(tmp_path, "patho-bench") == verify(place.features("a", "tiny").parent, "patho-bench") == ()
