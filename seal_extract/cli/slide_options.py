"""The options of ``seal-extract SLIDES``."""

from __future__ import annotations

import argparse
from pathlib import Path

from seal_extract.cli import slides
from seal_extract.cli.options import Parser, add_common, add_logs, add_precision, add_slide_mpp, mpp

COMMANDS = """\
commands:
  seal-extract SLIDE --dry-run    what would be read of a slide, without any encoder
  seal-extract encoders           the encoders to choose from
  seal-extract download NAME ...  their weights, for nodes without network
  seal-extract doctor [SLIDE]     is this machine ready: token, gate, network, cache, CUDA, readers
  seal-extract demo [FOLDER]      make a synthetic slide and an untrained encoder, and run on them
  seal-extract bench [SLIDE]      how fast every stage is here, alone and together
  seal-extract train CONFIG.toml  align an encoder with spatial transcriptomics
  seal-extract spots FOLDER ...   image and expression embeddings of spots of Visium or HEST, in one AnnData
  seal-extract evaluate ...       how much of gene expression an encoder's embeddings hold
  seal-extract verify FOLDER      is all of it as CLAM, TRIDENT, Patho-Bench, STAMP or MIL-Lab reads it
  seal-extract export FOLDER      a finished run in another layout, AnnData or SpatialData
  seal-extract genes OUT ...      predicted expression of a finished run: tables and heat maps
  seal-extract search OUT ...     its patches by gene, signature, profile, patch or picture; genes of a region
  seal-extract view OUT           all of it in the browser
  seal-extract report OUT         a slide in one HTML file, to mail

example:
  seal-extract slide.svs -o out --encoder seal-conch
"""


def slides_parser() -> argparse.ArgumentParser:
    """Options of ``seal-extract SLIDES``."""
    p = Parser(
        prog="seal-extract",
        description="Whole-slide images in, patch embeddings out: HDF5 for TRIDENT, Patho-Bench and CLAM.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(handler=slides.run)
    p.add_argument(
        "slides",
        nargs="+",
        metavar="SLIDE|FOLDER|URL|LIST.csv",
        help="slide files, folders, patterns, URLs; tables with a column slide, and mpp, case_id, roi",
    )
    p.add_argument(
        "-o", "--out", type=Path, default=Path("out"), help="folder for the results (default: out)"
    )

    encoder = p.add_argument_group("encoder")
    encoder.add_argument(
        "--encoder", metavar="NAME[,NAME]", help="names from `seal-extract encoders`, or a folder"
    )
    encoder.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="a local official weight file (.pth)"
    )
    encoder.add_argument(
        "--adapter", metavar="FOLDER", help="a LoRA adapter (PEFT) to merge into it; or owner/repo[/folder]"
    )
    encoder.add_argument(
        "--revision", help="branch, tag or commit on the Hub; main: as it is now (default: the pinned commit)"
    )
    add_precision(encoder)
    encoder.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    encoder.add_argument("--offline", action="store_true", help="never ask the network")

    patches = p.add_argument_group("patches")
    patches.add_argument("--mpp", type=mpp, metavar="UM", help="µm/px, or 20x (default: 0.5)")
    patches.add_argument("--patch-px", type=int, metavar="N", help="side in pixels (default: 224)")
    patches.add_argument(
        "--patches",
        action="store_true",
        help="SLIDE is ready-cut patches: HEST's patches/NAME.h5, an .npz, or a folder of PNG or JPEG; --mpp "
        "is their µm/px, where the file does not state it",
    )
    patches.add_argument(
        "--overlap-px", type=int, default=0, metavar="N", help="overlap of neighbours (default: 0)"
    )
    patches.add_argument(
        "--min-tissue", type=float, default=0.5, metavar="SHARE", help="0 to 1 (default: 0.5)"
    )
    patches.add_argument("--mpp-tolerance", type=float, default=0.05, metavar="SHARE", help=argparse.SUPPRESS)
    patches.add_argument("--allow-upsampling", action="store_true", help="permit --mpp finer than the slide")
    add_slide_mpp(patches)
    patches.add_argument("--roi", type=Path, metavar="PATH", help="tissue as GeoJSON, a file or a folder")
    patches.add_argument(
        "--coords", type=Path, metavar="PATH", help="coordinates of TRIDENT, CLAM or AtlasPatch"
    )
    patches.add_argument(
        "--edges",
        choices=["drop", "keep"],
        default="drop",
        help="patches that would reach past the slide: leave them out, or keep them, white beyond it "
        "(default: drop)",
    )
    patches.add_argument(
        "--resample", choices=["bicubic", "area"], default="bicubic", help="area is faster (default: bicubic)"
    )
    patches.add_argument(
        "--fast-decode", action="store_true", help="decode JPEG at reduced scale: other pixels, see README"
    )

    run = p.add_argument_group("run")
    run.add_argument(
        "--batch-size", type=int, metavar="N", help="patches per forward (default: tried out on a GPU)"
    )
    run.add_argument(
        "--max-read-errors",
        type=int,
        default=0,
        metavar="N",
        help="unreadable patches before a slide fails; their features are zeros (default: 0)",
    )
    run.add_argument("--workers", type=int, metavar="N", help="threads (default: all cores)")
    run.add_argument("--dry-run", action="store_true", help="only print what would be read")
    run.add_argument(
        "--layout",
        default="trident",
        metavar="NAME",
        help="trident, clam, stamp or flat: where files lie and in which form (default: trident)",
    )
    run.add_argument(
        "--overlay",
        choices=["tint", "outline"],
        default="tint",
        help="patches in the picture of a slide: a faint tint, or outlines, which leave the colours of the "
        "stains as they are (default: tint)",
    )
    run.add_argument("--overwrite", action="store_true", help="replace files that other options made")

    run.add_argument(
        "--slide-level",
        action="append",
        default=[],
        metavar="mean|FILE[,...]",
        help="also pool each slide's patches into one embedding: mean, or a CLAM (also its mil) or ABMIL "
        "checkpoint, trained on features of that encoder; attention and class probabilities lie beside",
    )

    cohort = p.add_argument_group("many slides")
    cohort.add_argument("--slide-folder", metavar="FOLDER", help="where the slides of a table lie")
    cohort.add_argument("--retry-failed", action="store_true", help="only those that status.csv says failed")
    cohort.add_argument(
        "--shard", type=slides.shard, metavar="I/N", help="the I-th of N shares of the slides"
    )
    cohort.add_argument(
        "--stage-dir", type=Path, metavar="FOLDER", help="copy the next slides to this fast folder first"
    )
    cohort.add_argument(
        "--stage-gb", type=float, default=50.0, metavar="GB", help="what copies may fill (default: 50)"
    )
    cohort.add_argument(
        "--plan-timeout",
        type=float,
        default=300.0,
        dest="plan_timeout_s",
        metavar="SECONDS",
        help="a slide that is not opened and its tissue not found by then has failed, as has one that takes "
        "more than 6 GB for it (default: 300; 0: no limits)",
    )
    cohort.add_argument("--engine", choices=["ray"], help="all GPUs of a Ray cluster, or of this machine")
    cohort.add_argument("--ray-address", metavar="ADDRESS", help="of a running cluster, or auto")
    cohort.add_argument("--ray-workers", type=int, metavar="N", help="how many (default: one per GPU)")
    cohort.add_argument("--ray-cores", type=int, metavar="N", help="of each worker (default: an equal share)")
    add_logs(p)
    add_common(p)
    return p
