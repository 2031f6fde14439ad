"""The page on a cohort says what happened, shows what to look at, and loads nothing from anywhere."""

import base64
import os
import random
import re
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from viewer_fixtures import Page, Tags

from seal_extract.errors import OutputError
from seal_extract.names import shown
from seal_extract.run.status_table import StatusRow
from seal_extract.slides import drawing
from seal_extract.slides.drawing import THUMBNAIL_BYTES, exif_of, make_thumbnail, read_thumbnail
from seal_extract.view import cohort_report
from seal_extract.view.cohort_report import MOST_PICTURES, write_report
from seal_extract.view.outliers import Cohort, duration, find_outliers, group_reasons

HOSTILE = [
    '<script>document.title="x"</script>',
    "\"quoted\" 'names' & <b>bold</b>",
    "組織切片 ünï \u202egpj.svs",
    "--> {{verdict}} </table>",
    "n" * 240,
]


def homogeneous(count, seed=5):
    """Slides that differ as those of one scanner and one organ do."""
    rng = random.Random(seed)
    rows = []
    for k in range(count):
        area = 120 * 2 ** rng.gauss(0, 0.5)
        patches = round(area * 78 * rng.uniform(0.93, 1.05))
        seconds = patches / 250 * rng.uniform(0.8, 1.2) + 2
        path = f"/data/cohort/s{k}.svs"
        read = (patches, area, 0.25, "openslide.mpp-x", "openslide 4 (JPEG)")
        done = StatusRow(path, f"s{k}", "done", "", *read)
        rows.append(replace(done, seconds=seconds, patches_per_s=patches / seconds, read_errors=0))
    return rows


def failing(name, reason, folder="/data/my slides"):
    path = f"{folder}/{name}.svs"
    return StatusRow(path, name, "failed", seconds=0.1, reason=reason.format(path=path))


def overlay(out, name, size=(900, 700), low=200, **options):
    """A picture of noise from ``low`` to 200."""
    path = out / "overlays" / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(3).integers(low, 201, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=95, **options)
    return path


def page(tmp_path, rows, **kwargs):
    return Tags(write_report(rows, tmp_path, tmp_path / "report.html", **kwargs).read_text(encoding="utf-8"))


# --- the page -----------------------------------------------------------------------------------------


def test_enlarged_patches_are_told(tmp_path):
    rows = [replace(row, mpp=0.5, grid="20x_224px_0px_overlap") for row in homogeneous(40)]
    assert "Enlarged" not in page(tmp_path, rows).text
    rows[3] = replace(rows[3], mpp=0.687)
    assert "Enlarged 1.4 times: the slide has 0.687 µm/px, asked are 0.5" in page(tmp_path, rows).text


def test_the_verdict_is_a_sentence(tmp_path):
    rows = homogeneous(40)
    assert "All 40 slides done; none looks unusual." in page(tmp_path, rows).text
    rows[3] = replace(rows[3], read_errors=2)
    rows.append(failing("bad", "{path} is empty (0 bytes); copy it again"))
    text = page(tmp_path, rows, title="Lung, 2024", seconds=7300).text
    assert "Lung, 2024" in text
    assert "40 of 41 slides done, 1 failed; 1 done slide looks unusual." in text
    assert "2.03 h" in text
    assert "2 patches in 1 slide" in text


def test_nothing_is_loaded_from_outside(tmp_path):
    rows = [*homogeneous(9), failing("bad", "{path}: see https://example.org/help")]
    overlay(tmp_path, "s3")
    parsed = page(tmp_path, rows)
    sources = [attrs[key] for _, attrs in parsed.tags for key in ("src", "srcset", "data") if attrs.get(key)]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/jpeg;base64,")
    assert [attrs["href"] for attrs in parsed.all("link")] == ["data:,"]
    assert {a["href"] for a in parsed.all("a") if not a["href"].startswith("#")} == {"overlays/s3.jpg"}
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"@import|url\(", text)
    policy = next(a["content"] for a in parsed.all("meta") if "content-security-policy" in str(a).lower())
    assert policy.startswith("default-src 'none'")


