"""The options of ``seal-extract SLIDES``, and the help page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from seal_extract.cli.options import Parser, add, add_common

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
  seal-extract verify FOLDER      read results as CLAM, TRIDENT, Patho-Bench, STAMP or MIL-Lab reads them
  seal-extract export FOLDER      convert a finished run to another layout, AnnData or SpatialData
  seal-extract genes OUT ...      predict gene expression of a finished run: tables and heat maps
  seal-extract search OUT ...     find patches by gene, signature, profile, patch or picture; compare regions
  seal-extract view OUT           look at a finished run in the browser
  seal-extract report OUT         write each slide as one HTML file to send

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


def slides_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract SLIDES``."""
    p = Parser(
        prog="seal-extract",
        description="Whole-slide images in, patch embeddings out: HDF5 for TRIDENT, Patho-Bench and CLAM.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    add(encoder, "--checkpoint", "--adapter", "--revision", "--precision", "--device", "--offline")

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
    add(run, "--workers")
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
        "--slide-level",
        action="append",
        default=[],
        metavar="mean|FILE[,...]",
        help="also pool the patches of each slide into one embedding: mean, or a CLAM or ABMIL checkpoint "
        "trained on features of that encoder",
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
    add_common(p)
    return p
