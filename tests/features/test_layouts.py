"""Every layout as its consumer's own loader reads it: written from the description of those loaders."""

from dataclasses import replace

import h5py
import numpy as np
import openslide
import pytest
import torch
from conftest import DrawnSlide
from feature_fixtures import CONSUMER_OF, DIM, SIZE, files_in, grid_of, provenance_of, short_of, write
from PIL import Image
from synthetic_slide import write_synthetic_slide

from seal_extract import ExtractOptions, extract, open_slide, read_features
from seal_extract.demo import UNTRAINED, untrained_encoder
from seal_extract.encoders.spec import Architecture, InputRule
from seal_extract.errors import OutputError, UsageError
from seal_extract.features.feature_file import PROVENANCE, SlideLabel
from seal_extract.features.layouts import LAYOUTS, check_layout, layout_of_grid, open_layout
from seal_extract.features.store import grid_fields, read_provenance
from seal_extract.features.verify import verify
from seal_extract.patches.grid import PatchGrid, read_grid
from seal_extract.run.extract import extract_many

# --- the consumers' loaders -------------------------------------------------------------------


def trident_reads_patches(path):
    """Coordinates, and how TRIDENT would read each: (xy, level-0 side, side at the target)."""
    with h5py.File(path) as file:
        coords, attrs = file["coords"][:], dict(file["coords"].attrs)
    need = {"patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap"}
    assert {*need, "name", "savetodir", "level0_width", "level0_height"} == set(attrs)
    assert coords.dtype == np.int64
    assert attrs["level0_magnification"] / attrs["target_magnification"] == pytest.approx(
        attrs["patch_size_level0"] / attrs["patch_size"]
    )
    return coords, int(attrs["patch_size_level0"]), int(attrs["patch_size"])


def patho_bench_fuses(paths):
    """The slides of one patient as one bag; asserts that their patches are of one level-0 size."""
    bags, sizes = [], []
    for path in paths:
        with h5py.File(path) as file:
            assert file["coords"].shape == (len(file["features"]), 2)
            bags.append(torch.from_numpy(file["features"][:]))
            sizes.append(file["coords"].attrs["patch_size_level0"])
    assert all(np.issubdtype(type(size), np.integer) for size in sizes)
    assert len(set(sizes)) == 1
    return torch.cat(bags)


def clam_trains_on(folder, slide, use_h5):
    """What CLAM hands its model for a slide: a float32 bag into float32 layers."""
    if use_h5:
        with h5py.File(folder / "h5_files" / f"{slide}.h5") as file:
            bag, coords = torch.from_numpy(file["features"][:]), file["coords"][:]
        assert np.issubdtype(coords.dtype, np.integer)
        assert coords.shape == (len(bag), 2)
    else:
        bag = torch.load(folder / "pt_files" / f"{slide}.pt", weights_only=True)
    assert torch.softmax(torch.nn.Linear(DIM, 1)(bag), dim=0).sum().item() == pytest.approx(1, abs=1e-5)
    return bag


def clam_extracts_from(path):
    """The regions that CLAM's extraction reads: (level-0 corner, level, side at that level)."""
    with h5py.File(path) as file:
        coords = file["coords"]
        level, side = coords.attrs["patch_level"], coords.attrs["patch_size"]
        assert {"downsample", "downsampled_level_dim", "level_dim", "name", "save_path"} <= set(coords.attrs)
        return [(tuple(xy), int(level), (int(side), int(side))) for xy in coords[:].tolist()]


def stamp_reads(paths):
    """STAMP's bag of the slides of a patient: (feats float32, coords µm, µm/px of the tiles)."""
    feats, coords, mpps = [], [], set()
    for path in paths:
        with h5py.File(path) as file:
            root = file.attrs
            is_tile = ("encoder" not in root and "feat_type" not in root) or root["feat_type"] == "tile"
            assert is_tile
            assert "stamp_version" not in root
            assert root["unit"] == "um"
            feats.append(torch.from_numpy(file["feats"][:]))
            coords.append(torch.from_numpy(file["coords"][:]))
            mpps.add(float(root["tile_size_um"]) / int(root["tile_size_px"]))
    return torch.concat(feats).float(), torch.concat(coords).float(), mpps


def mil_lab_batches(path):
    """A batch float32 [1, M, D]."""
    with h5py.File(path) as file:
        return torch.from_numpy(file["features"][:]).unsqueeze(0)


# --- contracts --------------------------------------------------------------------------------


