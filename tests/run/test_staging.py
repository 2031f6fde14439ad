"""Slides copied to a fast folder ahead of their turn: within the bound, and nothing of others is deleted."""

import os
import platform
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cohort_fixtures import contents, link_cohort

from seal_extract import ExtractOptions
from seal_extract.errors import OutputError, UsageError
from seal_extract.run.cohort import extract_cohort
from seal_extract.run.job import SlideJob
from seal_extract.run.staging import Stage
from seal_extract.slides.listing import list_slides


def jobs(slides):
    return [SlideJob.of(entry, Path(), ExtractOptions()) for entry in list_slides([slides]).entries]


def test_staged_slides_give_the_same_and_leave_nothing(drawn_slides, encoder, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 5)
    fast = tmp_path / "fast"
    fast.mkdir()
    (fast / "of_others.svs").write_text("mine")
    options, results = ExtractOptions(stage_dir=fast, stage_gb=0.01), []
    extract_cohort(slides, encoder, tmp_path / "staged", options=options, on_result=results.append)
    named = {result.features[0].provenance["slide"]["path"] for result in results}
    assert named == {str(slide) for slide in slides.iterdir()}  # not their copies
    again = extract_cohort(slides, encoder, tmp_path / "staged")
    assert [(row.status, row.seconds) for row in again.rows] == [("done", None)] * 5
    extract_cohort(slides, encoder, tmp_path / "in_place")
    assert contents(tmp_path / "staged") == contents(tmp_path / "in_place")
    assert [p.name for p in fast.iterdir()] == ["of_others.svs"]


def test_copies_never_exceed_the_bound(drawn_slides, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 8)
    sizes = [p.stat().st_size for p in slides.iterdir()]
    limit = 2 * max(sizes) + 1000
    stage = Stage(tmp_path / "fast", limit)
    seen = []
    for job in stage.copied(jobs(slides)):
        seen.append(sum(p.stat().st_size for p in (tmp_path / "fast").rglob("*.svs")))
        assert job.entry.file != job.entry.path
        assert job.entry.file.read_bytes() == job.entry.path.read_bytes()
        stage.release(job.entry)
    stage.close()
    assert len(seen) == 8
    assert 0 < max(seen) <= limit


def test_a_bound_that_one_slide_exceeds_is_one_line(drawn_slides, encoder, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 1)
    options = ExtractOptions(stage_dir=tmp_path / "fast", stage_gb=1e-6)
    with pytest.raises(UsageError, match=r"slide_0000.svs has 0\.\d+ GB, more than --stage-gb 1e-06; type"):
        extract_cohort(slides, encoder, tmp_path / "out", options=options)


def test_a_slide_that_cannot_be_copied_is_read_in_its_place(drawn_slides, encoder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seal_extract.run.staging.shutil.copy2", full)
    slides = link_cohort(tmp_path / "slides", drawn_slides, 1)
    options = ExtractOptions(stage_dir=tmp_path / "fast", stage_gb=0.01)
    with pytest.warns(UserWarning, match="is not staged but read in its place"):
        report = extract_cohort(slides, encoder, tmp_path / "out", options=options)
    assert len(report.done) == 1


def test_a_slide_too_large_for_the_bound_does_not_hold_up_those_after_it(drawn_slides, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 2)
    stage = Stage(tmp_path / "fast", 1000)
    with pytest.warns(UserWarning, match="is not staged but read in its place: .* more than --stage-gb"):
        entries = [job.entry for job in stage.copied(jobs(slides))]
    stage.close()
    assert [entry.copy for entry in entries] == [None, None]


def test_a_folder_for_copies_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a part of the path is a file; choose another --stage-dir"):
        Stage(tmp_path / "file" / "fast", 10**6)


def test_what_a_killed_run_has_staged_is_swept_away(tmp_path):
    killed = subprocess.Popen(
        [sys.executable, "-c", STAGE_AND_WAIT, tmp_path], stdout=subprocess.PIPE, text=True
    )
    (left,) = (Path(killed.stdout.readline().strip()),)
    other = tmp_path / "seal_extract-of-nobody-else"
    other.write_text("mine")
    for path in (left, other):
        os.utime(path, (1, 1))  # long ago
    Stage(tmp_path, 10**6).close()
    assert left.exists()  # it is held
    killed.kill()
    killed.communicate()
    Stage(tmp_path, 10**6).close()
    assert (left.exists(), other.exists()) == (False, True)


STAGE_AND_WAIT = """
import sys, time
from pathlib import Path
from tempfile import TemporaryDirectory
from seal_extract.run.staging import Stage
stage = Stage(Path(sys.argv[1]), 10**6)
print(*Path(sys.argv[1]).glob("seal_extract-*"), flush=True)
time.sleep(60)
"""


def test_copies_lie_in_a_folder_that_nobody_can_have_made_before(drawn_slides, tmp_path):
    for name in (f"seal_extract.{platform.node()}.{os.getpid()}", "seal_extract-"):
        (tmp_path / "fast" / name / "slide_0000").mkdir(parents=True)
        (tmp_path / "fast" / name / "slide_0000" / "slide_0000.svs").write_text("another's")
    slides = link_cohort(tmp_path / "slides", drawn_slides, 1)
    with (
        closing(Stage(tmp_path / "fast", 10**8)) as first,
        closing(Stage(tmp_path / "fast", 10**8)) as second,
    ):
        for stage in (first, second):
            entry = next(stage.copied(jobs(slides))).entry
            assert entry.file.read_bytes() == entry.path.read_bytes()
            own = entry.file.parents[1]
            assert (own.stat().st_mode & 0o777, own.stat().st_uid) == (0o700, os.geteuid())


@pytest.fixture
def open_to_all():
    """A folder that every user can reach, as those of pytest are not."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be two users")
def test_a_folder_in_which_others_could_exchange_copies_is_refused(open_to_all):
    for name, owner, mode, said in (
        ("another's", 1, 0o755, "belongs to another user"),
        ("open", 65534, 0o777, "may be written to by all users"),
        ("sticky", 65534, 0o1777, "made"),
        ("of root", 0, 0o1777, "made"),
        ("own", 65534, 0o755, "made"),
    ):
        folder = open_to_all / name
        folder.mkdir()
        os.chown(folder, owner, owner)
        folder.chmod(mode)
        done = subprocess.run([sys.executable, "-c", STAGE_AS_NOBODY, folder], capture_output=True, text=True)
        assert said in done.stdout, (name, done.stdout + done.stderr)


STAGE_AS_NOBODY = """
import os, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from seal_extract.run.staging import Stage
os.setegid(65534), os.seteuid(65534)
try:
    Stage(Path(sys.argv[1]), 10**6)
    print("made")
except Exception as exc:
    print(exc)
"""


def test_closing_stops_a_copier_that_waits_for_room(drawn_slides, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 3)
    stage = Stage(tmp_path / "fast", max(p.stat().st_size for p in slides.iterdir()) + 10)
    next(stage.copied(jobs(slides)))
    stage.close()
    assert not any(t.name == "stage" for t in threading.enumerate())
    assert os.listdir(tmp_path / "fast") == []
