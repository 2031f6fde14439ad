"""One slide as one HTML file: what is in it, what it refuses, and in a real browser from the disk."""

import base64
import contextlib
import hashlib
import io
import os
import platform
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import viewer_fixtures
from cohort_fixtures import assert_refused
from cohort_fixtures import run_here as run
from gene_fixtures import random_decoder
from PIL import Image
from viewer_fixtures import Page, Tags, data_of, numbers, write_report

from seal_extract import ExtractOptions, extract, read_features
from seal_extract.encoders.registry import bundled
from seal_extract.errors import OutputError, UsageError
from seal_extract.features.store import open_origin
from seal_extract.genes.gene_lists import Signature
from seal_extract.genes.predict import moments, predict_genes, signature_scores
from seal_extract.view import report
from seal_extract.view.layers import PatchRaster, colour, limits
from seal_extract.view.report import is_report, report_path, write_slide_report

pytest.importorskip("xstatic.pkg.leaflet")

EPITHELIUM = Signature("Epithelium <b>", viewer_fixtures.EPITHELIUM)


features = pytest.fixture(lambda slide_0: slide_0, name="features")
html = pytest.fixture(lambda slide_report: slide_report.read_text(encoding="utf-8"), name="html")
data = pytest.fixture(lambda slide_report: data_of(slide_report), name="data")


def picture(base64_text):
    return Image.open(io.BytesIO(base64.b64decode(base64_text)))


def assert_scores(layer, features, decoder, signature):
    (scores,) = signature_scores([features], decoder, signature)
    np.testing.assert_allclose(numbers(layer["values"]), scores, rtol=2**-10, atol=2**-14)


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


def test_nothing_tells_of_the_machine_that_made_it(html, features, slide_report):
    places = {features.path.parent, slide_report.parent, Path.home(), Path.cwd(), Path(__file__).parents[2]}
    places |= {Path(features.provenance["slide"]["path"]).parent}
    places |= {Path(w["source"]) for w in features.provenance["encoder"]["weights"]}
    assert [str(p) for p in places if str(p) in html] == []
    assert not re.search(
        rf"\b{re.escape(platform.node())}\b", html.split("<style>")[0] + html.split("</style>")[1]
    )
    assert not re.search(r"/(home|root|work|tmp|Users)/", html)


def test_the_foot_says_what_made_it(html):
    foot = re.sub(r"<[^>]+>", "", re.search(r"<footer.*?</footer>", html, re.S)[0])
    weights = hashlib.sha256((bundled()["seal-tiny"] / "model.safetensors").read_bytes()).hexdigest()
    for part in ("seal-tiny", f"sha256 {weights[:12]}", "µm/px", "CC-BY-4.0", "seal-extract "):
        assert part in foot
    assert re.search(r"Page \d{4}-\d\d-\d\d", foot)


def test_notes_say_that_genes_are_predicted_and_what_seal_tiny_is_for(data):
    notes = " ".join(data["slide"]["notes"])
    for words in (
        "predicted",
        "Nothing was measured",
        "seal-tiny is for trying",
        "Patches overlap: a colour",
    ):
        assert words in notes


def test_names_are_text_and_not_markup(html, data, features, tmp_path):
    assert data["kinds"]["signatures"][0]["legend"]["title"] == "Epithelium <b>"
    assert "Epithelium <b>" not in html
    name = """--> '"&<img src=x onerror=alert(1)> {{ 7*7 }}\x1b"""
    copy = Path(shutil.copy(features.path, tmp_path / f"{name}.h5"))
    path = write_report(read_features(copy), tmp_path / "a.html", None)
    tags = Tags(path.read_text(encoding="utf-8")).tags
    assert [tag for tag, _ in tags if tag == "img"] == []
    assert data_of(path)["slide"]["name"] == name.replace("\x1b", "\\x1b")


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
    assert_scores(data["kinds"]["signatures"][0], features, decoder, EPITHELIUM)


def test_attention_of_each_class_is_in_multiples_of_the_mean(data, features):
    titles = [layer["legend"]["title"] for layer in data["kinds"]["attention"]]
    assert titles == ["abmil, class 1", "abmil, class 2"]
    values = numbers(data["kinds"]["attention"][0]["values"]).astype(float)
    n = len(features.grid)
    np.testing.assert_allclose(values, np.linspace(1, 2, n) / 1.5, rtol=2**-9)


def test_a_picture_has_the_viridis_colours_of_the_values_at_the_patches(data, features, decoder):
    layer = data["kinds"]["genes"][0]
    image = picture(layer["picture"])
    assert image.mode == "P"
    rgba, raster = np.asarray(image.convert("RGBA")).astype(int), PatchRaster.of(features.grid)
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
    assert picture(data["picture"]).format == "JPEG"
    assert picture(data["picture"]).size == tuple(features.provenance["slide"]["size_l0"])  # below 3000 px


