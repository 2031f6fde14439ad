"""The viewer's page in a real browser, by pointer and by keyboard alone."""

import json

import numpy as np
import pytest
from PIL import Image
from viewer_fixtures import Page, gallery_of, serving

pytest.importorskip("uvicorn")
pytest.importorskip("selenium")

from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys


@pytest.fixture
def page(chromium, client):
    """The page with its first slide; at the end its console must be empty."""
    page = Page(chromium)
    page.open(client.url)
    yield page
    assert page.console() == []


def test_the_first_slide_lies_whole_on_the_stage(page):
    assert page.text("#name") == "slide_0"
    assert "1,400 × 1,100 px" in page.text("#facts")
    assert page.look("document.querySelectorAll('#slides button').length") == 4
    assert page.look("document.querySelector('#slides button').getAttribute('aria-current')") == "true"
    assert "µm" in page.text("#scale")


def test_zooming_brings_finer_tiles_and_a_shorter_scale(page):
    before = page.text("#scale-mag")
    for _ in range(3):
        page.click("#zoom-in")
        page.until(f"return document.getElementById('scale-mag').innerText !== {before!r}")
        before = page.text("#scale-mag")
    page.until("return [...document.querySelectorAll('.slide-tile')].some(t => t.src.includes('/tiles/0/'))")
    page.click("#zoom-fit")


def test_layers_are_switched_and_faded(page):
    page.keys("e")
    assert page.painted() == "pixelated"
    assert page.text("#legend-title") == "Embedding"
    page.keys("c")
    page.until_text("#legend-title", "5 clusters")
    assert page.look("document.querySelectorAll('#legend li').length") == 5
    page.keys(",", ",")
    assert page.look("document.querySelector('img.pixels').style.opacity") == "0.45"
    page.keys("a")
    page.until_text("#legend-title", "abmil, class 1")
    page.keys("t", "g", "s")
    assert page.look("['tissue', 'grid', 'grey'].map(id => document.getElementById(id).checked)") == [
        *(False, True, True)
    ]
    assert page.look("document.querySelectorAll('.leaflet-grid-pane canvas').length") > 0
    page.keys("n")
    assert page.look("document.querySelector('img.pixels')") is None
    page.keys("t", "g", "s")


def test_a_patch_that_is_clicked_shows_its_genes_and_neighbours(page):
    page.click_map(0.5, 0.5)
    page.until("return document.querySelectorAll('#patch tbody tr').length === 8")
    page.until("return document.querySelectorAll('#patch .alike').length === 2")
    page.until(
        "return [...document.querySelectorAll('#patch .chosen img')].every(i => i.naturalWidth === 160)"
    )
    page.click("#patch div:last-child > .alike button")
    page.until("return document.getElementById('name').innerText !== 'slide_0'")
    page.until("return document.querySelector('#patch .chosen') !== null")


def test_a_gene_of_a_patch_leads_to_its_map(page):
    page.keys("p")
    page.until("return document.querySelectorAll('#patch td button').length > 0")
    gene = page.text("#patch td button")
    page.click("#patch td button")
    page.until_text("#legend-title", gene)
    assert page.text("#legend-unit") == "predicted log1p expression"
    page.until_text("#legend .here", "here")


def test_a_gene_is_typed_with_suggestions(page):
    page.until("return document.getElementById('gene').placeholder.includes('500')")
    page.keys("/", "epc")
    page.until("return document.querySelectorAll('#gene-list li').length === 1")
    page.keys(Keys.ARROW_DOWN, Keys.ENTER)
    page.until_text("#legend-title", "EPCAM")
    assert page.painted() == "pixelated"
    assert page.look("document.querySelectorAll('#legend .ends span').length") == 2
    page.keys(", cd74", Keys.ENTER)
    page.until_text("#legend-unit", "mean of 2 genes")


def test_an_unknown_gene_shows_the_nearest_which_can_be_taken(page):
    page.keys("/", "EPCAN", Keys.ENTER)
    page.until_text("#colour-error", "EPCAN is not among the genes")
    page.click("#colour-error button")
    page.until_text("#legend-title", "EPCAM")


def test_a_region_is_drawn_by_clicks(page):
    page.click("#draw")
    for x, y in ((0.2, 0.2), (0.55, 0.2), (0.55, 0.8), (0.2, 0.8)):
        page.click_map(x, y)
    page.keys(Keys.ENTER)
    page.until("return document.querySelectorAll('#region tbody tr').length === 20")
    assert "mm²" in page.text("#region")
    page.click("#clear")
    assert page.text("#region") == ""


