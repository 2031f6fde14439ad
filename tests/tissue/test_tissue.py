"""What counts as tissue, on drawn slides and on real ones; how much of a patch is tissue."""

import csv
import math

import cv2
import numpy as np
import pytest
from conftest import DrawnSlide, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_helpers import masks

from seal_extract.errors import GeometryError, UsageError
from seal_extract.slides.overview import Overview
from seal_extract.slides.slide import open_slide
from seal_extract.tissue.mask import MAX_WORK_PX, TissueMask, work_resolution
from seal_extract.tissue.segmentation import find_tissue, flag_pixels

MPP = 2.0  # of the drawn slides, µm/px
SIDE = 1000  # their side in px: 2 mm

HAEMATOXYLIN, EOSIN, DAB = (0.65, 0.70, 0.29), (0.09, 0.95, 0.28), (0.27, 0.57, 0.78)
CLEAR_GLASS = np.full((SIDE, SIDE, 3), (0.02, 0.02, 0.03))  # optical density


# --- drawn in optical density, float [H, W, 3] ------------------------------------------------


def noise(seed, sigma_px):
    field = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(SIDE, SIDE)), (0, 0), sigma_px)
    return field / field.std()


def washed_glass():
    """Pink glass with a glow of eosin to one side, stronger than in any of her2st."""
    x = np.linspace(-1, 1, SIDE)
    glow = np.exp(-((x[None] - 0.5) ** 2 + (x[:, None] - 0.2) ** 2) / 0.2)
    return np.array((0.04, 0.07, 0.05)) + glow[..., None] * np.array((0.01, 0.16, 0.06))


def section(seed=0, stains=(HAEMATOXYLIN, EOSIN), strength=1.0):
    """Fibres with nuclei between, everywhere."""
    fibres = np.clip(0.3 + 0.12 * noise(seed, 1.5), 0, None)
    nuclei = np.clip(noise(seed + 1, 1.8) - 1.2, 0, 0.9)
    return strength * (nuclei[..., None] * np.array(stains[0]) + fibres[..., None] * np.array(stains[1]))