def test_hostile_names_are_shown_as_text(tmp_path):
    rows = homogeneous(10)
    for name in HOSTILE:
        words = dict.fromkeys(("name", "case_id", "reader", "mpp_source"), name)
        rows.append(replace(rows[0], slide=f"/x/{name}", **words))
        rows.append(failing(name, f"{{path}}: {name.replace('{', '{{').replace('}', '}}')}"))
        rows.append(StatusRow(f"/x/{name}", "", "ignored", reason=name))
    overlay(tmp_path, HOSTILE[2])
    parsed = page(tmp_path, rows, title=HOSTILE[0])
    assert len(parsed.all("script")) == 1
    assert not parsed.all("b") or all(not attrs for attrs in parsed.all("b"))
    for name in HOSTILE:
        assert " ".join(shown(name).split()) in parsed.text
        assert any(attrs.get("title") == shown(name) for _, attrs in parsed.tags)
    assert any(a["href"].startswith("overlays/%E7%B5%84") for a in parsed.all("a"))


def test_names_that_are_no_text_do_not_stop_it(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    overlay(tmp_path, name)
    parsed = page(tmp_path, [replace(row, name=name) for row in homogeneous(1)])
    assert r"caf\xe9" in parsed.text
    assert {"href": "overlays/caf%E9.jpg", "class": "pic"} in parsed.all("a")


def test_no_rows_make_a_page_that_says_so(tmp_path):
    assert "No slides: there is nothing to report yet." in page(tmp_path, []).text
    ignored = StatusRow("/data/notes.txt", "", "ignored", reason=".txt is no slide")
    parsed = page(tmp_path, [ignored])
    assert "No slides, 1 ignored file." in parsed.text
    assert "notes.txt" in parsed.text


def test_slides_without_figures_and_without_overlays(tmp_path):
    parsed = page(tmp_path, [StatusRow("/data/a.svs", "a", "done"), failing("b", "")])
    assert not parsed.all("img")
    assert "no overlay" in parsed.text
    assert "no reason was recorded" in parsed.text
    assert "1 of 2 slides done, 1 failed." in parsed.text


def test_each_picture_has_words_and_is_there_once(tmp_path):
    rows = homogeneous(10)
    rows[3] = replace(rows[3], read_errors=1)
    overlay(tmp_path, "s3")
    parsed = page(tmp_path, rows)
    (image,) = parsed.all("img")
    assert image["alt"].startswith("s3: tissue outline")
    assert [a["data-of"] for a in parsed.all("a") if "data-of" in a] == [image["id"]]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a part of the path is a file"):
        write_report([], tmp_path, tmp_path / "file" / "report.html")


# --- size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2048, 1584), (300, 2048), (2048, 60), (30, 20)])
def test_thumbnails_are_small_whatever_they_show(tmp_path, size):
    jpeg = read_thumbnail(overlay(tmp_path, "noise", size, low=0))
    assert jpeg is not None
    assert len(jpeg) <= THUMBNAIL_BYTES


def test_a_kept_thumbnail_is_taken_as_it_is_and_nothing_is_decoded(tmp_path, monkeypatch):
    for name, grey in (("s0", 60), ("s1", 200)):
        kept = make_thumbnail(Image.new("RGB", (900, 700), (grey,) * 3))
        overlay(tmp_path, name, exif=exif_of(kept))
    monkeypatch.setattr(drawing, "make_thumbnail", None)
    images = page(tmp_path, homogeneous(2)).all("img")
    shown = [Image.open(BytesIO(base64.b64decode(i["src"].partition(",")[2]))) for i in images]
    assert [image.size for image in shown] == [(320, 249)] * 2
    assert [image.getpixel((0, 0))[0] for image in shown] == pytest.approx([60, 200], abs=2)


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", exif_of(b"\xff\xd8")[:-1], Image.Exif().tobytes()])
def test_an_exif_block_of_another_kind_is_no_thumbnail(tmp_path, exif):
    path = overlay(tmp_path, "a", exif=exif)
    assert max(Image.open(BytesIO(read_thumbnail(path))).size) == 320


def test_a_broken_overlay_is_none(tmp_path):
    path = overlay(tmp_path, "a", low=0)
    path.write_bytes(path.read_bytes()[:2000])
    assert read_thumbnail(path) is None
    path.write_text("no picture")
    assert read_thumbnail(path) is None
    assert read_thumbnail(tmp_path) is None


def test_a_slide_takes_at_most_40_kb(tmp_path):
    sizes = []
    for count in (10, 60):
        rows = [replace(row, read_errors=1) for row in homogeneous(count)]  # each is shown twice
        for row in rows:
            overlay(tmp_path, row.name, (1024, 800), low=0)
        sizes.append(write_report(rows, tmp_path, tmp_path / "r.html").stat().st_size)
    assert (sizes[1] - sizes[0]) / 50 < 40_000


def test_of_thousands_of_slides_only_the_striking_have_pictures(tmp_path, monkeypatch):
    rows = homogeneous(5 * MOST_PICTURES)
    rows[7] = replace(rows[7], patches=0, tissue_mm2=0.0)
    rows += [failing(f"f{k}", "{path} is empty (0 bytes)") for k in range(300)]
    asked = []
    monkeypatch.setattr(cohort_report, "read_thumbnail", lambda path: asked.append(path.stem))
    parsed = page(tmp_path, rows)
    assert {"s7", *(f"f{k}" for k in range(300))} <= set(asked)
    assert len(set(asked)) == len(asked)
    assert 301 <= len(asked) < 330
    assert "only the unusual and the failed have pictures" in parsed.text
    assert any(attrs.get("class") == "table" for attrs in parsed.all("table"))
    assert (tmp_path / "report.html").stat().st_size < 1500 * len(rows)


# --- findings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_homogeneous_cohort_has_nothing_unusual(seed):
    assert find_outliers(homogeneous(500, seed)) == {}


PLANTED = {
    11: ({"tissue_mm2": 0.3, "patches": 23}, r"0\.3 mm² of tissue; the cohort's median is 1\d\d"),
    22: ({"patches": 900, "tissue_mm2": 120.0}, r"7\.5 patches per mm² of tissue; .* median is 7[678]"),
    33: ({"read_errors": 12}, r"12 of [\d,]+ patches could not be read; their features are zeros"),
    44: ({"patches": 0, "tissue_mm2": 0.0}, "No patches, with no tissue found"),
    55: ({"mpp": 1.01}, r"1\.01 µm/px, which no other slide has; the cohort's median is 0\.25"),
    66: ({"seconds": 9000.0}, r"2\.5 h for [\d,]+ patches; at the cohort's median pace about [\d.]+ s"),
}


def test_what_was_planted_is_found_and_nothing_else():
    rows = homogeneous(200)
    for i, (changes, _) in PLANTED.items():
        rows[i] = replace(rows[i], **changes)
    found = find_outliers(rows)
    assert set(found) == set(PLANTED)
    for i, (_, words) in PLANTED.items():
        assert re.search(words, found[i][0]), found[i]
    assert list(found)[:2] == [44, 33]  # the most striking first


def test_two_scanners_are_usual_and_a_third_kind_of_pixel_is_not():
    rows = homogeneous(200)
    rows = [replace(row, mpp=0.5 if i % 9 == 0 else 0.2485 + 0.004 * (i % 2)) for i, row in enumerate(rows)]
    rows[5] = replace(rows[5], mpp=0.37)
    assert set(find_outliers(rows)) == {5}


def test_without_tissue_the_patches_are_compared_and_few_slides_are_not():
    rows = [replace(row, tissue_mm2=None) for row in homogeneous(30)]
    rows[4] = replace(rows[4], patches=3, seconds=1.0)
    assert set(find_outliers(rows)) == {4}
    assert find_outliers(rows[:6]) == {}


def test_failures_are_grouped_by_kind():
    rows = [failing(f"a {k}", "{path} is empty (0 bytes); copy it again") for k in range(5)]
    damaged = "{{path}}: openslide cannot read 512 x 512 px of level 0 at ({}, {}): damaged"
    rows += [failing(f"b{k}", damaged.format(k, 7 * k)) for k in range(3)]
    exists = "/out/feats/{}.h5 exists, made with another request ({!r}, now {!r})"
    rows += [
        failing(name, exists.format(name, *two))
        for name, *two in (("c", "uni", "conch"), ("d", "conch", "uni"))
    ]
    assert group_reasons(rows) == [
        ("… is empty (0 bytes); copy it again", [0, 1, 2, 3, 4]),
        ("openslide cannot read 512 x 512 px of level 0 at (…, …): damaged", [5, 6, 7]),
        ("… exists, made with another request (…, now …)", [8, 9]),
    ]


def test_slides_come_in_the_order_of_their_numbers():
    rows = [replace(row, name=name) for row, name in zip(homogeneous(3), ("s10", "S2", "s1"), strict=True)]
    assert [row.name for row in Cohort.of(rows).slides] == ["s1", "S2", "s10"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.5, "0.5 s"), (119, "119 s"), (600, "10 min"), (7300, "2.03 h"), (604800, "7 days")],
)
def test_durations_are_short(seconds, words):
    assert duration(seconds) == words


