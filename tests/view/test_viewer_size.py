"""How fast the viewer is on a slide of 100,000 x 100,000 px with 50,000 patches:  pytest -m slow -s."""

import copy
import struct
import time

import cv2
import numpy as np
import pytest
from gene_fixtures import random_decoder
from viewer_fixtures import Page, gallery_of, serving

from seal_extract import open_slide
from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layouts import open_layout
from seal_extract.patches.grid import PatchGrid
from seal_extract.view.gene_maps import GeneMaps

pytest.importorskip("uvicorn")

SIDE_PX, TILE_PX, DOWNSAMPLES = 100_000, 256, (1, 4, 16, 64)
PATCHES, DIM = 50_000, 512
SHORT, LONG, RATIONAL, LONG8 = 3, 4, 5, 16  # TIFF's types
SIZES = {SHORT: 2, LONG: 4, RATIONAL: 8, LONG8: 8}


def write_repeating_slide(path, tiles):
    """A pyramid whose tiles are ``tiles`` over and over: its size without its bytes."""
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        places = []
        for tile in tiles:
            places.append((file.tell(), len(tile)))
            file.write(tile)
        file.seek((file.tell() + 7) // 8 * 8)
        link = 8
        for downsample in DOWNSAMPLES:
            link = _write_level(file, SIDE_PX // downsample, downsample > 1, places, link)
    return path


def _write_level(file, side, reduced, places, link):
    across = -(-side // TILE_PX)
    order = np.random.default_rng(side).integers(0, len(places), across * across)
    offsets, counts = np.array(places)[order].T
    entries = [
        (254, LONG, [int(reduced)]), (256, LONG, [side]), (257, LONG, [side]), (258, SHORT, [8, 8, 8]),
        (259, SHORT, [7]), (262, SHORT, [6]), (277, SHORT, [3]), (282, RATIONAL, [40_000, 1]),
        (283, RATIONAL, [40_000, 1]), (284, SHORT, [1]), (296, SHORT, [3]), (322, LONG, [TILE_PX]),
        (323, LONG, [TILE_PX]), (324, LONG8, offsets), (325, LONG, counts), (530, SHORT, [2, 2]),
    ]  # fmt: skip
    rows = []
    for tag, kind, values in entries:
        code = {SHORT: "<u2", LONG: "<u4", RATIONAL: "<u4", LONG8: "<u8"}[kind]
        data = np.asarray(values).astype(code).tobytes()
        count = len(data) // SIZES[kind]
        if len(data) > 8:
            place = file.tell()
            file.write(data + bytes(-len(data) % 8))
            data = struct.pack("<Q", place)
        rows.append(struct.pack("<HHQ", tag, kind, count) + data.ljust(8, b"\0"))
    start = file.tell()
    file.write(struct.pack("<Q", len(rows)) + b"".join(rows) + bytes(8))
    end = file.tell()
    file.seek(link)
    file.write(struct.pack("<Q", start))
    file.seek((end + 7) // 8 * 8)
    return end - 8


def jpeg_tiles(slide_path):
    """Tiles of a real picture, as JPEG."""
    with open_slide(slide_path) as slide:
        rgb = slide.read_region((0, 0), 0, (1280, 1024))
    cut = (
        rgb[y : y + TILE_PX, x : x + TILE_PX, ::-1] for y in range(0, 1024, 256) for x in range(0, 1280, 256)
    )
    return [cv2.imencode(".jpg", tile)[1].tobytes() for tile in cut]


def write_large_run(folder, drawn, model):
    """The slide and its features, random but in groups, with the provenance of the features ``model``."""
    slide = write_repeating_slide(folder / "large.tiff", jpeg_tiles(drawn))
    step = 448
    across = SIDE_PX // step
    cells = np.arange(PATCHES)
    xy = np.stack([cells % across, cells // across], 1).astype(np.int64) * step
    grid = PatchGrid(xy, 224, 0.5, step, 0, 0, step)
    size, label = (SIDE_PX, SIDE_PX), SlideLabel("large", (SIDE_PX, SIDE_PX), 0.25)
    provenance = copy.deepcopy(model.provenance)
    provenance["slide"] |= {"path": str(slide), "size_l0": size, "mpp": 0.25}
    provenance["grid"] = {k: getattr(grid, k) for k in provenance["grid"]}
    provenance["encoder"] |= {"name": "large", "dim": DIM}
    layout = open_layout("trident", folder / "out", 224, 0.5, 0)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((9, DIM)).astype(np.float32)
    with layout.write_features(label, grid, "large", DIM, provenance) as writer:
        for start in range(0, PATCHES, 5000):
            group = (cells[start : start + 5000] // 977) % 9
            writer.append(centres[group] + rng.standard_normal((len(group), DIM)).astype(np.float32))
    return folder / "out"


def timed(work):
    start = time.perf_counter()
    answer = work()
    return 1000 * (time.perf_counter() - start), answer


@pytest.fixture(scope="module")
def out(tmp_path_factory, drawn_slides, slide_0):
    return write_large_run(tmp_path_factory.mktemp("large"), drawn_slides[0], slide_0)


@pytest.mark.slow
def test_a_large_slide_opens_and_moves_fast(out):
    took, gallery = timed(lambda: gallery_of(out))
    gallery.genes = GeneMaps(lambda: random_decoder(DIM, 2000))
    print(f"\n{SIDE_PX:,} x {SIDE_PX:,} px, {PATCHES:,} patches of {DIM} numbers, in milliseconds")
    print(f"looking through the folder {took:.0f}")
    with serving(gallery) as client:

        def ask(path):
            status, _, body = client.ask(path)
            assert status == 200, body
            return body

        zooms = []

        def first_view():
            ask("/")
            ask("/api/slides")
            ask("/api/slides/0/patches")
            zooms.append(client.json("/api/slides/0")[1]["zooms"])
            for column in range(4):
                for row in range(4):
                    ask(f"/api/slides/0/tiles/7/{column}/{row}")

        print(f"first view, 16 tiles one after another {timed(first_view)[0]:.0f}")
        rng = np.random.default_rng(0)
        for zoom in range(zooms[0] - 1, -1, -1):
            across = -(-SIDE_PX // (TILE_PX << zoom))
            places = rng.integers(0, across, (20, 2)).tolist()
            tiles = [f"/api/slides/0/tiles/{zoom}/{column}/{row}" for column, row in places]
            times = [timed(lambda path=path: ask(path))[0] for path in tiles]
            print(f"zoom {zoom}: a tile {np.median(times):.0f}, the slowest of 20 {max(times):.0f}")
        for what, path in (
            ("embedding as colours, with its components", "/api/slides/0/layers/embedding/picture"),
            ("5 clusters", "/api/slides/0/layers/clusters/picture?of=5"),
            ("8 clusters", "/api/slides/0/layers/clusters/picture?of=8"),
            ("neighbours of a patch", "/api/slides/0/patches/20000/alike?scope=slide"),
            ("a gene, and torch is imported", "/api/slides/0/layers/genes/picture?of=GENE1"),
            ("another gene", "/api/slides/0/layers/genes/picture?of=GENE2"),
            ("a signature of 3", "/api/slides/0/layers/genes/picture?of=GENE3,GENE4,GENE5"),
            ("the first patch with its genes", "/api/slides/0/patches/20000"),
            ("another patch", "/api/slides/0/patches/20001"),
            ("a patch's picture", "/api/slides/0/patches/20000/image"),
        ):
            took, body = timed(lambda path=path: ask(path))
            print(f"{what} {took:.0f}, {len(body):,} bytes")
        square = [[0, 0], [30_000, 0], [30_000, 30_000], [0, 30_000]]
        took, (_, answer) = timed(lambda: client.region(square))
        print(f"genes of a region of {answer['patches']:,} patches {took:.0f}")


@pytest.mark.slow
def test_a_large_slide_in_a_browser(out, viewer_out, chromium):
    tiles = "const tiles = [...document.querySelectorAll('.slide-tile')];"
    whole = f"{tiles} return tiles.length > 3 && tiles.every(tile => tile.complete)"
    for what, folder in (("100,000 x 100,000 px", out), ("1,400 x 1,100 px", viewer_out)):
        gallery = gallery_of(folder)
        with serving(gallery) as client:
            page = Page(chromium)
            chromium.get("about:blank")
            took, _ = timed(lambda p=page, c=client: (p.driver.get(c.url), p.until(whole)))
            print(f"\n{what}: all tiles of the first view after {took:.0f} ms")
            page.keys("e")
            print(f"colours after {timed(page.painted)[0]:.0f} ms")
