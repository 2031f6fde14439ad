"""The command line: fills the options, calls the stages, prints one line per slide.

Each command's options stand beside its handler. Handlers import what they need: ``seal-extract --help`` must
not wait for torch.
"""

from __future__ import annotations

import argparse
import errno
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from seal_extract.cli import bench, encoders, evaluate, genes, report, search, spots, train, verify, view
from seal_extract.cli.slide_options import slides_parser
from seal_extract.cli.terminal import echo, fail
from seal_extract.errors import SealExtractError, UsageError

PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "encoders": encoders.encoders_parser,
    "download": encoders.download_parser,
    "doctor": encoders.doctor_parser,
    "demo": encoders.demo_parser,
    "bench": bench.bench_parser,
    "evaluate": evaluate.evaluate_parser,
    "verify": verify.verify_parser,
    "export": verify.export_parser,
    "genes": genes.genes_parser,
    "report": report.report_parser,
    "search": search.search_parser,
    "spots": spots.spots_parser,
    "train": train.train_parser,
    "view": view.view_parser,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failure, 2 for a usage error, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(argv)
    except UsageError as exc:
        return fail(str(exc), exc.exit_status)
    warnings.showwarning = _show_warning
    try:
        status: int = args.handler(args)
    except SealExtractError as exc:
        if args.debug:
            raise
        return fail(str(exc), exc.exit_status)
    except KeyboardInterrupt:
        return fail("interrupted; finished slides stay, the same command goes on after them", 130)
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except Exception as exc:
        if args.debug:
            raise
        if isinstance(exc, OSError) and exc.errno == errno.ENAMETOOLONG:
            return fail(f"{str(exc.filename)[:80]}... is too long for a path; check what was typed", 2)
        return fail(f"unexpected {type(exc).__name__}: {_one_line(exc)}; --debug shows where", 1)
    return status


def _parse(argv: list[str]) -> argparse.Namespace:
    if argv and argv[0] in PARSERS:
        return PARSERS[argv[0]]().parse_args(argv[1:])
    _refuse_mistyped(argv[:1])  # before its options, which those of slides are not
    args = slides_parser().parse_args(argv)
    _refuse_mistyped(args.slides[:1])
    return args


def _refuse_mistyped(first: list[str]) -> None:
    """Refuse a first word that is no file and looks like a command: the words after it are no slides."""
    for word in first:
        near = get_close_matches(word.lower(), PARSERS, n=1, cutoff=0.7)
        if near and not Path(word).exists():
            raise UsageError(
                f"there is no file {word!r}; if the command is meant, type it first: seal-extract {near[0]}"
            )


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """A warning is for the user of the command, who does not care which of our lines it came from."""
    echo(f"seal-extract: {message}", error=True)


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300]