# --- in a browser -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_sorts_filters_and_does_not_complain(chromium, tmp_path, width):
    rows = homogeneous(30)
    rows[4] = replace(rows[4], patches=0, tissue_mm2=0.0, name=HOSTILE[0])
    rows[5] = replace(rows[5], patches=None)
    rows.append(failing("broken", "{path} is empty (0 bytes)"))
    for row in rows[2:20]:
        if "<" not in row.name:
            overlay(tmp_path, row.name)
    rows[6] = replace(rows[6], read_errors=3)
    path = write_report(rows, tmp_path, tmp_path / "report.html", title=HOSTILE[0])
    page = Page(chromium)
    chromium.set_window_size(width, 900)
    chromium.get(path.as_uri())
    names = "[...document.querySelectorAll('#slides tbody tr:not([hidden]) .name')].map(e => e.textContent)"
    assert len(page.look(names)) == 31
    assert page.look("document.title") != "x"
    page.until("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.look("document.images.length") == 18  # one is shown again
    assert page.look("document.documentElement.scrollWidth <= window.innerWidth")

    choose = "(() => {{ const s = document.getElementById('{}'); s.value = '{}'; s.onchange(); }})()"
    page.look(choose.format("sort", 3))
    patches = [row.patches for row in sorted(rows, key=lambda r: -(-1 if r.patches is None else r.patches))]
    texts = "[...document.querySelectorAll('#slides tbody tr')].map(r => r.cells[3].textContent)"
    assert page.look(texts) == ["–" if n is None else f"{n:,}" for n in patches]
    page.look("document.getElementById('turn').click()")
    assert page.look(texts)[0] == "0"

    field = chromium.find_element("id", "find")
    field.send_keys("BROKEN empty")
    assert page.look(names) == ["broken"]
    assert page.text("#shown") == "1 of 31 slides shown"
    field.clear()
    page.look(choose.format("show", "unusual"))
    assert sorted(page.look(names)) == sorted([HOSTILE[0], "s6"])

    assert page.look("getComputedStyle(document.querySelector('#slides tbody')).display") == "grid"
    page.look("document.querySelector('[data-view=table]').click()")
    assert page.look("getComputedStyle(document.querySelector('#slides tbody')).display") == "table-row-group"
    page.look("document.querySelector('th [data-column=\"6\"]').click()")
    assert page.look("document.querySelector('th[aria-sort]').textContent") == "Read errors"
    assert page.console() == []
    chromium.set_window_size(1300, 900)