def test_trident_and_patho_bench_read_the_trident_layout(tmp_path):
    place, features, grid = write(tmp_path, "trident")
    assert files_in(tmp_path) == [
        "20x_256px_0px_overlap/features_tiny/a.h5",
        "20x_256px_0px_overlap/patches/a_patches.h5",
    ]
    xy, size_l0, size = trident_reads_patches(place.coords("a"))
    np.testing.assert_array_equal(xy, grid.xy_l0)
    assert (size_l0, size) == (512, 256)
    path = place.features("a", "tiny")
    assert trident_reads_patches(path)[1] == 512
    np.testing.assert_array_equal(patho_bench_fuses([path]).numpy(), features)
    with h5py.File(path) as file:
        said = {"name": "a", "savetodir": ".", "encoder": "tiny"}
        assert dict(file["features"].attrs) == said
        assert set(file.attrs) == {PROVENANCE}


def test_trident_reads_a_slide_without_patches(tmp_path):
    place, _, _ = write(tmp_path, "trident", n=0)
    assert trident_reads_patches(place.coords("a"))[0].shape == (0, 2)
    assert patho_bench_fuses([place.features("a", "tiny")]).shape == (0, DIM)


@pytest.mark.parametrize(
    ("patch_px", "mpp", "overlap_px", "folder"),
    [(512, 1.0, 64, "10x_512px_64px_overlap"), (224, 0.4, 0, "25x_224px_0px_overlap")],
)
def test_folders_are_tridents(tmp_path, patch_px, mpp, overlap_px, folder):
    layout = open_layout("trident", tmp_path, patch_px, mpp, overlap_px)
    assert layout.features("a", "seal-conch") == tmp_path / folder / "features_seal-conch/a.h5"


def test_patho_bench_fuses_slides_of_one_nominal_size(tmp_path):
    for i, mpp in enumerate((0.25, 0.2485, 0.2522)):
        write(tmp_path, "flat", n=5, name=str(i), mpp=mpp)
    assert files_in(tmp_path) == ["0.h5", "1.h5", "2.h5"]
    assert patho_bench_fuses(sorted(tmp_path.glob("*.h5"))).shape == (15, DIM)


def test_mil_lab_takes_a_file_of_the_flat_layout(tmp_path):
    place, features, _ = write(tmp_path, "flat")
    batch = mil_lab_batches(place.features("a", "tiny"))
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch[0].numpy(), features)


def test_clam_trains_and_extracts_from_the_clam_layout(tmp_path):
    place, features, grid = write(tmp_path, "clam")
    folder = tmp_path / "features_tiny"
    for use_h5 in (True, False):
        np.testing.assert_array_equal(clam_trains_on(folder, "a", use_h5).numpy(), features)
    want = [(tuple(xy), 0, (512, 512)) for xy in grid.xy_l0.tolist()]
    assert clam_extracts_from(place.coords("a")) == want


def test_clam_never_meets_a_slide_without_patches_and_it_is_still_finished(tmp_path):
    place, _, _ = write(tmp_path, "clam", n=0)
    assert files_in(tmp_path) == ["features_tiny/without_patches/a.h5"]
    assert place.find("a", "tiny") == place.empty("a", "tiny")
    assert read_features(place.find("a", "tiny")).features.shape == (0, DIM)


def test_coordinates_that_cannot_be_deleted_are_one_line(tmp_path):
    (tmp_path / "patches/a.h5").mkdir(parents=True)
    grid = grid_of(0)
    with pytest.raises(OutputError, match=r"cannot write .*a\.h5: "):
        layout_of_grid("clam", tmp_path, grid).write_coords(
            SlideLabel("a", SIZE, 0.25), grid, provenance_of(grid), overwrite=True
        )


def test_clams_own_coordinates_are_taken_back(tmp_path):
    place, _, grid = write(tmp_path, "clam", n=7)
    back = read_grid(place.coords("a"), DrawnSlide(np.zeros((SIZE[1], SIZE[0], 3), np.uint8)))
    np.testing.assert_array_equal(back.xy_l0, grid.xy_l0)
    assert (back.patch_size_l0, back.origin) == (512, "CLAM")


