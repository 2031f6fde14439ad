"""The grid: geometry in µm/px, inside the slide, row by row; other tools' coordinates."""

import h5py
import numpy as np
import pytest
from conftest import DrawnSlide
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_helpers import all_tissue

from seal_extract.errors import GeometryError, ResolutionError, UsageError
from seal_extract.patches.grid import PatchGrid, make_grid, nominal_mpp, read_grid
from seal_extract.tissue.mask import TissueMask


class Blank(DrawnSlide):
    """A slide of any size without pixels."""

    def __init__(self, width, height, mpp=0.25, downsamples=(1.0,), bounds=None):
        self._size = (width, height)
        super().__init__(np.empty((0, 0, 3), np.uint8), mpp, downsamples)
        self.bounds_l0 = bounds or (0, 0, width, height)

    @property
    def size_l0(self):
        return self._size


def grid_of(slide, *args, **kwargs):
    return make_grid(slide, all_tissue(slide, 32.0), *args, **kwargs)


# --- geometry ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slide_mpp", "patch_px", "mpp", "size_l0"),
    [
        (0.25, 224, 0.5, 448),
        (0.2485, 256, 0.5, 512),  # inside the tolerance: the nominal size
        (0.2622, 256, 0.5, 512),
        (0.2271, 224, 0.5, 493),  # outside: the exact one
        (0.35, 224, 0.5, 320),  # "20x" by bucket, but really between
        (0.499, 224, 0.5, 224),
        (0.25, 512, 1.0, 2048),
        (0.125, 224, 0.5, 896),
    ],
)
def test_patch_size_in_level0_pixels(slide_mpp, patch_px, mpp, size_l0):
    grid = grid_of(Blank(9000, 9000, slide_mpp), patch_px, mpp)
    assert grid.patch_size_l0 == size_l0
    assert grid.nominal_mpp_l0 == pytest.approx(nominal_mpp(slide_mpp), rel=3e-3)


def test_no_tolerance_cuts_exactly():
    assert grid_of(Blank(9000, 9000, 0.2485), 256, 0.5, mpp_tolerance=0).patch_size_l0 == 515


@pytest.mark.parametrize(
    ("downsamples", "mpp", "level", "read_px"),
    [
        ((1.0, 4.0, 16.0), 0.5, 0, 448),
        ((1.0, 2.0005, 4.0001), 0.5, 1, 224),
        ((1.0, 2.0, 3.9995), 1.0, 2, 224),
        ((1.0, 4.0, 16.0), 2.0, 1, 448),
        ((1.0, 4.0, 16.0), 4.0, 2, 224),
    ],
)
def test_level_read_is_the_coarsest_that_is_fine_enough(downsamples, mpp, level, read_px):
    grid = grid_of(Blank(20_000, 20_000, 0.25, downsamples), 224, mpp)
    assert (grid.level, grid.read_px) == (level, read_px)


slides = st.builds(Blank, st.integers(300, 6000), st.integers(300, 6000), st.floats(0.1, 1.0))