def fat(seed=0, cell_um=75):
    """Walls of 2 µm around empty cells, everywhere."""
    sites = np.full((SIDE, SIDE), 255, np.uint8)
    rng = np.random.default_rng(seed)
    cells = int((SIDE * MPP / cell_um) ** 2)
    sites[rng.integers(0, SIDE, cells), rng.integers(0, SIDE, cells)] = 0
    _, label = cv2.distanceTransformWithLabels(sites, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    wall = (label != np.roll(label, 1, 0)) | (label != np.roll(label, 1, 1))
    return wall[..., None] * 0.25 * np.array(EOSIN)


def blob(radius_px=250, center=(500, 450)):
    shape = np.zeros((SIDE, SIDE), np.uint8)
    cv2.ellipse(shape, center, (radius_px, int(radius_px * 0.7)), 20, 0, 360, 1, -1)
    return shape > 0


def on_glass(piece, drawn, glass=CLEAR_GLASS):
    return glass + piece[..., None] * drawn


def stroke(width_um=400, blur_um=12, start=(60, 60), end=(60, 940)):
    line = np.zeros((SIDE, SIDE), np.float32)
    cv2.line(line, start, end, 1, int(width_um / MPP))
    return cv2.GaussianBlur(line, (0, 0), blur_um / MPP).astype(float)[..., None]


def dirt(seed=0):
    """Grey specks up to 30 µm, fibres, the edge of a cover slip, a bubble."""
    rng = np.random.default_rng(seed)
    layer = np.zeros((SIDE, SIDE), np.float32)
    for x, y, r in zip(*rng.integers(0, SIDE, (2, 60)), rng.integers(1, 8, 60), strict=True):
        cv2.circle(layer, (int(x), int(y)), int(r), float(rng.uniform(0.2, 1.0)), -1)
    cv2.line(layer, (0, 930), (SIDE, 950), 0.4, 12)
    cv2.ellipse(layer, (850, 120), (90, 60), 0, 0, 360, 0.5, 6)
    return cv2.GaussianBlur(layer, (0, 0), 0.8)[..., None]


def slide_of(od, mpp=MPP, **kwargs):
    rgb = 255 * 10.0**-od + np.random.default_rng(0).normal(0, 1.5, od.shape)
    return DrawnSlide(np.clip(np.round(rgb), 0, 255).astype(np.uint8), mpp, **kwargs)


def found(od, mpp=MPP, **kwargs):
    """The mask, enlarged to the pixels of the slide: bool [H, W]."""
    tissue = find_tissue(slide_of(od, mpp), **kwargs)
    y, x = (np.arange(side) / tissue.downsample for side in od.shape[:2])
    return tissue.mask[np.ix_(y.astype(int), x.astype(int))]


def at(tissue, xy_l0):
    """Whether points (x, y) in level-0 pixels lie in tissue: bool [N]."""
    column, row = (np.asarray(xy_l0) / tissue.downsample).astype(int).T
    return tissue.mask[row, column]


def assert_tissue(mask, truth, margin_px=20):
    """Inside, all but a margin is tissue; outside, all but a margin is not."""
    kernel = np.ones((2 * margin_px + 1,) * 2, np.uint8)
    core = cv2.erode(truth.astype(np.uint8), kernel) > 0
    beyond = cv2.dilate(truth.astype(np.uint8), kernel) == 0
    assert mask[core].mean() > 0.99
    assert mask[beyond].mean() < 0.001


# --- what is tissue ---------------------------------------------------------------------------


GLASS = pytest.mark.parametrize("glass", [CLEAR_GLASS, washed_glass()], ids=["clear", "eosin wash"])


@GLASS
@pytest.mark.parametrize("strength", [1.0, 0.3], ids=["dark", "pale"])
def test_a_section_on_glass(glass, strength):
    piece = blob()
    assert_tissue(found(on_glass(piece, section(strength=strength), glass)), piece)


COUNTERSTAIN = (0.62, 0.55, 0.25)


@pytest.mark.parametrize(
    ("drawn", "margin_px"),
    [
        (fat(cell_um=50), 40),
        (fat(cell_um=75), 40),
        (fat(cell_um=100), 40),
        (section(stains=(COUNTERSTAIN, DAB), strength=0.8), 20),
    ],
    ids=["fat of 50 µm", "of 75 µm", "of 100 µm", "an immunostain"],
)
def test_fat_and_immunostains_are_tissue(drawn, margin_px):
    piece = blob()
    assert_tissue(found(on_glass(piece, drawn)), piece, margin_px)


@pytest.mark.parametrize(
    "lamp", [(0, 0, 0), (0.12, 0.12, 0.12), (0.0, 0.03, 0.09)], ids=["white", "dim", "warm"]
)
def test_a_slide_that_is_all_tissue(lamp):
    assert found(section() + lamp).all()


def test_lumina_and_smooth_pools_within_tissue_belong_to_it():
    piece, lumen, pool = blob(), blob(40, (420, 450)), blob(110, (600, 450))
    od = section() * (piece & ~lumen & ~pool)[..., None] + pool[..., None] * 0.5 * np.array(EOSIN)
    assert_tissue(found(CLEAR_GLASS + od), piece)


def test_a_wide_cavity_is_not_tissue():
    piece, cavity = blob(350), blob(150)
    mask = found(CLEAR_GLASS + section() * (piece & ~cavity)[..., None])
    assert_tissue(mask, piece & ~cavity)


# --- what is not ------------------------------------------------------------------------------


@GLASS
def test_bare_glass_is_empty(glass):
    tissue = find_tissue(slide_of(glass))
    assert not tissue.mask.any()
    assert tissue.area_mm2 == 0
    assert tissue.polygons_l0 == ()


INKS = {
    "red": (0.05, 1.00, 0.85),
    "green": (0.90, 0.30, 0.40),
    "blue": (0.85, 0.60, 0.15),
    "black": (1.00, 0.95, 0.92),
}


@pytest.mark.parametrize("blur_um", [3, 15], ids=["sharp", "blurred"])
@pytest.mark.parametrize("ink", INKS.values(), ids=INKS.keys())
def test_pen_is_dropped_and_the_tissue_beside_it_kept(ink, blur_um):
    piece = blob()
    od = on_glass(piece, section()) + stroke(blur_um=blur_um) * np.array(ink)
    assert_tissue(found(od), piece)


@pytest.mark.parametrize("width_um", [60, 400])
@pytest.mark.parametrize("strength", [0.1, 0.15, 0.25])
def test_a_faint_blue_stroke_is_dropped_and_the_tissue_beside_it_kept(strength, width_um):
    piece = blob()
    uneven = stroke(width_um, blur_um=8) * (1 + 0.15 * noise(3, 2)[..., None])
    od = on_glass(piece, section()) + strength * uneven * np.array(INKS["blue"])
    assert_tissue(found(od), piece)


def test_pen_over_fat_is_dropped():
    over = stroke(start=(500, 0), end=(500, SIDE))
    mask = found(CLEAR_GLASS + fat() + over * np.array(INKS["red"]))
    assert mask[over[..., 0] > 0.5].mean() < 0.02
    assert mask[:, :320].mean() > 0.98


@GLASS
def test_dust_edges_and_bubbles_are_dropped(glass):
    piece = blob(200)
    assert_tissue(found(on_glass(piece, section(), glass) + dirt()), piece, margin_px=30)


def test_what_was_never_scanned_is_no_tissue():
    piece = blob()
    slide = slide_of(on_glass(piece, section()))
    slide.pixels[:, 520:] = 0
    slide.pixels[:80] = 3
    mask = find_tissue(slide).mask
    assert not mask[:, 131:].any()
    assert not mask[:20].any()
    assert mask[90:130, 90:128].all()


def test_specks_are_dropped_and_pieces_of_a_patch_kept():
    pieces = blob(60, (250, 250)) | blob(15, (750, 250))
    assert_tissue(found(on_glass(pieces, section())), blob(60, (250, 250)))


# --- resolution and memory --------------------------------------------------------------------


@pytest.mark.parametrize("mpp", [2.0, 4.0, 5.0, 8.0, 16.0, 20.0])
def test_the_mask_has_the_resolution_asked_for(mpp):
    tissue = find_tissue(slide_of(on_glass(blob(), section(), washed_glass())), mpp=mpp)
    assert (tissue.mpp, tissue.downsample) == pytest.approx((mpp, mpp / MPP))
    assert tissue.area_mm2 == pytest.approx(blob().sum() * MPP**2 / 1e6, rel=0.12)


def test_a_thumbnail_is_judged_by_colour():
    piece = blob()
    od = on_glass(piece, section())
    small = cv2.resize(od, (100, 100), interpolation=cv2.INTER_AREA)
    tissue = find_tissue(slide_of(small, mpp=20.0))
    assert tissue.mpp == 20
    assert tissue.area_mm2 == pytest.approx(piece.sum() * MPP**2 / 1e6, rel=0.15)


def test_strips_leave_no_seams():
    od = CLEAR_GLASS + blob()[..., None] * section() + dirt() + stroke() * np.array(INKS["green"])
    overview = Overview(slide_of(od).pixels, np.ones((SIDE, SIDE), bool), 4.0, 2.0)
    strips, more, whole = (flag_pixels(overview, 2, strip_px=most) for most in (50_000, 200_000, 10**9))
    assert (strips != whole).mean() < 1e-4
    assert (more != whole).mean() < 1e-4


def test_huge_slides_are_looked_at_more_coarsely():
    class Huge:
        mpp, size_l0 = 0.25, (200_000, 160_000)

    work_mpp, factor = work_resolution(Huge(), 8.0)
    pixels = math.prod(side * Huge.mpp / work_mpp for side in Huge.size_l0)
    assert pixels == pytest.approx(MAX_WORK_PX, rel=0.01)
    assert factor == 2


@pytest.mark.parametrize("mpp", [0.5, 100, math.nan])
def test_a_resolution_no_mask_can_have_is_refused(mpp):
    with pytest.raises(UsageError, match="allowed: 1 to 20"):
        find_tissue(slide_of(CLEAR_GLASS), mpp=mpp)


@pytest.mark.parametrize("size", [(16, 16), (17, 90), (64, 33)])
def test_tiny_slides_do_not_break_it(size):
    pixels = np.full((*size, 3), 240, np.uint8)
    for mpp in (0.25, 4.0, 20.0):
        assert not find_tissue(DrawnSlide(pixels, mpp)).mask.any()


# --- the record -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    masks(12),
    st.one_of(st.integers(1, 9), st.floats(1, 40)),
    st.floats(0, 0.99),
    st.floats(0.02, 1.5),
    st.data(),
)
def test_share_is_the_exact_overlap_with_each_pixel_within_the_slide(mask, downsample, cut, side, data):
    height, width = mask.shape
    size = tuple(math.ceil(length * downsample - cut * (downsample - 1)) for length in (width, height))
    tissue = TissueMask(mask, 8.0, float(downsample), size)
    size_l0 = max(1, int(side * max(size)))
    xy = np.array([[data.draw(st.integers(-30, end + 30)) for end in size] for _ in range(5)])

    def overlap(start, i, end):
        return max(0.0, min((i + 1) * downsample, start + size_l0, end) - max(i * downsample, start))

    areas = [
        sum(overlap(x, column, size[0]) * overlap(y, row, size[1]) for row, column in np.argwhere(mask))
        for x, y in xy.tolist()
    ]
    assert tissue.share(xy, size_l0) == pytest.approx(np.array(areas) / size_l0**2, abs=1e-8)


