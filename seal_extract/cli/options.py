"""Options that commands share, and how their values are read."""

from __future__ import annotations

import argparse
from typing import NoReturn

from seal_extract.errors import UsageError
from seal_extract.names import shown


class Parser(argparse.ArgumentParser):
    """A parser whose errors may hold any file name: one that begins with a dash looks like an option."""

    def error(self, message: str) -> NoReturn:
        """Print it with the usage, and exit with 2."""
        super().error(shown(message))


def add_logs(p: argparse.ArgumentParser) -> None:
    """How much is told, and where."""
    p.add_argument("--log-json", metavar="FILE", help="one JSON line an event; - for stderr")
    p.add_argument("--verbose", action="store_true", help="list the files that are ignored")


def add_common(p: argparse.ArgumentParser) -> None:
    """What every command takes."""
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    p.add_argument("--version", action="version", version=_version())


def add_precision(p: argparse._ActionsContainer) -> None:
    """What the encoder computes in; short names are taken too."""
    p.add_argument(
        "--precision",
        type=_precision,
        metavar="{float32,bfloat16,float16}",
        help="what the encoder computes in (default: as `seal-extract encoders` says, float32 on a CPU)",
    )


def _precision(text: str) -> str | None:
    from seal_extract.encoders.spec import check_precision

    try:
        return check_precision(text)
    except UsageError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def add_slide_mpp(p: argparse._ActionsContainer) -> None:
    """The µm/px of slides."""
    p.add_argument(
        "--slide-mpp", type=mpp, metavar="UM", help="µm/px of slides whose file and table do not say it"
    )
    p.add_argument(
        "--override-mpp", type=mpp, metavar="UM", help="µm/px of all slides, whatever file and table say"
    )


def _version() -> str:
    from importlib.metadata import version

    return f"seal-extract {version('seal-extract')}"


def mpp(text: str) -> float:
    """``0.5``, or ``20x``: magnification is another word for 10 / µm/px."""
    number = float(text.rstrip("xX"))
    if number <= 0:
        raise ValueError(text)
    return 10 / number if text[-1] in "xX" else number


mpp.__name__ = "µm/px"  # argparse prints it: invalid µm/px value
