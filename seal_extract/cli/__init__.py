"""The command line: it fills the options, calls the stages, and prints one line per slide.

Each file holds the options and the handlers of one family of commands. Handlers import what they need, so
that ``seal-extract --help`` does not wait for torch.
"""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from seal_extract.cli.encoders import add_doctor_options, add_download_options, add_encoders_options
from seal_extract.cli.evaluate import (
    add_evaluate_options,
    add_hest_options,
    add_labels_options,
    add_robustness_options,
    add_spot_classes_options,
)
from seal_extract.cli.features import add_export_options, add_verify_options
from seal_extract.cli.genes import add_genes_options
from seal_extract.cli.options import parser_of
from seal_extract.cli.search import add_search_options
from seal_extract.cli.sections import add_spots_options, add_train_options
from seal_extract.cli.slides import slides_parser
from seal_extract.cli.terminal import fail, warn
from seal_extract.cli.trial import add_bench_options, add_demo_options
from seal_extract.cli.view import add_report_options, add_view_options
from seal_extract.cli.volume import (
    add_volume_evaluate_options,
    add_volume_options,
    add_volume_predict_options,
    add_volume_register_options,
    add_volume_train_options,
)
from seal_extract.errors import SealExtractError, UsageError, first_line

COMMANDS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "encoders": add_encoders_options,
    "download": add_download_options,
    "doctor": add_doctor_options,
    "demo": add_demo_options,
    "bench": add_bench_options,
    "evaluate": add_evaluate_options,
    "evaluate hest": add_hest_options,
    "evaluate robustness": add_robustness_options,
    "evaluate slides": add_labels_options,
    "evaluate spots": add_spot_classes_options,
    "verify": add_verify_options,
    "export": add_export_options,
    "genes": add_genes_options,
    "report": add_report_options,
    "search": add_search_options,
    "spots": add_spots_options,
    "train": add_train_options,
    "view": add_view_options,
    "volume": add_volume_options,
    "volume evaluate": add_volume_evaluate_options,
    "volume predict": add_volume_predict_options,
    "volume register": add_volume_register_options,
    "volume train": add_volume_train_options,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failure, 2 for a usage error, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(argv)
        args.typed = shlex.join(["seal-extract", *argv])
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
        return fail("Interrupted. Finished slides are kept; run the same command again to continue.", 130)
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except Exception as exc:
        if args.debug:
            raise
        if isinstance(exc, OSError) and exc.errno == errno.ENAMETOOLONG:
            return fail(f"{str(exc.filename)[:80]}... is too long for a path; check the command", 2)
        return fail(f"unexpected {type(exc).__name__}: {first_line(exc)}; type --debug to see where", 1)
    return status


def _parse(argv: list[str]) -> argparse.Namespace:
    for words in (2, 1):
        command = " ".join(argv[:words])
        if command in COMMANDS:
            return parser_of(command, COMMANDS[command]).parse_args(argv[words:])
    _refuse_mistyped(argv[:1])  # checked first, because the options of a command are not those of slides
    args = slides_parser().parse_args(argv)
    _refuse_mistyped(args.slides[:1])
    return args


def _refuse_mistyped(first: list[str]) -> None:
    """Refuse a first word that is not a file but resembles a command."""
    for word in first:
        near = get_close_matches(word.lower(), COMMANDS, n=1, cutoff=0.7)
        if near and not Path(word).exists():
            raise UsageError(
                f"there is no file {word!r}; if you mean the command, type: seal-extract {near[0]}"
            )


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """Print a warning without the file and line that it came from."""
    warn(str(message))
