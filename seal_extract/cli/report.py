"""``seal-extract report``: write each slide as one HTML file, to send to a colleague."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.features import (
    add_features,
    check_one_file_each,
    decoder_for,
    each_slide,
    keep_sound,
    read_given,
)
from seal_extract.cli.options import Parser, add, add_common
from seal_extract.cli.terminal import warn
from seal_extract.errors import EncoderError, UsageError

if TYPE_CHECKING:
    from seal_extract.features.store import SlideFeatures
    from seal_extract.genes.decoder import GeneDecoder


def report_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract report``."""
    p = Parser(
        prog="seal-extract report",
        description="Write each slide with its embedding, clusters, predicted genes and attention as one "
        "HTML file that opens without a server and without a network.",
    )
    p.set_defaults(handler=run_report)
    add_features(p)
    p.add_argument("-o", "--out", type=Path, help="folder (default: reports_ENCODER beside the features)")
    genes = p.add_argument_group("genes")
    which = genes.add_mutually_exclusive_group()
    which.add_argument("--genes", metavar="A,B", help="default: the 24 whose prediction varies most")
    which.add_argument("--no-genes", action="store_true", help="no genes; the decoder is not loaded")
    add(genes, "--signature")
    p.add_argument(
        "--max-px", type=int, default=3000, metavar="N", help="longest side of the picture (default: 3000)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace files that are not reports of this tool")
    add_common(p)
    return p


def run_report(args: argparse.Namespace) -> int:
    """Print one line per slide; the exit status is 1 if a slide failed."""
    from seal_extract.features.store import open_origin
    from seal_extract.genes.gene_lists import read_signature
    from seal_extract.genes.index import check_one_encoder
    from seal_extract.view.report import check_side, report_path, write_slide_report

    check_side(args.max_px)
    slides, damaged = read_given(args.features, args.encoder)
    check_one_encoder(slides)
    check_one_file_each(slides, lambda slide: report_path(slide, args.out))
    slides, damaged = keep_sound(slides, damaged)
    decoder = _decoder(args, slides)
    genes = [g.strip() for g in args.genes.split(",") if g.strip()] if args.genes else None
    signatures = [read_signature(text) for text in args.signature]
    if decoder is not None:  # genes that no slide can have are reported once
        if genes:
            decoder.columns(genes)
        for signature in signatures:
            if len(signature.known_to(decoder)[0]) < len(signature.weights):
                warn(signature.coverage(decoder))

    def write_one(features: SlideFeatures) -> str:
        with closing(open_origin(features, args.slides)) as slide:
            path = write_slide_report(
                features,
                report_path(features, args.out),
                slide=slide,
                decoder=decoder,
                genes=genes,
                signatures=signatures,
                max_px=args.max_px,
                overwrite=args.overwrite,
            )
        return f"{len(features.grid):,} patches, {path.stat().st_size / 1e6:.1f} MB -> {path}"

    return each_slide(slides, damaged, write_one)


def _decoder(args: argparse.Namespace, slides: Sequence[SlideFeatures]) -> GeneDecoder | None:
    """The decoder; None, with a warning, if there is none and no gene was asked for."""
    from seal_extract.encoders.registry import list_encoders

    asked, name = bool(args.genes or args.signature or args.panel), slides[0].provenance["encoder"]["name"]
    if args.no_genes and asked:
        raise UsageError(
            "--no-genes leaves out the decoder, which --signature and --panel need; type one of them"
        )
    if args.no_genes:
        return None
    published = {row.name: row.published for row in list_encoders()}.get(name)
    if not asked and published is not None and not published.decoder:  # avoids loading gigabytes
        warn(f"{name} has no expression decoder; the pages have no genes")
        return None
    try:
        return decoder_for(slides, args)
    except EncoderError as exc:
        if asked or type(exc) is not EncoderError:  # a damaged file or a network error
            raise
        warn(f"{exc}; the pages have no genes")
        return None
