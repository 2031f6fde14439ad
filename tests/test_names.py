"""Names of files as they come: written as they are, shown so that no terminal, table or page is misled."""

import csv
import json
import os
import re

import h5py
import pytest
from cohort_fixtures import run_here
from viewer_fixtures import serving

from seal_extract.names import cell, from_cell, shown
from seal_extract.run.status_table import read_status
from seal_extract.view.collection import Collection

ODD = {  # as bytes, and as it is shown
    b"caf\xe9": r"caf\xe9",
    b"\x1b[31mred\x07": r"\x1b[31mred\x07",
    b"two\nlines": r"two\x0alines",
    "left\u202egpj".encode(): r"left\u202egpj",
    b"=1+2": "=1+2",
    b"@at": "@at",
    b"-dash": "-dash",
    "日本 é".encode(): "日本 é",
    b"n" * 240: "n" * 240,
}
FORMULAS = ("=1+2", "@at", "-dash")


@pytest.mark.parametrize(("name", "expected"), ODD.items())
def test_a_name_is_shown_as_text_and_read_back_from_a_table(name, expected):
    name = os.fsdecode(name)
    assert shown(name) == expected
    assert cell(name) == "'" * (expected in FORMULAS) + expected
    assert from_cell(cell(name)) == name


@pytest.mark.parametrize(
    "text", ["", "'", "'=1", "''-1", r"C:\x12", r"\u0041", "\x85", "\udc85", "\U000e0001"]
)
def test_what_looks_escaped_is_read_back_too(text):
    assert cell(text).isprintable()
    assert from_cell(cell(text)) == text


@pytest.fixture(scope="module")
def odd(tmp_path_factory, drawn_slides):
    """Slides of odd names, embedded by the command; (folder, what it said)."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "slides").mkdir()
    for name in [*ODD, b"x" * 250]:
        os.link(drawn_slides[0], os.fsencode(folder / "slides") + b"/" + name + b".svs")
    log = folder / "log.jsonl"
    return folder, run_here(
        folder / "slides", "-o", folder / "out", "--encoder", "seal-tiny", "--log-json", log
    )


def test_a_cohort_of_odd_names_is_done_and_told_in_text(odd):
    folder, done = odd
    written = {os.fsencode(path.stem) for path in (folder / "out").rglob("features_*/*.h5")}
    assert written == set(ODD)
    lines = done.stdout.split("\n")[:-1]
    assert {line.split(".svs: ")[0] for line in lines[:-1]} == set(ODD.values())
    assert lines[-1].startswith(f"{len(ODD)} of {len(ODD) + 1} slides done")
    assert all(line.isprintable() for line in lines)
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    told = {e["name"].replace("\n", r"\x0a") for e in events if e["event"] == "done"}
    assert told == set(ODD.values())


def test_a_name_too_long_for_the_disk_is_told_as_that(odd):
    folder, done = odd
    (failed,) = (line for line in done.stderr.splitlines() if "FAILED" in line)
    assert failed.endswith(
        "the name is too long for that disk; rename the slide or choose another -o; "
        "nothing half-written was left"
    )
    assert not list((folder / "out").rglob(".*"))


def test_tables_pages_and_attributes_of_odd_names_can_be_read(odd):
    folder, _ = odd
    out = folder / "out"
    with (out / "status.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows if row["status"] == "done"} == {cell(os.fsdecode(n)) for n in ODD}
    assert not [text for row in rows for text in row.values() if text[:1] in "=+-@\t\r" and text]
    assert set(ODD) <= set(map(os.fsencode, read_status(out / "status.csv")))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert r"caf\xe9.svs" in page
    assert not re.search(r"[\x1b\x07\u202e]", page)
    (path,) = (p for p in out.rglob("features_*/*.h5") if os.fsencode(p.stem) == b"caf\xe9")
    with h5py.File(path) as file:
        assert file["coords"].attrs["name"] == r"caf\xe9"


def test_every_command_shows_odd_names(odd, tmp_path):
    folder, _ = odd
    out = folder / "out"
    for words in (
        ("genes", out, "--genes", "EPCAM", "--write", "h5ad,png", "-o", tmp_path / "genes"),
        ("search", out, "--gene", "EPCAM", "-o", tmp_path / "search"),
        ("report", out, "--genes", "EPCAM", "-o", tmp_path / "reports"),
        ("export", out, "--layout", "clam", "-o", tmp_path / "clam"),
        ("verify", tmp_path / "clam/features_seal-tiny", "--for", "clam"),
        (folder / "slides", "-o", out, "--encoder", "seal-tiny", "--dry-run"),
        (folder / "slides" / "-\x1b[2Jno.svs", "--no\x1b[2J"),
    ):
        done = run_here(*words)
        said = (done.stdout + done.stderr).split("\n")
        assert all(line.isprintable() for line in said), words
        assert "unexpected" not in done.stderr
    with (tmp_path / "search/found.csv").open(encoding="utf-8", newline="") as file:
        assert "'=1+2" in {row["slide"] for row in csv.DictReader(file)}


def test_the_viewer_lists_odd_names(odd):
    from seal_extract.view.gallery import Gallery
    from seal_extract.view.gene_maps import GeneMaps

    gallery = Gallery(Collection.find(odd[0] / "out"), GeneMaps(lambda: None))
    with serving(gallery) as client:
        _, listed = client.json("/api/slides")
    assert {slide["name"] for slide in listed["slides"]} >= set(ODD.values())
