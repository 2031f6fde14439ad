"""A cohort on several devices: the same bytes as in one process, and what the death of a worker costs."""

import os
import signal
import subprocess
import time
import warnings
from concurrent.futures import Future
from pathlib import Path

import pytest
from cohort_fixtures import assert_refused, command, contents, link_cohort, run_here

from seal_extract import ExtractOptions
from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import CheckpointError, EncoderError, UsageError
from seal_extract.run.cohort import extract_cohort
from seal_extract.run.devices import DeviceEngine
from seal_extract.run.job import SlideJob
from seal_extract.run.status_table import SlideResult, read_status
from seal_extract.run.workers import SLIDES_PER_WORKER, StartError, share
from seal_extract.slides.entry import SlideEntry

# --- who gets which slide ---------------------------------------------------------------------


class Stub:
    """A worker that dies of some slides, and of some of its starts; ``had`` is what it had at each time."""

    def __init__(self, deadly=(), bad_starts=0, error=None, waits_for_more=False):
        self.name, self.deadly, self.bad_starts = "stub", set(deadly), bad_starts
        self.error, self.waits_for_more = error or RuntimeError("CUDA error"), waits_for_more
        self.given, self.had, self.starts = {}, [], 1

    def embed(self, job):
        future = self.given[job.entry.name] = Future()
        self.had.append(list(self.given))
        if self.waits_for_more and len(self.given) < SLIDES_PER_WORKER:
            return future
        given, self.given, self.waits_for_more = self.given, {}, False
        for name, one in given.items():
            if self.bad_starts:
                one.set_exception(StartError("out of memory"))
            elif self.deadly & set(given):
                one.set_exception(self.error)
            else:
                one.set_result(SlideResult(SlideEntry(Path(f"{name}.svs"), name), (), None, 0.0))
        return future

    def restart(self):
        self.starts += 1
        self.bad_starts = max(0, self.bad_starts - 1)

    def notes(self):
        return ["the slides are large"]


def shared(count, *workers):
    """The error of each slide, by name."""
    entries = [SlideEntry(Path(f"{i}.svs"), str(i)) for i in range(count)]
    results = list(share([SlideJob(entry, ExtractOptions(), Path("out")) for entry in entries], workers))
    assert sorted(result.path for result in results) == [entry.path for entry in entries]
    return {result.name: result.error for result in results}


@pytest.mark.filterwarnings("ignore:the slides are large")
def test_a_slide_whose_worker_died_is_tried_once_more_and_alone():
    worker = Stub(deadly={"2"}, waits_for_more=True)
    with pytest.warns(UserWarning, match=r"^stub died \(CUDA error\); it is restarted$"):
        errors = shared(6, worker)
    assert [name for name, error in errors.items() if error is not None] == ["2"]
    assert str(errors["2"]) == (
        "2.svs: stub died (CUDA error), and so did the worker that had it before; run it by itself"
    )
    assert worker.had[3:7] == [["0", "1", "2", "3"], ["0"], ["1"], ["2"]]
    assert worker.starts == 3


@pytest.mark.filterwarnings("ignore:the slides are large", "ignore:stub died .*; it is restarted")
def test_a_worker_that_always_dies_gets_no_more_slides_and_the_others_do_its_work():
    broken, well = Stub(bad_starts=9), Stub()
    with pytest.warns(UserWarning, match="out of memory.*, 3 times in a row; it gets no more slides"):
        errors = shared(9, broken, well)
    assert set(errors.values()) == {None}
    assert broken.starts == 3
    with pytest.raises(EncoderError, match="3 times in a row; finished slides are kept, run the same"):
        shared(9, Stub(bad_starts=9))


@pytest.mark.filterwarnings("ignore:the slides are large")
def test_an_error_that_every_slide_would_have_ends_the_cohort():
    with pytest.raises(CheckpointError, match="missing key"):
        shared(9, Stub(deadly="0", error=CheckpointError("missing key")), Stub())


def test_what_several_workers_have_to_say_is_said_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shared(9, Stub(), Stub())
    assert [str(warning.message) for warning in caught] == ["the slides are large"]


# --- processes --------------------------------------------------------------------------------


def test_two_processes_write_what_one_writes(drawn_slides, encoder_folder, tmp_path):
    cohort = link_cohort(tmp_path / "slides", drawn_slides, 6)
    (cohort / "note.svs").write_text("not a slide")
    words = (cohort, "--encoder", encoder_folder, "-q", "--layout", "trident")
    one = run_here(*words, "-o", tmp_path / "one", "--device", "cpu")
    two = run_here(*words, "-o", tmp_path / "two", "--device", "cpu,cpu")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (one.returncode, two.returncode) == (1, 1)
    assert sorted(one.stderr.splitlines()) == sorted(two.stderr.splitlines())
    rows = [read_status(tmp_path / out / "status.csv") for out in ("one", "two")]
    assert {n: (r.status, r.patches, r.reason, r.slide) for n, r in rows[0].items()} == {
        n: (r.status, r.patches, r.reason, r.slide) for n, r in rows[1].items()
    }
    again = run_here(*words, "-o", tmp_path / "two", "--device", "cpu,cpu")
    assert again.stdout.count("finished before") == 6