def test_the_picture_is_as_large_as_asked_for(features, tmp_path):
    data = data_of(write_report(features, tmp_path / "a.html", None, max_px=500))
    assert max(picture(data["picture"]).size) == 500


def test_float16_holds_what_it_can_and_float32_the_rest():
    for values, kind in (([0, 1.5, -2047], "f2"), ([0, 70_000], "f4"), ([], "f2")):
        packed = report.pack_numbers(np.array(values, np.float32))
        assert packed["type"] == kind
        np.testing.assert_array_equal(numbers(packed), values)


# --- less in it ---------------------------------------------------------------------------------------


def test_without_a_decoder_or_names_the_page_has_no_genes_and_says_why(features, decoder, tmp_path):
    for given, why in (
        (None, "this page was made without an expression decoder of seal-tiny."),
        (replace(decoder, genes=None), "the 500 columns that seal-tiny predicts have no names."),
    ):
        data = data_of(write_report(features, tmp_path / "a.html", given))
        assert set(data["kinds"]) == {"embedding", "clusters", "attention"}
        assert data["genes"] == {"named": False, "why": why, "are": ""}
        assert "Nothing was measured" not in " ".join(data["slide"]["notes"])


def test_no_genes_but_two_signatures_of_one_name(features, decoder, tmp_path):
    signatures = EPITHELIUM, Signature(EPITHELIUM.name, {"CD74": 1.0})
    path = write_report(features, tmp_path / "a.html", decoder, genes=[], signatures=signatures)
    kinds = data_of(path)["kinds"]
    assert "genes" not in kinds
    for layer, signature in zip(kinds["signatures"], signatures, strict=True):
        assert_scores(layer, features, decoder, signature)


def test_attention_over_other_patches_is_left_out_and_that_is_said(features, tmp_path):
    copy = tmp_path / "run" / "features_seal-tiny" / "slide_0.h5"
    wrong = tmp_path / "run" / "slide_features_abmil" / "slide_0.h5"
    for path in (copy, wrong):
        path.parent.mkdir(parents=True)
    shutil.copy(features.path, copy)
    with h5py.File(wrong, "w") as file:
        file["attention"] = np.ones((1, 3), np.float32)
    path = write_report(read_features(copy), tmp_path / "a.html", None)
    notes = " ".join(data_of(path)["slide"]["notes"])
    assert "The attention of abmil is left out: it is over other patches." in notes
    assert "There is no tissue outline" in notes
    assert "attention" not in data_of(path)["kinds"]
    assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_patches_that_could_not_be_read_and_slides_without_any_are_told(features, decoder, tmp_path):
    broken = replace(features, provenance=features.provenance | {"unreadable": [{"row": 2}]})
    slide = data_of(write_report(broken, tmp_path / "a.html", None))["slide"]
    assert slide["unread"] == [2]
    assert "1 patch could not be read" in " ".join(slide["notes"])
    empty = replace(features, grid=replace(features.grid, xy_l0=np.empty((0, 2), np.int64)))
    data = data_of(write_report(empty, tmp_path / "a.html", decoder))
    assert data["kinds"] == {}
    assert "No patch was cut of this slide" in " ".join(data["slide"]["notes"])


# --- what it refuses ----------------------------------------------------------------------------------


def test_more_genes_than_a_page_has_room_for(features, decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_VALUES", 5 * len(features.grid))
    with pytest.raises(UsageError, match=r"^4 genes .* allowed: 3 for this slide; type fewer --genes$"):
        write_report(features, tmp_path / "a.html", decoder, genes=decoder.genes[:4])  # attention takes two
    assert not list(tmp_path.iterdir())
    data = data_of(write_report(features, tmp_path / "a.html", decoder))
    assert len(data["kinds"]["genes"]) == 3
    with pytest.raises(UsageError, match=r"4 signatures and 2 attentions .* allowed: 5 in all"):
        write_report(features, tmp_path / "b.html", decoder, signatures=[EPITHELIUM] * 4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"genes": ["EPCAN"]}, "EPCAN is not among the genes of seal-tiny; the nearest are"),
        ({"signatures": [Signature("x", {"NOT1": 1.0})]}, "none of the 1 genes of x"),
        ({"max_px": 100}, "the picture's longest side is 100 px; allowed: --max-px 256 to 8000"),
        ({"decoder": None, "genes": ["EPCAM"]}, "an expression decoder of seal-tiny; leave out --genes"),
        ({"decoder": "0" * 64}, f"the decoder has weights {'0' * 12} and slide_0.h5 was made by"),
        ({"size_l0": [10, 10]}, "the slide has 1400 x 1100 px and slide_0.h5 was made of 10 x 10"),
    ],
)
def test_what_cannot_be_meant_is_refused(features, decoder, tmp_path, options, line):
    made, options = features.provenance, dict(options)
    given = options.pop("decoder", decoder)
    if isinstance(given, str):
        given = replace(decoder, weights=replace(decoder.weights, sha256=given))
    size = options.pop("size_l0", made["slide"]["size_l0"])
    other = replace(features, provenance=made | {"slide": made["slide"] | {"size_l0": size}})
    with (
        contextlib.closing(open_origin(features)) as slide,
        pytest.raises(UsageError, match=re.escape(line)),
    ):
        write_slide_report(other, tmp_path / "a.html", slide=slide, decoder=given, **options)
    assert not list(tmp_path.iterdir())


