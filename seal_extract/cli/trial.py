"""``seal-extract bench`` and ``demo``: try this machine and the tool, also without a slide."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.genes import add_genes_options
from seal_extract.cli.options import add, encoder_request, parser_of
from seal_extract.cli.search import add_search_options
from seal_extract.cli.slides import slides_parser
from seal_extract.cli.terminal import echo, progress_line
from seal_extract.errors import UsageError
from seal_extract.publish import publish

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder

TO_STDOUT = "-"
GENE = "COL3A1"  # a collagen: predicted high in the demo slide's connective tissue, low in its epithelium


def add_bench_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract bench``."""
    p.description = (
        "Measure the speed of every stage alone and of a whole run. Without a slide, bench makes "
        "a large one by repeating the bundled slide. Without an encoder, it takes an UNTRAINED one. If you "
        "give several slides, the stages are measured on the first."
    )
    p.set_defaults(handler=run_bench)
    p.add_argument("slides", nargs="*", type=Path, metavar="SLIDE")
    add(p, "--encoder", "--checkpoint", "--precision", "--device", "--offline")
    p.add_argument(
        "--untrained",
        metavar="NAME",
        help="the random weights in the architecture of an encoder or timm:NAME; needs no file or network",
    )
    add(p, "--mpp", default=0.5)
    add(p, "--patch-px", default=224)
    add(p, "--slide-mpp", "--override-mpp", "--resample", "--fast-decode", "--batch-size", "--workers")
    add(p, "--gpu-decode")
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
    p.add_argument("--json", nargs="?", const=TO_STDOUT, metavar="FILE", help="all figures as JSON")


def run_bench(args: argparse.Namespace) -> int:
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
        with publish(file) as part:
            part.write_text(text + "\n", encoding="utf-8")
        echo(f"figures -> {file}")
    return 0


def _json_file(given: str | None) -> Path | None:
    """The file for JSON; None for standard output.

    Raises:
        UsageError: ``--json slide.svs`` would write over the slide.
    """
    if given is None or given == TO_STDOUT:
        return None
    file = Path(given)
    if file.suffix != ".json":
        raise UsageError(f"--json {file} is no name that ends in .json; give slides before --json")
    return file


def _encoder(args: argparse.Namespace) -> Encoder:
    if args.encoder is not None and args.untrained is not None:
        raise UsageError("--encoder has weights and --untrained has none; give one of them")
    if args.encoder is not None:
        return encoder_request(args.encoder, args).load()
    if args.checkpoint is not None:
        raise UsageError(f"--checkpoint {args.checkpoint} is of no encoder; type --encoder NAME too")
    from seal_extract.demo import UNTRAINED, untrained_encoder
    from seal_extract.encoders.build import pick_device
    from seal_extract.encoders.locate import named_spec

    spec = UNTRAINED
    if args.untrained is not None:
        spec = named_spec(args.untrained)
        spec = replace(spec, name=f"untrained-{spec.name}")
    encoder = untrained_encoder(spec).to(pick_device(args.device))
    encoder.set_precision(encoder.spec.precision_for(encoder.device.type, args.precision))
    return encoder


# --- demo ---------------------------------------------------------------------------------------------


def add_demo_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract demo``."""
    p.description = (
        "Embed a small real slide with the bundled encoder, map a gene on it and search it. "
        "The demo needs no network and no other download."
    )
    p.set_defaults(handler=run_demo)
    p.add_argument("out", nargs="?", type=Path, default=Path("seal_demo"), metavar="FOLDER")
    p.add_argument("--slide", type=Path, help="a slide of yours in place of the bundled one")
    add(p, "--slide-mpp", "--override-mpp")


def run_demo(args: argparse.Namespace) -> int:
    """Run each command as a user would type it, then list the pictures."""
    from seal_extract.demo import demo_slide

    out, slide = args.out, args.slide or demo_slide()
    common = ["--overwrite", *["--quiet"] * args.quiet, *["--debug"] * args.debug]
    embed = [slide, "-o", out, "--encoder", "seal-tiny", *common]
    for option in ("slide_mpp", "override_mpp"):
        if (value := getattr(args, option)) is not None:
            embed += [f"--{option.replace('_', '-')}", value]
    map_gene = [out, "--genes", GENE, "--write", "png", "-o", out / "genes", *common]
    find = [out, "--gene", GENE, "-k", 12, "-o", out / "search", *common]
    echo("This demo uses seal-tiny, an encoder for trying the tool. Do not use it for science.")
    for parser, words in (
        (slides_parser(), embed),
        (parser_of("genes", add_genes_options), map_gene),
        (parser_of("search", add_search_options), find),
    ):
        typed = [str(word) for word in words]
        echo("", f"$ {parser.prog} {shlex.join(typed)}")
        command = parser.parse_args(typed)
        status: int = command.handler(command)
        if status:
            return status
    (features,) = out.glob(f"*/features_seal-tiny/{slide.stem}.h5")
    (overlay,) = out.glob(f"overlays/*/{slide.stem}.jpg")
    echo(
        "",
        f"features                   {features}",
        f"tissue and patches         {overlay}",
        f"predicted {GENE}           {out / 'genes' / f'{slide.stem}_{GENE}.png'}",
        f"patches with most {GENE}   {out / 'search' / 'contact_sheet.png'}",
    )
    return 0
