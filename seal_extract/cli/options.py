"""The options that commands share and those of ``seal-extract SLIDES``; how their values are read."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
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
        "metavar": "{float32,tf32,bfloat16,float16}",
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
    "--gpu-decode": {
        "choices": ["auto", "on", "off"],
        "default": "auto",
        "help": "decode JPEG tiles on a GPU, to the same pixels (default: auto, where it can)",
    },
    "--batch-size": {
        "type": int,
        "metavar": "N",
        "help": "patches per forward pass (default: 256 of 224 px on a GPU)",
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


def parser_of(command: str, add_options: Callable[[argparse.ArgumentParser], None]) -> Parser:
    """The parser of ``seal-extract COMMAND``: its own options, and those that every command has."""
    from importlib.metadata import version

    p = Parser(prog=f"seal-extract {command}".rstrip())
    add_options(p)
    p.add_argument("-q", "--quiet", action="store_true", help="show no progress bar")
    add(p, "--debug")
    p.add_argument("--version", action="version", version=f"seal-extract {version('seal-extract')}")
    return p


def comma_separated(text: str) -> list[str]:
    """The parts of ``A, B,C`` without the spaces around them; empty parts are left out."""
    return [part for one in text.split(",") if (part := one.strip())]


def encoder_request(name: str, args: argparse.Namespace) -> EncoderRequest:
    """An encoder with those settings that the command has options for."""
    from seal_extract.encoders.request import EncoderRequest

    settings = ("checkpoint", "adapter", "revision", "device", "precision", "offline")
    return EncoderRequest(name, **{s: getattr(args, s) for s in settings if hasattr(args, s)})


def requested_encoders(args: argparse.Namespace) -> list[EncoderRequest]:
    """The encoders asked for.

    Raises:
        UsageError: a checkpoint, an adapter or a revision is given for several encoders.
    """
    from seal_extract.encoders.registry import DEFAULT

    if args.encoder is None:
        args.encoder = DEFAULT
        warn(NOTE_ON_DEFAULT)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our error message covers its retries
    names: list[str] = [args.encoder] if Path(args.encoder).exists() else args.encoder.split(",")
    if len(names) > 1 and (args.checkpoint or args.adapter or args.revision):
        raise UsageError("--checkpoint, --adapter and --revision belong to one encoder; give one --encoder")
    return [encoder_request(name.strip(), args) for name in names]


# --- seal-extract SLIDES ------------------------------------------------------------------------------

COMMANDS = """\
commands:
  seal-extract SLIDE --dry-run    print what would be read of a slide; needs no encoder
  seal-extract encoders           list the encoders
  seal-extract download NAME ...  fetch weights, for nodes without network
  seal-extract doctor [SLIDE]     test this machine: token, gates, network, cache, CUDA, readers
  seal-extract demo [FOLDER]      embed a small real slide with the bundled encoder
  seal-extract bench [SLIDE]      measure the speed of every stage, alone and together
  seal-extract train CONFIG.toml  align an encoder with spatial transcriptomics
  seal-extract spots FOLDER ...   embed image and expression of the spots of Visium or HEST, as AnnData
  seal-extract evaluate ...       measure how well an encoder's embeddings predict gene expression
  seal-extract evaluate hest ...  run the HEST-Benchmark on an encoder
  seal-extract evaluate slides ...
                                  measure how well labels of patients are predicted from features of slides
  seal-extract evaluate spots ... measure how well classes of spots are told apart
  seal-extract evaluate robustness ...
                                  measure how far scanner and stain show in features
  seal-extract verify FOLDER      read results as CLAM, TRIDENT, Patho-Bench, STAMP or MIL-Lab reads them
  seal-extract export FOLDER      convert a finished run to another layout, AnnData or SpatialData
  seal-extract genes OUT ...      predict gene expression of a finished run: tables and heat maps
  seal-extract search OUT ...     find patches by gene, signature, profile, patch or picture; compare regions
  seal-extract view OUT           look at a finished run in the browser
  seal-extract report OUT         write each slide as one HTML file to send
  seal-extract volume COMMAND     register, train, predict, evaluate: gene expression through a volume

example:
  seal-extract slide.svs -o out --encoder seal-conch
"""


def shard(text: str) -> tuple[int, int]:
    """Read ``2/8`` as the second of eight shares.

    Raises:
        ValueError: the text has another form; argparse reports it.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise ValueError(text)
    return int(found[1]), int(found[2])


