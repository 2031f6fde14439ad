"""One slide as one HTML file: what is in it, what it refuses, and in a real browser from the disk."""

import base64
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
from cohort_fixtures import run_here as run
from PIL import Image
from viewer_fixtures import Page

from seal_extract import ExtractOptions, extract, read_features
from seal_extract.errors import OutputError, UsageError
from seal_extract.features.origin import open_origin
from seal_extract.genes.gene_lists import Signature
from seal_extract.genes.predict import moments, predict_genes, signature_scores
from seal_extract.patches.grid import PatchGrid
from seal_extract.view import report
from seal_extract.view.heatmap import PatchRaster, colour, limits
from seal_extract.view.layers import Layer
from seal_extract.view.report import is_report, report_path, write_slide_report

pytest.importorskip("xstatic.pkg.leaflet")

EPITHELIUM = Signature("Epithelium <b>", {"EPCAM": 1.0, "KRT8": 1.0})


@pytest.fixture(scope="module")
def features(viewer_out):
    """Of slide_0, which has an outline, and attention in two classes."""
    return read_features(next(viewer_out.rglob("features_seal-tiny/slide_0.h5")))


def write(features, path, decoder, **options):
    with contextlib.closing(open_origin(features)) as slide:
        return write_slide_report(features, path, slide=slide, decoder=decoder, **options)