# as a slide that crashes its reader, and a GPU that fails once, would behave; Python runs this as it starts
HOSTILE = """
import os, sys
from pathlib import Path
if "devices import serve" in " ".join(sys.orig_argv):
    from seal_extract.encoders.encoder import Encoder
    from seal_extract.run import job
    open_entry, encode, failed = job.open_entry, Encoder.encode_unchecked, Path(os.environ["FAILED_ONCE"])
    opened = set()

    def open_slide(entry, *args):
        opened.add(entry.name)
        if entry.name == "slide_0001":
            os.abort()
        return open_entry(entry, *args)

    def encode_unchecked(self, *patches):
        if "slide_0006" in opened and not failed.exists():
            failed.touch()
            raise RuntimeError("CUDA error: an illegal memory access")
        return encode(self, *patches)

    job.open_entry, Encoder.encode_unchecked = open_slide, encode_unchecked
"""


def test_a_process_that_dies_is_restarted_and_costs_only_the_slide_that_kills_it(
    drawn_slides, encoder_folder, encoder, tmp_path, monkeypatch
):
    cohort = link_cohort(tmp_path / "slides", drawn_slides, 7)  # the last is beyond the first window
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(HOSTILE)
    paths = [str(tmp_path / "start"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("FAILED_ONCE", str(tmp_path / "failed"))
    engine, progress = DeviceEngine(("cpu",)), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = extract_cohort(
            cohort, encoder_folder, tmp_path / "out", engine=engine, progress=lambda *p: progress.append(p)
        )
    slide = cohort / "slide_0006.svs"
    said = {str(warning.message) for warning in caught}
    assert said == {
        "cpu died (its process ended with status -6); it is restarted",
        f"cpu died (the GPU stopped when {slide} was embedded (CUDA error: an illegal memory access)); "
        "it is restarted",
    }
    (failed,) = report.failed
    assert failed.name == "slide_0001"
    assert "cpu died (its process ended with status -6), and so did the worker" in failed.reason
    extract_cohort(cohort, encoder, tmp_path / "here")
    here = contents(tmp_path / "here")
    assert contents(tmp_path / "out") == {n: c for n, c in here.items() if n != "slide_0001.h5"}
    assert {slide for slide, done, total in progress if done == total} == {
        path for path in cohort.iterdir() if path.stem != "slide_0001"
    }


def processes():
    listed = subprocess.run(["ps", "-eo", "pid,ppid,stat"], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    return {int(pid): int(parent) for pid, parent, state in rows if "Z" not in state}


def descendants(pid):
    found, parents = {pid}, processes()
    for _ in range(4):
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_no_process(drawn_slides, encoder_folder, tmp_path, how):
    """After Ctrl-C nothing half-written either."""
    cohort = link_cohort(tmp_path / "slides", drawn_slides, 300)
    words = command(cohort, "-o", tmp_path / "out", "--encoder", encoder_folder, "--device", "cpu,cpu")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    started = set()
    while process.poll() is None and not (contents(tmp_path / "out") and len(started) >= 4):
        time.sleep(0.05)
        started = descendants(process.pid)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    assert ("interrupted" in said.lower()) == (how == signal.SIGINT)
    assert len(started) >= 4  # two that embed, two that open slides
    until = time.monotonic() + 20
    while started & set(processes()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not started & set(processes())
    if how == signal.SIGINT:
        assert not list(tmp_path.rglob("*.part"))


# --- what cannot be meant ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cpu,gpu", "--device has 'gpu'; allowed: all, or several, as in cuda:0,cuda:1"),
        ("cpu,cuda:0", "--device cpu,cuda:0 are of two kinds, whose embeddings differ; give one kind"),
        (",", "--device has no device; allowed"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(drawn_slides, encoder_folder, tmp_path, device, words):
    run = (drawn_slides[0], "-o", tmp_path / "out", "--encoder", encoder_folder, "--device", device)
    assert_refused(words, *run)
    if device == "cpu,cuda:0":
        assert_refused("--engine ray both say which GPUs work; give one", *run, "--engine", "ray")


def test_all_devices_of_a_machine_without_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="--device all means all CUDA devices, and this machine has none"):
        DeviceEngine.all()


def test_all_devices_are_all_gpus_and_encoders_lie_on_one_of_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    engine = DeviceEngine.all()
    assert engine.devices == ("cuda:0", "cuda:1", "cuda:2")
    assert engine.placed([EncoderRequest("seal-tiny")]) == [EncoderRequest("seal-tiny", device="cuda:0")]