def test_a_report_is_replaced_and_what_is_none_is_not(features, tmp_path):
    path = tmp_path / "a.html"
    path.write_text("<title>my notes</title>")
    with pytest.raises(OutputError, match="is no report of seal-extract; type --overwrite"):
        write_report(features, path, None)
    assert path.read_text() == "<title>my notes</title>"
    write_report(features, path, None, overwrite=True)
    assert is_report(path)
    write_report(features, path, None, max_px=300)
    assert os.listdir(tmp_path) == ["a.html"]


# --- the command --------------------------------------------------------------------------------------


def test_the_command_writes_a_file_for_each_slide(viewer_out, tmp_path):
    words = ["--genes", "EPCAM, CD74", "--signature", "EPCAM,KRT8,NOSUCH"]
    done = run("report", viewer_out, "-o", tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "seal-extract: EPCAM,KRT8,NOSUCH: 2 of 3 genes are in the panel; missing: NOSUCH\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"slide_{i}.html" for i in range(3)]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"slide_{i}" for i in range(3)]
    kinds = data_of(tmp_path / "slide_1.html")["kinds"]
    assert [layer["legend"]["title"] for layer in kinds["genes"]] == ["EPCAM", "CD74"]
    assert [layer["legend"]["title"] for layer in kinds["signatures"]] == ["EPCAM,KRT8,NOSUCH"]


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
    assert_refused(line, "report", viewer_out, "-o", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


def test_an_encoder_without_a_decoder_has_pages_without_genes(drawn_slides, encoder, tmp_path):
    options = ExtractOptions(overlap_px=112, workers=1)
    found = extract(drawn_slides[0], encoder, tmp_path / "out", options=options)
    done = run("report", found.path)
    assert done.returncode == 0, done.stderr
    assert "has no expression decoder" in done.stderr
    page = found.path.parent.parent / f"reports_{encoder.spec.name}" / f"{found.path.stem}.html"
    assert report_path(found) == page  # beside the features by default
    assert set(data_of(page)["kinds"]) == {"embedding", "clusters"}
    assert run("report", found.path, "--genes", "EPCAM").returncode == 1


def test_two_slides_of_one_name_are_not_written_to_one_file(features, viewer_out, tmp_path):
    copy = tmp_path / "other" / "slide_0.h5"
    copy.parent.mkdir()
    shutil.copy(features.path, copy)
    words = ["report", features.path, copy, "-o", tmp_path / "new"]
    assert_refused("would both become slide_0.html", *words)


# --- how large ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_slide_stays_small_enough_to_mail(tmp_path, drawn_slides, features, decoder, chromium):
    """50,000 patches of noise, the worst to compress, with 50 genes:  pytest -m slow -s -k small_enough."""
    from test_viewer_size import DIM, PATCHES, timed, write_large_run

    out = write_large_run(tmp_path, drawn_slides[0], features)
    large = read_features(next(out.rglob("large.h5")))
    wide = replace(random_decoder(DIM, 500), weights=decoder.weights)
    took, path = timed(lambda: write_report(large, tmp_path / "large.html", wide, genes=wide.genes[:50]))
    size = path.stat().st_size
    data = data_of(path)
    genes = sum(len(g["picture"]) + len(g["values"]["base64"]) for g in data["kinds"]["genes"])
    page = Page(chromium)
    opened, _ = timed(lambda: page.open(path.as_uri()))
    switched, _ = timed(lambda: (page.keys("/"), page.painted()))
    page.look("document.activeElement.blur()")
    chosen, _ = timed(lambda: (page.keys("p"), page.until("return document.querySelector('#patch b')")))
    print(
        f"\n{PATCHES:,} patches, 50 genes: {size / 1e6:.1f} MB (slide {len(data['picture']) / 1e6:.1f}, "
        f"genes {genes / 1e6:.1f}), written in {took / 1000:.1f} s, opened in {opened / 1000:.1f} s, "
        f"first gene after {switched:.0f} ms, first patch after {chosen:.0f} ms"
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