@pytest.fixture(scope="module")
def written(features, decoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "deep" / "slide.html"
    return write(features, path, decoder, signatures=[EPITHELIUM])


@pytest.fixture(scope="module")
def html(written):
    return written.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(html):
    return data_of(html)


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def numbers(packed):
    return np.frombuffer(base64.b64decode(packed["base64"]), f"<{packed['type']}")


class Tags(HTMLParser):
    """All tags with their attributes, and the text of scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts[-1] += text


# --- what is in it ------------------------------------------------------------------------------------


def test_nothing_in_the_page_points_elsewhere(html):
    for tag, attributes in Tags(html).tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    assert not re.search(r"@import|url\((?!#)", re.search(r"<style>(.*?)</style>", html, re.S)[1])
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|sourceMappingURL|^import\b", html, re.M)


def test_the_policy_allows_the_scripts_that_are_there_and_nothing_else(html):
    tags = Tags(html)
    (policy,) = [a["content"] for t, a in tags.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    kinds = [a.get("type") for t, a in tags.tags if t == "script"]
    assert kinds == ["application/json", None, "module"]
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in tags.scripts[1:]
    }
    assert set(rules.pop("script-src").split()) == hashes
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not [name for _, attributes in tags.tags for name in attributes if name.startswith("on")]


def test_nothing_tells_of_the_machine_that_made_it(html, features, written):
    places = {features.path.parent, written.parent, Path.home(), Path.cwd(), Path(__file__).parents[2]}
    places |= {Path(features.provenance["slide"]["path"]).parent}
    places |= {Path(w["source"]) for w in features.provenance["encoder"]["weights"]}
    assert [str(p) for p in places if str(p) in html] == []
    assert not re.search(
        rf"\b{re.escape(platform.node())}\b", html.split("<style>")[0] + html.split("</style>")[1]
    )
    assert not re.search(r"/(home|root|work|tmp|Users)/", html)


def test_the_foot_says_what_made_it(html):
    foot = re.sub(r"<[^>]+>", "", re.search(r"<footer.*?</footer>", html, re.S)[0])
    for part in ("seal-tiny", "sha256 7f1c52e503e8", "µm/px", "CC-BY-4.0", "seal-extract "):
        assert part in foot
    assert re.search(r"Page \d{4}-\d\d-\d\d", foot)


def test_it_says_that_genes_are_predicted_and_what_seal_tiny_is_for(data):
    notes = " ".join(data["slide"]["notes"])
    assert "predicted" in notes
    assert "Nothing was measured" in notes
    assert "seal-tiny is for trying" in notes


def test_names_are_text_and_not_markup(html, data):
    assert data["kinds"]["signatures"][0]["legend"]["title"] == "Epithelium <b>"
    assert "Epithelium <b>" not in html


def test_the_genes_are_those_that_vary_most(data, features, decoder):
    _, deviation = moments([features], decoder)
    expected = [decoder.genes[i] for i in np.argsort(-deviation, kind="stable")[:24]]
    assert [layer["legend"]["title"] for layer in data["kinds"]["genes"]] == expected
    assert data["genes"]["are"] == "The 24 of 500 genes whose prediction varies most over this slide."


def test_values_are_those_predicted(data, features, decoder):
    for layer in data["kinds"]["genes"][:3]:
        gene = layer["legend"]["title"]
        expected = predict_genes(features, decoder, decoder.columns([gene]))[:, 0]
        np.testing.assert_allclose(numbers(layer["values"]), expected, rtol=2**-10, atol=2**-14)
        assert layer["mean"] == pytest.approx(expected.mean(), rel=1e-5)
        assert layer["sd"] == pytest.approx(expected.std(), rel=1e-4)
        assert (layer["legend"]["low"], layer["legend"]["high"]) == pytest.approx(limits(expected), rel=1e-4)
    (scores,) = signature_scores([features], decoder, EPITHELIUM)
    np.testing.assert_allclose(
        numbers(data["kinds"]["signatures"][0]["values"]), scores, rtol=2**-10, atol=2**-14
    )


def test_attention_of_each_class_is_in_multiples_of_the_mean(data, features):
    titles = [layer["legend"]["title"] for layer in data["kinds"]["attention"]]
    assert titles == ["abmil, class 1", "abmil, class 2"]
    values = numbers(data["kinds"]["attention"][0]["values"]).astype(float)
    n = len(features.grid)
    np.testing.assert_allclose(values, np.linspace(1, 2, n) / 1.5, rtol=2**-9)


def test_a_picture_has_the_viridis_colours_of_the_values_at_the_patches(data, features, decoder):
    layer = data["kinds"]["genes"][0]
    picture = Image.open(io.BytesIO(base64.b64decode(layer["picture"])))
    assert picture.mode == "P"
    rgba, raster = np.asarray(picture.convert("RGBA")).astype(int), PatchRaster.of(features.grid)
    assert rgba.shape[:2] == raster.shape
    assert (rgba[..., 3] > 0).sum() == len(features.grid)
    column, row = raster.boxes[:, :2].T
    expected = predict_genes(features, decoder, decoder.columns([layer["legend"]["title"]]))[:, 0]
    exact = colour(expected, *limits(expected)).astype(int)
    assert np.abs(rgba[row, column, :3] - exact).max() <= 4  # a step of 255 instead of 256


def test_places_outline_and_picture_are_those_of_the_slide(data, features):
    xy = np.frombuffer(base64.b64decode(data["xy"]), "<i4").reshape(-1, 2)
    np.testing.assert_array_equal(xy, features.grid.xy_l0)
    assert data["slide"]["tissue"]
    corners = np.concatenate([np.array(ring) for ring in data["slide"]["tissue"]])
    assert (corners >= 0).all()
    assert (corners <= features.provenance["slide"]["size_l0"]).all()
    picture = Image.open(io.BytesIO(base64.b64decode(data["picture"])))
    assert picture.format == "JPEG"
    assert picture.size == tuple(features.provenance["slide"]["size_l0"])  # it has less than 3000 px


def test_the_picture_is_as_large_as_asked_for(features, tmp_path):
    data = data_of(write(features, tmp_path / "a.html", None, max_px=500).read_text(encoding="utf-8"))
    assert max(Image.open(io.BytesIO(base64.b64decode(data["picture"]))).size) == 500


def test_float16_holds_what_it_can_and_float32_the_rest():
    for values, kind in (([0, 1.5, -2047], "f2"), ([0, 70_000], "f4"), ([], "f2")):
        packed = report.pack_numbers(np.array(values, np.float32))
        assert packed["type"] == kind
        np.testing.assert_array_equal(numbers(packed), values)


def test_patches_that_lie_on_no_common_grid_are_all_in_the_picture():
    xy = np.array([[0, 0], [224, 3], [460, 229]])
    raster = PatchRaster.of(PatchGrid(xy, 224, 0.5, 224, 0, 0, 224))
    png = Layer(np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9]], np.uint8), {}).png(raster)
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    assert [int((rgba[..., channel] == 9).sum()) for channel in range(3)] == [64, 64, 64]


# --- encoders without genes ----------------------------------------------------------------------------


def test_without_a_decoder_the_page_says_so_and_has_no_genes(features, tmp_path):
    data = data_of(write(features, tmp_path / "a.html", None).read_text(encoding="utf-8"))
    assert set(data["kinds"]) == {"embedding", "clusters", "attention"}
    assert data["genes"]["why"] == "this page was made without an expression decoder of seal-tiny."


def test_without_names_the_page_says_so_and_has_no_genes(features, decoder, tmp_path):
    html = write(features, tmp_path / "a.html", replace(decoder, genes=None)).read_text(encoding="utf-8")
    assert "genes" not in data_of(html)["kinds"]
    assert data_of(html)["genes"]["why"] == "the 500 columns that seal-tiny predicts have no names."
    assert "Nothing was measured" not in html


def test_no_genes_but_a_signature(features, decoder, tmp_path):
    path = write(features, tmp_path / "a.html", decoder, genes=[], signatures=[EPITHELIUM])
    kinds = data_of(path.read_text(encoding="utf-8"))["kinds"]
    assert "genes" not in kinds
    assert len(kinds["signatures"]) == 1


def test_two_signatures_of_one_name_are_both_there(features, decoder, tmp_path):
    other = Signature(EPITHELIUM.name, {"CD74": 1.0})
    path = write(features, tmp_path / "a.html", decoder, genes=[], signatures=[EPITHELIUM, other])
    shown = data_of(path.read_text(encoding="utf-8"))["kinds"]["signatures"]
    for layer, signature in zip(shown, (EPITHELIUM, other), strict=True):
        (scores,) = signature_scores([features], decoder, signature)
        np.testing.assert_allclose(numbers(layer["values"]), scores, rtol=2**-10, atol=2**-14)


def test_overlapping_patches_are_told(html):
    assert "Patches overlap: a colour fills the middle of its patch" in html


def test_attention_over_other_patches_is_left_out_and_that_is_said(features, tmp_path):
    copy = tmp_path / "run" / "features_seal-tiny" / "slide_0.h5"
    wrong = tmp_path / "run" / "slide_features_abmil" / "slide_0.h5"
    for path in (copy, wrong):
        path.parent.mkdir(parents=True)
    shutil.copy(features.path, copy)
    with h5py.File(wrong, "w") as file:
        file["attention"] = np.ones((1, 3), np.float32)
    html = write(read_features(copy), tmp_path / "a.html", None).read_text(encoding="utf-8")
    assert "The attention of abmil is left out: it is over other patches." in html
    assert "attention" not in data_of(html)["kinds"]
    assert "There is no tissue outline" in html
    assert str(tmp_path) not in html


def test_patches_that_could_not_be_read_are_told(features, tmp_path):
    broken = replace(features, provenance=features.provenance | {"unreadable": [{"row": 2}]})
    html = write(broken, tmp_path / "a.html", None).read_text(encoding="utf-8")
    assert data_of(html)["slide"]["unread"] == [2]
    assert "1 patch could not be read" in html


def test_a_slide_without_patches_is_shown_as_it_is(features, decoder, tmp_path):
    empty = replace(features, grid=replace(features.grid, xy_l0=np.empty((0, 2), np.int64)))
    html = write(empty, tmp_path / "a.html", decoder).read_text(encoding="utf-8")
    assert data_of(html)["kinds"] == {}
    assert "No patch was cut of this slide" in html


# --- what it refuses ----------------------------------------------------------------------------------


def test_more_genes_than_a_page_has_room_for(features, decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_VALUES", 5 * len(features.grid))
    with pytest.raises(UsageError, match=r"^4 genes .* allowed: 3 for this slide; type fewer --genes$"):
        write(features, tmp_path / "a.html", decoder, genes=decoder.genes[:4])  # attention takes two
    assert not list(tmp_path.iterdir())
    data = data_of(write(features, tmp_path / "a.html", decoder).read_text(encoding="utf-8"))
    assert len(data["kinds"]["genes"]) == 3
    with pytest.raises(UsageError, match=r"4 signatures and 2 attentions .* allowed: 5 in all"):
        write(features, tmp_path / "b.html", decoder, signatures=[EPITHELIUM] * 4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"genes": ["EPCAN"]}, "EPCAN is not among the genes of seal-tiny; the nearest are"),
        ({"signatures": [Signature("x", {"NOT1": 1.0})]}, "none of the 1 genes of x"),
        ({"max_px": 100}, "the picture's longest side is 100 px; allowed: --max-px 256 to 8000"),
    ],
)
def test_what_cannot_be_meant(features, decoder, tmp_path, options, line):
    with pytest.raises(UsageError, match=re.escape(line)):
        write(features, tmp_path / "a.html", decoder, **options)
    assert not list(tmp_path.iterdir())


def test_genes_without_a_decoder(features, tmp_path):
    with pytest.raises(UsageError, match="without an expression decoder of seal-tiny; leave out --genes"):
        write(features, tmp_path / "a.html", None, genes=["EPCAM"])


def test_another_encoders_decoder(features, decoder, tmp_path):
    other = replace(decoder, weights=replace(decoder.weights, sha256="0" * 64))
    with pytest.raises(UsageError, match=r"the decoder has weights 0{12} and slide_0\.h5 was made by"):
        write(features, tmp_path / "a.html", other)


def test_another_slide(features, tmp_path):
    slide = features.provenance["slide"] | {"size_l0": [10, 10]}
    other = replace(features, provenance=features.provenance | {"slide": slide})
    with (
        contextlib.closing(open_origin(features)) as opened,
        pytest.raises(UsageError, match=r"the slide has 1400 x 1100 px and slide_0.h5 was made of 10 x 10"),
    ):
        write_slide_report(other, tmp_path / "a.html", slide=opened, decoder=None)


def test_a_report_is_replaced_and_what_is_none_is_not(features, tmp_path):
    path = tmp_path / "a.html"
    path.write_text("<title>my notes</title>")
    with pytest.raises(OutputError, match="is no report of seal-extract; type --overwrite"):
        write(features, path, None)
    assert path.read_text() == "<title>my notes</title>"
    write(features, path, None, overwrite=True)
    assert is_report(path)
    write(features, path, None, max_px=300)
    assert os.listdir(tmp_path) == ["a.html"]


# --- the command --------------------------------------------------------------------------------------


def test_the_command_writes_a_file_for_each_slide(viewer_out, tmp_path):
    done = run(
        "report", viewer_out, "-o", tmp_path, "--genes", "EPCAM, CD74", "--signature", "EPCAM,KRT8,NOSUCH"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "seal-extract: EPCAM,KRT8,NOSUCH: 2 of 3 genes are in the panel; missing: NOSUCH\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"slide_{i}.html" for i in range(3)]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"slide_{i}" for i in range(3)]
    kinds = data_of((tmp_path / "slide_1.html").read_text(encoding="utf-8"))["kinds"]
    assert [layer["legend"]["title"] for layer in kinds["genes"]] == ["EPCAM", "CD74"]
    assert [layer["legend"]["title"] for layer in kinds["signatures"]] == ["EPCAM,KRT8,NOSUCH"]


def test_it_lies_beside_the_features_by_default(features):
    expected = features.path.parent.parent / "reports_seal-tiny" / "slide_0.html"
    assert report_path(features) == expected


def test_a_slide_that_fails_does_not_stop_the_others(viewer_out, tmp_path):
    (tmp_path / "slide_1.html").write_text("mine")
    done = run("report", viewer_out, "-o", tmp_path, "--no-genes")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2
    assert "slide_1: " in done.stderr
    assert "1 of 3 slides failed" in done.stderr
    assert (tmp_path / "slide_1.html").read_text() == "mine"
    assert run("report", viewer_out, "-o", tmp_path, "--no-genes", "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--genes", "EPCAN"), "EPCAN is not among"),
        (("--max-px", "10"), "allowed: --max-px 256 to 8000"),
        (("--no-genes", "--signature", "EPCAM"), "--no-genes leaves out the decoder"),
    ],
)
def test_what_no_slide_can_have_is_told_once(viewer_out, tmp_path, options, line):
    done = run("report", viewer_out, "-o", tmp_path / "new", *options)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr
    assert not (tmp_path / "new").exists()


def test_an_encoder_without_a_decoder_has_pages_without_genes(drawn_slides, encoder, tmp_path):
    options = ExtractOptions(overlap_px=112, workers=1)
    found = extract(drawn_slides[0], encoder, tmp_path / "out", options=options)
    done = run("report", found.path)
    assert done.returncode == 0, done.stderr
    assert "has no expression decoder" in done.stderr
    data = data_of(report_path(found).read_text(encoding="utf-8"))
    assert set(data["kinds"]) == {"embedding", "clusters"}
    assert run("report", found.path, "--genes", "EPCAM").returncode == 1


def test_two_slides_of_one_name_are_not_written_to_one_file(features, viewer_out, tmp_path):
    copy = tmp_path / "other" / "slide_0.h5"
    copy.parent.mkdir()
    shutil.copy(features.path, copy)
    done = run("report", features.path, copy, "-o", tmp_path / "new")
    assert done.returncode == 2
    assert "would both become slide_0.html" in done.stderr


# --- in a browser -------------------------------------------------------------------------------------


@pytest.fixture
def page(chromium, written):
    """The page from the disk; at the end its console must be empty."""
    page = Page(chromium)
    show(page, written)
    yield page
    assert page.console() == []


def show(page, path):
    page.driver.get("about:blank")
    page.driver.get(path.as_uri())
    page.until("const i = document.querySelector('img.slide-picture'); return i && i.naturalWidth > 0")


def centre_pixel(page):
    """What a pixel of the overlay is, drawn on a canvas by the page itself."""
    return page.look(
        "(() => { const i = document.querySelector('img.pixels'), c = document.createElement('canvas');"
        "c.width = i.naturalWidth; c.height = i.naturalHeight; const p = c.getContext('2d');"
        "p.drawImage(i, 0, 0); return [...p.getImageData(0, 0, c.width, c.height).data].length / 4; })()"
    )


def test_the_slide_is_there_with_its_facts_and_a_scale(page):
    assert page.text("#name") == "slide_0"
    assert "1,400 × 1,100 px" in page.text("#facts")
    assert re.search(r"\d+ µm", page.text("#scale"))
    assert page.look("document.querySelectorAll('.leaflet-overlay-pane canvas').length") == 1
    assert (
        page.look("performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:'))") == []
    )


def test_overlays_are_switched_and_faded(page, features):
    for key, title in (("e", "Embedding"), ("c", "5 clusters"), ("a", "abmil, class 1")):
        page.keys(key)
        assert page.painted() == "pixelated"
        assert page.text("#legend-title") == title
    rows, columns = PatchRaster.of(features.grid).shape
    assert centre_pixel(page) == rows * columns
    assert "in multiples of the slide's mean" in page.text("#legend-unit")
    assert page.look("document.querySelectorAll('#legend .ends span').length") == 2
    page.keys(",", ",")
    assert page.look("document.querySelector('img.pixels').style.opacity") == "0.45"
    page.keys("t", "g", "s")
    assert page.look("document.querySelectorAll('.leaflet-grid-pane canvas').length") > 0
    assert page.look("getComputedStyle(document.querySelector('.slide-picture')).filter") == "grayscale(1)"
    page.keys("n")
    assert page.look("document.querySelector('img.pixels')") is None
    assert page.look("document.getElementById('legend').hidden")


def test_colours_lie_over_the_slide_and_not_under_it(page):
    page.keys("e")
    page.painted()
    order = page.look(
        "['.slide-picture', 'img.pixels'].map(s => +getComputedStyle("
        "document.querySelector(s).closest('.leaflet-pane:not(.leaflet-map-pane)')).zIndex)"
    )
    assert order[0] < order[1]


def test_a_list_chooses_among_clusters_signatures_and_genes(page):
    from selenium.webdriver.support.ui import Select

    for kind, title in (("clusters", "8 clusters"), ("signatures", "Epithelium <b>"), ("genes", None)):
        page.look(f"document.querySelector('input[value={kind}]').click()")
        choice = Select(page.driver.find_element("id", kind))
        title = title or choice.options[3].text
        choice.select_by_visible_text(title)
        assert page.text("#legend-title") == title
    assert page.look("document.getElementById('gene').value") == title


def test_a_patch_that_is_clicked_tells_place_value_and_genes(page, data, features):
    page.look("document.querySelector('input[value=genes]').click()")
    x, y = (features.grid.xy_l0[0] + features.grid.patch_size_l0 / 2).tolist()
    left, top, width, height = page.look(
        "(() => { const m = document.getElementById('map').getBoundingClientRect(), s = "
        "document.querySelector('.slide-picture').getBoundingClientRect();"
        "return [(s.left - m.left) / m.width, (s.top - m.top) / m.height, s.width / m.width,"
        "s.height / m.height]; })()"
    )
    size = features.provenance["slide"]["size_l0"]
    page.click_map(left + width * x / size[0], top + height * y / size[1])
    page.until("return document.querySelector('#patch b') !== null")
    said = page.text("#patch")
    row = int(said.split("\n")[0].removeprefix("Patch ").replace(",", "")) - 1
    distance = np.abs(features.grid.xy_l0 + features.grid.patch_size_l0 / 2 - (x, y)).max(1)
    assert row == int(distance.argmin())
    assert "x {:,}, y {:,} px".format(*features.grid.xy_l0[row].tolist()) in said
    layer = data["kinds"]["genes"][0]
    value = float(numbers(layer["values"])[row])
    assert f"{layer['legend']['title']}: {value:.2f}" in said
    assert f"here {value:.2f}" in page.text("#legend .here")
    above = {
        g["legend"]["title"]: (float(numbers(g["values"])[row]) - g["mean"]) / g["sd"]
        for g in data["kinds"]["genes"]
    }
    expected = sorted(above, key=above.get, reverse=True)[:8]
    shown = page.look("[...document.querySelectorAll('#patch td button')].map(b => b.innerText)")
    assert shown == expected
    page.click("#patch td button")
    assert page.text("#legend-title") == expected[0]


def test_every_value_is_unpacked_as_it_was(page, data):
    """A patch's number on the page is the number in the file, over all patches of one gene."""
    page.look("document.querySelector('input[value=genes]').click()")
    page.keys("p")
    row = int(page.text("#patch b").removeprefix("Patch ")) - 1
    for index in (0, 5, 23):
        page.look(
            f"(() => {{ const g = document.getElementById('genes'); g.selectedIndex = {index};"
            "g.dispatchEvent(new Event('change')); })()"
        )
        value = float(numbers(data["kinds"]["genes"][index]["values"])[row])
        assert page.text("#patch .value b") == f"{value:.2f}".replace("-", "−")


def test_a_gene_is_typed_with_suggestions(page, data):
    from selenium.webdriver.common.keys import Keys

    names = [layer["legend"]["title"] for layer in data["kinds"]["genes"]]
    page.keys("/", names[3].lower()[:3])
    page.until("return document.querySelectorAll('#gene-list li').length > 0")
    shown = page.look("[...document.querySelectorAll('#gene-list li')].map(e => e.innerText)")
    assert all(names[3][:3].upper() in name.upper() for name in shown)
    page.keys(*[Keys.ARROW_DOWN] * (shown.index(names[3]) + 1), Keys.ENTER)
    assert page.text("#legend-title") == names[3]
    assert page.text("#legend-unit") == "predicted log1p expression"
    page.look("document.getElementById('gene').select()")
    page.keys("NOSUCH", Keys.ENTER)
    assert page.text("#colour-error") == "NOSUCH is not among the 24 genes in this page."
    assert page.text("#legend-title") == names[3]


def test_all_of_it_is_reached_by_keyboard(page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.look("document.activeElement.blur()")
    seen = []
    for _ in range(30):
        page.keys(Keys.TAB)
        seen.append(page.look("document.activeElement.closest('.skip, #map, #zoom, #tools')?.id"))
    assert list(dict.fromkeys(part for part in seen if part)) == ["map", "zoom", "tools"]
    page.look("document.activeElement.blur()")
    page.keys("c", "p")
    first = page.text("#patch b")
    assert "cluster" in page.text("#patch .value")
    for arrow in (Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ARROW_DOWN):
        ActionChains(page.driver).key_down(Keys.ALT).send_keys(arrow).key_up(Keys.ALT).perform()
        if page.text("#patch b") != first:
            break
    assert page.text("#patch b") != first
    before = page.text("#scale-mag")
    page.keys("+")
    page.until(f"return document.getElementById('scale-mag').innerText !== {before!r}")
    page.keys("f", "?")
    assert page.look("document.getElementById('help').open")
    page.keys(Keys.ESCAPE)
    assert not page.look("document.getElementById('help').open")


def test_every_control_has_a_name(page):
    unnamed = page.look(
        "[...document.querySelectorAll('button, input, select')].filter(e => "
        "!(e.innerText.trim() || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_a_narrow_window_has_all_of_it(page):
    page.driver.set_window_size(600, 900)
    try:
        assert page.look("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.look("document.getElementById('map').clientHeight") > 200
    finally:
        page.driver.set_window_size(1300, 900)


@pytest.mark.parametrize("case", ["no decoder", "no patches"])
def test_a_page_with_less_in_it_works_too(chromium, features, decoder, tmp_path, case):
    if case == "no patches":
        features = replace(features, grid=replace(features.grid, xy_l0=np.empty((0, 2), np.int64)))
    path = write(features, tmp_path / "näme #1.html", None if case == "no decoder" else decoder)
    page = Page(chromium)
    show(page, path)
    page.keys("e", "c", "/", "p", "g", "t", "a")
    kinds = page.look(
        "[...document.querySelectorAll('input[name=kind]')]"
        ".filter(r => !r.parentElement.hidden).map(r => r.value)"
    )
    assert kinds == (["none", "embedding", "clusters", "attention"] if case == "no decoder" else ["none"])
    if case == "no decoder":
        assert page.text("#genes-why").startswith("No genes: ")
        assert "x " in page.text("#patch")
    assert page.console() == []


# --- how large ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_slide_stays_small_enough_to_mail(tmp_path, drawn_slides, features, decoder, chromium):
    """50,000 patches of noise, the worst to compress, with 50 genes:  pytest -m slow -s -k small_enough."""
    import torch
    from test_viewer_size import DIM, PATCHES, timed, write_large_run

    from seal_extract.encoders.heads import ExpressionDecoder
    from seal_extract.encoders.spec import Decoder

    out = write_large_run(tmp_path, drawn_slides[0], features.path)
    large = read_features(next(out.rglob("large.h5")))
    torch.manual_seed(0)
    layers = ExpressionDecoder(DIM, Decoder(512, decoder.n_genes)).to_empty(device="cpu")
    for layer in (layers.hidden, layers.genes):
        layer.reset_parameters()
    wide = replace(decoder, dim=DIM, _layers=layers.requires_grad_(False))
    took, path = timed(lambda: write(large, tmp_path / "large.html", wide, genes=wide.genes[:50]))
    size = path.stat().st_size
    data = data_of(path.read_text(encoding="utf-8"))
    picture = len(data["picture"])
    genes = sum(len(g["picture"]) + len(g["values"]["base64"]) for g in data["kinds"]["genes"])
    page = Page(chromium)
    opened, _ = timed(lambda: show(page, path))
    switched, _ = timed(lambda: (page.keys("/"), page.painted()))
    page.look("document.activeElement.blur()")
    chosen, _ = timed(lambda: (page.keys("p"), page.until("return document.querySelector('#patch b')")))
    print(
        f"\n{PATCHES:,} patches, 50 genes: {size / 1e6:.1f} MB (slide {picture / 1e6:.1f}, genes "
        f"{genes / 1e6:.1f}), written in {took / 1000:.1f} s, opened in {opened / 1000:.1f} s, first gene "
        f"after {switched:.0f} ms, first patch after {chosen:.0f} ms"
    )
    assert size < 15e6
    assert page.console() == []


def test_damaged_slides_are_named_and_the_others_have_their_page(drawn_slides, tiny, tmp_path):
    paths = [extract(slide, tiny, tmp_path / "run").path for slide in drawn_slides]
    with h5py.File(paths[0], "a") as file:
        file["features"][0, 0] = np.nan
    paths[1].write_bytes(paths[1].read_bytes()[:5000])
    done = run("report", tmp_path / "run", "--no-genes", "-o", tmp_path / "pages")
    assert done.returncode == 1
    assert f"{paths[0]} holds NaN or infinity" in done.stderr
    assert f"{paths[1]} cannot be read" in done.stderr
    assert "2 of 3 slides failed" in done.stderr
    assert [page.name for page in (tmp_path / "pages").iterdir()] == [f"{paths[2].stem}.html"]