@settings(max_examples=150, deadline=None)
@given(slides, st.integers(16, 256), st.sampled_from([1.0, 2.0, 4.0]), st.floats(0, 0.9), st.floats(0, 1))
def test_patches_lie_inside_row_by_row_at_equal_steps(slide, patch_px, mpp, overlap, min_tissue):
    try:
        grid = grid_of(slide, patch_px, mpp, overlap_px=int(patch_px * overlap), min_tissue=min_tissue)
    except GeometryError as exc:
        assert "smaller --patch-px" in str(exc)
        return
    size, (w, h) = grid.patch_size_l0, slide.size_l0
    xy = grid.xy_l0
    assert (xy >= 0).all()
    assert (xy + size <= (w, h)).all()
    assert (np.lexsort((xy[:, 0], xy[:, 1])) == np.arange(len(xy))).all()
    assert len(np.unique(xy, axis=0)) == len(xy)
    for axis in (0, 1):
        steps = np.diff(np.unique(xy[:, axis]))
        assert len(set(steps.tolist())) <= 1
    step = size * (patch_px - int(patch_px * overlap)) / patch_px
    assert np.diff(np.unique(xy[:, 0])) == pytest.approx(step, abs=0.5) or len(np.unique(xy[:, 0])) == 1
    assert xy[-1, 0] + size + max(1, round(step)) > w  # no room for another
    assert size == pytest.approx(patch_px * mpp / slide.mpp, rel=0.053, abs=0.51)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_only_patches_with_enough_tissue_stay(seed, min_tissue):
    slide = Blank(2048, 1536, 0.5)
    mask = TissueMask(np.random.default_rng(seed).random((48, 64)) < 0.5, 16.0, 32.0, slide.size_l0)
    grid = make_grid(slide, mask, 128, 0.5, min_tissue=min_tissue)
    kept = {tuple(xy) for xy in grid.xy_l0.tolist()}
    for x in range(0, 2048, 128):
        for y in range(0, 1536, 128):
            share = mask.mask[y // 32 : y // 32 + 4, x // 32 : x // 32 + 4].mean()
            assert ((x, y) in kept) == (share >= min_tissue and share > 0)


def test_no_tissue_gives_an_empty_grid():
    slide = Blank(2048, 2048)
    mask = TissueMask(np.zeros((64, 64), bool), 8.0, 32.0, slide.size_l0)
    assert make_grid(slide, mask).xy_l0.shape == (0, 2)


def test_grid_begins_at_the_scanned_bounds():
    grid = grid_of(Blank(10_000, 10_000, bounds=(3000, 2000, 1000, 900)))
    assert grid.xy_l0.tolist() == [[3000, 2000], [3448, 2000], [3000, 2448], [3448, 2448]]


def test_a_grid_introduces_itself():
    grid = grid_of(Blank(2000, 2000))
    assert (
        repr(grid) == "PatchGrid(16 patches of 224 px at 0.5 µm/px = 448 level-0 px, read 448 px of level 0)"
    )


# --- refusals ---------------------------------------------------------------------------------


def test_target_finer_than_the_slide_is_refused_unless_allowed():
    slide = Blank(4000, 4000, 0.687)
    with pytest.raises(
        ResolutionError, match=r"0.5 µm/px asked, but the slide has only 0.687.*--allow-upsampling"
    ):
        grid_of(slide)
    assert grid_of(slide, allow_upsampling=True).patch_size_l0 == 163


def test_patch_larger_than_the_slide_is_refused():
    with pytest.raises(GeometryError, match=r"a patch is 448 level-0 px wide and the slide only 300 x 250"):
        grid_of(Blank(300, 250))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_px": 0}, "--patch-px is 0; allowed: 1 or more"),
        ({"mpp": 0.0}, "--mpp is 0 µm/px; allowed: 0.05 to 20"),
        ({"mpp": float("nan")}, "--mpp is nan"),
        ({"overlap_px": 224}, "--overlap-px is 224; allowed: 0 to 223"),
        ({"overlap_px": -1}, "--overlap-px is -1"),
        ({"min_tissue": 1.5}, "--min-tissue is 1.5; allowed: 0 to 1"),
        ({"mpp_tolerance": 0.5}, "--mpp-tolerance is 0.5; allowed: 0 to 0.2"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(kwargs, message):
    with pytest.raises(UsageError, match=message):
        grid_of(Blank(4000, 4000), **kwargs)


def test_a_grid_checks_itself():
    with pytest.raises(GeometryError, match=r"float64 \[3\]; allowed: int64 \[N, 2\]"):
        PatchGrid(np.zeros(3), 224, 0.5, 448, 0, 0, 448)


# --- other tools' coordinates -----------------------------------------------------------------


def coords_file(path, coords, attrs=(), root=()):
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=coords).attrs.update(dict(attrs))
        file.attrs.update(dict(root))
    return path


XY = np.array([[0, 0], [512, 0], [512, 1024]])


SIZES = {"patch_size": 256, "patch_size_level0": 512}
TRIDENT = SIZES | {"overlap": 0, "level0_width": 4000, "level0_height": 3000}
CLAM = {"patch_level": 1, "patch_size": 256}  # in pixels of that level
ATLAS_ROWS = np.column_stack([XY, np.full((3, 2), 512), np.zeros(3)])


@pytest.mark.parametrize(
    ("origin", "rows", "attrs", "root", "size_l0", "mpp", "level"),
    [
        ("TRIDENT", XY, TRIDENT, {}, 512, 0.5, 0),
        ("CLAM", XY, CLAM, {}, 1024, 1.0, 1),
        ("AtlasPatch", ATLAS_ROWS, {}, SIZES, 512, 0.5, 0),
    ],
)
def test_coordinates_of_other_tools(tmp_path, origin, rows, attrs, root, size_l0, mpp, level):
    slide = Blank(4000, 3000, 0.2485, (1.0, 4.0))
    grid = read_grid(coords_file(tmp_path / "a.h5", rows.astype(np.int32), attrs, root), slide)
    assert (grid.patch_px, grid.patch_size_l0, grid.mpp, grid.origin) == (256, size_l0, mpp, origin)
    assert (grid.level, grid.read_px) == (level, 256 * 2 ** (level == 0))
    np.testing.assert_array_equal(grid.xy_l0, XY)


@pytest.mark.parametrize(("named", "told"), [("drawn", False), ("a__drawn", False), ("other", True)])
def test_coordinates_that_say_they_are_of_another_slide_are_told(tmp_path, named, told):
    path = coords_file(tmp_path / "a.h5", XY, SIZES | {"name": named})
    if told:
        with pytest.warns(UserWarning, match=r"a\.h5: says that it is of other, not of drawn\.svs"):
            read_grid(path, Blank(4000, 3000, 0.25))
    else:
        read_grid(path, Blank(4000, 3000, 0.25))


@pytest.mark.parametrize(
    ("coords", "attrs", "message"),
    [
        (XY, {}, "carry neither patch_size_level0"),
        (XY * 1.5, SIZES, r"coords are float64 \[3, 2\].*STAMP"),
        (XY[:, :1], SIZES, r"coords are int64 \[3, 1\]"),
        (
            XY + 3000,
            SIZES,
            r"3 of 3 patches begin outside drawn.svs \(4000 x 3000 px\), the first at \(3000, 3000\)",
        ),
        (XY - 1, SIZES, "2 of 3 patches begin outside"),
        (XY, SIZES | {"level0_width": 9}, "made for a slide of 9 x 3000 px, but drawn.svs is 4000 x 3000"),
        (XY, {"patch_size": 0.5, "patch_size_level0": 512}, "patch_size is .*0.5.*; allowed: a whole number"),
        (XY, {"patch_level": 3, "patch_size": 256}, "patch_level is 3, but drawn.svs has levels 0 to 0"),
    ],
)
def test_coordinates_that_do_not_fit_are_refused(tmp_path, coords, attrs, message):
    with pytest.raises(GeometryError, match=message):
        read_grid(coords_file(tmp_path / "a.h5", coords, attrs), Blank(4000, 3000))


def test_files_that_hold_no_coordinates_are_refused(tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("no")
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["features"] = np.zeros((2, 3))
    for path, message in [
        (tmp_path / "no.h5", "does not exist"),
        (text, "is not an HDF5 file"),
        (other, r"holds \['features'\], no dataset 'coords'"),
    ]:
        with pytest.raises(GeometryError, match=message):
            read_grid(path, Blank(4000, 3000))