def add_slide_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract SLIDES``, and the list of commands."""
    p.description = "Whole-slide images in, patch embeddings out: HDF5 for TRIDENT, Patho-Bench and CLAM."
    p.epilog, p.formatter_class = COMMANDS, argparse.RawDescriptionHelpFormatter
    p.add_argument(
        "slides",
        nargs="+",
        metavar="SLIDE|FOLDER|URL|LIST.csv",
        help="slide files, folders, patterns, URLs, or tables with the column slide and optionally "
        "mpp, case_id and roi",
    )
    p.add_argument(
        "-o", "--out", type=Path, default=Path("out"), help="folder for the results (default: out)"
    )

    encoder = p.add_argument_group("encoder")
    add(encoder, "--encoder", metavar="NAME[,NAME]", help="names from `seal-extract encoders`, or a folder")
    add(encoder, "--checkpoint", "--adapter", "--revision", "--precision")
    add(
        encoder,
        "--device",
        help="cpu, cuda, cuda:1 (default: cuda where there is one); several as cuda:0,cuda:1, or all GPUs as "
        "all: one process for each, which share the slides",
    )
    add(encoder, "--offline")

    patches = p.add_argument_group("patches")
    add(patches, "--mpp", "--patch-px")
    patches.add_argument(
        "--patches",
        action="store_true",
        help="SLIDE holds patches that are cut already: HEST's patches/NAME.h5, an .npz, or a folder of PNG "
        "or JPEG; --mpp is their µm/px if the file does not state it",
    )
    patches.add_argument(
        "--overlap-px", type=int, default=0, metavar="N", help="overlap of neighbouring patches (default: 0)"
    )
    patches.add_argument(
        "--min-tissue",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="least share of tissue in a patch, 0 to 1 (default: 0.5)",
    )
    patches.add_argument("--mpp-tolerance", type=float, default=0.05, metavar="SHARE", help=argparse.SUPPRESS)
    patches.add_argument("--allow-upsampling", action="store_true", help="permit --mpp finer than the slide")
    add(patches, "--slide-mpp", "--override-mpp")
    patches.add_argument("--roi", type=Path, metavar="PATH", help="tissue as GeoJSON: a file or a folder")
    patches.add_argument(
        "--coords", type=Path, metavar="PATH", help="coordinates made by TRIDENT, CLAM or AtlasPatch"
    )
    patches.add_argument(
        "--edges",
        choices=["drop", "keep"],
        default="drop",
        help="leave out patches that reach past the slide, or keep them with white beyond it (default: drop)",
    )
    add(patches, "--resample", "--fast-decode")

    run = p.add_argument_group("run")
    add(run, "--batch-size")
    run.add_argument(
        "--max-read-errors",
        type=int,
        default=0,
        metavar="N",
        help="unreadable patches that a slide may have; their features are zeros (default: 0)",
    )
    add(run, "--workers", "--gpu-decode")
    run.add_argument("--dry-run", action="store_true", help="only print what would be read")
    run.add_argument(
        "--layout",
        default="trident",
        metavar="NAME",
        help="form and place of the files: trident, clam, stamp or flat (default: trident)",
    )
    run.add_argument(
        "--overlay",
        choices=["tint", "outline"],
        default="tint",
        help="show patches in the slide's picture as a faint tint, or as outlines, which leave the colours "
        "of the stain unchanged (default: tint)",
    )
    run.add_argument("--overwrite", action="store_true", help="replace files made with other options")
    run.add_argument(
        "--tokens",
        action="store_true",
        help="also write the tokens of each patch in float16, for segmentation or registration; some 0.5 MB "
        "per patch, and --dry-run says how many GB in all",
    )
    run.add_argument(
        "--slide-level",
        action="append",
        default=[],
        metavar="mean|NAME|FILE[,...]",
        help="also pool the patches of each slide into one embedding: mean; feather-univ2, feather-uni, "
        "feather-conch15, chief=FILE or tangle=FILE; or a CLAM or ABMIL checkpoint trained on features of "
        "that encoder",
    )
    run.add_argument(
        "--patient-level",
        action="append",
        default=[],
        metavar="early|late[,...]",
        help="also pool the slides of each case_id of the table into one embedding by --slide-level: early "
        "takes all their patches as one bag, late the mean of their embeddings",
    )

    cohort = p.add_argument_group("many slides")
    cohort.add_argument("--slide-folder", metavar="FOLDER", help="the folder of the slides of a table")
    cohort.add_argument(
        "--retry-failed", action="store_true", help="only slides that status.csv lists as failed"
    )
    cohort.add_argument(
        "--shard", type=shard, metavar="I/N", help="process the I-th of N shares of the slides"
    )
    cohort.add_argument(
        "--stage-dir", type=Path, metavar="FOLDER", help="copy the next slides to this fast folder first"
    )
    cohort.add_argument(
        "--stage-gb", type=float, default=50.0, metavar="GB", help="space for these copies (default: 50)"
    )
    cohort.add_argument(
        "--plan-timeout",
        type=float,
        default=300.0,
        dest="plan_timeout_s",
        metavar="SECONDS",
        help="time to open a slide and find its tissue; with this limit there is one of 6 GB of memory "
        "(default: 300; 0: no limits)",
    )
    cohort.add_argument("--engine", choices=["ray"], help="use all GPUs of this machine or of a Ray cluster")
    cohort.add_argument("--ray-address", metavar="ADDRESS", help="address of a running cluster, or auto")
    cohort.add_argument(
        "--ray-workers", type=int, metavar="N", help="number of workers (default: one per GPU)"
    )
    cohort.add_argument(
        "--ray-cores", type=int, metavar="N", help="cores of each worker (default: equal shares)"
    )
    add(p, "--log-json", "--verbose")
