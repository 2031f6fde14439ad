"""``seal-extract report``: one HTML file per slide, to mail to a colleague."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.cli.genes import (
    add_decoder,
    add_slides,
    decoder_for,
    finished_features,
    one_file_each,
    sound_features,
)
from seal_extract.cli.options import Parser, add_common
from seal_extract.cli.terminal import echo, fail
from seal_extract.errors import EncoderError, SealExtractError, UsageError

if TYPE_CHECKING:
    from seal_extract.features.store import SlideFeatures
    from seal_extract.genes.decoder import GeneDecoder


def report_parser() -> argparse.ArgumentParser:
    """Options of ``seal-extract report``."""
    p = Parser(
        prog="seal-extract report",
        description="Write each slide with its embedding, clusters, predicted genes and attention as one "
        "HTML file that opens without a server and without a network.",
    )
    p.set_defaults(handler=run_report)
    p.add_argument(
        "features", nargs="+", type=Path, metavar="SLIDE.h5|OUT", help="features files, or a run's -o"
    )
    p.add_argument("-o", "--out", type=Path, help="folder (default: reports_ENCODER beside the features)")
    genes = p.add_argument_group("genes")
    which = genes.add_mutually_exclusive_group()
    which.add_argument("--genes", metavar="A,B", help="default: the 24 whose prediction varies most")
    which.add_argument("--no-genes", action="store_true", help="none; the decoder is not asked for")
    genes.add_argument(
        "--signature",
        action="append",
        default=[],
        metavar="FILE.gmt:NAME|A:1,B:-1",
        help="the mean of a set of genes, each in standard deviations over the slide; may be repeated",
    )
    genes.add_argument("--panel", type=Path, metavar="FILE", help="the gene of each column, one per line")
    add_decoder(p)
    p.add_argument(
        "--max-px", type=int, default=3000, metavar="N", help="longest side of the picture (default: 3000)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace files that are no reports of ours")
    add_slides(p)
    add_common(p)
    return p


def run_report(args: argparse.Namespace) -> int:
    """A line per slide; 1 if any failed."""
    from seal_extract.genes.index import check_one_encoder
    from seal_extract.genes.signature import read_signature
    from seal_extract.view.report import check_side, report_path

    check_side(args.max_px)
    slides, damaged = finished_features(args.features, args.encoder)
    check_one_encoder(slides)
    one_file_each(slides, lambda slide: report_path(slide, args.out))
    slides, damaged = sound_features(slides, damaged)
    decoder = _decoder(args, slides)
    genes = [g.strip() for g in args.genes.split(",") if g.strip()] if args.genes else None
    signatures = [read_signature(text) for text in args.signature]
    if decoder is not None:  # what no slide can have is told once
        if genes:
            decoder.columns(genes)
        for signature in signatures:
            if len(signature.known_to(decoder)[0]) < len(signature.weights):
                _tell(signature.told(decoder))
    wanted: dict[str, Any] = {
        "decoder": decoder,
        "genes": genes,
        "signatures": signatures,
        "max_px": args.max_px,
        "overwrite": args.overwrite,
    }
    failed = len(damaged)
    for slide in slides:
        try:
            echo(f"{slide.path.stem}: {_one(slide, wanted, args)}")
        except SealExtractError as exc:
            failed += 1
            fail(f"{slide.path.stem}: {exc}", 1)
    return fail(f"{failed} of {len(slides) + len(damaged)} slides failed", 1) if failed else 0


def _one(features: SlideFeatures, wanted: dict[str, Any], args: argparse.Namespace) -> str:
    """Write one slide's; what was written, in words."""
    from seal_extract.features.origin import open_origin
    from seal_extract.view.report import report_path, write_slide_report

    with closing(open_origin(features, args.slides)) as slide:
        path = write_slide_report(features, report_path(features, args.out), slide=slide, **wanted)
    return f"{len(features.grid):,} patches, {path.stat().st_size / 1e6:.1f} MB -> {path}"


def _decoder(args: argparse.Namespace, slides: Sequence[SlideFeatures]) -> GeneDecoder | None:
    """The decoder; None where it has none and no gene was asked for, which is said."""
    from seal_extract.encoders.registry import list_encoders

    asked, name = bool(args.genes or args.signature or args.panel), slides[0].provenance["encoder"]["name"]
    if args.no_genes and asked:
        raise UsageError(
            "--no-genes leaves the decoder out that --signature and --panel need; type one of them"
        )
    if args.no_genes:
        return None
    published = {row.name: row.published for row in list_encoders()}.get(name)
    if not asked and published is not None and not published.decoder:  # its file may have gigabytes
        _tell(f"{name} has no expression decoder; the pages have no genes")
        return None
    try:
        return decoder_for(slides, args)
    except EncoderError as exc:
        if asked or type(exc) is not EncoderError:  # a damaged file or no network is another matter
            raise
        _tell(f"{exc}; the pages have no genes")
        return None


def _tell(line: str) -> None:
    echo(f"seal-extract: {line}", error=True)
