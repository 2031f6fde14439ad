"""The process that opens slides and finds tissue: what it costs when a slide hangs, swells or crashes it."""

import os
import signal
import subprocess
import time

import pytest
from cohort_fixtures import command, contents, link_cohort, run

from seal_extract import ExtractOptions, extract
from seal_extract.run.cohort import extract_cohort

# as a reading library would behave on a slide made for it; Python runs this file as it starts
HOSTILE = """
import os, sys
if "serve" in " ".join(sys.orig_argv):
    import numpy, seal_extract.tissue.segmentation as tissue
    find = tissue.find_tissue

    def find_tissue(slide, *args, **kwargs):
        if slide.path.stem == "slide_0001":
            while True:
                pass
        if slide.path.stem == "slide_0002":
            hold = [numpy.empty(2**28, 'u1') for _ in range(1000)]  # asked for, never touched
        if slide.path.stem == "slide_0003":
            os.abort()
        return find(slide, *args, **kwargs)

    tissue.find_tissue = find_tissue
"""


@pytest.fixture
def hostile(tmp_path, drawn_slides, monkeypatch):
    """Five slides: one hangs, one takes memory without end, one crashes its reader, two are well."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(HOSTILE)
    paths = [str(tmp_path / "start"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return link_cohort(tmp_path / "slides", drawn_slides, 5)


def test_a_slide_beyond_its_limits_has_failed_and_the_others_are_done(hostile, encoder_folder, tmp_path):
    done = run(hostile, "-o", tmp_path / "out", "--encoder", encoder_folder, "--plan-timeout", 6)
    assert "2 of 5 slides done" in done.stdout
    lines = [line for line in done.stderr.splitlines() if "FAILED" in line]
    assert "slide_0001.svs: opening it and finding its tissue took more than 6 s; copy it again" in lines[0]
    assert "slide_0002.svs: opening it and finding its tissue takes more than 6 GB of memory" in lines[1]
    assert "slide_0003.svs: the process that opened it ended with status -6" in lines[2]
    assert len(lines) == 3
    assert sorted(contents(tmp_path / "out")) == ["slide_0000.h5", "slide_0004.h5"]


def children(process):
    """Processes that ``process`` started and that still run."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,stat"], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    return [int(pid) for pid, parent, state in rows if int(parent) == process.pid and "Z" not in state]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_no_process(hostile, encoder_folder, tmp_path, how):
    """Even where it hangs, and at once: Ctrl-C does not wait for the slide."""
    words = command(hostile / "slide_0001.svs", "-o", tmp_path / "out", "--encoder", encoder_folder)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (planners := children(process)):
        time.sleep(0.05)
    time.sleep(3)
    process.send_signal(how)
    said = process.communicate(timeout=30)[1]
    assert ("interrupted" in said.lower()) == (how == signal.SIGINT)
    until = time.monotonic() + 10
    while any(map(is_running, planners)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, planners))


def test_the_same_is_found_with_and_without_limits_which_are_no_other_request(
    drawn_slides, encoder, tmp_path
):
    extract(drawn_slides[0], encoder, tmp_path / "within")
    extract(drawn_slides[0], encoder, tmp_path / "without", options=ExtractOptions(plan_timeout_s=0))
    assert contents(tmp_path / "within") == contents(tmp_path / "without")
    results, options = [], ExtractOptions(plan_timeout_s=77)
    extract_cohort(drawn_slides[0], encoder, tmp_path / "within", options=options, on_result=results.append)
    assert [result.finished_before for result in results] == [True]
