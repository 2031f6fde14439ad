"""Files appear whole or not at all: what a kill leaves, who may delete it, two runs at once, full disks."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from cohort_fixtures import contents, link_cohort
from feature_fixtures import SIZE, grid_of, provenance_of

from seal_extract import publish
from seal_extract.errors import OutputError
from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layouts import TridentLayout, layout_of_grid
from seal_extract.features.store import read_features
from seal_extract.hdf5 import new_hdf5
from seal_extract.publish import sweep
from seal_extract.run.cohort import extract_cohort

DAY_S = 24 * 3600
SLIDE = SlideLabel("drawn", SIZE, 0.25)


def left_by_a_killed_run(folder, *, kernel=publish.KERNEL, days=0):
    """A temporary file whose writer has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".seal-extract.{kernel}.{len(list(folder.iterdir())):016x}.part"
    path.touch()
    os.utime(path, (time.time() - days * DAY_S,) * 2)
    return path


WRITER = """
import sys, time
from pathlib import Path
from seal_extract.publish import claimed, publish
with claimed(Path(sys.argv[1]), as_folder=True), publish(Path(sys.argv[1]) / "a.txt") as part:
    part.write_text("half of it")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that writes a file and a folder."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_is_being_written_is_not_swept_away_however_old_it_is(writer, tmp_path):
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 2
    for part in parts:
        os.utime(part, (time.time() - 30 * DAY_S,) * 2)
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == parts
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_ours_and_proven_dead_is_swept_away(tmp_path):
    thesis = tmp_path / "deep/.thesis.docx.part"
    thesis.parent.mkdir()
    for theirs in (thesis, tmp_path / ".seal-extract.x.part", tmp_path / ".a.h5.host.1.part"):
        theirs.touch()
        os.utime(theirs, (0, 0))
    stays = left_by_a_killed_run(tmp_path / "deep", kernel="another-machine", days=2)
    for dead in (
        left_by_a_killed_run(tmp_path / "deep"),
        left_by_a_killed_run(tmp_path / "deep", kernel="another-machine", days=8),
    ):
        assert dead.exists()
    sweep(tmp_path)
    left = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted([thesis, tmp_path / ".seal-extract.x.part", tmp_path / ".a.h5.host.1.part", stays])


def test_whoever_writes_into_a_folder_sweeps_it(tmp_path):
    dead = left_by_a_killed_run(tmp_path / "expression_tiny")
    with publish.publish(tmp_path / "expression_tiny/a.h5"):
        pass
    assert os.listdir(tmp_path / "expression_tiny") == ["a.h5"]
    assert not dead.exists()


def test_a_link_is_made_where_the_disk_has_none(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for text in ("first", "second"):
        with publish.publish(tmp_path / "a.txt", keep=lambda path: True) as part:
            part.write_text(text)
    assert (tmp_path / "a.txt").read_text() == "first"
    assert os.listdir(tmp_path) == ["a.txt"]


# --- two runs at once -------------------------------------------------------------------------


def features_at_once(tmp_path, layout, **second):
    """Two runs that begin before either has ended."""
    grid = grid_of(9)
    place = layout_of_grid(layout, tmp_path, grid)
    for name, value in (("first", {}), ("second", second)):
        provenance = provenance_of(grid) | {"request": value, "slide": {"mpp": 0.25}}
        file = place.write_features(SLIDE, grid, "tiny", 24, provenance, overwrite=False)
        if name == "first":
            first, opened = file, file.__enter__()
        else:
            with file as writer:
                opened.append(np.zeros((9, 24), np.float32))
                first.__exit__(None, None, None)
                writer.append(np.ones((9, 24), np.float32))
    return place


@pytest.mark.parametrize("layout", ["trident", "clam", "stamp", "flat"])
def test_the_second_of_two_runs_never_replaces_the_first_one_s_features(tmp_path, layout):
    with pytest.raises(OutputError, match=r"by another run meanwhile, from another request; type "):
        features_at_once(tmp_path, layout, options={"min_tissue": 0.1})
    place = layout_of_grid(layout, tmp_path, grid_of(9))
    assert not read_features(place.features("drawn", "tiny")).features.any()
    assert all(path.exists() for path in place.derived("drawn", "tiny"))
    assert not list(tmp_path.rglob("*.part"))


def test_two_runs_of_one_request_both_succeed(tmp_path):
    place = features_at_once(tmp_path, "trident")
    assert not read_features(place.features("drawn", "tiny")).features.any()


def test_another_grid_of_a_run_at_once_is_not_replaced(tmp_path):
    place = layout_of_grid("trident", tmp_path, grid_of(9))

    class Slow(TridentLayout):
        def _describe_coords(self, *args):
            place.write_coords(SLIDE, grid_of(5), {"slide": {}})
            super()._describe_coords(*args)

    with pytest.raises(OutputError, match="by another run meanwhile"):
        Slow(**vars(place)).write_coords(SLIDE, grid_of(9), {"slide": {}})
    with h5py.File(place.coords("drawn")) as file:
        assert len(file["coords"]) == 5


def test_a_file_can_be_read_before_its_writer_lets_go_of_it(tmp_path, monkeypatch):
    give_name, read = publish._named, []

    def meanwhile(part, path):
        given = give_name(part, path)
        with h5py.File(path) as file:
            read.append(sorted(file))
        return given

    monkeypatch.setattr(publish, "_named", meanwhile)
    with new_hdf5(tmp_path / "a.h5", keep=lambda path: True) as (file, _):
        file["coords"] = [1]
    assert read == [["coords"]]


CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--uts"]


def can_unshare():
    command = [*CONTAINER, "true"]
    return shutil.which("unshare") and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make PID namespaces")
def test_two_containers_of_one_host_name_and_process_number_both_succeed(
    tmp_path, drawn_slides, encoder_folder, encoder
):
    cohort = link_cohort(tmp_path / "slides", drawn_slides, 6)
    words = [sys.executable, "-m", "seal_extract.cli", cohort, "-o", tmp_path / "out"]
    command = [*CONTAINER, *map(str, words), "--encoder", str(encoder_folder), "--quiet"]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        assert "FAILED" not in run.communicate()[1]
        assert run.returncode == 0
    extract_cohort(cohort, encoder, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not list(tmp_path.rglob("*.part"))


def write_many(folder, number):
    for i in range(30):
        sweep(folder)
        with publish.publish(folder / f"{i % 5}.txt") as part:
            part.write_text(f"{number} {i}" * 1000)


def test_many_writers_and_sweepers_in_one_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(tmp_path, n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == [f"{i}.txt" for i in range(5)]


# --- a disk that fails ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space or choose another -o"),
        (errno.EACCES, "this user may not write there; choose another -o"),
    ],
)
def test_an_error_of_the_disk_within_the_block_is_one_line(tmp_path, code, words):
    with (
        pytest.raises(OutputError, match=rf"a\.txt: {words}; nothing half-written was left$"),
        publish.publish(tmp_path / "a.txt"),
    ):
        raise OSError(code, os.strerror(code))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="a part of the path is a file; choose another -o"),
        publish.publish(tmp_path / "file/features/a.h5"),
    ):
        pass


def test_a_geojson_that_cannot_be_written_fails_its_slide_alone(tmp_path, drawn_slides, encoder):
    cohort = link_cohort(tmp_path / "slides", drawn_slides, 3)
    (tmp_path / "out").mkdir()
    probe = extract_cohort(cohort / "slide_0000.svs", encoder, tmp_path / "probe")
    assert len(probe.done) == 1
    for outline in (tmp_path / "probe").rglob("slide_0000.geojson"):
        in_the_way = tmp_path / "out" / outline.relative_to(tmp_path / "probe").with_stem("slide_0001")
        (in_the_way / "a folder").mkdir(parents=True)
    report = extract_cohort(cohort, encoder, tmp_path / "out")
    assert [row.name for row in report.failed] == ["slide_0001"]
    assert "cannot write" in report.failed[0].reason
    assert len(report.done) == 2
