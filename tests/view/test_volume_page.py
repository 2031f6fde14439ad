"""A predicted volume as its page shows it: what the server answers, and in a real browser."""

import base64
import io
import json
import re
import shutil
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import zarr
from cohort_fixtures import assert_refused, run_here
from PIL import Image
from synthetic_volume import GENES, SIDE, SPACING_UM, TILES
from viewer_fixtures import Page, data_of, gallery_of, serving

from seal_extract.errors import OutputError, UsageError
from seal_extract.view import volume_report
from seal_extract.view.collection import Collection
from seal_extract.view.volume import NO_PICTURE, ShownVolume

pytest.importorskip("uvicorn")
PLANES = 6


@pytest.fixture(scope="module")
def volume_client(predicted):
    with serving(gallery_of(predicted)) as client:
        yield client


def array(out, name="0"):
    return zarr.open_array(str(next(out.glob("*.ome.zarr")) / name), mode="r")[:]


def test_the_page_is_told_lengths_in_um_planes_and_genes(volume_client):
    status, volume = volume_client.json("/api/volume")
    assert status == 200
    side_um = TILES * SIDE * 0.5
    assert volume["size_um"] == [side_um, side_um, PLANES * SPACING_UM]
    assert (volume["cells"], volume["cell_um"]) == ([TILES, TILES], [SIDE / 2, SIDE / 2])
    assert [plane["name"] for plane in volume["planes"]] == [f"P{i}" for i in range(PLANES)]
    assert [plane["problem"] for plane in volume["planes"]] == [None] * PLANES
    assert sorted(volume["genes"]) == [f"GENE{i}" for i in range(GENES)]
    assert "Nothing was measured" in " ".join(volume["notes"])


def test_a_map_has_a_code_for_each_cell_of_all_planes(volume_client, predicted):
    genes = volume_client.json("/api/volume")[1]["genes"]
    values = array(predicted)[genes.index("GENE2")]
    legend = volume_client.json("/api/volume/maps/genes/legend?of=gene2")[1]
    codes = np.frombuffer(volume_client.ask("/api/volume/maps/genes/codes?of=gene2")[2], np.uint8)
    low, high = legend["low"], legend["high"]
    assert legend["title"] == "GENE2"
    assert (low, high) == pytest.approx(tuple(np.percentile(values, (1, 99))))
    shown = low + (codes.reshape(values.shape) - 1.0) / 254 * (high - low)
    np.testing.assert_allclose(shown, values.clip(low, high), atol=(high - low) / 254)
    legend = volume_client.json("/api/volume/maps/domains/legend")[1]
    labels = array(predicted, "labels/domains/0")
    codes = np.frombuffer(volume_client.ask("/api/volume/maps/domains/codes")[2], np.uint8)
    assert np.array_equal(codes, labels.ravel())
    assert legend["counts"] == np.bincount(labels.ravel())[1:].tolist()


