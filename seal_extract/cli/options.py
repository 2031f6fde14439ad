"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from seal_extract.cli.terminal import warn
from seal_extract.errors import UsageError
from seal_extract.names import shown

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest

NOTE_ON_DEFAULT = (
    "the encoder is seal-tiny, which is bundled for trying the tool and was trained on four sections of one "
    "breast cancer; for science, type --encoder seal-conch or another name of `seal-extract encoders`"
)


class Parser(argparse.ArgumentParser):
    """A parser whose error messages escape control characters of file names."""

    def error(self, message: str) -> NoReturn:
        """Print the message with the usage, and exit with 2."""
        super().error(shown(message))


def mpp(text: str) -> float:
    """Read ``0.5`` as µm/px, and ``20x`` as the magnification of 10 / 20 µm/px."""
    number = float(text.rstrip("xX"))
    if number <= 0:
        raise ValueError(text)
    return 10 / number if text[-1] in "xX" else number


mpp.__name__ = "µm/px"  # argparse prints it: invalid µm/px value


def _precision(text: str) -> str | None:
    from seal_extract.encoders.spec import check_precision

    try:
        return check_precision(text)
    except UsageError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _version() -> str:
    from importlib.metadata import version

    return f"seal-extract {version('seal-extract')}"


SHARED: dict[str, dict[str, Any]] = {
    "--encoder": {"metavar": "NAME|FOLDER", "help": "a name from `seal-extract encoders`, or a folder"},
    "--checkpoint": {"type": Path, "metavar": "FILE", "help": "an official weight file (.pth) on this disk"},
    "--adapter": {
        "metavar": "FOLDER",
        "help": "a LoRA adapter of PEFT to merge into the encoder: a folder, or owner/repo[/folder]",
    },
    "--revision": {
        "metavar": "REVISION",
        "help": "branch, tag or commit on the Hub; main is the newest (default: the pinned commit)",
    },
    "--precision": {
        "type": _precision,
        "metavar": "{float32,bfloat16,float16}",
        "help": "number format of the encoder (default: float32 on a CPU; see `seal-extract encoders`)",
    },
    "--device": {"help": "cpu, cuda, cuda:1 (default: cuda where there is one)"},
    "--offline": {"action": "store_true", "help": "never use the network"},
    "--mpp": {"type": mpp, "metavar": "UM", "help": "µm/px of patches, or 20x (default: 0.5)"},
    "--patch-px": {"type": int, "metavar": "N", "help": "side of a patch in pixels (default: 224)"},
    "--slide-mpp": {
        "type": mpp,
        "metavar": "UM",
        "help": "µm/px of slides for which neither the file nor the table states it",
    },
    "--override-mpp": {
        "type": mpp,
        "metavar": "UM",
        "help": "µm/px of all slides, whatever file and table state",
    },
    "--resample": {
        "choices": ["bicubic", "area"],
        "default": "bicubic",
        "help": "interpolation; area is faster (default: bicubic)",
    },
    "--fast-decode": {
        "action": "store_true",
        "help": "decode JPEG at reduced scale, which changes pixels slightly",
    },
    "--batch-size": {
        "type": int,
        "metavar": "N",
        "help": "patches per forward pass (default: measured on a GPU)",
    },
    "--workers": {"type": int, "metavar": "N", "help": "reading threads (default: all cores)"},
    "--signature": {
        "action": "append",
        "default": [],
        "metavar": "FILE.gmt:NAME|A:1,B:-1",
        "help": "the mean of a set of genes, each in standard deviations over these slides; may be repeated",
    },
    "--panel": {"type": Path, "metavar": "FILE", "help": "the gene of each column, one name per line"},
    "--slides": {"type": Path, "metavar": "FOLDER", "help": "the folder of the slides, if they have moved"},
    "--log-json": {
        "metavar": "FILE",
        "help": "write one JSON object per event to this file; - is standard error",
    },
    "--verbose": {"action": "store_true", "help": "list the files that are ignored"},
    "--debug": {"action": "store_true", "help": "show the traceback of an error"},
}


def add(p: argparse._ActionsContainer, *names: str, **changes: Any) -> None:
    """Add shared options to a parser or a group; ``changes`` replace their settings, such as the help."""
    for name in names:
        p.add_argument(name, **SHARED[name] | changes)


def add_common(p: argparse.ArgumentParser) -> None:
    """Add the options that every command has."""
    p.add_argument("-q", "--quiet", action="store_true", help="show no progress bar")
    add(p, "--debug")
    p.add_argument("--version", action="version", version=_version())


def requested_encoders(args: argparse.Namespace) -> list[EncoderRequest]:
    """The encoders asked for.

    Raises:
        UsageError: a checkpoint, an adapter or a revision is given for several encoders.
    """
    from seal_extract.encoders.registry import DEFAULT
    from seal_extract.encoders.request import EncoderRequest

    if args.encoder is None:
        args.encoder = DEFAULT
        warn(NOTE_ON_DEFAULT)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our error message covers its retries
    names: list[str] = [args.encoder] if Path(args.encoder).exists() else args.encoder.split(",")
    if len(names) > 1 and (args.checkpoint or args.adapter or args.revision):
        raise UsageError("--checkpoint, --adapter and --revision belong to one encoder; give one --encoder")
    settings = ("checkpoint", "adapter", "revision", "device", "precision", "offline")
    chosen = {name: getattr(args, name) for name in settings}
    return [EncoderRequest(name.strip(), **chosen) for name in names]
