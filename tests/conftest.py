"""Slides one can draw, and the real ones where they lie beside the project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from seal_extract.slides.readers import Level

pytest_plugins = ("cohort_fixtures", "url_fixtures", "viewer_fixtures", "synthetic_volume")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # chosen when Triton is imported, which nothing has done yet

SHARED = Path(__file__).parents[2] / "shared"


def shared(*parts: str) -> Path:
    """A file of the real data, or a skip that says what is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not there")
    return path


def run_file(file: str, *words: object, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a test file as a program of its own, with the import path of this process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-X", "faulthandler", file, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests remember of weight files does not go to the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny encoders known by name for one test."""
    from encoder_fixtures import BASES, SEALS

    from seal_extract.encoders.registry import ROWS

    for row in (*BASES, *SEALS):
        monkeypatch.setitem(ROWS, row.name, row)


@pytest.fixture(name="run")
def type_command(capsys):
    """Type a command: (exit status, lines of output, lines of error)."""
    from seal_extract.cli import main

    def type_(*words):
        try:
            status = main([str(w) for w in words])
        except SystemExit as exc:
            status = exc.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return type_


def one_line(result, status, message):
    """Hold what `run` gave to one line of error that a pattern matches, and no output."""
    got, out, err = result
    assert out == []
    assert len(err) == 1, err
    assert re.search(message, err[0]), err[0]
    assert "Traceback" not in err[0]
    assert got == status


@dataclass
class DrawnSlide:
    """A slide held in memory: its lower levels are subsampled from level 0."""

    pixels: NDArray[np.uint8]  # [H, W, 3]
    mpp: float = 0.25
    downsamples: tuple[float, ...] = (1.0,)
    path: Path = Path("drawn.svs")
    reader: str = "drawn 1"
    mpp_source: str = "drawn"
    mpp_conflict: str = ""
    bounds_l0: tuple[int, int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.bounds_l0 = (0, 0, *self.size_l0)

    @property
    def size_l0(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def levels(self) -> tuple[Level, ...]:
        w, h = self.size_l0
        return tuple(Level((int(w / d), int(h / d)), d, True) for d in self.downsamples)

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> NDArray[np.uint8]:
        step = self.downsamples[level]
        (x, y), (w, h) = xy_l0, size_px
        cols, rows = x + (np.arange(w) * step).astype(int), y + (np.arange(h) * step).astype(int)
        region = np.zeros((h, w, 3), np.uint8)
        inside_x = (cols >= 0) & (cols < self.size_l0[0])
        inside_y = (rows >= 0) & (rows < self.size_l0[1])
        region[np.ix_(inside_y, inside_x)] = self.pixels[np.ix_(rows[inside_y], cols[inside_x])]
        return region

    def close(self) -> None:
        pass

    def __enter__(self) -> DrawnSlide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def drawn() -> Callable[..., DrawnSlide]:
    """Make a slide of noise: ``drawn(width, height, mpp=..., downsamples=...)``."""

    def make(width: int, height: int, **kwargs: object) -> DrawnSlide:
        rng = np.random.default_rng(width * 10_007 + height)
        return DrawnSlide(rng.integers(90, 256, (height, width, 3), dtype=np.uint8), **kwargs)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def slide_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make the slide of a kind of `slide_helpers.KINDS` once."""
    from slide_helpers import DOWNSAMPLES, KINDS, SIZE
    from synthetic_slide import write_synthetic_slide

    folder = tmp_path_factory.mktemp("slides")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            path = folder / f"{kind}.svs"
            made[kind] = write_synthetic_slide(path, SIZE, downsamples=DOWNSAMPLES, **KINDS[kind])
        return made[kind]

    return get
