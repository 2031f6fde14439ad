"""Ready-cut patches in every form: embedded as they are, with their barcodes, never at a guessed scale."""

import h5py
import numpy as np
import pytest
import torch
from encoder_fixtures import noise_patches
from PIL import Image

from seal_extract import read_features
from seal_extract.demo import untrained_encoder
from seal_extract.errors import DeviceError
from seal_extract.evaluate.run import embed as embed_sections
from seal_extract.features.export import export
from seal_extract.features.verify import verify
from seal_extract.run.patch_images import extract_patches
from seal_extract.slides.patch_files import open_patches

N, SIDE = 7, 224
HEST = {"patch_size_src": 448, "patch_size_target": SIDE, "downsample": 2.0, "pixel_size": 0.25}
BARCODES = tuple(f"AAC{i}-1" for i in range(N))
FOLDER = "20x_224px_0px_overlap/features_untrained-demo"


@pytest.fixture(scope="module")
def images():
    return noise_patches(N, SIDE)


@pytest.fixture(scope="module")
def expected(images, encoder):
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.cat([encoder.encode(one[None]) for one in batch]).numpy()


def write_hest(path, images, **attrs):
    """As HEST's ``dump_patches``: barcodes of bytes [N, 1], numbers as attributes."""
    with h5py.File(path, "w") as file:
        file["img"], file["coords"] = images, np.arange(2 * len(images)).reshape(-1, 2) * 500
        file["barcode"] = np.array([[b.encode()] for b in BARCODES[: len(images)]])
        for name in ("img", "coords"):
            file[name].attrs.update(attrs)
    return path


def write_pictures(folder, images, suffix=".png"):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"patch{i}{suffix}")
    return folder


@pytest.fixture
def embed(run, encoder_folder, tmp_path):
    """Embed patches into ``tmp_path / "out"``: (exit status, all that was printed)."""

    def type_(*words, encoder=encoder_folder):
        status, out, err = run(*words, "--patches", "-o", tmp_path / "out", "--encoder", encoder)
        return status, "\n".join(out + err)

    return type_


def test_hests_patches_keep_barcodes_and_places_and_say_their_scale(tmp_path, images, embed, expected):
    status, said = embed(write_hest(tmp_path / "TENX1.h5", images, **HEST))
    assert status == 0
    assert "7 ready-cut patches by untrained-demo, 224 px at 0.5 µm/px by the file" in said
    made = read_features(tmp_path / "out" / FOLDER / "TENX1.h5")
    np.testing.assert_allclose(made.features, expected, atol=1e-5)
    assert made.barcodes == BARCODES
    assert made.grid.xy_l0.tolist() == [[1000 * i, 1000 * i + 500] for i in range(N)]
    assert (made.grid.mpp, made.grid.patch_size_l0, made.provenance["slide"]["mpp"]) == (0.5, 448, 0.25)
    assert [f.problem for f in verify(tmp_path / "out", "trident")] == []
    for layout in ("clam", "stamp"):
        (copy,) = export(tmp_path / "out", layout, tmp_path / layout)
        assert read_features(copy.path).barcodes == BARCODES


def test_pictures_and_npz_are_one_slide_each(tmp_path, images, embed, expected):
    pictures = write_pictures(tmp_path / "core_a", images)
    np.savez(tmp_path / "core_b.npz", any_name=images, barcodes=np.array(BARCODES))
    assert embed(pictures, tmp_path / "core_b.npz", "--mpp", "0.5")[0] == 0
    a, b = (read_features(tmp_path / "out" / FOLDER / f"core_{x}.h5") for x in "ab")
    for made in (a, b):
        np.testing.assert_allclose(made.features, expected, atol=1e-5)
        assert len({tuple(xy) for xy in made.grid.xy_l0.tolist()}) == N
        assert made.grid.origin == "ready-cut patches, laid in their order"
    assert a.barcodes == tuple(f"patch{i}" for i in range(N))
    assert b.barcodes == BARCODES


def test_the_same_patches_are_finished_and_others_are_not_replaced(tmp_path, images, embed):
    pictures = write_pictures(tmp_path / "core", images)
    words, path = (pictures, "--mpp", "0.5"), tmp_path / "out" / FOLDER / "core.h5"
    assert embed(*words)[0] == 0
    before = path.stat().st_mtime_ns
    status, said = embed(*words)
    assert status == 0
    assert "finished before" in said
    Image.fromarray(images[1]).save(pictures / "patch0.png")
    status, said = embed(*words)
    assert status == 1
    assert "core.h5 exists, made of something else (slide sha256" in said
    assert path.stat().st_mtime_ns == before
    assert embed(*words, "--overwrite")[0] == 0
    features = read_features(path).features
    np.testing.assert_array_equal(features[0], features[1])


def test_a_folder_of_hests_files_stands_for_all_of_them_and_one_that_fails_stops_no_other(
    tmp_path, images, embed
):
    (tmp_path / "patches").mkdir()
    write_hest(tmp_path / "patches" / "A.h5", images[:2])  # states no µm/px
    write_hest(tmp_path / "patches" / "B.h5", images[:3], **HEST)
    status, said = embed(tmp_path / "patches")
    assert status == 1
    assert "A.h5 does not state the µm/px of its patches; type it, for example --mpp 0.5" in said
    assert len(read_features(tmp_path / "out" / FOLDER / "B.h5").grid) == 3


