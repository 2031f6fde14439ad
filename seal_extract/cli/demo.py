"""``seal-extract demo``: the commands of a first run, on a small real slide that comes with the package."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from seal_extract.cli import genes, search
from seal_extract.cli.options import Parser, add, add_common
from seal_extract.cli.slide_options import slides_parser
from seal_extract.cli.slides import run_slides
from seal_extract.cli.terminal import echo

GENE = "COL3A1"  # a collagen: predicted high in the demo slide's connective tissue, low in its epithelium


def demo_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract demo``."""
    p = Parser(
        prog="seal-extract demo",
        description="Embed a small real slide with the bundled encoder, map a gene on it and search it. "
        "The demo needs no network and no other download.",
    )
    p.set_defaults(handler=run_demo)
    p.add_argument("out", nargs="?", type=Path, default=Path("seal_demo"), metavar="FOLDER")
    p.add_argument("--slide", type=Path, help="a slide of yours in place of the bundled one")
    add(p, "--slide-mpp", "--override-mpp")
    add_common(p)
    return p


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
    for name, parser, run, words in (
        ("", slides_parser, run_slides, embed),
        ("genes", genes.genes_parser, genes.run, map_gene),
        ("search", search.search_parser, search.run, find),
    ):
        typed = [str(word) for word in words]
        echo("", f"$ {shlex.join(['seal-extract', *[name] * bool(name), *typed])}")
        if status := run(parser().parse_args(typed)):
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
