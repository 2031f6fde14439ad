"""Volumes one can draw: what opens, what each plane shows, and what is refused in one line."""

import json

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from synthetic_volume import write_zarr

from seal_extract.errors import SealExtractError
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.regions import RegionReader
from seal_extract.patches.resample import Resampling
from seal_extract.slides.planes import open_plane
from seal_extract.slides.slide import open_with_another_reader
from seal_extract.volume.volume import open_volume

MPP, SPACING_UM = 0.5, 16.0


def drawn(planes=3, size_px=(96, 64), seed=0):
    """Smooth colours, another picture in each plane: uint8 [Z, H, W, 3]."""
    rng, (w, h) = np.random.default_rng(seed), size_px
    small = rng.integers(0, 256, (planes, h // 8, w // 8, 3), dtype=np.uint8)
    return np.stack([cv2.resize(plane, size_px, interpolation=cv2.INTER_LINEAR) for plane in small])


def write_folder(folder, planes, first=1):
    folder.mkdir(parents=True, exist_ok=True)
    for i, plane in enumerate(planes):
        Image.fromarray(plane).save(folder / f"plane_{i + first:03}.png")
    return folder


def write_stack(path, planes, axes="ZYXS", **metadata):
    sizes = {"PhysicalSizeX": MPP, "PhysicalSizeY": MPP, "PhysicalSizeZ": SPACING_UM} | metadata
    sizes = {name: value for name, value in sizes.items() if value is not None}
    tifffile.imwrite(path, planes, metadata={"axes": axes, **sizes}, tile=(16, 16), photometric=(
        "rgb" if axes.endswith("S") else "minisblack"
    ))  # fmt: skip
    return path


def write_list(place, pictures, transforms=(), **values):
    write_folder(place, pictures)
    entries = [{"slide": f"plane_{i + 1:03}.png", "name": f"S{i}"} for i in range(len(pictures))]
    for entry, transform in zip(entries, transforms, strict=False):
        if transform is not None:
            entry["transform"] = np.asarray(transform).tolist()
    given = {"planes": entries, "mpp": MPP, "spacing_um": SPACING_UM} | values
    path = place / "volume.json"
    path.write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
    return path


def whole(volume, plane):
    with volume.planes[plane].open() as slide:
        return slide.read_region((0, 0), 0, slide.size_l0)


@pytest.mark.parametrize(
    "kind", ["folder", "list", "ome-tiff", "ome-zarr", "grey", "16-bit", "channels first", "pages"]
)
def test_every_source_gives_the_planes_that_were_written(tmp_path, kind):
    planes = drawn()
    grey = np.repeat(planes[..., :1], 3, 3)
    ome = tmp_path / "v.ome.tif"
    if kind == "folder":
        volume = open_volume(write_folder(tmp_path / "f", planes), spacing_um=SPACING_UM, mpp=MPP)
    elif kind == "list":
        volume = open_volume(write_list(tmp_path, planes))
    elif kind == "ome-tiff":
        volume = open_volume(write_stack(ome, planes))
    elif kind == "channels first":
        volume = open_volume(write_stack(ome, planes.transpose(0, 3, 1, 2), "ZCYX"))
    elif kind == "ome-zarr":
        volume = open_volume(write_zarr(tmp_path / "v.zarr", planes))
    elif kind == "grey":
        planes, volume = grey, open_volume(write_stack(ome, planes[..., 0], "ZYX"))
    elif kind == "16-bit":
        write_stack(ome, planes[..., 0].astype(np.uint16) * 10 + 1000, "ZYX")
        planes, volume = grey, open_volume(ome, window=(1000, 3550))
    else:
        path = tmp_path / "pages.tif"
        tifffile.imwrite(path, planes, photometric="rgb")
        volume = open_volume(path, spacing_um=SPACING_UM, mpp=MPP)
    assert (len(volume), volume.size_px, volume.mpp, volume.spacing_um) == (3, (96, 64), MPP, SPACING_UM)
    for i, plane in enumerate(planes):
        np.testing.assert_array_equal(whole(volume, i), plane)
    assert volume.around(0, 3) == [0, 0, 1]
    assert volume.around(2, 5) == [0, 1, 2, 2, 2]


def test_coarser_levels_and_the_digest_of_a_stack(tmp_path):
    planes = drawn()
    volume = open_volume(write_zarr(tmp_path / "v.zarr", planes))
    with volume.planes[1].open() as slide:
        assert [level.downsample for level in slide.levels] == [1, 2]
        np.testing.assert_array_equal(slide.read_region((8, 4), 1, (10, 6)), planes[1, 4:16:2, 8:28:2])
    same = open_volume(write_zarr(tmp_path / "w.zarr", planes, shape=(1, 1, 1, 64, 64)))
    other = open_volume(write_zarr(tmp_path / "x.zarr", planes[::-1]))
    assert volume.planes[0].content() == same.planes[0].content() != other.planes[0].content()


def test_a_region_beyond_a_plane_of_a_stack_is_black(tmp_path):
    planes = drawn()
    volume = open_volume(write_stack(tmp_path / "v.ome.tif", planes))
    with volume.planes[1].open() as slide:
        region = slide.read_region((-10, -5), 0, (20, 20))
        assert not slide.read_region((500, 0), 0, (4, 4)).any()
    assert not region[:5].any()
    assert not region[:, :10].any()
    np.testing.assert_array_equal(region[5:, 10:], planes[1, :15, :10])


def test_patches_of_a_plane_are_those_of_its_depth_and_never_of_another_reader(tmp_path):
    planes = drawn()
    volume = open_volume(write_stack(tmp_path / "v.ome.tif", planes))
    with volume.planes[2].open() as slide:
        grid = PatchGrid(np.array([[8, 16]]), 32, MPP, 32, 0, 0, 32)
        patch = RegionReader(slide, grid, Resampling(32)).read(range(1)).pixels
        assert open_with_another_reader(slide) is None
    assert torch.equal(patch[0], torch.from_numpy(planes[2, 16:48, 8:40]).permute(2, 0, 1))


@pytest.mark.parametrize("size_px", [(96, 64), (960, 640)])  # the second moves many level-0 pixels at once
def test_a_section_is_seen_through_its_transform(tmp_path, size_px):
    """Turned and moved pixels, by where a smooth picture's places land; white where the section ends."""
    w, h = size_px
    y, x = np.mgrid[:h, :w]
    picture = np.stack([x * 200 / w + 20, y * 200 / h + 20, np.full((h, w), 90)], 2).astype(np.uint8)
    turn, shift = np.deg2rad(30), np.array([w * 0.2, -h * 0.1])
    affine = np.array([[np.cos(turn), -np.sin(turn), shift[0]], [np.sin(turn), np.cos(turn), shift[1]]])
    volume = open_volume(write_list(tmp_path, [picture, picture], [None, affine]))
    assert volume.sections["S1"][0] == 1
    np.testing.assert_allclose(volume.sections["S1"][1], affine)
    with volume.planes[1].open() as slide:
        assert slide.size_l0 == size_px
        seen = slide.read_region((0, 0), 0, size_px)
        np.testing.assert_allclose(slide.read_region((10, 20), 0, (40, 30)), seen[20:50, 10:50], atol=1)
        assert (slide.read_region((-5000, 0), 0, (8, 8)) == 255).all()
    places = np.stack([x, y], -1).reshape(-1, 2) + 0.5
    back = (places - affine[:, 2]) @ affine[:, :2]  # a rotation is undone by its transpose
    inside = ((back > 2) & (back < np.array(size_px) - 2)).all(1)
    outside = ((back < -2) | (back > np.array(size_px) + 2)).any(1)
    expected = (back - 0.5) * 200 / np.array(size_px) + 20
    pixels = seen.reshape(-1, 3).astype(float)
    assert inside.mean() > 0.3
    assert np.abs(pixels[inside, :2] - expected[inside]).max() < 2.5  # both were rounded to 8 bits
    assert (pixels[outside] == 255).all()
    assert outside.mean() > 0.05


def test_a_coarser_section_fills_the_frame_of_a_finer_one(tmp_path):
    fine = drawn(1, (192, 128))[0]
    coarse = cv2.resize(fine, (96, 64), interpolation=cv2.INTER_AREA)
    volume = open_volume(write_list(tmp_path, [fine, coarse], [None, [[2, 0, 0], [0, 2, 0]]]))
    seen, expected = whole(volume, 1), cv2.resize(coarse, (192, 128), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(seen[8:-8, 8:-8], expected[8:-8, 8:-8].astype(float), atol=1)


def test_a_table_lists_sections_as_the_json_file_does(tmp_path):
    """With depths in µm, a transform as six numbers, and one in a file of NumPy's."""
    turn, shift = [[0, -1, 64], [1, 0, 0]], [[1, 0, 5.5], [0, 1, -3]]
    listed = open_volume(write_list(tmp_path, drawn(), [None, turn, shift]))
    np.savetxt(tmp_path / "turn.txt", np.vstack([turn, [0, 0, 1]]))
    (tmp_path / "v.csv").write_text(
        "slide,name,z_um,mpp,transform\nplane_001.png,S0,10,0.5,\n"
        'plane_002.png,S1,30,0.5,turn.txt\nplane_003.png,S2,50,0.5,"1 0 5.5, 0 1 -3"\n'
    )
    volume = open_volume(tmp_path / "v.csv")
    assert (volume.spacing_um, volume.mpp, len(volume)) == (20, MPP, 3)
    for i in range(3):
        np.testing.assert_array_equal(whole(volume, i), whole(listed, i))
        assert volume.planes[i].name == listed.planes[i].name
    for name, (plane, affine) in listed.sections.items():
        assert volume.sections[name][0] == plane
        np.testing.assert_array_equal(volume.sections[name][1], affine)


def test_a_plane_is_opened_again_by_what_its_features_record(tmp_path):
    planes = drawn()
    write_stack(tmp_path / "v.ome.tif", planes[..., 0].astype(np.uint16) * 10 + 1000, "ZYX")
    turned = [[0, -1, 64], [1, 0, 0]]
    for volume in (
        open_volume(tmp_path / "v.ome.tif", window=(1000, 3550)),
        open_volume(write_list(tmp_path, planes, [None, turned, turned])),
    ):
        for i in (1, 2):
            plane = volume.planes[i]
            origin = json.loads(json.dumps(plane.origin))
            with open_plane(plane.path, origin, volume.mpp, volume.size_px) as slide:
                assert (slide.size_l0, slide.mpp) == (volume.size_px, volume.mpp)
                np.testing.assert_array_equal(slide.read_region((0, 0), 0, slide.size_l0), whole(volume, i))


REFUSED = {
    "one plane": (lambda p: open_volume(write_list(p, drawn(1))), "holds one plane"),
    "missing number": (lambda p: _without(p, "plane_002.png"), "plane 2 is missing between"),
    "missing file": (lambda p: _without(p, "plane_002.png", listed=True), "plane S1 is missing"),
    "gap in a list": (
        lambda p: open_volume(
            write_list(p, drawn(2), planes=[{"slide": f"plane_00{i}.png", "z": 3 * i} for i in (1, 2)])
        ),
        "plane 4 is missing between",
    ),
    "other size": (lambda p: open_volume(write_list(p, [drawn(1)[0], drawn(1, (80, 64))[0]])), "to be alike"),
    "other µm/px": (
        lambda p: open_volume(
            write_list(p, drawn(2), planes=[{"slide": f"plane_00{i}.png", "mpp": i / 2} for i in (1, 2)])
        ),
        "at 1 µm/px, plane_001 96 x 64 px at 0.5",
    ),
    "no spacing": (lambda p: open_volume(write_list(p, drawn(), spacing_um=None)), "type --spacing-um VALUE"),
    "spacings differ": (
        lambda p: open_volume(write_stack(p / "v.ome.tif", drawn()), spacing_um=5.0),
        "--spacing-um gives 5 µm between planes, v.ome.tif 16",
    ),
    "infinite spacing": (
        lambda p: open_volume(write_folder(p / "f", drawn()), mpp=MPP, spacing_um=float("inf")),
        "--spacing-um gives inf µm",
    ),
    "no µm/px": (lambda p: open_volume(write_list(p, drawn(), mpp=None)), "type --slide-mpp VALUE"),
    "no µm/px of a stack": (
        lambda p: open_volume(write_stack(p / "v.ome.tif", drawn(), PhysicalSizeX=None, PhysicalSizeY=None)),
        "type --slide-mpp VALUE",
    ),
    "no window": (
        lambda p: open_volume(write_stack(p / "v.ome.tif", drawn()[..., 0].astype(np.uint16), "ZYX")),
        "type --window LOW,HIGH",
    ),
    "no unit in OME-Zarr": (
        lambda p: open_volume(write_zarr(p / "v.zarr", drawn(), unit="parsec")),
        "type --slide-mpp VALUE",
    ),
    "no OME-Zarr": (lambda p: _damaged_zarr(p), "is no OME-Zarr that can be read"),
    "window": (lambda p: open_volume(write_list(p, drawn(), window=[9, 9])), "allowed: LOW below HIGH"),
    "no depth": (lambda p: open_volume(write_stack(p / "v.ome.tif", drawn()[0], "YXS")), "allowed: z, y, x"),
    "no volume": (lambda p: open_volume(p / "v.txt"), "is no volume; allowed"),
    "nothing there": (lambda p: open_volume(_with(p, "v.tif", "?")), "no TIFF stack that can be read"),
    "no planes": (lambda p: open_volume(p), "holds no planes"),
    "no number": (lambda p: _renamed(p), "has no number in its name"),
    "two kinds": (
        lambda p: open_volume(write_list(p, drawn(), stack="v.tif")),
        "give either planes, or a stack",
    ),
    "depths": (lambda p: _table(p, "slide,z_um", "3", "7", "10"), "z_um is 3, 7, 10; allowed: the depth of"),
    "depth left out": (lambda p: _table(p, "slide,z_um", "3", "", "9"), "z_um is 3, nan, 9"),
    "gap in depths": (lambda p: _table(p, "slide,z_um", "3", "6", "12"), "plane 2 is missing between"),
    "no number in a table": (lambda p: _table(p, "slide,mpp", "x", "1", "1"), "line 2: mpp is 'x'"),
    "unknown column": (lambda p: _table(p, "slide,zum", "1", "2", "3"), "'zum'; did you mean z_um?"),
    "no transform": (
        lambda p: _table(p, "slide,transform", "", "1 0 3", ""),
        "1 0 3 is no transform",
    ),
    "unknown option": (
        lambda p: open_volume(write_list(p, drawn(), plains=[])),
        "there is no option 'plains'",
    ),
    "no JSON": (lambda p: open_volume(_with(p, "v.json", "[")), "cannot be read as JSON"),
    "flat transform": (
        lambda p: open_volume(write_list(p, drawn(), [None, np.zeros((2, 3))])),
        "can be undone",
    ),
    "twice": (
        lambda p: open_volume(write_list(p, drawn(2), planes=[{"slide": "plane_001.png"}] * 2)),
        "two planes have the name plane_001",
    ),
    "name": (
        lambda p: open_volume(
            write_list(p, drawn(2), planes=[{"slide": "plane_001.png", "name": "a/b"}] * 2)
        ),
        "not a plain word",
    ),
    "section outside": (lambda p: _with_section(p, 3), "section S lies in plane 3, outside the volume"),
}


def _without(folder, name, listed=False):
    path = write_list(folder, drawn())
    (folder / name).unlink()
    return open_volume(path if listed else folder, mpp=MPP, spacing_um=SPACING_UM)


def _table(folder, columns, *cells):
    write_folder(folder, drawn())
    rows = "".join(f"plane_{i:03}.png,{cell}\n" for i, cell in enumerate(cells, 1))
    return open_volume(_with(folder, "v.csv", f"{columns}\n{rows}"), mpp=MPP, spacing_um=SPACING_UM)


def _renamed(folder):
    (write_folder(folder, drawn()) / "plane_002.png").rename(folder / "other.png")
    return open_volume(folder, mpp=MPP, spacing_um=SPACING_UM)


def _damaged_zarr(folder):
    (write_zarr(folder / "v.zarr", drawn()) / ".zattrs").write_text("{}")
    return open_volume(folder / "v.zarr")


def _with(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def _with_section(folder, plane):
    write_stack(folder / "v.ome.tif", drawn())
    text = json.dumps({"stack": "v.ome.tif", "sections": [{"name": "S", "plane": plane}]})
    return open_volume(_with(folder, "v.json", text))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_volume_is_refused_in_one_line(tmp_path, case):
    open_it, why = REFUSED[case]
    with pytest.raises(SealExtractError) as caught:
        open_it(tmp_path)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_section_in_a_stack(tmp_path):
    volume = _with_section(tmp_path, 1)
    assert volume.sections["S"][0] == 1
    assert repr(volume).startswith(
        "Volume(v.json: 3 planes of 96 x 64 px, 0.5 µm/px, 16 µm apart, 32 µm deep"
    )