def test_the_picture_of_a_plane_is_its_own(volume_client, world):
    with Image.open(world[0].with_name("plane_4.png")) as plane:
        expected = np.asarray(plane)
    for size in ("picture", "slice"):
        status, headers, body = volume_client.ask(f"/api/volume/planes/4/{size}")
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        picture = np.asarray(Image.open(io.BytesIO(body)))
        assert picture.shape == expected.shape
        assert np.abs(picture.astype(int) - expected).mean() < 8  # JPEG of noise


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("planes/6/picture", "there is no plane 6; there are 6"),
        ("planes/0/huge", "the size is 'huge'; allowed: picture, slice"),
        ("maps/genes/legend?of=GENE77", "GENE77 is not among the 8 genes"),
        ("maps/other/codes", "the map is 'other'; allowed: genes, domains"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(volume_client, address, line):
    status, answer = volume_client.json(f"/api/volume/{address}")
    assert status == 400
    assert line in answer["error"]


def test_the_planes_are_also_there_as_slides(volume_client):
    assert b"volume.js" in volume_client.ask("/")[2]
    assert b"slide.js" in volume_client.ask("/slides")[2]
    volume = volume_client.json("/api/volume")[1]
    name = volume_client.json(f"/api/slides/{volume['planes'][3]['slide']}")[1]["name"]
    assert name == volume["planes"][3]["name"] == "P3"


def test_a_run_of_slides_has_no_volume(client):
    assert b"slide.js" in client.ask("/")[2]
    status, answer = client.json("/api/volume")
    assert (status, "holds no predicted volume" in answer["error"]) == (400, True)


@contextmanager
def without_pictures(world):
    """While it lasts, the planes are in another folder."""
    away = world[0].parent.rename(world[0].parent.with_name("away"))
    try:
        yield away
    finally:
        away.rename(world[0].parent)


def test_planes_that_have_moved_are_named_and_found(predicted, world):
    with without_pictures(world) as away:
        gone = ShownVolume.find(Collection.find(predicted)).describe()["planes"]
        assert "plane_0.png is not there any more; start again with --slides FOLDER" in gone[0]["problem"]
        found = ShownVolume.find(Collection.find(predicted, slides=away)).describe()["planes"]
        assert [plane["problem"] for plane in found] == [None] * PLANES


def test_large_volumes_are_thinned_and_the_page_says_so(predicted):
    volume = ShownVolume.find(Collection.find(predicted), most_planes=3, most_cells=120)
    assert volume.cells == (3, 6, 6)
    codes = volume.map("domains", "")[1]
    assert np.array_equal(codes, array(predicted, "labels/domains/0")[::2, ::2, ::2])
    described = volume.describe()
    assert [plane["name"] for plane in described["planes"]] == ["P0", "P2", "P4"]
    assert (described["spacing_um"], described["cell_um"]) == (2 * SPACING_UM, [SIDE, SIDE])
    notes = " ".join(described["notes"])
    assert "3 of 6 planes are shown, one of every 2" in notes
    assert "Of every 2 × 2 patches one is shown" in notes


def test_a_damaged_volume_is_told_in_a_line(predicted, tmp_path):
    copy = shutil.copytree(predicted, tmp_path / "copy")
    (copy / "deep-depth3.ome.zarr" / "0" / "0" / "1" / "0" / "0").write_bytes(b"damaged")
    with pytest.raises(OutputError, match=r"deep-depth3.ome.zarr is damaged \(.*predict the volume again"):
        ShownVolume.find(Collection.find(copy)).map("genes", "GENE1")
    (copy / "deep-depth3.ome.zarr" / "0" / ".zarray").unlink()
    with pytest.raises(OutputError, match="is damaged"):
        ShownVolume.find(Collection.find(copy))


def test_genes_that_vary_most_come_first(predicted):
    volume = ShownVolume.find(Collection.find(predicted))
    order = np.argsort(-array(predicted).reshape(GENES, -1).var(1))
    assert volume.most_varying(3) == [volume.genes[i] for i in order[:3]]
    with pytest.raises(UsageError, match="GENEX is not among the 8 genes"):
        volume.gene("GENEX")


# --- a page to mail --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_file(predicted, tmp_path_factory):
    """The report of the volume."""
    out = tmp_path_factory.mktemp("page")
    assert run_here("report", predicted, "-o", out).returncode == 0
    return out / "deep-depth3.html"


def test_the_page_holds_maps_and_pictures_and_loads_nothing(page_file, predicted):
    html, data = page_file.read_text(encoding="utf-8"), data_of(page_file)
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|^import\b|https?://(?!www.w3.org)", html, re.M)
    assert str(predicted) not in html
    volume = ShownVolume.find(Collection.find(predicted))
    for kind, count in (("genes", GENES), ("domains", 1)):
        assert len(data["maps"][kind]) == count
        for one in data["maps"][kind]:
            legend, codes = volume.map(kind, one["legend"]["title"])
            assert one["legend"] == legend
            assert zlib.decompress(base64.b64decode(one["codes"])) == codes.tobytes()
    pictures = [Image.open(io.BytesIO(base64.b64decode(one))) for one in data["pictures"]]
    assert [one.size for one in pictures] == [(TILES * SIDE, TILES * SIDE)] * PLANES
    assert data["volume"]["slice_px"] == [TILES * SIDE, TILES * SIDE]


def test_the_page_has_room_for_large_volumes(predicted, tmp_path, monkeypatch):
    monkeypatch.setattr(volume_report, "MOST_BYTES", 40_000)
    monkeypatch.setattr(volume_report, "MOST_CODES", 2 * 6 * 36)
    monkeypatch.setattr(volume_report, "MOST_PLANES", 3)
    found = Collection.find(predicted)
    path = volume_report.write_volume_report(found, tmp_path / "small.html", genes=["GENE1"])
    data, notes = data_of(path), " ".join(data_of(path)["volume"]["notes"])
    assert len(json.dumps([data["maps"], data["pictures"]])) < 40_000 * 4 / 3 + 2000
    assert [data["volume"]["genes"], len(data["pictures"])] == [["GENE1"], 3]
    for words in ("3 of 6 planes", "Of every 2 × 2 patches", "1 of 8 genes are in this page, chosen", "px, "):
        assert words in notes


def test_a_page_without_pictures_says_so_and_tells_nothing_of_this_machine(predicted, world, tmp_path):
    with without_pictures(world):
        done = run_here("report", predicted, "-o", tmp_path, "--no-genes")
    assert (done.returncode, "6 slides are not where the features say" in done.stderr) == (0, True)
    data = data_of(tmp_path / "deep-depth3.html")
    assert data["pictures"] == [""] * PLANES
    assert {plane["problem"] for plane in data["volume"]["planes"]} == {NO_PICTURE}
    assert data["maps"]["genes"] == []


def test_what_a_page_cannot_have_is_refused_in_a_line(predicted, tmp_path):
    assert_refused("GENEX is not among the 8 genes", "report", predicted, "--genes", "GENEX", "-o", tmp_path)
    assert_refused("for slides: give the folder", "report", predicted, "--signature", "A", "-o", tmp_path)
    (tmp_path / "deep-depth3.html").write_text("mine")
    done = run_here("report", predicted, "-o", tmp_path)
    assert (done.returncode, "is no report of seal-extract" in done.stderr) == (1, True)


# --- in a browser ----------------------------------------------------------------------------------


class VolumePage(Page):
    """What one sees of the page of a volume."""

    def open(self, url):
        self.driver.get("about:blank")
        self.console()
        self.driver.get(url)
        self.until(f"return document.body.dataset.loaded === '{PLANES}'")

    def colours(self, name):
        """The colours of a view and how many pixels have each: {(r, g, b): count}."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        picture = Image.open(io.BytesIO(self.driver.find_element("id", name).screenshot_as_png))
        counts, colours = zip(*picture.convert("RGB").getcolors(2**24), strict=True)
        return dict(zip(colours, counts, strict=True))

    def slide(self, name, value):
        """Put a slider, or choose in a list."""
        script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        send = "for (const n of ['input', 'change']) e.dispatchEvent(new Event(n, { bubbles: true }));"
        self.driver.execute_script(script + send, name, value)


@pytest.fixture(params=["viewer", "report"])
def page(request, chromium):
    """The page of the volume from the server, and from a file; at the end its console must be empty."""
    where = {"viewer": ("volume_client", "url"), "report": ("page_file", "as_uri")}[request.param]
    url = getattr(request.getfixturevalue(where[0]), where[1])
    page = VolumePage(chromium)
    page.open(url if isinstance(url, str) else url())
    yield page
    assert page.console() == []


def test_planes_and_box_are_looked_at_by_pointer_and_by_keyboard(page):
    from selenium.webdriver import ActionChains, Keys

    loaded = "performance.getEntriesByType('resource').every(one => one.name.startsWith(location.origin))"
    assert page.look(f"location.protocol === 'file:' || {loaded}")
    assert "6 µm" in page.text("#facts")
    assert page.look("[...document.querySelectorAll('#labels span')].map(one => one.textContent)") == [
        "x 192 µm", "y 192 µm", "z 96 µm"
    ]  # fmt: skip
    page.keys("d", "1")  # domains on the plane alone
    page.until_text("#legend-title", "3 domains")
    page.slide("opacity", 100)
    legend = page.look("[...document.querySelectorAll('#legend li i')].map(one => one.style.background)")
    domains = {tuple(map(int, re.findall(r"\d+", one))) for one in legend}
    first = page.colours("plane")
    assert domains <= set(first)
    page.keys("]", "]")
    assert "P2" in page.text("#z-now")
    assert page.colours("plane") != first
    page.keys("2")  # the box alone, from plane 2
    whole = page.colours("box")
    assert domains <= set(whole)
    page.slide("x-0", 0.5)
    page.slide("z-1", 3)
    assert page.text("#z-text") == "P2 to P3"
    assert page.text("#x-text") == "0.10 to 0.19 mm"
    cut = page.colours("box")
    assert sum(map(cut.get, domains)) < 0.7 * sum(map(whole.get, domains))
    box = page.driver.find_element("id", "box")
    ActionChains(page.driver).drag_and_drop_by_offset(box, 120, 60).perform()
    turned = page.colours("box")
    assert turned != cut
    page.keys("+")
    larger = page.colours("box")
    assert sum(map(larger.get, domains)) > 1.5 * sum(map(turned.get, domains))
    page.slide("times", "10")
    assert page.text("#labels span:nth-child(3)") == "z 96 µm, drawn × 10"
    page.keys("n")
    assert not domains & set(page.colours("box"))
    page.keys("r", "3")
    assert page.text("#z-text") == "P0 to P5"
    page.keys("/", "GENEX", Keys.ENTER)
    page.until_text("#colour-error", "GENEX is not among the 8 genes in this page")
    page.look("document.activeElement.blur()")
    page.keys("/", "gene3", Keys.ENTER)
    page.until_text("#legend-title", "GENE3")
    plane = page.driver.find_element("id", "plane")
    ActionChains(page.driver).move_to_element(plane).perform()
    page.until_text("#legend .here", "here")
