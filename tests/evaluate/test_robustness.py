"""Robustness: figures of PLISM's own code, clusters by hand, an encoder that sees the scanner and one not."""

import json
import math
import sys

import numpy as np
import pytest
from conftest import one_line
from feature_fixtures import DIM, write

from seal_extract.evaluate.robustness import Scan, cluster_agreement, compare_places

N = 24
SCANNERS, SPECIMENS = ("AT2", "S60", "P1000"), ("one", "two", "three")


def scans_of(stains=("HE",)):
    return [Scan(f"{p}_{s}_{t}", p, s, t, p) for p in SPECIMENS for s in SCANNERS for t in stains]


def write_table(path, scans, columns=("slide", "specimen", "scanner", "stain")):
    lines = [",".join(columns), *(",".join(getattr(s, c) for c in columns) for s in scans)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_features(out, scans, encoder, scanner=0.0, n=N):
    """Places look alike on all scans of a specimen, but for noise and what the scanner adds."""
    rng = np.random.default_rng(0)
    places = {p: rng.normal(size=(n, DIM)) + rng.normal(size=DIM) for p in SPECIMENS}
    added = {s: scanner * rng.normal(size=DIM) for s in SCANNERS}
    for scan in scans:
        rows = places[scan.specimen] + added[scan.scanner] + 0.3 * rng.normal(size=(n, DIM))
        write(out, "trident", n, scan.slide, encoder=encoder, features=rows.astype(np.float32))


def test_places_are_compared_as_plism_compares_them():
    """By the numbers of owkin/plism-benchmark (tests/metrics, and its classes run on the last ones)."""
    a, b = np.array([[0, 1], [1, 0], [1, 1], [1, 1]]), np.array([[0, 2], [2, 0], [-1, -1], [0, 1]])
    assert compare_places(a, b)[0] == pytest.approx(0.426776695)
    a = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])
    b = np.array([[0.1, 1.1], [0.2, 1.1], [0.3, 1.1], [0.4, 1.1]])
    assert compare_places(a, b)[1].tolist()[::3] == [0.125, 1.0]
    rng = np.random.default_rng(0)
    a = rng.normal(size=(1500, 64)).astype(np.float32)
    b = (a + 1.4 * rng.normal(size=a.shape) + 0.3).astype(np.float32)
    cosine, top = compare_places(a, b)
    assert cosine == pytest.approx(0.5684361, abs=1e-6)
    assert top == pytest.approx([0.929333, 0.973, 0.983333, 0.991667], abs=1e-5)


def test_clusters_agree_with_what_tells_slides_apart():
    scans = scans_of()
    by_scanner = np.array([np.eye(3)[SCANNERS.index(scan.scanner)] for scan in scans])
    best = cluster_agreement(by_scanner * 7, scans).max(0)  # length does not count
    assert best == pytest.approx([1, math.log(3), -0.5 + 0.125, 0], abs=0.3)
    assert best[3] < 0.01
    by_specimen = np.array([np.eye(3)[SPECIMENS.index(scan.specimen)] for scan in scans])
    assert cluster_agreement(by_specimen, scans).max(0)[2:] == pytest.approx([1, math.log(3)])