def test_stamp_reads_micrometres_of_the_true_resolution(tmp_path):
    place, features, grid = write(tmp_path, "stamp", mpp=0.2485)
    assert files_in(tmp_path) == ["tiny/a.h5"]
    feats, coords_um, mpps = stamp_reads([place.features("a", "tiny")])
    np.testing.assert_array_equal(feats.numpy(), features.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(coords_um.numpy(), grid.xy_l0 * 0.2485, rtol=1e-6)
    assert mpps == {512 * 0.2485 / 256}
    with h5py.File(place.features("a", "tiny")) as file:
        assert (file["feats"].dtype, file["coords"].dtype) == (np.float16, np.float32)
        assert file.attrs["extractor"] == "tiny"


def test_stamp_reads_a_slide_without_patches(tmp_path):
    place, _, _ = write(tmp_path, "stamp", n=0)
    feats, coords, _ = stamp_reads([place.features("a", "tiny")])
    assert (feats.shape, coords.shape) == ((0, DIM), (0, 2))


# --- what all layouts have in common ----------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [50, 0])
def test_any_layout_is_read_back_with_its_level_0_grid(tmp_path, layout, n):
    place, features, grid = write(tmp_path, layout, n=n, mpp=0.2485)
    path = place.find("a", "tiny")
    back = read_features(path)
    kept = features.astype(np.float16) if layout == "stamp" else features
    assert back.features.dtype == np.float32
    np.testing.assert_array_equal(back.features, kept.astype(np.float32))
    np.testing.assert_array_equal(back.grid.xy_l0, grid.xy_l0)
    assert grid_fields(back.grid) == grid_fields(grid)
    assert read_provenance(path, place.dataset)["encoder"] == {"name": "tiny"}


def test_stamps_micrometres_give_back_every_pixel_of_a_large_slide(tmp_path):
    xy = np.random.default_rng(0).integers(0, 300_000, (20_000, 2))
    grid = PatchGrid(xy, 256, 0.5, 515, 0, 0, 515)
    place, label = layout_of_grid("stamp", tmp_path, grid), SlideLabel("a", (300_512, 300_512), 0.24853)
    with place.write_features(label, grid, "tiny", 2, provenance_of(grid, 0.24853)) as writer:
        writer.append(np.zeros((20_000, 2), np.float32))
    np.testing.assert_array_equal(read_features(place.features("a", "tiny")).grid.xy_l0, xy)


@pytest.mark.parametrize("layout", ["trident", "clam"])
def test_two_encoders_share_the_coordinates(tmp_path, layout):
    place, _, _ = write(tmp_path, layout)
    before = place.coords("a").stat().st_mtime_ns
    write(tmp_path, layout, encoder="other", seed=2)
    assert place.coords("a").stat().st_mtime_ns == before
    assert place.features("a", "tiny") != place.features("a", "other")
    assert (read_features(place.features("a", "other")).features != 0).all()


def test_other_coordinates_of_a_slide_are_not_replaced_without_overwrite(tmp_path):
    place, _, _ = write(tmp_path, "clam", n=50)
    label, other = SlideLabel("a", SIZE, 0.25), grid_of(20)
    with pytest.raises(
        OutputError,
        match=r"exists with 50 other patches, and these are 20; type --coords .* to use those, --overwrite",
    ):
        place.write_coords(label, other, provenance_of(other))
    assert len(clam_extracts_from(place.coords("a"))) == 50
    place.write_coords(label, other, provenance_of(other), overwrite=True)
    assert len(clam_extracts_from(place.coords("a"))) == 20


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="--layout is 'tridnet'; allowed: trident, clam, stamp, flat"):
        ExtractOptions(layout="tridnet")


def test_one_folder_for_two_encoders_is_refused():
    with pytest.raises(
        UsageError, match=r"--layout flat has one file per slide, but these are 2 encoders \(a, b\)"
    ):
        check_layout("flat", ["a", "b"])
    for layout in ("trident", "clam", "stamp"):
        check_layout(layout, ["a", "b"])
    check_layout("flat", ["a"])


# --- through the whole pipeline ---------------------------------------------------------------


@pytest.mark.parametrize(("layout", "consumer"), [*CONSUMER_OF.items()])
def test_a_run_is_as_its_consumer_takes_it_and_is_recognised(
    drawn_slides, encoder, tmp_path, layout, consumer
):
    options = ExtractOptions(layout=layout)
    result = extract(drawn_slides[0], encoder, tmp_path, options=options)
    assert len(result.grid) > 1
    assert short_of(tmp_path, consumer) == []
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files_in(tmp_path)}
    again = extract(drawn_slides[0], encoder, tmp_path, options=options)
    assert again.path == result.path
    np.testing.assert_array_equal(again.features, result.features)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files_in(tmp_path)} == before