SCALED = ("--mpp", "0.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "A.h5 does not state the µm/px of its patches; type it, for example --mpp 0.5"),
        (SCALED, "A.h5 has coords in pixels of a slide whose µm/px it does not state; type it"),
        ((*SCALED, "--patch-px", "224"), "--patch-px does not apply to patches that are cut already"),
        ((*SCALED, "--min-tissue", "0.1"), "--min-tissue does not apply to patches"),
        ((*SCALED, "--dry-run"), "--dry-run does not apply to patches"),
    ],
)
def test_nothing_is_guessed_and_no_option_passed_over(tmp_path, images, embed, options, message):
    status, said = embed(write_hest(tmp_path / "A.h5", images[:2]), *options)
    assert status == 2
    assert message in said
    assert not (tmp_path / "out").exists()


def test_ready_cut_patches_are_no_slide_and_have_no_pictures(tmp_path, images, embed, run):
    hest = write_hest(tmp_path / "A.h5", images[:2], **HEST)
    status, _, (line,) = run(hest, "--dry-run")
    assert status == 1
    assert "A.h5 is no slide; ready-cut patches are embedded with --patches" in line
    assert embed(hest, encoder="seal-tiny")[0] == 0
    status, out, (line,) = run("search", tmp_path / "out", "--gene", "EPCAM", "-o", tmp_path / "found")
    assert status == 1  # as where a slide has moved: the table is written, the pictures are not
    assert any("A  (1000, 1500)" in row for row in out)
    assert "there is no slide to draw them on" in line


def test_bad_files_are_one_line_each(tmp_path, images):
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["features"] = np.zeros((3, 5), np.float32)
    np.savez(tmp_path / "flat.npz", img=images[..., 0])
    np.savez(tmp_path / "objects.npz", img=np.array([{}, {}], object))
    np.savez(tmp_path / "whole.npz", img=images)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-100])
    (tmp_path / "changed.npz").write_bytes(whole[:500] + bytes(100) + whole[600:])
    np.savez(tmp_path / "two_scales.npz", img=images, mpp=[0.5, 0.25])
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, images)
    write_hest(tmp_path / "cut.h5", images, **HEST)
    (tmp_path / "cut.h5").write_bytes((tmp_path / "cut.h5").read_bytes()[:4000])
    write_hest(tmp_path / "impossible.h5", images, **HEST | {"pixel_size": 300.0})
    (tmp_path / "empty").mkdir()
    odd = write_pictures(tmp_path / "odd", images[:2])
    Image.fromarray(images[2][:100]).save(odd / "z.png")
    deep = write_pictures(tmp_path / "deep", images[:1])
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(deep / "z.png")
    for name, words in {
        "none.h5": "holds features float32 [3, 5]; allowed: one array of images uint8 [N, S, S, 3]",
        "flat.npz": "holds img uint8 [7, 224, 224]; allowed: one array",
        "objects.npz": "cannot be read (Object arrays cannot be loaded when allow_pickle=False)",
        "cut.npz": "cut.npz cannot be read (File is not a zip file)",
        "array.npz": "array.npz cannot be read (File is not a zip file)",
        "changed.npz": "changed.npz cannot be read (Bad CRC-32",
        "two_scales.npz": "two_scales.npz cannot be read (can only convert an array of size 1",
        "cut.h5": "cut.h5 cannot be read (",
        "impossible.h5": "600 µm/px cannot be true; type the true one",
        "empty": "holds no PNG or JPEG; give an HDF5 or NPZ file",
        "odd": "z.png is 224 x 100 px; allowed: squares of one size",
        "deep": "z.png is of mode I;16; allowed: 8 bits per channel",
        "missing": "missing does not exist; give an HDF5",
    }.items():
        with pytest.raises(Exception) as told:  # noqa: PT011 the message is what is held
            open_patches(tmp_path / name, mpp=None if name == "impossible.h5" else 0.5)
        assert words in str(told.value)
        assert "\n" not in str(told.value)
        assert type(told.value).__module__ == "seal_extract.errors"


def test_a_damaged_picture_leaves_no_file(tmp_path, images, embed):
    pictures = write_pictures(tmp_path / "core", images[:3])
    damaged = pictures / "patch1.png"
    damaged.write_bytes(damaged.read_bytes()[:20_000])
    status, said = embed(pictures, "--mpp", "0.5")
    assert status == 1
    assert f"{damaged} cannot be read" in said
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_gpu_that_stops_is_one_line_and_leaves_no_file(tmp_path, images):
    def stop(*_):
        raise RuntimeError(
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"
        )

    encoder = untrained_encoder()
    encoder.encode_unchecked = stop
    path = tmp_path / "ready.npz"
    np.savez(path, images=images)
    words = r"the GPU stopped when .*ready.npz was embedded \(CUDA error.*same command.*--device cpu"
    with pytest.raises(DeviceError, match=words):
        extract_patches(path, encoder, tmp_path / "out", mpp=0.5)
    assert not list(tmp_path.rglob("*.h5"))
    with pytest.raises(DeviceError, match="when a batch of the sections was embedded"):
        embed_sections(encoder, np.zeros((2, 3, 64, 64), np.uint8), 2)
