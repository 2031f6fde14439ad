"""``seal-extract genes``: predict the expression of finished slides, as tables and as pictures."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.features import (
    add_features,
    check_one_file_each,
    decoder_for,
    each_slide,
    given_panel,
    keep_sound,
    read_given,
)
from seal_extract.cli.gene_files import FORMS, write_forms
from seal_extract.cli.options import Parser, add, add_common
from seal_extract.cli.terminal import echo, warn
from seal_extract.errors import UsageError

if TYPE_CHECKING:
    from seal_extract.genes.decoder import GeneDecoder


def genes_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract genes``."""
    p = Parser(
        prog="seal-extract genes",
        description="Predict gene expression from the features of an encoder that has an expression decoder, "
        "such as seal-conch, and write it beside them.",
    )
    p.set_defaults(handler=run)
    add_features(p, "*")
    which = p.add_argument_group("what")
    which.add_argument("--genes", metavar="A,B", help="these genes")
    add(which, "--signature")
    which.add_argument("--all", action="store_true", help="all genes of the decoder")
    which.add_argument(
        "--list",
        action="store_true",
        help="print the genes that can be asked for; with --genes 'KRT*', those that match; of the encoder "
        "that made the features, or of --encoder NAME",
    )
    p.add_argument(
        "--write",
        metavar="FORM,...",
        help=f"any of {', '.join(FORMS)}: a table beside the features, AnnData, tiles for QuPath, heat maps "
        "(default: h5, and png where the slide is found); geojson and png need --genes or --signature",
    )
    p.add_argument("-o", "--out", type=Path, help="folder (default: expression_ENCODER beside the features)")
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files instead of adding to files of the same features and weights",
    )
    add_common(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Print one line per slide; the exit status is 1 if a slide failed."""
    from seal_extract.genes.contents import Contents
    from seal_extract.genes.predict import expression_path, fit_signatures
    from seal_extract.genes.signature import read_signature

    if args.list:
        return _list(args)
    forms = _forms(args)
    slides, damaged = read_given(args.features, args.encoder)
    check_one_file_each(slides, lambda slide: expression_path(slide, args.out))
    decoder = decoder_for(slides, args)
    columns = _columns(args, decoder)
    signatures = [read_signature(text) for text in args.signature]
    for signature in signatures:
        echo(signature.told(decoder))
    slides, damaged = keep_sound(slides, damaged)
    fitted = fit_signatures(slides, decoder, signatures) if signatures else []
    wanted = {slide.path: Contents.of(slide, decoder, columns, fitted) for slide in slides}
    return each_slide(
        slides, damaged, lambda slide: write_forms(slide, decoder, wanted[slide.path], forms, args)
    )


def _list(args: argparse.Namespace) -> int:
    """Print the genes of a decoder, one per line."""
    from seal_extract.genes.decoder import load_decoder

    if args.features:
        decoder = decoder_for(read_given(args.features, args.encoder)[0], args)
    elif args.encoder:
        decoder = load_decoder(
            args.encoder, checkpoint=args.checkpoint, panel=given_panel(args), offline=args.offline
        )
    else:
        raise UsageError("type the -o of a run or --encoder NAME, whose genes are to be listed")
    wanted = [part.strip().upper() for part in (args.genes or "*").split(",") if part.strip()]
    found = [gene for gene in decoder.named() if any(fnmatchcase(gene.upper(), part) for part in wanted)]
    if not found:
        raise UsageError(
            f"none of the {decoder.n_genes} genes of {decoder.name} matches {args.genes}; type for example "
            f"--genes '*{wanted[0].strip('*')[:3]}*'"
        )
    echo(*found)
    return 0


def _forms(args: argparse.Namespace) -> list[str]:
    typed = "h5,png" if args.write is None else args.write
    forms = [form.strip() for form in typed.split(",") if form.strip()]
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise UsageError(f"--write {args.write!r}; allowed: {', '.join(FORMS)}")
    if not (args.genes or args.signature or args.all):
        raise UsageError("type --genes A,B, --signature FILE.gmt:NAME or --all")
    if args.all and not args.signature and not {"h5", "h5ad"} & set(forms):
        raise UsageError(f"--write {typed} needs genes by name; type --genes A,B in place of --all")
    return forms


def _columns(args: argparse.Namespace, decoder: GeneDecoder) -> list[int]:
    if args.all:
        if decoder.genes is None:
            warn(
                f"the {decoder.n_genes} columns of {decoder.name} have no names, because their list is not "
                "published; give --panel genes.txt if you have them"
            )
        return list(range(decoder.n_genes))
    names = [name.strip() for name in (args.genes or "").split(",") if name.strip()]
    return decoder.columns(list(dict.fromkeys(names)))
