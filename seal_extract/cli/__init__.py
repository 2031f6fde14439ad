"""The command line: fills the options, calls the stages, prints one line per slide.

Handlers import what they need: ``seal-extract --help`` must not wait for torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from seal_extract.errors import CheckpointError, HubError, SealExtractError, UsageError

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.plan import ExtractOptions, SlidePlan
    from seal_extract.store import SlideFeatures

SLIDE_SUFFIXES = {
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide"),
    *(".dcm", ".png", ".jpg", ".jpeg"),
}
COMMANDS = """\
commands:
  seal-extract encoders          the encoders to choose from
  seal-extract demo [FOLDER]     make a synthetic slide and an untrained encoder, and run on them
  seal-extract SLIDE --dry-run   what would be read of a slide, without any encoder

example:
  seal-extract slide.svs -o out --encoder seal-conch
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failure, 2 for a usage error, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parsers: dict[str, Callable[[], argparse.ArgumentParser]] = {
        "encoders": _encoders_parser,
        "demo": _demo_parser,
    }
    if argv and argv[0] in parsers:
        args = parsers[argv[0]]().parse_args(argv[1:])
    else:
        args = _extract_parser().parse_args(argv)
    try:
        status: int = args.handler(args)
    except SealExtractError as exc:
        if args.debug:
            raise
        return _fail(str(exc), exc.exit_status)
    except KeyboardInterrupt:
        return _fail("interrupted; finished slides stay, the same command goes on after them", 130)
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except Exception as exc:
        if args.debug:
            raise
        return _fail(f"unexpected {type(exc).__name__}: {_one_line(exc)}; --debug shows where", 1)
    return status


def _extract_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="seal-extract",
        description="Whole-slide images in, patch embeddings out: HDF5 for TRIDENT, Patho-Bench and CLAM.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(handler=_run_extract)
    p.add_argument(
        "slides", nargs="+", type=Path, metavar="SLIDE|FOLDER", help="slide files, or folders of them"
    )
    p.add_argument(
        "-o", "--out", type=Path, default=Path("out"), help="folder for the results (default: out)"
    )

    encoder = p.add_argument_group("encoder")
    encoder.add_argument("--encoder", metavar="NAME", help="a name from `seal-extract encoders`, or a folder")
    encoder.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="a local official weight file (.pth)"
    )
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

    run = p.add_argument_group("run")
    run.add_argument(
        "--batch-size", type=int, metavar="N", help="patches per forward (default: GPU 64, CPU 16)"
    )
    run.add_argument("--workers", type=int, metavar="N", help="reading threads (default: all cores)")
    run.add_argument("--dry-run", action="store_true", help="only print what would be read")
    run.add_argument("--overwrite", action="store_true", help="replace files that other options made")
    _add_common(p)
    return p


def _demo_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="seal-extract demo",
        description="Make a synthetic H&E slide and a small UNTRAINED encoder, and run the tool on them.",
    )
    p.set_defaults(handler=_run_demo)
    p.add_argument("out", nargs="?", type=Path, default=Path("seal_demo"), metavar="FOLDER")
    p.add_argument("--slide", type=Path, help="a slide of your own in place of the synthetic one")
    p.add_argument("--slide-mpp", type=_mpp, metavar="UM", help="µm/px of a slide that does not say it")
    _add_common(p)
    return p


def _encoders_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="seal-extract encoders", description="The encoders to choose from.")
    p.set_defaults(handler=_run_encoders)
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


def _fail(message: str, status: int) -> int:
    print(f"seal-extract: {message}", file=sys.stderr)
    return status


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300]


def _run_extract(args: argparse.Namespace) -> int:
    options = _options(args)
    slides = find_slides(args.slides)
    if args.dry_run:
        return _run_dry(slides, options)
    return _embed(slides, args, options)


def _options(args: argparse.Namespace) -> ExtractOptions:
    from dataclasses import fields

    from seal_extract.plan import ExtractOptions

    return ExtractOptions(**{f.name: getattr(args, f.name) for f in fields(ExtractOptions)})


def find_slides(paths: Sequence[Path]) -> list[Path]:
    """Slide files as given, and those that lie in given folders, by name.

    Raises:
        UsageError: a folder without slides, or two slides of one name, whose results would collide.
    """
    slides: list[Path] = []
    for path in paths:
        inside = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SLIDE_SUFFIXES)
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise UsageError(f"{path} holds no slide; allowed: {' '.join(sorted(SLIDE_SUFFIXES))}")
        slides += inside
    by_name: dict[str, Path] = {}
    for slide in slides:
        other = by_name.setdefault(slide.stem, slide)
        if other is not slide:
            raise UsageError(
                f"{other} and {slide} would both be written as {slide.stem}.h5; "
                f"give them in two runs with two -o"
            )
    return slides


