"""``seal-extract verify`` and ``export``: one line per file."""

from __future__ import annotations

import argparse
from pathlib import Path

from seal_extract.cli.options import Parser, add_common
from seal_extract.cli.terminal import echo, exit_status, fail


def verify_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract verify``."""
    p = Parser(
        prog="seal-extract verify",
        description="Read every file of a folder as another tool does, and print its problems.",
    )
    p.set_defaults(handler=run_verify)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="the folder that you would give to that tool")
    p.add_argument(
        "--for",
        required=True,
        dest="consumer",
        metavar="TOOL",
        help="clam, trident, patho-bench, stamp or mil-lab",
    )
    add_common(p)
    return p


def run_verify(args: argparse.Namespace) -> int:
    """Print one line per problem; the exit status is 1 if a file has one, 2 if there is no file."""
    from seal_extract.features.verify import files_for, verify

    files, consumer = files_for(args.folder, args.consumer), args.consumer
    problems = verify(args.folder, consumer)
    for problem in problems:
        echo(problem)
    short = {f.path for f in problems if not f.is_warning}
    if short:
        return fail(f"{len(short)} of {len(files)} files are not as {consumer} expects", 1)
    echo(f"{len(files)} of {len(files)} files are as {consumer} expects")
    return 0


def export_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract export``."""
    p = Parser(
        prog="seal-extract export",
        description="Convert the features of a finished run to another layout, without encoding again.",
    )
    p.set_defaults(handler=run_export)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="the -o of a finished run, or a part of it")
    p.add_argument(
        "--layout",
        required=True,
        metavar="NAME",
        help="trident, clam, stamp, flat, anndata or spatialdata",
    )
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for the copies")
    p.add_argument("--overwrite", action="store_true", help="replace files that were made from others")
    p.add_argument(
        "--slides",
        type=Path,
        metavar="FOLDER",
        help="the folder of the slides, if they have moved; anndata and spatialdata hold a picture of one",
    )
    add_common(p)
    return p


def run_export(args: argparse.Namespace) -> int:
    """Print one line per feature file; the exit status is 1 if one could not be exported."""
    from seal_extract.features.export import export

    failed = total = 0
    for exported in export(args.folder, args.layout, args.out, overwrite=args.overwrite, slides=args.slides):
        total += 1
        if exported.error is None:
            echo(exported)
        else:
            failed += 1
            fail(str(exported), 1)
    return exit_status(failed, total, "files")
