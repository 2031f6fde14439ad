"""What a TIFF claims is held to its size before anybody uses it, and its pixels are the writer's."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from bombs import write_tiffs
from conftest import shared

from seal_extract import open_slide
from seal_extract.errors import SlideOpenError


def lines_about(paths, most_bytes=3 * 2**30, seconds=10):
    """What a process with limits says of each file."""
    program = [sys.executable, str(Path(__file__).parent / "bombs.py"), str(most_bytes), str(seconds)]
    done = subprocess.run([*program, *map(str, paths)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout[-500:]} {done.stderr[-2000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_directories_that_claim_more_than_there_is_are_refused_at_once(tmp_path):
    told = write_tiffs(tmp_path)
    for (path, words), line in zip(told.items(), lines_about(told), strict=True):
        assert words in line, path.name
        assert line.startswith(str(path)), line
        assert "\n" not in line


def test_four_damaged_bytes_of_a_real_slide_do_not_hang(tmp_path):
    data = bytearray(shared("data/wsi/CMU-1-Small-Region.svs").read_bytes())
    struct.pack_into("<I", data, 1938394, 1275950)
    path = tmp_path / "a.svs"
    path.write_bytes(data)
    (line,) = lines_about([path])
    assert "lead in a circle" in line
    with pytest.raises(SlideOpenError, match="lead in a circle"):
        open_slide(path)
