"""The page of a slide in a real browser, by pointer and by keyboard: in the viewer, and as a report."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from viewer_fixtures import Page, data_of, gallery_of, numbers, serving, write_report

from seal_extract.view.layers import PatchRaster

pytest.importorskip("uvicorn")
pytest.importorskip("selenium")

from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select


@contextmanager
def opened(chromium, url):
    """A page; at the end its console must be empty."""
    page = Page(chromium)
    page.open(url)
    yield page
    assert page.console() == []


@pytest.fixture
def viewer(chromium, client):
    """The viewer with its first slide."""
    with opened(chromium, client.url) as page:
        yield page


@pytest.fixture
def report(chromium, slide_report):
    """The report of the same slide."""
    with opened(chromium, slide_report.as_uri()) as page:
        yield page


@pytest.fixture(params=["viewer", "report"])
def page(request):
    """Either."""
    return request.getfixturevalue(request.param)


# --- in both --------------------------------------------------------------------------------------


def test_the_slide_lies_whole_on_the_stage_with_facts_notes_and_a_scale(page):
    assert page.text("#name") == "slide_0"
    assert "1,400 × 1,100 px" in page.text("#facts")
    assert re.search(r"\d+ µm", page.text("#scale"))
    assert "Patches overlap" in page.text("#notes")
    assert page.look("document.querySelectorAll('.leaflet-overlay-pane canvas').length") == 1


def test_layers_are_switched_and_faded(page, slide_report, slide_0):
    page.keys("e")
    assert page.painted() == "pixelated"
    page.until_text("#legend-title", "Embedding")
    order = page.look(
        "['.slide-tile, .slide-picture', 'img.pixels'].map(s => +getComputedStyle("
        "document.querySelector(s).closest('.leaflet-pane:not(.leaflet-map-pane)')).zIndex)"
    )
    assert order[0] < order[1]  # colours lie over the slide
    page.keys("c")
    page.until_text("#legend-title", "5 clusters")
    assert page.look("document.querySelectorAll('#legend li').length") == 5
    page.keys(",", ",")
    assert page.look("document.querySelector('img.pixels').style.opacity") == "0.45"
    page.keys("a")
    page.until_text("#legend-title", "abmil, class 1")
    assert "in multiples of the slide's mean" in page.text("#legend-unit")
    page.until("return document.querySelectorAll('img.pixels').length === 1")
    page.painted()
    size = "['naturalHeight', 'naturalWidth'].map(side => document.querySelector('img.pixels')[side])"
    assert tuple(page.look(size)) == PatchRaster.of(slide_0.grid).shape
    page.keys("t", "g", "s")
    checked = page.look("['tissue', 'grid', 'grey'].map(id => document.getElementById(id).checked)")
    assert checked == [False, True, True]
    assert page.look("document.querySelectorAll('.leaflet-grid-pane canvas').length") > 0
    ground = "getComputedStyle(document.querySelector('.slide-tile, .slide-picture')).filter"
    assert page.look(ground) == "grayscale(1)"
    page.keys("n")
    assert page.look("document.querySelector('img.pixels')") is None
    assert page.look("document.getElementById('legend').hidden")
    page.keys("t", "g", "s")


def test_a_list_chooses_among_clusters(page):
    page.keys("c")
    Select(page.driver.find_element("id", "clusters")).select_by_visible_text("8 clusters")
    page.until_text("#legend-title", "8 clusters")


def test_a_gene_of_a_patch_leads_to_its_map(page):
    page.keys("p")
    page.until("return document.querySelectorAll('#patch tbody tr').length === 8")
    gene = page.text("#patch td button")
    page.click("#patch td button")
    page.until_text("#legend-title", gene)
    assert page.text("#legend-unit") == "predicted log1p expression"
    page.until_text("#legend .here", "here")
    value = page.text("#legend .here").removeprefix("here ")
    assert page.text("#value").startswith(f"{gene}: {value}")


def test_the_view_is_saved_as_a_picture_with_its_legend(page, tmp_path):
    page.keys("e")
    page.painted()
    page.until_text("#legend-title", "Embedding")
    assert page.legend_hides_nothing()
    path = page.saved(tmp_path / "saved", lambda: page.keys("i"))
    assert path.name == "slide_0_Embedding.png"
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    map_px = page.look("document.getElementById('map').clientHeight") * 2
    assert pixels.shape[0] > map_px  # the legend has room of its own below
    assert len(np.unique(pixels[:map_px:8, ::8].reshape(-1, 3), axis=0)) > 100  # tissue and colours
    below = pixels[map_px + 4 :]
    assert (below == 255).all(-1).mean() > 0.5
    assert (below < 60).all(-1).any()  # text and scale bar


def test_all_of_it_is_reached_by_keyboard_in_order(page):
    page.look("document.activeElement.blur()")
    seen = []
    for _ in range(30):
        page.keys(Keys.TAB)
        seen.append(page.look("document.activeElement.closest('#list, #map, #zoom, #tools')?.id"))
    order = [part for part in dict.fromkeys(seen) if part]
    assert order[-3:] == ["map", "zoom", "tools"]
    assert order[:-3] == (["list"] if page.look("document.getElementById('list')") else [])
    page.look("document.activeElement.blur()")
    page.keys("p")
    page.until("return document.querySelector('#patch b') !== null")
    first, beside = page.text("#patch b"), set()
    for arrow in (Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ARROW_DOWN):
        ActionChains(page.driver).key_down(Keys.ALT).send_keys(arrow).key_up(Keys.ALT).perform()
        beside.add(page.text("#patch b"))
    assert beside - {first}
    before = page.text("#scale-mag")
    page.keys("+")
    page.until(f"return document.getElementById('scale-mag').innerText !== {before!r}")
    page.keys("f", "?")
    assert page.look("document.getElementById('help').open")
    page.keys(Keys.ESCAPE)
    assert not page.look("document.getElementById('help').open")


def test_every_control_has_a_name_and_a_narrow_window_has_all_of_it(page):
    unnamed = page.look(
        "[...document.querySelectorAll('button, input, select')].filter(e => !e.hidden && "
        "!(e.innerText.trim() || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert [tag for tag in unnamed if "value=" not in tag] == []
    page.driver.set_window_size(600, 900)
    try:
        assert page.look("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.look("document.getElementById('map').clientHeight") > 200
    finally:
        page.driver.set_window_size(1300, 900)


# --- in the viewer --------------------------------------------------------------------------------


def test_the_list_shows_every_slide_and_a_failed_one_says_why(viewer):
    assert viewer.look("document.querySelectorAll('#slides button').length") == 4
    assert viewer.look("document.querySelector('#slides button').getAttribute('aria-current')") == "true"
    viewer.click("#slides li:last-child button")
    assert "broken.svs" in viewer.text("#problem")
    viewer.keys("[")
    viewer.until_text("#name", "slide_2")
    assert viewer.look("document.getElementById('problem').hidden")


def test_zooming_brings_finer_tiles_and_a_shorter_scale(viewer):
    before = viewer.text("#scale-mag")
    for _ in range(3):
        viewer.click("#zoom-in")
        viewer.until(f"return document.getElementById('scale-mag').innerText !== {before!r}")
        before = viewer.text("#scale-mag")
    tiles = "[...document.querySelectorAll('.slide-tile')]"
    viewer.until(f"return {tiles}.some(tile => tile.src.includes('/tiles/0/'))")
    viewer.click("#zoom-fit")


def test_a_patch_that_is_clicked_shows_its_genes_and_neighbours(viewer):
    viewer.click_map(0.5, 0.5)
    viewer.until("return document.querySelectorAll('#patch tbody tr').length === 8")
    viewer.until("return document.querySelectorAll('#patch .alike').length === 2")
    pictures = "[...document.querySelectorAll('#patch .chosen img')]"
    viewer.until(f"return {pictures}.every(i => i.naturalWidth === 160)")
    viewer.click("#patch div:last-child > .alike button")
    viewer.until("return document.getElementById('name').innerText !== 'slide_0'")
    viewer.until("return document.querySelector('#patch .chosen') !== null")


def test_genes_are_typed_with_suggestions_and_an_unknown_one_shows_the_nearest(viewer):
    viewer.until("return document.getElementById('gene').placeholder.includes('500')")
    viewer.keys("/", "epc")
    viewer.until("return document.querySelectorAll('#gene-list li').length === 1")
    viewer.keys(Keys.ARROW_DOWN, Keys.ENTER)
    viewer.until_text("#legend-title", "EPCAM")
    assert viewer.painted() == "pixelated"
    assert viewer.look("document.querySelectorAll('#legend .ends span').length") == 2
    viewer.keys(Keys.END, ", cd74", Keys.ENTER)
    viewer.until_text("#legend-unit", "mean of 2 genes")
    viewer.look("document.activeElement.blur()")
    viewer.keys("/", "EPCAN", Keys.ENTER)
    viewer.until_text("#colour-error", "EPCAN is not among the genes")
    viewer.click("#colour-error button")
    viewer.until_text("#legend-title", "EPCAM")


def test_regions_are_drawn_by_clicks_and_by_keys(viewer):
    viewer.click("#draw")
    for x, y in ((0.2, 0.2), (0.55, 0.2), (0.55, 0.8), (0.2, 0.8)):
        viewer.click_map(x, y)
    viewer.keys(Keys.ENTER)
    viewer.until("return document.querySelectorAll('#region tbody tr').length === 20")
    assert "mm²" in viewer.text("#region")
    viewer.click("#clear")
    assert viewer.text("#region") == ""
    viewer.look("document.getElementById('map').focus()")
    viewer.keys("f", "d", " ")
    for arrow in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN):
        viewer.keys(arrow)
        viewer.driver.execute_async_script("setTimeout(arguments[0], 400)")  # the map glides there
        viewer.keys(" ")
    viewer.keys(Keys.ENTER)
    viewer.until("return document.getElementById('hint').hidden")
    viewer.until("return document.getElementById('region').innerText.includes('m²')")


def test_regions_are_kept_with_a_class_and_saved_for_qupath(viewer, tmp_path, slide_0):
    from seal_extract.genes.predict import patches_inside
    from seal_extract.tissue.geojson import read_polygons

    for name in ("Tumor", "Immune cells"):
        viewer.keys("r")
        viewer.until("return !document.getElementById('keep').hidden")
        field = viewer.driver.find_element("id", "region-class")
        field.clear()
        field.send_keys(name)
        viewer.click("#keep button")
        viewer.keys("+")
    kept = viewer.look("[...document.querySelectorAll('#kept li')].map(e => e.innerText)")
    assert kept == ["1. Tumor\n×", "2. Immune cells\n×"]
    path = viewer.saved(tmp_path / "saved", lambda: viewer.click("#save-regions"))
    assert path.name == "slide_0_regions.geojson"
    classes = [f["properties"]["classification"]["name"] for f in json.loads(path.read_text())["features"]]
    assert classes == ["Tumor", "Immune cells"]
    inside = patches_inside(slide_0.grid, read_polygons(path)[0])
    assert 0 < inside.sum() < len(slide_0.grid)
    viewer.click("#kept li:first-child button:last-child")
    viewer.keys("]")
    viewer.until_text("#name", "slide_1")
    assert viewer.look("document.querySelectorAll('#kept li').length") == 0
    viewer.keys("[")
    viewer.until_text("#kept", "1. Immune cells")
    viewer.click("#kept button:last-child")


def test_signatures_are_chosen_by_name_and_genes_without_names_say_so(chromium, viewer_out):
    from seal_extract.genes.gene_lists import Signature

    immune = Signature("IMMUNE", {"CD74": 1.0, "HLA-DRA": 1.0})
    gallery = gallery_of(viewer_out, signatures={immune.name: immune})
    with serving(gallery) as client, opened(chromium, client.url) as page:
        page.until("return document.querySelectorAll('#signatures option').length === 1")
        page.look("document.querySelector('input[value=signatures]').click()")
        page.until_text("#legend-title", "IMMUNE")
    gallery = gallery_of(viewer_out)
    gallery.genes._decoder = replace(gallery.genes.decoder, genes=None)
    with serving(gallery) as client, opened(chromium, client.url) as page:
        page.until("return !document.getElementById('genes-why').hidden")
        assert "--panel genes.txt" in page.text("#genes-why")
        assert page.look("document.querySelector('input[value=genes]').disabled")
        page.keys("p")
        page.until("return document.querySelectorAll('#patch .alike').length === 2")


# --- in a report ----------------------------------------------------------------------------------


def test_a_report_loads_nothing(report):
    loaded = "performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:'))"
    assert report.look(loaded) == []


def test_a_list_chooses_among_signatures_and_genes(report):
    for kind, title in (("signatures", "Epithelium <b>"), ("genes", None)):
        report.look(f"document.querySelector('input[value={kind}]').click()")
        choice = Select(report.driver.find_element("id", kind))
        title = title or choice.options[3].text
        choice.select_by_visible_text(title)
        assert report.text("#legend-title") == title
    assert report.look("document.getElementById('gene').value") == title


def test_a_patch_that_is_clicked_tells_place_value_and_genes(report, slide_report, slide_0):
    data = data_of(slide_report)
    report.look("document.querySelector('input[value=genes]').click()")
    x, y = (slide_0.grid.xy_l0[0] + slide_0.grid.patch_size_l0 / 2).tolist()
    left, top, width, height = report.look(
        "(() => { const m = document.getElementById('map').getBoundingClientRect(), s = "
        "document.querySelector('.slide-picture').getBoundingClientRect();"
        "return [(s.left - m.left) / m.width, (s.top - m.top) / m.height, s.width / m.width,"
        "s.height / m.height]; })()"
    )
    size = slide_0.provenance["slide"]["size_l0"]
    report.click_map(left + width * x / size[0], top + height * y / size[1])
    report.until("return document.querySelector('#patch b') !== null")
    text = report.text("#patch")
    row = int(text.split("\n")[0].removeprefix("Patch ").replace(",", "")) - 1
    distance = np.abs(slide_0.grid.xy_l0 + slide_0.grid.patch_size_l0 / 2 - (x, y)).max(1)
    assert row == int(distance.argmin())
    assert "x {:,}, y {:,} px".format(*slide_0.grid.xy_l0[row].tolist()) in text
    values = {g["legend"]["title"]: float(numbers(g["values"])[row]) for g in data["kinds"]["genes"]}
    titles = {g["legend"]["title"]: g for g in data["kinds"]["genes"]}
    above = {title: (values[title] - g["mean"]) / g["sd"] for title, g in titles.items()}
    expected = sorted(above, key=above.get, reverse=True)[:8]
    assert report.look("[...document.querySelectorAll('#patch td button')].map(b => b.innerText)") == expected
    for index, gene in enumerate(values):  # each is unpacked as it was
        report.look(
            f"(() => {{ const g = document.getElementById('genes'); g.selectedIndex = {index};"
            "g.dispatchEvent(new Event('change')); })()"
        )
        assert report.text("#value b") == f"{values[gene]:.2f}".replace("-", "−")


def test_a_gene_of_the_page_is_typed_with_suggestions(report, slide_report):
    names = [layer["legend"]["title"] for layer in data_of(slide_report)["kinds"]["genes"]]
    report.keys("/", names[3].lower()[:3])
    report.until("return document.querySelectorAll('#gene-list li').length > 0")
    shown = report.look("[...document.querySelectorAll('#gene-list li')].map(e => e.innerText)")
    assert all(names[3][:3].upper() in name.upper() for name in shown)
    report.keys(*[Keys.ARROW_DOWN] * (shown.index(names[3]) + 1), Keys.ENTER)
    assert report.text("#legend-title") == names[3]
    report.look("document.getElementById('gene').select()")
    report.keys("NOSUCH", Keys.ENTER)
    assert report.text("#colour-error") == "NOSUCH is not among the 24 genes in this page."
    assert report.text("#legend-title") == names[3]


@pytest.mark.parametrize("case", ["no decoder", "no patches"])
def test_a_report_with_less_in_it_works_too(chromium, slide_0, decoder, tmp_path, case):
    features = slide_0
    if case == "no patches":
        features = replace(slide_0, grid=replace(slide_0.grid, xy_l0=np.empty((0, 2), np.int64)))
    path = write_report(features, tmp_path / "näme #1.html", None if case == "no decoder" else decoder)
    with opened(chromium, path.as_uri()) as page:
        page.keys("e", "c", "/", "p", "g", "t", "a")
        shown = "[...document.querySelectorAll('input[name=kind]')].filter(r => !r.parentElement.hidden)"
        kinds = page.look(f"{shown}.map(r => r.value)")
        assert kinds == (["none", "embedding", "clusters", "attention"] if case == "no decoder" else ["none"])
        if case == "no decoder":
            assert page.text("#genes-why").startswith("No genes: ")
            assert "x " in page.text("#patch")
