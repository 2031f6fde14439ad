"""The command line: fills the options, calls the stages, prints one line per slide.

Handlers import what they need: ``seal-extract --help`` must not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from seal_extract.cli import bench, encoders, slides, verify
from seal_extract.cli.fail import fail
from seal_extract.errors import SealExtractError

COMMANDS = """\
commands:
  seal-extract SLIDE --dry-run    what would be read of a slide, without any encoder
  seal-extract encoders           the encoders to choose from
  seal-extract download NAME ...  their weights, for nodes without network
  seal-extract doctor [SLIDE]     is this machine ready: token, gate, network, cache, CUDA, readers
  seal-extract demo [FOLDER]      make a synthetic slide and an untrained encoder, and run on them
  seal-extract bench [SLIDE]      how fast every stage is here, alone and together
  seal-extract verify FOLDER      is all of it as CLAM, TRIDENT, Patho-Bench, STAMP or MIL-Lab reads it
  seal-extract export FOLDER      a finished run in another layout, AnnData or SpatialData

example:
  seal-extract slide.svs -o out --encoder seal-conch
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failure, 2 for a usage error, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parsers: dict[str, Callable[[], argparse.ArgumentParser]] = {
        "encoders": _encoders_parser,
        "download": _download_parser,
        "doctor": _doctor_parser,
        "demo": _demo_parser,
        "bench": _bench_parser,
        "verify": _verify_parser,
        "export": _export_parser,
    }
    if argv and argv[0] in parsers:
        args = parsers[argv[0]]().parse_args(argv[1:])
    else:
        args = _extract_parser().parse_args(argv)
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
        return fail(f"unexpected {type(exc).__name__}: {_one_line(exc)}; --debug shows where", 1)
    return status


def _extract_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
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
    encoder.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter (PEFT) to merge into it")
    encoder.add_argument("--revision", help="branch, tag or commit on the Hub")
    encoder.add_argument("--precision", choices=["float32", "bfloat16", "float16"])
    encoder.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    encoder.add_argument("--offline", action="store_true", help="never ask the network")

    patches = p.add_argument_group("patches")
    patches.add_argument("--mpp", type=_mpp, default=0.5, metavar="UM", help="µm/px, or 20x (default: 0.5)")
    patches.add_argument(
        "--patch-px", type=int, default=224, metavar="N", help="side in pixels (default: 224)"
    )
    patches.add_argument(
        "--overlap-px", type=int, default=0, metavar="N", help="overlap of neighbours (default: 0)"
    )
    patches.add_argument(
        "--min-tissue", type=float, default=0.5, metavar="SHARE", help="0 to 1 (default: 0.5)"
    )
    patches.add_argument("--mpp-tolerance", type=float, default=0.05, metavar="SHARE", help=argparse.SUPPRESS)
    patches.add_argument("--allow-upsampling", action="store_true", help="permit --mpp finer than the slide")
    patches.add_argument("--slide-mpp", type=_mpp, metavar="UM", help="µm/px of slides that do not say it")
    patches.add_argument("--roi", type=Path, metavar="PATH", help="tissue as GeoJSON, a file or a folder")
    patches.add_argument(
        "--coords", type=Path, metavar="PATH", help="coordinates of TRIDENT, CLAM or AtlasPatch"
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
    run.add_argument("--overwrite", action="store_true", help="replace files that other options made")

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
    cohort.add_argument("--engine", choices=["ray"], help="all GPUs of a Ray cluster, or of this machine")
    cohort.add_argument("--ray-address", metavar="ADDRESS", help="of a running cluster, or auto")
    cohort.add_argument("--ray-workers", type=int, metavar="N", help="how many (default: one per GPU)")
    _add_logs(p)
    _add_common(p)
    return p


def _add_logs(p: argparse.ArgumentParser) -> None:
    p.add_argument("--log-json", metavar="FILE", help="one JSON line an event; - for stderr")
    p.add_argument("--verbose", action="store_true", help="list the files that are ignored")


def _demo_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="seal-extract demo",
        description="Make a synthetic H&E slide and a small UNTRAINED encoder, and run the tool on them.",
    )
    p.set_defaults(handler=encoders.run_demo)
    p.add_argument("out", nargs="?", type=Path, default=Path("seal_demo"), metavar="FOLDER")
    p.add_argument("--slide", type=Path, help="a slide of your own in place of the synthetic one")
    p.add_argument("--slide-mpp", type=_mpp, metavar="UM", help="µm/px of a slide that does not say it")
    _add_common(p)
    return p


