"""``seal-extract FILE --patches``: embed patches that are cut already, with one line per file or folder."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from seal_extract.cli.options import requested_encoders
from seal_extract.cli.slide_options import slides_parser
from seal_extract.cli.terminal import echo, fail
from seal_extract.errors import SealExtractError, UsageError

# the options that apply to patches that are cut already
ALLOWED = {
    *("slides", "out", "encoder", "checkpoint", "adapter", "revision", "precision", "device", "offline"),
    *("patches", "mpp", "slide_mpp", "layout", "batch_size", "workers", "overwrite"),
    *("quiet", "debug", "handler", "verbose"),
}


def embed_patch_images(args: argparse.Namespace) -> int:
    """Embed each file or folder; the exit status is 1 if one fails, which does not stop the others."""
    from tqdm import tqdm

    from seal_extract.run.patch_images import extract_patches

    _refuse_options(args)
    paths = _inputs(args.slides)
    encoders = [request.load() for request in requested_encoders(args)]
    failed = 0
    for path in paths:
        for encoder in encoders:
            with tqdm(unit="patch", disable=True if args.quiet else None, leave=False) as bar:
                told: list[int] = []

                def show(done: int, total: int, bar: Any = bar, told: list[int] = told) -> None:
                    told.append(done)
                    bar.total = total
                    bar.update(done - bar.n)

                try:
                    made = extract_patches(
                        path,
                        encoder,
                        args.out,
                        mpp=args.mpp,
                        slide_mpp=args.slide_mpp,
                        layout=args.layout,
                        batch_size=args.batch_size,
                        workers=args.workers,
                        overwrite=args.overwrite,
                        progress=show,
                    )
                except SealExtractError as exc:
                    if len(paths) == 1:
                        raise
                    failed += 1
                    fail(f"FAILED {exc}", 1)
                    continue
            slide, grid = made.provenance["slide"], made.grid
            before = "" if told else ", finished before"
            echo(
                f"{path.name}: {len(grid)} ready-cut patches by {encoder.spec.name}, {grid.patch_px} px at "
                f"{grid.mpp:.4g} µm/px by {slide['mpp_source']}{before} -> {made.path}",
            )
    return 1 if failed else 0


def _refuse_options(args: argparse.Namespace) -> None:
    """Refuse options that would cut other patches, rather than ignore them."""
    parser = slides_parser()
    for name, value in vars(args).items():
        if name not in ALLOWED and value != parser.get_default(name):
            raise UsageError(
                f"--{name.replace('_', '-')} does not apply to patches that are cut already; "
                "leave out --patches or this option"
            )


def _inputs(given: list[str]) -> list[Path]:
    """Files and folders; a folder of HDF5 or NPZ files stands for all of them."""
    from seal_extract.slides.patch_files import TABLES

    paths: list[Path] = []
    for path in map(Path, given):
        tables = sorted(p for p in path.iterdir() if p.suffix.lower() in TABLES) if path.is_dir() else []
        paths += tables or [path]
    names = Counter(path.resolve().name if path.is_dir() else path.stem for path in paths)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UsageError(
            f"{twice[0]} is the name of {names[twice[0]]} inputs, whose results would have one name; "
            "give each a run with an -o of its own"
        )
    return paths