def test_a_patch_all_in_tissue_has_a_share_of_exactly_one():
    tissue = TissueMask(np.ones((400, 500), bool), 8.0, 16.0371, (8018, 6414))
    xy = np.stack(np.meshgrid(np.arange(0, 7000, 97), np.arange(0, 5000, 89)), -1).reshape(-1, 2)
    assert (tissue.share(xy, 448) == 1).all()
    assert tissue.share(np.empty((0, 2), np.int64), 448).shape == (0,)


def test_it_introduces_itself():
    mask = np.zeros((1000, 1250), bool)
    mask[:, :125] = True
    tissue = TissueMask(mask, 8.0, 16.0, (20_000, 16_000))
    assert repr(tissue) == (
        "TissueMask(1250 x 1000 px at 8 µm/px of 20000 x 16000 level-0 px, 8 mm² = 10.0% tissue)"
    )


@pytest.mark.parametrize(
    ("mask", "mpp", "downsample", "complaint"),
    [
        (np.zeros((4, 4), np.uint8), 8.0, 16.0, "allowed: bool"),
        (np.zeros((4, 4, 1), bool), 8.0, 16.0, "allowed: bool"),
        (np.zeros((0, 4), bool), 8.0, 16.0, "allowed: bool"),
        (np.zeros((4, 4), bool), 0.0, 16.0, "above 0"),
        (np.zeros((4, 4), bool), 8.0, math.nan, "above 0"),
        (np.zeros((4, 8), bool), 8.0, 16.0, "make 4.0 x 4.0"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, mpp, downsample, complaint):
    with pytest.raises(GeometryError, match=complaint):
        TissueMask(mask, mpp, downsample, (64, 64))


# --- real slides ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["C2", "C3", "C4", "C5"])
def test_her2st_spots_lie_in_tissue_and_the_glass_does_not(name):
    with shared("data", "her2st", "spots", f"{name}_selection.tsv").open() as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["selected"] == "1"]
    spots = np.array([(float(row["pixel_x"]), float(row["pixel_y"])) for row in rows])
    with open_slide(shared("data", "her2st", "images", f"{name}.jpg"), mpp=0.687) as slide:
        tissue = find_tissue(slide)

    column, row = (spots / tissue.downsample).astype(int).T
    elsewhere = np.ones(tissue.mask.shape, np.uint8)
    elsewhere[row, column] = 0
    far = cv2.distanceTransform(elsewhere, cv2.DIST_L2, 5) * tissue.mpp > 400
    assert at(tissue, spots).mean() >= 0.95
    assert tissue.mask[far].mean() <= 0.01


GLASS_OR_PEN = ["almost-white-1", "no-tissue", "no-tissue2", "no-tissue-red-pen"]
WHOLE = [f"{score}-nuclei-score-level0" for score in ("high", "medium", "low")]  # "low" is fat


@pytest.mark.parametrize(
    ("name", "least", "most"), [*((n, 0, 0) for n in GLASS_OR_PEN), *((n, 0.95, 1) for n in WHOLE)]
)
def test_real_glass_and_pen_are_empty_and_crops_without_glass_are_tissue(name, least, most):
    with open_slide(shared("data", "he", f"{name}.png"), mpp=0.5) as slide:
        assert least <= find_tissue(slide).mask.mean() <= most


def test_real_pen_over_fat_and_tissue():
    """By its nuclei the crop has about 3 µm/px."""
    with open_slide(shared("data", "he", "tcga-red-pen.png"), mpp=3.0) as slide:
        tissue, rgb = find_tissue(slide), slide.read_region((0, 0), 0, slide.size_l0)
    red, green, blue = cv2.split(rgb.astype(int))
    y, x = np.nonzero((red > 150) & (green < 60) & (blue < 60))
    assert at(tissue, np.stack([x, y], 1)).mean() < 0.03
    assert tissue.mask[:, 80:].mean() > 0.95
    assert at(tissue, np.array([[31, 115], [115, 58]])).all()  # fat beside the ink


def test_a_real_thumbnail_with_three_pens():
    with open_slide(shared("data", "he", "diagnostic-slide-thumb-rgb.png"), mpp=20.0) as slide:
        tissue, rgb = find_tissue(slide), slide.read_region((0, 0), 0, slide.size_l0)
    red, green, blue = cv2.split(cv2.GaussianBlur(rgb, (0, 0), 2).astype(int))
    inks = {
        "green": (green > red + 40) & (green < 200),
        "red": (red > 190) & (green < 100) & (blue < 120),
        "black": (red < 90) & (green < 70),
    }
    for ink in inks.values():
        y, x = np.nonzero(ink)
        assert at(tissue, np.stack([x, y], 1)).mean() < 0.05
    within = np.array([[157, 192], [327, 251], [233, 408], [379, 152], [402, 362], [251, 58]])
    assert at(tissue, within).all()
    assert not tissue.mask[:15].any()
    assert not tissue.mask[-20:].any()


def test_a_real_slide_with_ragged_borders():
    with open_slide(shared("data", "wsi", "CMU-1-Small-Region.svs")) as slide:
        tissue = find_tissue(slide)
    within = np.array([[1061, 778], [1132, 1651], [1510, 2595], [1651, 2359], [472, 1050]])
    assert at(tissue, within).all()
    assert not at(tissue, np.array([[236, 472], [300, 2000], [2076, 2123], [2000, 300]])).any()
    assert tissue.area_mm2 == pytest.approx(0.72, rel=0.1)
