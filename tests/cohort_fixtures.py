"""Cohorts of small slides, good and broken, made quickly: links to a few drawn ones."""

import contextlib
import io
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from synthetic_slide import write_synthetic_slide

from seal_extract.cli import main

SIZE_PX = (1400, 1100)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A small encoder of random weights, as a folder."""
    return write_untrained_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with an encoder and two slides: encoder, slides/a.svs and slides/b.svs."""
    folder = tmp_path_factory.mktemp("place")
    write_untrained_encoder(folder / "encoder")
    write_synthetic_slide(folder / "slides" / "a.svs", (3000, 2400), mpp=0.25)
    write_synthetic_slide(folder / "slides" / "b.svs", (2600, 2400), mpp=0.25, seed=2)
    return folder


@pytest.fixture(scope="session")
def encoder(encoder_folder):
    """The same, loaded."""
    from seal_extract import load_encoder

    return load_encoder(encoder_folder, device="cpu")


@pytest.fixture(scope="session")
def tiny():
    """The bundled encoder."""
    from seal_extract import load_encoder

    return load_encoder("seal-tiny", device="cpu")


@pytest.fixture(scope="session")
def decoder():
    """Its decoder alone."""
    from seal_extract.genes.decoder import load_decoder

    return load_decoder("seal-tiny")


@pytest.fixture(scope="session")
def drawn_slides(tmp_path_factory):
    """A few different slides of some patches each."""
    return draw_slides(tmp_path_factory.mktemp("drawn"))


def draw_slides(folder, count=3):
    """A few different slides of some patches each."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_synthetic_slide(folder / f"{i}.svs", SIZE_PX, downsamples=(1, 4), seed=i) for i in range(count)
    ]


def link_cohort(folder, drawn, count):
    """``count`` slides of different names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        os.link(drawn[i % len(drawn)], folder / f"slide_{i:04}.svs")
    return folder


BROKEN = ("truncated", "mutated", "text", "empty", "wrong_type", "no_mpp")


def add_broken(folder, drawn, count, seed=0):
    """``count`` slides broken in all the ways of `BROKEN`, in turn."""
    rng = np.random.default_rng(seed)
    data = drawn[0].read_bytes()
    for i in range(count):
        kind = BROKEN[i % len(BROKEN)]
        path = folder / f"bad_{i:04}_{kind}.svs"
        if kind == "truncated":
            path.write_bytes(data[: int(len(data) * rng.uniform(0.2, 0.9))])
        elif kind == "mutated":
            hurt = bytearray(data)
            start = int(len(data) * rng.uniform(0.1, 0.3))
            hurt[start : start + len(data) // 3] = rng.bytes(len(data) // 3)
            path.write_bytes(hurt)
        elif kind == "text":
            path.write_text("this is a note, not a slide\n")
        elif kind == "empty":
            path.touch()
        elif kind == "wrong_type":
            path.write_bytes(b"%PDF-1.7\n" + rng.bytes(2000))
        else:
            path = path.with_suffix(".png")
            Image.fromarray(rng.integers(0, 256, (400, 400, 3), dtype=np.uint8)).save(path)


def command(*words):
    """The command line in a process of its own."""
    return [sys.executable, "-m", "seal_extract.cli", *map(str, words)]


def run(*words, timeout=600):
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout)


def contents(out):
    """Features and coordinates of every file, byte for byte."""
    found = {}
    for path in sorted(out.rglob("features_*/*.h5")):
        with h5py.File(path) as file:
            found[path.name] = (file["features"][()].tobytes(), file["coords"][()].tobytes())
    return found


def resident_mb():
    """Memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_here(*words):
    """The command line in this process, which has imported everything before; as `run`."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.simplefilter("default")
        try:
            status = main([str(word) for word in words])
        except SystemExit as exc:  # argparse's
            status = exc.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def assert_refused(line, *words):
    """A command that says why it cannot be meant, in one line."""
    done = run_here(*words)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1


def write_untrained_encoder(folder, spec=None, seed=0):
    """Write an encoder with random weights into a folder; by default of two blocks, to be quick."""
    from seal_extract.demo import UNTRAINED, untrained_encoder

    shallow = replace(UNTRAINED, architecture=replace(UNTRAINED.architecture, kwargs={"depth": 2}))
    untrained_encoder(spec or shallow, seed).save_pretrained(folder)
    return folder
