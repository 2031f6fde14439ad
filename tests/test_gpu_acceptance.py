"""The program for a machine with a GPU, rehearsed on a CPU, so that it fails there for no silly reason."""

import json
from pathlib import Path

import pytest
from conftest import run_file

FOLDER = Path(__file__).parent / "gpu_acceptance"
PROGRAM = FOLDER / "run.py"


def rehearse(out, *words):
    done = run_file(PROGRAM, "--cpu-rehearsal", "--out", out, *words)
    report = json.loads((out / "acceptance.json").read_text())
    failed = {name: part["failed"] for name, part in report.items() if "failed" in part}
    assert (done.returncode, failed) == (0, {}), done.stdout + done.stderr
    return done.stdout.splitlines(), report


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path):
    lines, report = rehearse(tmp_path)
    for name in ("conch", "h0mini", "uni", "phikon2", "univ2", "virchow2"):
        assert {"whole", "float32", "bfloat16", "float16"} <= set(report[name]["figures"])
    assert sum(len(part["rows"]) + 1 for part in report.values()) < len(lines)
    assert report["tests"]["figures"]["status"] == 0  # the tests for a GPU were collected without an error


def test_a_section_has_a_limit_of_time_and_the_table_says_so(tmp_path):
    done = run_file(PROGRAM, "--cpu-rehearsal", "--out", tmp_path, "--only", "rates", "--limit-s", "10")
    assert done.returncode == 1
    assert "rates    FAILED  no time was left" in done.stdout