def _run_dry(slides: list[Path], options: ExtractOptions) -> int:
    from seal_extract.plan import plan_slide
    from seal_extract.slide import open_slide

    def line(path: Path) -> str:
        with open_slide(path, mpp=options.slide_mpp) as slide:
            return _row(_dry_cells(plan_slide(slide, options)))

    print(_row(DRY_HEAD))
    return _each(slides, line)


DRY_HEAD = ("slide", "px", "µm/px", "source", "read", "patch", "level-0", "tissue", "patches")
WIDTHS = (28, 15, 7, 24, 18, 18, 8, 10, 8)


def _dry_cells(plan: SlidePlan) -> tuple[str, ...]:
    slide, grid = plan.slide, plan.grid
    return (
        slide.path.name,
        f"{slide.size_l0[0]} x {slide.size_l0[1]}",
        f"{slide.mpp:.4g}",
        slide.mpp_source,
        f"level {grid.level}, {grid.read_px} px",
        f"{grid.patch_px} px at {grid.mpp:.4g}",
        f"{grid.patch_size_l0} px",
        f"{plan.mask.area_mm2:.4g} mm²" if plan.mask is not None else grid.origin,
        str(len(grid)),
    )


def _row(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _each(slides: list[Path], work: Callable[[Path], str]) -> int:
    """Do one slide after the other; a slide that fails is told and counted, the others go on."""
    failed = 0
    for path in slides:
        try:
            print(work(path), flush=True)
        except (UsageError, CheckpointError, HubError):  # the same for every slide
            raise
        except SealExtractError as exc:
            failed += 1
            _fail(f"FAILED {exc}", 1)
    if failed and len(slides) > 1:
        _fail(f"{failed} of {len(slides)} slides failed", 1)
    return 1 if failed else 0


def _embed(slides: list[Path], args: argparse.Namespace, options: ExtractOptions) -> int:
    from seal_extract.encoders.request import EncoderRequest

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are told in our one line
    request = EncoderRequest(
        _encoder_name(args.encoder),
        checkpoint=args.checkpoint,
        revision=args.revision,
        device=args.device,
        precision=args.precision,
        offline=args.offline,
    )
    return _each(slides, lambda path: _embed_one(path, request, args.out, options, args.quiet))


def _embed_one(path: Path, request: EncoderRequest, out: Path, options: ExtractOptions, quiet: bool) -> str:
    """Embed one slide unless it is finished; the closing line."""
    from tqdm import tqdm

    from seal_extract.finished import resume

    started = perf_counter()
    finished = resume(path, request, out, options)
    if finished is not None:
        return f"{path.name}: {len(finished.grid)} patches, finished before -> {finished.path}"

    from seal_extract.extract import extract

    encoder = request.load()
    with tqdm(
        unit="patch", desc=path.name, disable=True if quiet else None, leave=False
    ) as bar:  # None: no terminal

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = extract(path, encoder, out, options=options, progress=progress)
    return _closing_line(path, result, perf_counter() - started)


def _closing_line(path: Path, result: SlideFeatures, seconds: float) -> str:
    slide, n = result.provenance["slide"], len(result.grid)
    if not n:
        return f"{path.name}: 0 patches, no tissue found -> {result.path}; look at its overlay"
    return (
        f"{path.name}: {n} patches by {result.provenance['encoder']['name']}, {slide['mpp']:.4g} µm/px by "
        f"{slide['mpp_source']}, {slide['reader']} ({slide['decoder']}), {seconds:.1f} s, "
        f"{n / seconds:.3g} patches/s -> {result.path}"
    )


def _encoder_name(name: str | None) -> str:
    from seal_extract.encoders import list_encoders

    if name is None:
        names = ", ".join(spec.name for spec in list_encoders())
        raise UsageError(
            f"--encoder is missing; type --encoder NAME with one of {names}, or a folder of yours"
        )
    return name


def _run_encoders(args: argparse.Namespace) -> int:
    from seal_extract.encoders import list_encoders

    row = "{:<12} {:>5}  {:<22} {:<9} {:<36} {}".format
    print(row("name", "D", "trained at", "precision", "licence", "weights, and their gate"))
    for s in list_encoders():
        print(row(s.name, s.dim, f"{s.patch_px} px, {s.mpp:g} µm/px", s.precision, s.licence, s.page))
    return 0


def _run_demo(args: argparse.Namespace) -> int:
    from seal_extract.demo import write_demo_slide, write_untrained_encoder
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.plan import ExtractOptions

    print(f"encoder  {args.out / 'encoder'} (random weights: for trying, never for science)")
    encoder = write_untrained_encoder(args.out / "encoder")
    slide = args.slide or write_demo_slide(args.out)
    print(f"slide    {slide}", flush=True)
    options = ExtractOptions(overwrite=True, slide_mpp=args.slide_mpp)
    print(_embed_one(slide, EncoderRequest(encoder), args.out / "out", options, args.quiet))
    print(f"look at  {args.out / 'out' / 'overlays' / slide.stem}.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
