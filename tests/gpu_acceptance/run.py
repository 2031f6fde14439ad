"""Everything that only a GPU can show, in one run of at most eight minutes on a bare machine.

::

    python tests/gpu_acceptance/carry.py FOLDER         where there is a network: the wheels that it needs
    python tests/gpu_acceptance/run.py --wheels FOLDER --out OUT
    python tests/gpu_acceptance/run.py --cpu-rehearsal --out OUT        every section, tiny, without a GPU

The machine has what ``tests/README.md`` lists, and no network. Each section is a process of
its own, with a limit of time: one that fails or hangs costs only what it had still to measure. The table
comes last; all figures are in ``OUT/acceptance.json``, which is written anew after each section.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 480
REHEARSAL_S = 3600
# the limit of each section before the encoders, in seconds; together they leave 300 s to these
SECTIONS = {"rates": 60, "tests": 90, "decoding": 90, "reading": 60}
ENCODERS = ("conch", "h0mini", "uni", "phikon2", "univ2", "virchow2")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack first")
    parser.add_argument("--out", type=Path, default=Path("acceptance"), help="folder for acceptance.json")
    parser.add_argument(
        "--cpu-rehearsal", action="store_true", help="every section on a CPU, with tiny sizes"
    )
    parser.add_argument("--limit-s", type=float, help=f"for all of it (default: {LIMIT_S})")
    parser.add_argument("--only", help="comma-separated names of sections and encoders")
    parser.add_argument(
        "--section", nargs=4, metavar=("NAME", "FOLDER", "UNTIL", "SHARE"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.section:
        return run_section(*args.section, rehearsal=args.cpu_rehearsal)
    args.out.mkdir(parents=True, exist_ok=True)
    limit_s = args.limit_s or (REHEARSAL_S if args.cpu_rehearsal else LIMIT_S)
    until = time() + limit_s - 5  # for the table
    with TemporaryDirectory(prefix="acceptance_") as folder:
        environment = prepare(Path(folder), args.wheels)
        if args.cpu_rehearsal:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        names = [n for n in (*SECTIONS, *ENCODERS) if args.only is None or n in args.only.split(",")]
        report: dict[str, dict] = {}
        for i, name in enumerate(names):
            share = 1 / sum(n in ENCODERS for n in names[i:]) if name in ENCODERS else 1.0
            most = limit_s if args.cpu_rehearsal else SECTIONS.get(name, limit_s)
            limit = min(until - time(), most)
            report[name] = child(name, Path(folder), until, share, limit, environment, args.cpu_rehearsal)
            (args.out / "acceptance.json").write_text(json.dumps(report, indent=1, default=str))
    print_table(report)
    return int(any("failed" in part for part in report.values()))


def prepare(folder: Path, wheels: Path | None) -> dict[str, str]:
    """Unpack the wheels, and a record of this package's version; returns the environment of the sections."""
    site = folder / "site"
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    record = site / f"seal_extract-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: seal-extract\nVersion: {version}\n")
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(site)
    path = os.pathsep.join(filter(None, [str(ROOT), str(site), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}


def child(
    name: str, folder: Path, until: float, share: float, limit: float, environment: dict, rehearsal: bool
) -> dict:
    """Run a section as a process; its part of the report."""
    if limit < 10:
        return {"failed": "no time was left", "rows": []}
    print(f"-- {name}, at most {limit:.0f} s", flush=True)
    part, log, began = folder / f"{name}.json", folder / f"{name}.log", time()
    words = [sys.executable, __file__, "--section", name, str(folder), str(until), str(share)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            words + ["--cpu-rehearsal"] * rehearsal,
            env=environment,
            cwd=ROOT,
            stdout=out,
            stderr=out,
            start_new_session=True,  # so that its own processes end with it
        )
        try:
            why = f"it ended with {code}" if (code := process.wait(limit)) else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            why = f"it took more than {limit:.0f} s"
    said = log.read_text("utf-8", "replace")
    found = json.loads(part.read_text()) if part.exists() else {"rows": []}
    if why:
        found |= {"failed": why, "said": said[-4000:]}
        print(f"   {why}", *said.splitlines()[-12:], sep="\n   ", flush=True)
    return found | {"seconds": time() - began}


def print_table(report: dict[str, dict]) -> None:
    rows = [("what", "figure", "note")]
    for name, part in report.items():
        rows += map(tuple, part["rows"])
        if "failed" in part:
            rows.append((name, "FAILED", part["failed"]))
        rows.append((f"= {name}", f"{part.get('seconds', 0):.0f} s", ""))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for what, figure, note in rows:
        print(f"{what.ljust(widths[0])}  {figure.rjust(widths[1])}  {note}".rstrip())


# --- in the process of a section ----------------------------------------------------------------------


def run_section(name: str, folder: str, until: str, share: str, rehearsal: bool) -> int:
    import decoding
    import embedding
    from card import Card

    card = Card(rehearsal, Path(folder), float(until), float(share))
    work = {"rates": rates, "tests": gpu_tests, "decoding": decoding.decoding, "reading": embedding.reading}
    part = Path(folder) / f"{name}.json"
    for figures, rows in work[name](card) if name in work else embedding.encoder(card, name):
        part.write_text(json.dumps({"figures": figures, "rows": rows}, default=str))
    return 0


def rates(card):
    """What the card does at best: products, copies, and the time that a launch takes."""
    import timm
    import torch
    import triton

    figures = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    figures |= {"triton": triton.__version__, "cores": os.cpu_count()}
    if not card.rehearsal:
        facts = torch.cuda.get_device_properties(card.device)
        figures |= {"card": facts.name, "memory_gb": facts.total_memory / 1e9, "cuda": torch.version.cuda}
    rows = [("machine", str(figures.get("card", "CPU")), ", ".join(f"{k} {v}" for k, v in figures.items()))]
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
    ):
        figures[name] = card.matrix_rate(dtype, tf32) / 1e12
        rows.append((f"matrices, {name}", f"{figures[name]:.1f}", "TFLOP/s"))
    size = card.size(2**30, 2**20)
    there = torch.empty(size, dtype=torch.uint8, device=card.device)
    other, paged = torch.empty_like(there), torch.empty(size, dtype=torch.uint8)
    copies = {"on the card": (other, there), "from pageable memory": (there, paged)}
    if not card.rehearsal:
        copies["from pinned memory"] = (there, torch.empty(size, dtype=torch.uint8, pin_memory=True))
    for name, (to, of) in copies.items():
        figures[name] = size / card.seconds(lambda: to.copy_(of, non_blocking=True)) / 1e9  # noqa: B023
        rows.append((f"copy {name}", f"{figures[name]:.1f}", "GB/s"))
    small = torch.zeros(1, device=card.device)
    launches = 1000
    figures["launch_us"] = card.seconds(lambda: [small.add_(1) for _ in range(launches)]) / launches * 1e6
    rows.append(("launch of a kernel", f"{figures['launch_us']:.1f}", "µs each, by one thread"))
    yield figures, rows


def gpu_tests(card):
    """``pytest -m gpu``, of the files that have such tests."""
    files = [str(p) for p in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in p.read_text("utf-8")]
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "--tb=short", "-p", "no:cacheprovider"]
    words += ["-W", "default", "--continue-on-collection-errors", *files]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        words + ["--collect-only"] * card.rehearsal, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    rows = [
        (
            "pytest -m gpu",
            "ok" if not done.returncode else "FAILED",
            lines[-1] if lines else done.stderr[-200:],
        )
    ]
    rows += [
        (line.split(" ")[0].lower(), "", line[:160])
        for line in lines
        if re.match("(FAILED|ERROR|SKIPPED) ", line)
    ]
    yield {"status": done.returncode, "output": done.stdout[-12_000:], "errors": done.stderr[-2000:]}, rows


if __name__ == "__main__":
    sys.exit(main())