@pytest.mark.parametrize("downsamples", [(1, 4), (1, 2)], ids=["no level at 0.5", "a level at 0.5"])
@pytest.mark.parametrize("input_rule", [InputRule(16), InputRule(16, 224, "bilinear")], ids=str)
def test_clams_own_extraction_gives_the_same_numbers(tmp_path, downsamples, input_rule):
    svs = write_synthetic_slide(tmp_path / "a.svs", (2000, 1600), mpp=0.25, downsamples=downsamples)
    any_size = Architecture("vit_tiny_patch16_224", {"img_size": 224, "dynamic_img_size": True})
    encoder = untrained_encoder(replace(UNTRAINED, architecture=any_size, input=input_rule))
    ours = extract(svs, encoder, tmp_path / "out", options=ExtractOptions(layout="clam"))
    regions = clam_extracts_from(tmp_path / "out/patches/a.h5")
    level_is_there = downsamples == (1, 2)
    assert {region[1:] for region in regions} == {(1, (224, 224)) if level_is_there else (0, (448, 448))}
    with openslide.OpenSlide(svs) as wsi, torch.inference_mode():
        patches = [wsi.read_region(*region).convert("RGB") for region in regions]
        theirs = encoder(torch.stack([encoder.transform_for(224)(patch) for patch in patches])).numpy()
    np.testing.assert_allclose(theirs, ours.features, atol=1e-4 * np.abs(ours.features).max())
    assert [f.is_warning for f in verify(tmp_path / "out", "clam")] == [True] * (not level_is_there)
    with open_slide(svs) as slide:
        again = read_grid(tmp_path / "out/patches/a.h5", slide)
    assert grid_fields(again) == grid_fields(ours.grid) | {"origin": "CLAM"}


@pytest.mark.parametrize("layout", ["trident", "clam", "stamp"])
def test_two_encoders_fill_one_layout(drawn_slides, encoder, tmp_path, layout):
    encoders = encoder, untrained_encoder(replace(UNTRAINED, name="second"), seed=1)
    (result,) = extract_many(drawn_slides[:1], encoders, tmp_path, options=ExtractOptions(layout=layout))
    assert [f.features.shape[1] for f in result.features] == [192, 192]
    assert len({f.path for f in result.features}) == 2
    assert short_of(tmp_path, CONSUMER_OF[layout]) == []


def test_a_run_on_glass_in_clams_layout_is_finished_and_out_of_clams_way(encoder, tmp_path):
    Image.new("RGB", (900, 900), (244, 244, 244)).save(tmp_path / "glass.png")
    options = ExtractOptions(layout="clam", slide_mpp=0.5)
    for _ in range(2):
        result = extract(tmp_path / "glass.png", encoder, tmp_path / "out", options=options)
        assert result.features.shape == (0, 192)
        assert result.path.parent.name == "without_patches"
    assert [name for name in files_in(tmp_path / "out") if name.endswith((".h5", ".pt"))] == [
        "features_untrained-demo/without_patches/glass.h5"
    ]


# --- nothing half there -----------------------------------------------------------------------


def test_a_tensor_that_is_missing_is_made_again(tmp_path):
    place, features, _ = write(tmp_path, "clam")
    (tensor,) = place.derived("a", "tiny")
    tensor.unlink()
    place.complete("a", "tiny")
    np.testing.assert_array_equal(torch.load(tensor, weights_only=True).numpy(), features)
    before = tensor.stat().st_mtime_ns
    place.complete("a", "tiny")
    assert tensor.stat().st_mtime_ns == before


def test_a_slide_that_lost_its_patches_leaves_no_former_features(tmp_path):
    write(tmp_path, "clam", n=50)
    grid, label = grid_of(0), SlideLabel("a", SIZE, 0.25)
    place = layout_of_grid("clam", tmp_path, grid)
    place.write_coords(label, grid, provenance_of(grid), overwrite=True)
    with place.write_features(label, grid, "tiny", DIM, provenance_of(grid)):
        pass
    assert files_in(tmp_path) == ["features_tiny/without_patches/a.h5"]
    write(tmp_path, "clam", n=5)
    assert files_in(tmp_path) == [
        "features_tiny/h5_files/a.h5",
        "features_tiny/pt_files/a.pt",
        "patches/a.h5",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_stops_leaves_the_former_files_as_they_were(tmp_path, layout):
    _, _, grid = write(tmp_path, layout)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    place, label = layout_of_grid(layout, tmp_path, grid), SlideLabel("a", SIZE, 0.25)
    with (
        pytest.raises(OutputError, match="16 rows for 50 patches"),
        place.write_features(label, grid, "tiny", DIM, provenance_of(grid)) as writer,
    ):
        writer.append(np.zeros((16, DIM), np.float32))
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before


def test_a_tensor_that_cannot_be_written_is_one_line_and_leaves_none(tmp_path, monkeypatch):
    def fill_up(self, data):
        self.failure = OSError(28, "No space left on device")
        return len(data)

    place, _, _ = write(tmp_path, "clam")
    (tensor,) = place.derived("a", "tiny")
    tensor.unlink()
    monkeypatch.setattr("seal_extract.hdf5.Disk.write", fill_up)
    with pytest.raises(OutputError, match=r"a\.pt: the disk is full"):
        place.complete("a", "tiny")
    assert [name for name in files_in(tmp_path) if "pt_files" in name] == []