def _download_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="seal-extract download",
        description="Fetch the weights of encoders into the Hub's cache; then --offline finds them.",
    )
    p.set_defaults(handler=encoders.run_download)
    p.add_argument("names", nargs="+", metavar="NAME", help="names from `seal-extract encoders`")
    p.add_argument("--revision", help="branch, tag or commit on the Hub")
    _add_common(p)
    return p


def _doctor_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="seal-extract doctor",
        description="Try each thing a run depends on by itself; of a slide, encode 8 patches.",
    )
    p.set_defaults(handler=encoders.run_doctor)
    p.add_argument("slide", nargs="?", type=Path, metavar="SLIDE")
    p.add_argument("--slide-mpp", type=_mpp, metavar="UM", help="µm/px of a slide that does not say it")
    p.add_argument("--offline", action="store_true", help="leave out what asks the network")
    _add_common(p)
    return p


def _bench_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="seal-extract bench",
        description="Measure every stage alone, the whole run, and what limits it: on a synthetic slide and "
        "an UNTRAINED encoder unless others are given. Of several slides, stages are measured on the first.",
    )
    p.set_defaults(handler=bench.run)
    p.add_argument("slides", nargs="*", type=Path, metavar="SLIDE")
    p.add_argument("--encoder", metavar="NAME", help="a name from `seal-extract encoders`, or a folder")
    p.add_argument("--checkpoint", type=Path, metavar="FILE", help="a local official weight file (.pth)")
    p.add_argument("--precision", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    p.add_argument("--offline", action="store_true", help="never ask the network")
    p.add_argument("--mpp", type=_mpp, default=0.5, metavar="UM", help="µm/px, or 20x (default: 0.5)")
    p.add_argument("--patch-px", type=int, default=224, metavar="N", help="side in pixels (default: 224)")
    p.add_argument("--slide-mpp", type=_mpp, metavar="UM", help="µm/px of slides that do not say it")
    p.add_argument("--resample", choices=["bicubic", "area"], default="bicubic")
    p.add_argument("--fast-decode", action="store_true", help="decode JPEG at reduced scale")
    p.add_argument("--batch-size", type=int, metavar="N", help="patches per forward")
    p.add_argument("--workers", type=int, metavar="N", help="threads (default: all cores)")
    p.add_argument("--patches", type=int, default=512, metavar="N", help="of each slide (default: 512)")
    p.add_argument("--repeats", type=int, default=3, metavar="K", help="of each measurement (default: 3)")
    p.add_argument("--against", choices=["openslide"], help="read with OpenSlide + PIL too, in turns")
    p.add_argument("--reading-only", action="store_true", help="without the encoder and the whole")
    p.add_argument("--size-px", type=int, default=12_000, metavar="N", help="of the synthetic slide's side")
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="all figures as JSON")
    _add_common(p)
    return p


def _verify_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="seal-extract verify",
        description="Read every file of a folder as another tool does, and print what falls short of it.",
    )
    p.set_defaults(handler=verify.run_verify)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="the folder that tool would be given")
    p.add_argument(
        "--for",
        required=True,
        dest="consumer",
        metavar="TOOL",
        help="clam, trident, patho-bench, stamp or mil-lab",
    )
    _add_common(p)
    return p


def _export_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="seal-extract export",
        description="Copy the features of a finished run into another layout, without encoding again.",
    )
    p.set_defaults(handler=verify.run_export)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="the -o of a finished run, or a part of it")
    p.add_argument(
        "--layout",
        required=True,
        metavar="NAME",
        help="trident, clam, stamp, flat, anndata or spatialdata",
    )
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for the copies")
    p.add_argument("--overwrite", action="store_true", help="replace files that were made from others")
    _add_common(p)
    return p


def _encoders_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="seal-extract encoders", description="The encoders to choose from.")
    p.set_defaults(handler=encoders.run_table)
    _add_common(p)
    return p


def _add_common(p: argparse.ArgumentParser) -> None:
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    p.add_argument("--version", action="version", version=_version())


def _version() -> str:
    from importlib.metadata import version

    return f"seal-extract {version('seal-extract')}"


def _mpp(text: str) -> float:
    """``0.5``, or ``20x``: magnification is another word for 10 / µm/px."""
    number = float(text.rstrip("xX"))
    if number <= 0:
        raise ValueError(text)
    return 10 / number if text[-1] in "xX" else number


_mpp.__name__ = "µm/px"  # argparse prints it: invalid µm/px value


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """A warning is for the user of the command, who does not care which of our lines it came from."""
    print(f"seal-extract: {message}", file=sys.stderr)


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300]