def test_a_scanner_that_shows_is_told_from_one_that_does_not(run, tmp_path):
    scans = scans_of(("HE", "HE light"))
    write_features(tmp_path / "out", scans, "sturdy")
    write_features(tmp_path / "out", scans, "fragile", scanner=4)
    table = write_table(tmp_path / "slides.csv", scans)
    words = ("evaluate", "robustness", tmp_path / "out", "--slides", table, "-o", tmp_path / "evaluation")
    status, out, err = run(*words)
    assert (status, err) == (0, [])
    assert "|  | cosine | top 1 | top 3 | top 5 | top 10 |" in out
    report = json.loads((tmp_path / "evaluation/robustness.json").read_text())
    titles = [t["title"].removeprefix("Robustness, ") for t in report["tables"]]
    kinds = ("across scanners", "across stains", "across scanners and stains")
    assert titles == [
        *(f"PLISM's figures {kind}" for kind in kinds), "neighbours (RI, MaRI, CRoMa)", "clusters of slides"
    ]  # fmt: skip
    assert "Median over 18 pairs of slides" in report["tables"][0]["note"]  # 3 specimens, 3 pairs, 2 stains
    figures = {
        t: {r["line"]: r["folds"] for r in table["rows"]}
        for t, table in zip(titles, report["tables"], strict=True)
    }
    assert figures["PLISM's figures across scanners"]["sturdy"]["top 1"] == 1
    assert figures["PLISM's figures across scanners"]["fragile"]["top 1"] < 0.7
    assert figures["PLISM's figures across stains"]["fragile"]["top 1"] == 1
    neighbours = figures["neighbours (RI, MaRI, CRoMa)"]
    for figure, neutral in (("RI", 0.5), ("MaRI", 0.5), ("CRoMa", 0)):
        assert neighbours["fragile"][figure] < neutral < neighbours["sturdy"][figure]
    clusters = figures["clusters of slides"]
    assert clusters["sturdy"]["ARI, scanner"] < 0.1 < clusters["fragile"]["ARI, scanner"]
    assert clusters["sturdy"]["MI, specimen"] > clusters["fragile"]["MI, specimen"]
    assert report["pairs"]["sturdy"]["across scanners"][0][0] > 0.9
    assert (tmp_path / "evaluation/robustness.png").stat().st_size > 10_000
    assert "data:image/png;base64," in (tmp_path / "evaluation/evaluation.html").read_text()
    one_line(run(*words), 1, "robustness.md exists already; give --overwrite or another -o")


def test_slides_of_other_places_have_no_pairs_and_few_patches_no_margin(run, tmp_path, monkeypatch):
    scans = scans_of()
    for i, scan in enumerate(scans):
        write_features(tmp_path / "out", [scan], "tiny", n=4 + i)
    table = write_table(tmp_path / "slides.csv", scans)
    words = ("evaluate", "robustness", tmp_path / "out", "--slides", table, "--patches", 1)
    status, out, _ = run(*words, "-o", tmp_path / "e")
    assert status == 0
    assert "No two slides of one specimen have the same places in the same order" in "\n".join(out)
    assert "RI, MaRI and CRoMa are left out: " in "\n".join(out)
    monkeypatch.setitem(sys.modules, "croma", None)
    status, out, _ = run(*words, "-o", tmp_path / "f")
    assert status == 0
    assert "RI, MaRI and CRoMa need the package croma; type, in your clone" in out[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:-1], r"has no features by tiny of 1 slides of the table"),
        (lambda s: [*s, s[0]], r"one_AT2_HE stands 2 times; name each slide once"),
        (
            lambda s: [x for x in s if x.specimen == "one" or x.scanner == "P1000"],
            r"scanner AT2 has one slide",
        ),
        (lambda s: [x for x in s if x.scanner == "P1000"], r"has 1 scanner or one specimen; allowed: two"),
        (lambda s: [*s, Scan("x", "", "P1000", "", "")], r"row 10 lacks its slide, specimen or scanner"),
        (None, r"needs the columns slide, specimen and scanner, and may have stain and label"),
    ],
)
def test_what_is_refused(run, tmp_path, change, message):
    scans = scans_of()
    write_features(tmp_path / "out", scans[1:] if change and len(change(scans)) < 9 else scans, "tiny", n=12)
    columns = ("slide", "scanner") if change is None else ("slide", "specimen", "scanner")
    asked = scans if change is None or message.startswith("has no") else change(scans)
    table = write_table(tmp_path / "slides.csv", asked, columns)
    one_line(
        run("evaluate", "robustness", tmp_path / "out", "--slides", table, "-o", tmp_path / "e"), 2, message
    )
