"""Many slides in one run: what is recognised or tried again, what a kill leaves, what the table says."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from cohort_fixtures import add_broken, command, contents, link_cohort, run, run_here
from PIL import Image

from seal_extract import ExtractOptions, extract, open_slide
from seal_extract.cli import main
from seal_extract.demo import UNTRAINED, untrained_encoder
from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError
from seal_extract.features.export import export
from seal_extract.features.store import list_features, read_features
from seal_extract.run.cohort import extract_cohort
from seal_extract.run.status_table import StatusFile, StatusRow, read_status, read_status_rows
from seal_extract.slides.listing import list_slides
from seal_extract.view.collection import Collection


@pytest.fixture
def cohort(tmp_path, drawn_slides):
    return link_cohort(tmp_path / "slides", drawn_slides, 5)


# --- results ----------------------------------------------------------------------------------


def test_a_cohort_gives_what_each_slide_gives_by_itself(cohort, encoder, tmp_path):
    report = extract_cohort(cohort, encoder, tmp_path / "out")
    assert [row.status for row in report.rows] == ["done"] * 5
    for slide in sorted(cohort.iterdir()):
        alone = extract(slide, encoder, tmp_path / "alone")
        assert len(alone.grid) > 1
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_two_encoders_see_the_same_patches_in_one_pass(cohort, encoder, tmp_path, monkeypatch):
    from seal_extract.patches.tiles import TileReader

    second = untrained_encoder(replace(UNTRAINED, name="untrained-second"), seed=7)
    read = TileReader.read
    rows = []
    monkeypatch.setattr(TileReader, "read", lambda self, r, *more: rows.append(r) or read(self, r, *more))
    report = extract_cohort(cohort, [encoder, second], tmp_path / "out")
    patches = sum(row.patches for row in report.rows)
    assert sum(map(len, rows)) == patches
    for name, one in (("untrained-demo", encoder), ("untrained-second", second)):
        alone = extract(cohort / "slide_0001.svs", one, tmp_path / "alone")
        (together,) = (tmp_path / "out").rglob(f"features_{name}/slide_0001.h5")
        np.testing.assert_array_equal(alone.features, read_features(together).features)


def test_an_encoder_added_later_leaves_the_first_ones_files_alone(cohort, encoder, tmp_path):
    extract_cohort(cohort, encoder, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("features_untrained-demo/*")}
    second = untrained_encoder(replace(UNTRAINED, name="untrained-second"), seed=7)
    extract_cohort(cohort, [encoder, second], tmp_path)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(list(tmp_path.rglob("features_untrained-second/*"))) == 5


# --- names that stay --------------------------------------------------------------------------


def plant(folder, drawn, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(drawn[int(folder.joinpath(name).suffix == ".tiff")], folder / name)
    return folder


def named(out):
    """Each features file of a folder with the slide that it is of."""
    return {p.stem: Path(read_features(p).provenance["slide"]["path"]) for p in out.rglob("features_*/*.h5")}


@pytest.mark.parametrize("lost", ["nothing", "the table", "the working folder"])
def test_a_slide_keeps_its_name_in_whatever_company(drawn_slides, encoder, tmp_path, monkeypatch, lost):
    """A later run knows it by the table, or by its features where that is lost or names another folder."""
    slides, out = plant(tmp_path / "a", drawn_slides, "s.svs"), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    extract_cohort("a", encoder, out)
    plant(tmp_path, drawn_slides, "a/s.tiff", "b/s.svs", "b/t.svs")
    (tmp_path / "elsewhere").mkdir()
    if lost == "the table":
        (out / "status.csv").unlink()
    if lost == "the working folder":
        monkeypatch.chdir("elsewhere")
    results = []
    extract_cohort([slides, tmp_path / "b"], encoder, out, on_result=results.append)
    expected = {
        "s": slides / "s.svs",
        "s.tiff": slides / "s.tiff",
        "b__s": tmp_path / "b/s.svs",
        "t": tmp_path / "b/t.svs",
    }
    assert named(out) == expected
    assert [r.name for r in results if r.finished_before] == ["s"]
    for slide in expected.values():  # alone, what each is called in company
        assert extract(slide, encoder, out).path.stem == next(n for n, p in expected.items() if p == slide)
        extract_cohort(slide, encoder, out)
    assert named(out) == expected
    assert set(read_status(out / "status.csv")) == set(expected)


def test_shards_write_what_one_run_writes_under_the_same_names(cohort, drawn_slides, encoder, tmp_path):
    slides = list_slides([plant(cohort, drawn_slides, "a/s.svs", "b/s.svs", "b/t.svs")])
    extract_cohort(slides, encoder, tmp_path / "whole")
    for _ in range(2):
        for i in (1, 2, 3):
            extract_cohort(slides.shard(i, 3), encoder, tmp_path / "out", status_name=f"status_{i}.csv")
        assert set(named(tmp_path / "out")) >= {"a__s", "b__s", "t"}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sum(len(read_status(tmp_path / f"out/status_{i}.csv")) for i in (1, 2, 3)) == 8


def test_a_slide_that_has_moved_keeps_its_name(drawn_slides, encoder, tmp_path):
    plant(tmp_path / "a", drawn_slides, "s.svs")
    extract_cohort(tmp_path / "a", encoder, tmp_path / "out")
    (tmp_path / "a").rename(tmp_path / "b")
    report = extract_cohort(tmp_path / "b", encoder, tmp_path / "out")
    assert [(row.name, row.seconds) for row in report.rows] == [("s", None)]


def test_a_slide_that_an_older_version_wrote_twice_is_searched_once(drawn_slides, encoder, tmp_path):
    plant(tmp_path / "a", drawn_slides, "s.svs", "t.svs")
    extract_cohort(tmp_path / "a", encoder, tmp_path / "out")
    (first,) = (tmp_path / "out").rglob("features_*/s.h5")
    shutil.copy(first, first.with_name("s.svs.h5"))
    for look in (
        lambda: [f.path.stem for f in list_features(tmp_path / "out")[0]],
        lambda: [slide.name for slide in Collection.find(tmp_path / "out").slides],
        lambda: [e.path.stem for e in export(tmp_path / "out", "flat", tmp_path / "flat")],
    ):
        with pytest.warns(UserWarning, match=r"s\.h5 is left out: s\.svs\.h5 beside it is of the same slide"):
            assert look() == ["s.svs", "t"]


# --- coming back ------------------------------------------------------------------------------


def test_a_finished_cohort_is_recognised_without_opening_a_slide(
    cohort, encoder_folder, tmp_path, monkeypatch
):
    extract_cohort(cohort, EncoderRequest(encoder_folder), tmp_path / "out")

    def refuse(*args, **kwargs):
        raise AssertionError("a slide was opened")

    monkeypatch.setattr("seal_extract.slides.entry.open_slide", refuse)
    report = extract_cohort(cohort, EncoderRequest(encoder_folder), tmp_path / "out")
    assert [row.status for row in report.rows] == ["done"] * 5
    assert all(row.seconds is None for row in report.rows)


def test_a_slide_that_was_touched_is_opened_and_recognised(cohort, encoder, tmp_path):
    extract_cohort(cohort, encoder, tmp_path / "out")
    for slide in cohort.iterdir():
        slide.touch()
    results = []
    extract_cohort(cohort, encoder, tmp_path / "out", on_result=results.append)
    assert [r.finished_before for r in results] == [True] * 5


def test_failed_slides_are_tried_again_and_finished_ones_are_not(cohort, drawn_slides, encoder, tmp_path):
    add_broken(cohort, drawn_slides, 6)
    first = extract_cohort(cohort, encoder, tmp_path / "out")
    assert (len(first.done), len(first.failed)) == (5, 6)
    (cohort / "bad_0002_text.svs").write_bytes(drawn_slides[1].read_bytes())
    results = []
    second = extract_cohort(cohort, encoder, tmp_path / "out", on_result=results.append)
    assert (len(second.done), len(second.failed)) == (6, 5)
    assert [r.name for r in results if r.error is None and not r.finished_before] == ["bad_0002_text"]


def test_only_failed_slides_are_retried_when_asked_to(cohort, drawn_slides, encoder, tmp_path):
    with pytest.raises(
        UsageError, match=r"--retry-failed: .*status\.csv with the failed slides does not exist"
    ):
        extract_cohort(cohort, encoder, tmp_path / "out", retry_failed=True)
    add_broken(cohort, drawn_slides, 2)
    extract_cohort(cohort, encoder, tmp_path / "out")
    report = extract_cohort(cohort, encoder, tmp_path / "out", retry_failed=True)
    assert sorted(row.name for row in report.rows) == ["bad_0000_truncated", "bad_0001_mutated"]
    assert len(read_status(report.status)) == 7


def test_options_that_change_the_numbers_do_not_pass_for_done(cohort, encoder, tmp_path):
    extract_cohort(cohort, encoder, tmp_path)
    report = extract_cohort(cohort, encoder, tmp_path, options=ExtractOptions(min_tissue=0.1))
    assert all(
        "made with another request (options min_tissue 0.5, now 0.1)" in r.reason for r in report.failed
    )
    assert len(report.failed) == 5


# --- one bad slide ----------------------------------------------------------------------------


def coordinates_with(attribute, value):
    """Coordinates of every slide, of which those of one say something that cannot be."""

    def hurt(cohort, encoder, tmp_path):
        extract_cohort(cohort, encoder, tmp_path / "before")
        (folder,) = (tmp_path / "before").rglob("patches")
        with h5py.File(folder / "slide_0001_patches.h5", "r+") as file:
            file["coords"].attrs[attribute] = value
        return cohort, {"coords": folder}

    return hurt


def outline_with(number):
    """A table in which one slide has an outline with that number in it."""

    def hurt(cohort, encoder, tmp_path):
        ring = f"[[0, 0], [{number}, 0], [900, 900], [0, 0]]"
        (tmp_path / "bad.geojson").write_text(f'{{"type": "Polygon", "coordinates": [{ring}]}}')
        return listed(cohort, tmp_path, "roi", tmp_path / "bad.geojson"), {}

    return hurt


def resolution_of(number):
    """A table in which one slide has that many µm/px."""
    return lambda cohort, encoder, tmp_path: (listed(cohort, tmp_path, "mpp", number), {})


def listed(cohort, tmp_path, column, value):
    """A table of a cohort; its second slide has a value in a column."""
    lines = [f"{slide},{value if i == 1 else ''}" for i, slide in enumerate(sorted(cohort.iterdir()))]
    (tmp_path / "list.csv").write_text("\n".join([f"slide,{column}", *lines]))
    return tmp_path / "list.csv"


def link_to_itself(cohort, encoder, tmp_path):
    (cohort / "slide_0001.svs").unlink()
    (cohort / "slide_0001.svs").symlink_to("slide_0001.svs")
    return cohort, {}


BAD = {
    "link to itself": (link_to_itself, "slide_0001.svs does not exist"),
    "overlap": (coordinates_with("overlap", "x"), "overlap is 'x'; allowed: a whole number"),
    "patch of 10,000,000": (coordinates_with("patch_size_level0", 10**7), "10000000 level-0 px wide, and"),
    "encoder's patch": (coordinates_with("patch_size", 10**6), "patch_size is 1000000 px; allowed: up to"),
    "level": (coordinates_with("patch_size_level0", np.inf), "patch_size_level0 is 'inf'; allowed"),
    "400 digits": (outline_with("1" * 400), "a ring is not a list"),
    "0 µm/px": (resolution_of("0"), "table gives 0 µm/px, which cannot be true"),
    "NaN µm/px": (resolution_of("nan"), "table gives nan µm/px, which cannot be true"),
}


@pytest.mark.parametrize("bad", BAD)
def test_whatever_is_wrong_with_one_slide_the_others_are_done(cohort, encoder, tmp_path, bad):
    hurt, words = BAD[bad]
    slides, options = hurt(cohort, encoder, tmp_path)
    report = extract_cohort(slides, encoder, tmp_path / "out", options=ExtractOptions(**options))
    assert [row.name for row in report.failed] == ["slide_0001"]
    assert len(report.done) == 4
    assert words in report.failed[0].reason


def test_a_defect_that_one_slide_meets_is_told_with_its_traceback_and_stops_no_other(
    cohort, encoder_folder, tmp_path, monkeypatch, capsys
):
    from seal_extract.run.overlay import draw_overlay

    def defect(slide, *rest, **how):
        if slide.path.stem == "slide_0001":
            raise KeyError("brought to light")
        draw_overlay(slide, *rest, **how)

    monkeypatch.setattr("seal_extract.run.writer.draw_overlay", defect)
    log = tmp_path / "log.jsonl"
    words = (cohort, "-o", tmp_path / "out", "--encoder", encoder_folder, "-q", "--log-json", log, "--debug")
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    assert status == 1
    assert "4 of 5 slides done" in said.out
    assert "slide_0001.svs: unexpected KeyError: 'brought to light'; --debug shows where" in said.err
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (failed,) = [event for event in events if event["event"] == "failed"]
    assert failed["traceback"] in said.err
    assert "in defect" in failed["traceback"]


# --- kills ------------------------------------------------------------------------------------


def killed_at_random(cohort, out, encoder_folder, times, most_s, seed=0):
    """Kill the run with SIGKILL a random while after it has finished a slide; how often it was hit."""
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(times):
        before = len(list(out.rglob("features_*/*.h5")))
        process = subprocess.Popen(
            command(cohort, "-o", out, "--encoder", encoder_folder, "-q"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(list(out.rglob("features_*/*.h5"))) == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, most_s))
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
        check_whole(out)
    return hits


def check_whole(out):
    """What has a final name can be read to its end."""
    for features, coords in contents(out).values():
        assert len(features) == len(coords) // 16 * 192 * 4


def test_a_killed_run_goes_on_and_equals_an_undisturbed_one(drawn_slides, encoder_folder, encoder, tmp_path):
    cohort = link_cohort(tmp_path / "slides", drawn_slides, 25)
    assert killed_at_random(cohort, tmp_path / "killed", encoder_folder, 2, 0.1) == 2
    last = run(cohort, "-o", tmp_path / "killed", "--encoder", encoder_folder)
    assert last.returncode == 0, last.stderr
    extract_cohort(cohort, encoder, tmp_path / "undisturbed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert not list(tmp_path.rglob("*.part"))


# --- the table --------------------------------------------------------------------------------


def test_the_table_survives_a_line_cut_short(tmp_path):
    table = StatusFile(tmp_path / "status.csv")
    quoted = StatusRow("a.svs", "a", "done", patches=3, mpp=0.25, reason="a, 'quoted' \"reason\"")
    table.add(quoted)
    table.add(StatusRow("b.svs", "b", "failed", reason="no"))
    whole = table.path.read_bytes()
    for cut in range(whole.index(b"b.svs") + 1, len(whole)):
        table.path.write_bytes(whole[:cut])
        rows = read_status(table.path)
        assert rows["a"] == quoted
        assert set(rows) <= {"a", "b"}


def test_the_table_keeps_the_last_row_of_each_slide_whatever_its_length(tmp_path):
    table = StatusFile(tmp_path / "status.csv", [StatusRow("a.svs", "a", "failed", reason="then")])
    table.add(StatusRow("a.svs", "a", "done", patches=1))
    table.add(StatusRow("b.svs", "b", "failed", reason="x" * 200_000))
    assert {name: row.status for name, row in read_status(table.path).items()} == {"a": "done", "b": "failed"}
    assert read_status(tmp_path / "nowhere.csv") == {}


# --- several grids in one folder ---------------------------------------------------------------


def write_square(path, side):
    """GeoJSON of a square at the slide's corner."""
    ring = [[0, 0], [side, 0], [side, side], [0, side], [0, 0]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return path


def test_another_grid_leaves_pictures_outlines_and_rows_of_the_first_alone(cohort, encoder_folder, tmp_path):
    out, roi = tmp_path / "out", write_square(tmp_path / "roi.geojson", 900)
    slides = [cohort / "slide_0000.svs", cohort / "slide_0001.svs"]
    words = (*slides, "-o", out, "--encoder", encoder_folder, "-q")
    first, second = "20x_224px_0px_overlap", "20x_112px_0px_overlap"
    kept = (f"overlays/{first}/slide_0000.jpg", f"contours_geojson/{first}/slide_0000.geojson")
    kept = (*kept, "contours_geojson/slide_0000.geojson")

    run_here(*words)
    before = {name: (out / name).read_bytes() for name in kept}
    assert before[kept[1]] == before[kept[2]]
    run_here(*words, "--patch-px", "112", "--roi", roi)
    assert {name: (out / name).read_bytes() for name in kept} == before
    assert (out / f"contours_geojson/{second}/slide_0000.geojson").read_bytes() != before[kept[1]]
    rows = {(row.name, row.grid): row.patches for row in read_status_rows(out / "status.csv")}
    assert {grid for _, grid in rows} == {first, second}
    assert len(rows) == 4
    assert f"overlays/{second}/slide_0000.jpg" in (out / "report.html").read_text()

    again = run_here(*words)
    assert again.stdout.count("finished before") == 2
    page = (out / "report.html").read_text()
    assert f"overlays/{first}/slide_0000.jpg" in page
    assert second not in page
    assert {(row.name, row.grid): row.patches for row in read_status_rows(out / "status.csv")} == rows


def test_the_one_picture_of_an_older_version_is_shown_and_its_row_taken_up(cohort, encoder_folder, tmp_path):
    out = tmp_path / "out"
    words = (cohort, "-o", out, "--encoder", encoder_folder, "-q")
    run_here(*words)
    for folder in (out / "overlays", out / "contours_geojson"):
        for path in (folder / "20x_224px_0px_overlap").iterdir():
            path.replace(folder / path.name)
        (folder / "20x_224px_0px_overlap").rmdir()
    rows = read_status_rows(out / "status.csv")
    StatusFile(out / "status.csv", [replace(row, grid="") for row in rows])
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.suffix in (".jpg", ".h5")}
    assert run_here(*words).stdout.count("finished before") == 5
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "overlays/slide_0000.jpg" in (out / "report.html").read_text()
    assert len(read_status_rows(out / "status.csv")) == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_a_full_log_or_output_or_one_of_ascii_stops_no_run(cohort, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    words = (cohort, "--encoder", encoder_folder, "-q")
    ascii_ = run(*words, "-o", tmp_path / "a", "--log-json", "/dev/full")
    assert (ascii_.returncode, ascii_.stderr.count("\n")) == (0, 1)
    assert "--log-json can no longer be written (No space left on device); the run continues" in ascii_.stderr
    assert r"\xb5m/px by openslide" in ascii_.stdout
    with open("/dev/full", "w") as full:
        lost = subprocess.run(
            command(*words, "-o", tmp_path / "b"), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (lost.returncode, lost.stderr.count("\n")) == (0, 1)
    assert "standard output can no longer be written" in lost.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- tables of slides -------------------------------------------------------------------------


def test_a_table_whose_resolution_contradicts_the_file_counts_and_the_contradiction_is_told(
    cohort, encoder, tmp_path
):
    table = tmp_path / "list.csv"
    table.write_text(
        f"slide,mpp\n{cohort}/slide_0000.svs,0.25\n{cohort}/slide_0001.svs,0.5\n{cohort}/gone.svs,\n"
    )
    words = r"0.5 µm/px by table \(file: 0.25, openslide.mpp-x\), against file 0.25"
    with pytest.warns(UserWarning, match=rf"slide_0001.svs: {words}$"):
        report = extract_cohort(table, encoder, tmp_path / "out")
    rows = {row.name: row for row in report.done}
    assert (rows["slide_0000"].mpp, rows["slide_0000"].warning) == (0.25, "")
    assert rows["slide_0001"].mpp == 0.5
    assert re.fullmatch(words, rows["slide_0001"].warning)
    assert "does not exist" in report.failed[0].reason


@pytest.fixture
def mixed(cohort, tmp_path):
    """One slide of 0.25 µm/px, and one that says nothing."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    os.link(cohort / "slide_0000.svs", folder / "says.svs")
    with open_slide(cohort / "slide_0001.svs") as slide:
        Image.fromarray(slide.read_region((0, 0), 0, slide.size_l0)).save(folder / "silent.png")
    return folder


def test_slide_mpp_fills_gaps_and_what_contradicts_it_is_told(mixed, encoder_folder, tmp_path):
    out = tmp_path / "out"
    words = (mixed, "-o", out, "--encoder", encoder_folder, "-q")
    alone = run_here(mixed / "says.svs", *words[1:])
    both = run_here(*words, "--slide-mpp", "0.5")
    assert (alone.returncode, both.returncode) == (0, 0)
    assert re.search(r"says.svs: \d+ patches, finished before", both.stdout)  # it is the same request
    conflict = "0.25 µm/px by openslide.mpp-x, against --slide-mpp 0.5"
    assert f"says.svs: {conflict}; type --override-mpp 0.5 if the file is wrong" in both.stderr
    shutil.rmtree(out)
    both = run_here(*words, "--slide-mpp", "0.5")
    rows = read_status(out / "status.csv")
    assert {name: (row.mpp, row.mpp_source, row.warning) for name, row in rows.items()} == {
        "says": (0.25, "openslide.mpp-x", conflict),
        "silent": (0.5, "--slide-mpp", ""),
    }
    assert both.stderr.count(conflict) == 1
    assert conflict in (out / "report.html").read_text()
    again = run_here(*words, "--slide-mpp", "0.5")
    assert again.stdout.count("finished before") == 2
    other = run_here(*words, "--slide-mpp", "0.4")
    assert "(slide mpp 0.5, now 0.4)" in other.stderr
    assert other.stdout.count("finished before") == 1


def test_override_mpp_overrules_the_file_and_says_so(mixed, encoder_folder, tmp_path):
    words = (mixed, "-o", tmp_path / "out", "--encoder", encoder_folder, "-q", "--override-mpp", "0.5")
    done, again = run_here(*words), run_here(*words)
    row = read_status(tmp_path / "out/status.csv")["says"]
    assert (row.mpp, row.mpp_source) == (0.5, "--override-mpp (file: 0.25, openslide.mpp-x)")
    assert "against file 0.25" in row.warning
    assert "against file 0.25" in done.stderr
    assert again.stdout.count("finished before") == 2
    without = run_here(*words[:-2], "--slide-mpp", "0.5")
    assert "(slide mpp 0.5, now 0.25)" in without.stderr
    with pytest.raises(UsageError, match="give one"):
        ExtractOptions(slide_mpp=0.5, override_mpp=0.5)


@pytest.mark.parametrize(("recorded", "resumes"), [(0.26, True), (0.5, False)])
def test_what_an_older_version_finished_by_slide_mpp_against_the_file(
    mixed, encoder_folder, encoder, tmp_path, recorded, resumes
):
    """It counts as finished where it agrees with the file, which it then wrote down as given."""
    done = extract_cohort(mixed / "says.svs", encoder, tmp_path, options=ExtractOptions(layout="flat")).done
    with h5py.File(tmp_path / "says.h5", "r+") as file:
        provenance = json.loads(file.attrs["seal_extract"])
        provenance["request"]["options"]["slide_mpp"] = provenance["request"]["slide"]["mpp"] = recorded
        provenance["slide"] |= {"mpp": recorded, "mpp_source": "given (file: 0.25, openslide.mpp-x)"}
        file.attrs["seal_extract"] = json.dumps(provenance)
    assert len(done) == 1
    words = ("--encoder", encoder_folder, "--layout", "flat", "--slide-mpp", str(recorded))
    again = run_here(mixed / "says.svs", "-o", tmp_path, *words)
    assert ("finished before" in again.stdout) == resumes
    assert ("(slide mpp 0.5, now 0.25)" in again.stderr) != resumes


def test_tissue_drawn_beside_the_tissue_is_told_and_kept(cohort, encoder, tmp_path):
    roi = write_square(tmp_path / "roi.geojson", 60)
    words = r"roi\.geojson: no polygon overlaps the tissue found in slide_0000\.svs; was it drawn on another"
    with pytest.warns(UserWarning, match=words):
        extract_cohort(cohort / "slide_0000.svs", encoder, tmp_path / "out", options=ExtractOptions(roi=roi))


def test_slides_that_are_gone_in_mid_run_fail_and_come_back(cohort, encoder, tmp_path):
    lost = tmp_path / "lost"

    def lose(_, done, total):
        if cohort.exists():
            cohort.rename(lost)

    first = extract_cohort(cohort, encoder, tmp_path / "out", progress=lose)
    assert len(first.failed) == 5 - len(first.done) > 0
    assert any("is gone, or its disk is" in row.reason for row in first.failed)
    assert all("run again" in row.reason or "check" in row.reason for row in first.failed)
    lost.rename(cohort)
    assert len(extract_cohort(cohort, encoder, tmp_path / "out").done) == 5
