"""Cohorts that are large, broken, killed or shared: minutes each, so marked slow; figures printed with -s."""

import gc
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from cohort_fixtures import add_broken, command, contents, link_cohort, resident_mb, run
from conftest import shared
from mutations import metadata_places, mutated
from test_cohort import killed_at_random

from seal_extract import extract, load_encoder
from seal_extract.encoders.spec import Architecture
from seal_extract.run.cohort import extract_cohort
from seal_extract.run.extract import extract_many
from seal_extract.slides.listing import list_slides

pytestmark = pytest.mark.slow

RAY = ("--engine", "ray", "--workers", 1, "--ray-workers")


def test_memory_after_200_slides_is_that_after_20(drawn_slides, encoder, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 200)
    extract(slides / "slide_0000.svs", encoder, tmp_path / "first")  # starts the process that opens slides
    files_before = len(os.listdir("/proc/self/fd"))
    memory = []
    for result in extract_many(list_slides([slides]).entries, encoder, tmp_path / "out"):
        assert result.error is None
        gc.collect()
        memory.append(resident_mb())
    print(f"\nresident after slide 20: {memory[19]:.0f} MB, after slide 200: {memory[199]:.0f} MB")
    assert memory[199] <= 1.05 * memory[19]
    assert len(os.listdir("/proc/self/fd")) <= files_before


def test_memory_after_400_damaged_slides_is_that_after_200(encoder, tmp_path):
    source = shared("data", "wsi", "CMU-1-Small-Region.svs")
    places, memory, done = metadata_places(source), [], 0
    for seed in range(400):
        (tmp_path / f"{seed:03}.svs").write_bytes(mutated(source.read_bytes(), places, 10_000 + seed))
    for result in extract_many(list_slides([tmp_path / "*.svs"]).entries, encoder, tmp_path / "out"):
        done += result.error is None
        gc.collect()
        memory.append(resident_mb())
    early, late = max(memory[:200]), max(memory[200:])
    print(f"\n{done} of 400 done; resident at most {early:.0f} MB until slide 200, {late:.0f} MB after it")
    assert 0 < done < 200
    assert late <= 1.05 * early


def test_20_kills_lose_nothing(drawn_slides, encoder_folder, encoder, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 150)
    hits = killed_at_random(slides, tmp_path / "killed", encoder_folder, 20, 0.2, seed=1)
    last = run(slides, "-o", tmp_path / "killed", "--encoder", encoder_folder)
    assert last.returncode == 0, last.stderr
    extract_cohort(slides, encoder, tmp_path / "undisturbed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert len(contents(tmp_path / "killed")) == 150
    assert not list(tmp_path.rglob("*.part"))
    print(f"\n{hits} of 20 kills hit a running cohort")
    assert hits == 20


def test_100_broken_slides_among_500_are_named_and_the_others_done(drawn_slides, encoder_folder, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 400)
    add_broken(slides, drawn_slides, 100)
    done = run(slides, "-o", tmp_path / "out", "--encoder", encoder_folder, timeout=1200)
    assert done.returncode == 1
    print("\n" + done.stdout.splitlines()[-1])
    assert "400 of 500 slides done" in done.stdout
    failed = [line for line in done.stderr.splitlines() if "FAILED" in line]
    assert len(failed) == 100
    assert all("bad_" in line for line in failed)


def test_a_finished_cohort_of_1000_is_recognised_in_seconds(drawn_slides, encoder_folder, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 1000)
    first = run(slides, "-o", tmp_path / "out", "--encoder", encoder_folder, timeout=3000)
    assert first.returncode == 0, first.stderr
    started = time.monotonic()
    again = run(slides, "-o", tmp_path / "out", "--encoder", encoder_folder)
    print(f"\n1,000 finished slides recognised in {time.monotonic() - started:.2f} s, all of the command")
    assert again.returncode == 0
    assert again.stdout.count("finished before") == 1000


# --- Ray --------------------------------------------------------------------------------------


@pytest.fixture
def ray():
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


def timed_cohort(slides, out, encoder_folder, workers):
    """Seconds of the whole command, with a core for each worker."""
    started = time.monotonic()
    done = run(
        *(slides, "-o", out, "--encoder", encoder_folder, "--ray-cores", 1, *RAY, workers), timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return time.monotonic() - started


def test_two_ray_workers_write_the_same_bytes_in_less_time(ray, drawn_slides, tmp_path):
    from cohort_fixtures import write_untrained_encoder

    from seal_extract.demo import UNTRAINED

    # a ViT-S: still 30 times less work a patch than the smallest of the field, but most of a slide's work
    small = replace(UNTRAINED, dim=384, architecture=Architecture("vit_small_patch16_224"))
    folder = write_untrained_encoder(tmp_path / "encoder", small)
    slides = link_cohort(tmp_path / "slides", drawn_slides, 120)
    one = timed_cohort(slides, tmp_path / "one", folder, 1)
    two = timed_cohort(slides, tmp_path / "two", folder, 2)
    print(f"\none worker {one:.1f} s, two {two:.1f} s: {two / one:.2f} x, start of Ray included")
    extract_cohort(slides, load_encoder(folder, device="cpu"), tmp_path / "here")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "here")


def workers_of(process):
    """Processes of Ray actors that descend from ``process``, or that Ray started for it."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::_Worker" in line]


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_ray_worker_loses_no_slide(ray, drawn_slides, encoder_folder, encoder, tmp_path, seed):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 40)
    process = subprocess.Popen(
        command(slides, "-o", tmp_path / "out", "--encoder", encoder_folder, "-q", *RAY, 2),
        stdout=subprocess.PIPE,
        text=True,
    )
    killed = threading.Event()

    def kill():
        while process.poll() is None and not list(tmp_path.rglob("features_*/*.h5")):
            time.sleep(0.05)
        time.sleep(np.random.default_rng(seed).uniform(0, 0.5))
        victims = workers_of(process)
        if victims and process.poll() is None:
            os.kill(victims[seed % len(victims)], signal.SIGKILL)
            killed.set()

    thread = threading.Thread(target=kill)
    thread.start()
    out, _ = process.communicate(timeout=600)
    thread.join()
    assert process.returncode == 0
    assert killed.is_set()
    assert "40 of 40 slides done" in out
    extract_cohort(slides, encoder, tmp_path / "here")
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
