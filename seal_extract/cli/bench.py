"""``seal-extract bench``."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import Parser, add, add_common, mpp
from seal_extract.cli.terminal import echo, progress_line
from seal_extract.errors import UsageError

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder

TO_STDOUT = "-"


def bench_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract bench``."""
    p = Parser(
        prog="seal-extract bench",
        description="Measure the speed of every stage alone and of a whole run. Without a slide, bench makes "
        "a large one by repeating the bundled slide. Without an encoder, it takes an UNTRAINED one. If you "
        "give several slides, the stages are measured on the first.",
    )
    p.set_defaults(handler=run)
    p.add_argument("slides", nargs="*", type=Path, metavar="SLIDE")
    p.add_argument("--encoder", metavar="NAME", help="a name from `seal-extract encoders`, or a folder")
    p.add_argument("--checkpoint", type=Path, metavar="FILE", help="a local official weight file (.pth)")
    add(p, "--precision", "--device", "--offline")
    p.add_argument("--mpp", type=mpp, default=0.5, metavar="UM", help="µm/px, or 20x (default: 0.5)")
    p.add_argument("--patch-px", type=int, default=224, metavar="N", help="side in pixels (default: 224)")
    add(p, "--slide-mpp", "--override-mpp")
    p.add_argument("--resample", choices=["bicubic", "area"], default="bicubic")
    p.add_argument("--fast-decode", action="store_true", help="decode JPEG at reduced scale")
    p.add_argument("--batch-size", type=int, metavar="N", help="patches per forward")
    p.add_argument("--workers", type=int, metavar="N", help="threads (default: all cores)")
    p.add_argument("--patches", type=int, default=512, metavar="N", help="of each slide (default: 512)")
    p.add_argument("--repeats", type=int, default=3, metavar="K", help="of each measurement (default: 3)")
    p.add_argument("--against", choices=["openslide"], help="read with OpenSlide + PIL too, in turns")
    p.add_argument("--reading-only", action="store_true", help="without the encoder and the whole")
    p.add_argument(
        "--size-px", type=int, default=16_000, metavar="N", help="side of the slide that bench makes"
    )
    p.add_argument(
        "--tiles",
        choices=["420-256", "420-240", "rgb-256", "rgb-240"],
        default="420-256",
        help="its JPEG tiles: 4:2:0 or RGB 4:4:4, of 256 or 240 px (default: 420-256)",
    )
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="all figures as JSON")
    add_common(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table or JSON."""
    file = _json_file(args.json)
    from seal_extract.bench import BenchOptions, bench
    from seal_extract.encoders.build import pick_device
    from seal_extract.run.options import ExtractOptions

    choices = {f.name: getattr(args, f.name) for f in fields(ExtractOptions) if hasattr(args, f.name)}
    options = BenchOptions(args.patches, args.repeats, args.against == "openslide", args.size_px, args.tiles)
    run = ExtractOptions(**choices)
    progress = progress_line(args.quiet)
    try:
        report = bench(
            args.slides,
            None if args.reading_only else _encoder(args),
            run=run,
            options=options,
            device=pick_device(args.device),
            progress=progress,
        )
    finally:
        progress("")
    text = json.dumps(report.to_json(), indent=1, default=str)
    if args.json is None:
        echo(*report.lines())
    elif file is None:
        echo(*text.split("\n"))
    else:
        _write(file, text)
    return 0


def _json_file(given: str | None) -> Path | None:
    """Where JSON goes, if not to standard output.

    Raises:
        UsageError: ``--json slide.svs`` would write over the slide.
    """
    if given in (None, TO_STDOUT):
        return None
    file = Path(str(given))
    if file.suffix != ".json":
        raise UsageError(f"--json {file} is no name that ends in .json; give slides before --json")
    return file


def _write(file: Path, text: str) -> None:
    from seal_extract.publish import publish

    with publish(file) as part:
        part.write_text(text + "\n", encoding="utf-8")
    echo(f"figures -> {file}")


def _encoder(args: argparse.Namespace) -> Encoder:
    from seal_extract.encoders.request import EncoderRequest

    if args.encoder is not None:
        return EncoderRequest(
            args.encoder,
            checkpoint=args.checkpoint,
            device=args.device,
            precision=args.precision,
            offline=args.offline,
        ).load()
    if args.checkpoint is not None:
        raise UsageError(f"--checkpoint {args.checkpoint} is of no encoder; type --encoder NAME too")
    import torch

    from seal_extract.demo import untrained_encoder
    from seal_extract.encoders.build import pick_device

    encoder = untrained_encoder().to(pick_device(args.device))
    encoder.precision = getattr(torch, encoder.spec.precision_for(encoder.device.type, args.precision))
    return encoder