def test_regions_are_kept_with_a_class_and_saved_for_qupath(page, tmp_path, viewer_out):
    from seal_extract.features.store import read_features
    from seal_extract.genes.region import patches_inside
    from seal_extract.tissue.geojson import read_polygons

    for name in ("Tumor", "Immune cells"):
        page.keys("r")
        page.until("return !document.getElementById('keep').hidden")
        field = page.driver.find_element("id", "region-class")
        field.clear()
        field.send_keys(name)
        page.click("#keep button")
        page.keys("+")
    assert page.look("[...document.querySelectorAll('#kept li')].map(e => e.innerText)") == [
        *("1. Tumor\n×", "2. Immune cells\n×")
    ]
    path = page.saved(tmp_path / "saved", lambda: page.click("#save-regions"))
    assert path.name == "slide_0_regions.geojson"
    collection = json.loads(path.read_text())
    assert [f["properties"]["classification"]["name"] for f in collection["features"]] == [
        *("Tumor", "Immune cells")
    ]
    features = read_features(next(viewer_out.rglob("features_seal-tiny/slide_0.h5")))
    inside = patches_inside(features.grid, read_polygons(path)[0])
    assert 0 < inside.sum() < len(features.grid)
    page.click("#kept li:first-child button:last-child")
    page.keys("]")
    page.until_text("#name", "slide_1")
    assert page.look("document.querySelectorAll('#kept li').length") == 0
    page.keys("[")
    page.until_text("#kept", "1. Immune cells")
    page.click("#kept button:last-child")


def test_the_view_is_saved_as_a_picture_with_its_legend(page, tmp_path):
    page.keys("e")
    page.painted()
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


def test_everything_is_reached_by_keyboard_alone(page):
    page.look("document.getElementById('map').focus()")
    page.keys("+", Keys.ARROW_RIGHT)
    page.keys("p")
    page.until("return document.querySelector('#patch .chosen') !== null")
    first = page.text("#patch b")
    page.look("document.getElementById('map').focus()")
    for arrow in (Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ARROW_DOWN):
        ActionChains(page.driver).key_down(Keys.ALT).send_keys(arrow).key_up(Keys.ALT).perform()
        if page.text("#patch b") != first:
            break
    assert page.text("#patch b") != first
    page.keys("r")
    page.until("return document.getElementById('region').innerText.includes('m²')")
    page.keys("f", "d", " ")
    for arrow in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN):
        page.keys(arrow)
        page.driver.execute_async_script("setTimeout(arguments[0], 400)")  # the map glides there
        page.keys(" ")
    page.keys(Keys.ENTER)
    page.until("return document.getElementById('hint').hidden")
    page.until("return document.getElementById('region').innerText.includes('m²')")
    page.keys("?")
    assert page.look("document.getElementById('help').open")
    page.keys(Keys.ESCAPE, "]")
    page.until_text("#name", "slide_1")
    page.keys("[")
    page.until_text("#name", "slide_0")


def test_tab_goes_through_list_slide_and_tools_in_this_order(page):
    page.look("document.activeElement.blur()")
    seen = []
    for _ in range(30):
        page.keys(Keys.TAB)
        seen.append(page.look("document.activeElement.closest('#list, #map, #zoom, #tools')?.id"))
    order = [part for part in dict.fromkeys(seen) if part]
    assert order == ["list", "map", "zoom", "tools"]


def test_every_control_has_a_name(page):
    unnamed = page.look(
        "[...document.querySelectorAll('button, input, select')].filter(e => !e.hidden && "
        "!(e.innerText || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_a_failed_slide_says_why_and_the_others_stay(page):
    page.click("#slides li:last-child button")
    assert "broken.svs" in page.text("#problem")
    page.keys("[")
    page.until_text("#name", "slide_2")
    assert page.look("document.getElementById('problem').hidden")


def test_a_narrow_window_has_all_of_it(page):
    page.driver.set_window_size(600, 900)
    try:
        assert page.look("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.look("document.getElementById('map').clientHeight") > 200
    finally:
        page.driver.set_window_size(1300, 900)


def test_an_encoder_without_gene_names_disables_genes_and_names_the_option(chromium, viewer_out):
    gallery = gallery_of(viewer_out)
    gallery.genes._decoder = gallery.genes.decoder.__class__(**{**vars(gallery.genes.decoder), "genes": None})
    with serving(gallery) as client:
        page = Page(chromium)
        page.open(client.url)
        page.until("return !document.getElementById('genes-why').hidden")
        assert "--panel genes.txt" in page.text("#genes-why")
        assert page.look("document.querySelector('input[value=genes]').disabled")
        page.keys("p")
        page.until("return document.querySelectorAll('#patch .alike').length === 2")
        assert page.console() == []
