"""``seal-extract genes``: predicted expression of finished slides, as tables and as pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.gene_files import FORMS, write_forms
from seal_extract.cli.options import Parser, add_common
from seal_extract.cli.terminal import echo, fail
from seal_extract.errors import OutputError, SealExtractError, UsageError

if TYPE_CHECKING:
    from seal_extract.features.store import SlideFeatures
    from seal_extract.genes.decoder import GeneDecoder


def genes_parser() -> argparse.ArgumentParser:
    """Options of ``seal-extract genes``."""
    p = Parser(
        prog="seal-extract genes",
        description="Predict gene expression from the features of an encoder that carries an expression "
        "decoder, such as seal-conch; write it beside them.",
    )
    p.set_defaults(handler=run)
    p.add_argument(
        "features", nargs="*", type=Path, metavar="SLIDE.h5|OUT", help="features files, or a run's -o"
    )
    which = p.add_argument_group("what")
    which.add_argument("--genes", metavar="A,B", help="these genes")
    which.add_argument(
        "--signature",
        action="append",
        default=[],
        metavar="FILE.gmt:NAME|A:1,B:-1",
        help="the mean of a set of genes, each in standard deviations over all these slides; may be repeated",
    )
    which.add_argument("--all", action="store_true", help="all genes of the decoder")
    which.add_argument(
        "--list",
        action="store_true",
        help="print the genes that can be asked for, and stop; with --genes 'KRT*' those alone; of --encoder "
        "NAME, or of the encoder that made the features",
    )
    which.add_argument("--panel", type=Path, metavar="FILE", help="the gene of each column, one per line")
    add_decoder(p)
    p.add_argument(
        "--write",
        metavar="FORM,...",
        help=f"of {', '.join(FORMS)}: a table beside the features, AnnData, tiles for QuPath, heat maps "
        "(default: h5, and png where the slide is found); the last two of genes that are named, not of --all",
    )
    p.add_argument("-o", "--out", type=Path, help="folder (default: expression_ENCODER beside the features)")
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files instead of adding to those of the same features and weights",
    )
    add_slides(p)
    add_common(p)
    return p


def add_decoder(p: argparse.ArgumentParser) -> None:
    """Where the encoder is whose decoder is meant."""
    p.add_argument("--encoder", metavar="NAME|FOLDER", help="that made the features (default: as they say)")
    p.add_argument("--checkpoint", type=Path, metavar="FILE", help="its weights on this disk")
    p.add_argument("--offline", action="store_true", help="never ask the network")


def add_slides(p: argparse.ArgumentParser) -> None:
    """Where the slides are."""
    p.add_argument("--slides", type=Path, metavar="FOLDER", help="that holds the slides, if they have moved")


def run(args: argparse.Namespace) -> int:
    """A line per slide; 1 if any failed."""
    from seal_extract.genes.contents import Contents
    from seal_extract.genes.predict import expression_path, fit_signatures
    from seal_extract.genes.signature import read_signature

    if args.list:
        return _list(args)
    forms = _forms(args)
    slides, damaged = finished_features(args.features, args.encoder)
    one_file_each(slides, lambda slide: expression_path(slide, args.out))
    decoder = decoder_for(slides, args)
    columns = _columns(args, decoder)
    signatures = [read_signature(text) for text in args.signature]
    for signature in signatures:
        echo(signature.told(decoder))
    slides, damaged = sound_features(slides, damaged)
    fitted = fit_signatures(slides, decoder, signatures) if signatures else []
    wanted = [Contents.of(slide, decoder, columns, fitted) for slide in slides]
    failed = len(damaged)
    for slide, asked in zip(slides, wanted, strict=True):
        try:
            echo(f"{slide.path.stem}: {write_forms(slide, decoder, asked, forms, args)}")
        except SealExtractError as exc:
            failed += 1
            fail(f"{slide.path.stem}: {exc}", 1)
    return fail(f"{failed} of {len(slides) + len(damaged)} slides failed", 1) if failed else 0


def _list(args: argparse.Namespace) -> int:
    """The genes of a decoder, one in a line."""
    from seal_extract.genes.decoder import load_decoder
    from seal_extract.genes.panel import read_panel

    if args.features:
        decoder = decoder_for(finished_features(args.features, args.encoder)[0], args)
    elif args.encoder:
        panel = None if args.panel is None else read_panel(args.panel)
        decoder = load_decoder(args.encoder, checkpoint=args.checkpoint, panel=panel, offline=args.offline)
    else:
        raise UsageError("whose genes? type a run's -o, or --encoder NAME")
    wanted = [part.strip().upper() for part in (args.genes or "*").split(",") if part.strip()]
    found = [gene for gene in decoder.named() if any(fnmatchcase(gene.upper(), part) for part in wanted)]
    if not found:
        raise UsageError(
            f"none of the {decoder.n_genes} genes of {decoder.name} is like {args.genes}; type for example "
            f"--genes '*{wanted[0].strip('*')[:3]}*'"
        )
    echo(*found)
    return 0


def finished_features(
    paths: Sequence[Path], encoder: str | None
) -> tuple[list[SlideFeatures], dict[Path, SealExtractError]]:
    """The features files given, and those in folders given; and those that are damaged, which are told.

    Raises:
        UsageError: none is given, or they are of several encoders.
        OutputError: none can be read.
    """
    from seal_extract.features.store import list_features, read_features

    if not paths:
        raise UsageError("type the -o of a finished run, or features files")
    slides: list[SlideFeatures] = []
    damaged: dict[Path, SealExtractError] = {}
    for path in paths:
        try:
            if path.is_dir():
                listed, bad = list_features(path)
                slides, damaged = slides + listed, damaged | bad
            else:
                slides.append(read_features(path))
        except SealExtractError as exc:
            if len(paths) == 1:
                raise
            damaged[path] = exc
    for error in damaged.values():
        fail(str(error), 1)
    if not slides:
        raise OutputError("none of these files can be read; give the -o of a finished run")
    names = sorted({slide.provenance["encoder"]["name"] for slide in slides})
    wanted = [
        s for s in slides if encoder is None or len(names) == 1 or s.provenance["encoder"]["name"] == encoder
    ]
    if len(names) > 1 and (encoder is None or not wanted):
        raise UsageError(f"these are features of {', '.join(names)}; choose one with --encoder")
    return wanted, damaged


def sound_features(
    slides: Sequence[SlideFeatures], damaged: dict[Path, SealExtractError]
) -> tuple[list[SlideFeatures], dict[Path, SealExtractError]]:
    """Those whose rows are all there and finite; the others join the damaged ones, and are told.

    Raises:
        OutputError: none is left.
    """
    from seal_extract.genes.index import sound_slides

    sound, bad = sound_slides(slides)
    for exc in bad.values():
        fail(str(exc), 1)
    if not sound:
        raise OutputError("none of these features files is whole; encode these slides again with --overwrite")
    return sound, damaged | bad


def decoder_for(slides: Sequence[SlideFeatures], args: argparse.Namespace) -> GeneDecoder:
    """The decoder of the one encoder that made all of these, as the options of `add_decoder` say.

    Raises:
        SealExtractError: see `decoder_of`, and `check_one_encoder`.
    """
    from seal_extract.genes.decoder import decoder_of
    from seal_extract.genes.index import check_one_encoder
    from seal_extract.genes.panel import read_panel

    check_one_encoder(slides)
    return decoder_of(
        slides[0].provenance,
        encoder=args.encoder,
        checkpoint=args.checkpoint,
        panel=None if args.panel is None else read_panel(args.panel),
        offline=args.offline,
    )


def one_file_each(slides: Sequence[SlideFeatures], path_of: Callable[[SlideFeatures], Path]) -> None:
    """Refuse two slides that would be written to one file.

    Raises:
        UsageError: there are two.
    """
    seen: dict[Path, Path] = {}
    for features in slides:
        path = path_of(features)
        if path in seen:
            raise UsageError(
                f"{seen[path]} and {features.path} would both become {path.name}; give them in two commands, "
                "each with its own -o"
            )
        seen[path] = features.path


def _forms(args: argparse.Namespace) -> list[str]:
    typed = "h5,png" if args.write is None else args.write
    forms = [form.strip() for form in typed.split(",") if form.strip()]
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise UsageError(f"--write {args.write!r}; allowed: {', '.join(FORMS)}")
    if not (args.genes or args.signature or args.all):
        raise UsageError("type --genes A,B, --signature FILE.gmt:NAME or --all")
    if args.all and not args.signature and not {"h5", "h5ad"} & set(forms):
        raise UsageError(f"--write {typed} is of genes that are named; type --genes A,B in place of --all")
    return forms


def _columns(args: argparse.Namespace, decoder: GeneDecoder) -> list[int]:
    if args.all:
        if decoder.genes is None:
            echo(
                f"seal-extract: the {decoder.n_genes} columns of {decoder.name} have no names, for nobody "
                "has published them; give --panel genes.txt if you have them",
                error=True,
            )
        return list(range(decoder.n_genes))
    names = [name.strip() for name in (args.genes or "").split(",") if name.strip()]
    return decoder.columns(list(dict.fromkeys(names)))
