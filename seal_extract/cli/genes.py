"""``seal-extract genes``: write predicted expression of finished slides as tables, tiles and heat maps."""

from __future__ import annotations

import argparse
import re
from contextlib import closing
from dataclasses import replace
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
from seal_extract.cli.options import add, comma_separated
from seal_extract.cli.terminal import echo, warn
from seal_extract.errors import SlideError, SlideOpenError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from seal_extract.features.store import SlideFeatures
    from seal_extract.genes.decoder import GeneDecoder
    from seal_extract.genes.expression_file import GeneSelection
    from seal_extract.genes.predict import SignatureScores

FORMS = ("h5", "h5ad", "geojson", "png")


def add_genes_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract genes``."""
    p.description = (
        "Predict gene expression from the features of an encoder that has an expression decoder, "
        "such as seal-conch, and write it beside them."
    )
    p.set_defaults(handler=run_genes)
    add_features(p, "*")
    which = p.add_argument_group("what")
    which.add_argument("--genes", metavar="A,B", help="these genes")
    add(which, "--signature")
    which.add_argument("--all", action="store_true", help="all genes of the decoder")
    which.add_argument(
        "--list",
        action="store_true",
        help="print the genes that can be asked for, of the encoder that made the features or of --encoder "
        "NAME; with --genes 'KRT*', print the genes that match",
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


def run_genes(args: argparse.Namespace) -> int:
    """Write the files and print one line per slide; the exit status is 1 if a slide failed."""
    from seal_extract.genes.expression_file import GeneSelection, expression_path
    from seal_extract.genes.gene_lists import read_signature
    from seal_extract.genes.predict import fit_signatures

    if args.list:
        return _list(args)
    forms = _forms(args)
    slides, damaged = read_given(args.features, args.encoder)
    check_one_file_each(slides, lambda slide: expression_path(slide, args.out))
    decoder = decoder_for(slides, args)
    columns = _columns(args, decoder)
    signatures = [read_signature(text) for text in args.signature]
    for signature in signatures:
        echo(signature.coverage(decoder))
    slides, damaged = keep_sound(slides, damaged)
    fitted = fit_signatures(slides, decoder, signatures) if signatures else []
    selections = {slide.path: GeneSelection.of(slide, decoder, columns, fitted) for slide in slides}
    return each_slide(
        slides, damaged, lambda slide: _write_forms(slide, decoder, selections[slide.path], forms, args)
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
        raise UsageError("type the -o of a run, or --encoder NAME, to list the genes of its encoder")
    patterns = [pattern.upper() for pattern in comma_separated(args.genes or "*")]
    found = [gene for gene in decoder.named() if any(fnmatchcase(gene.upper(), p) for p in patterns)]
    if not found:
        raise UsageError(
            f"none of the {decoder.n_genes} genes of {decoder.name} matches {args.genes}; type for example "
            f"--genes '*{patterns[0].strip('*')[:3]}*'"
        )
    echo(*found)
    return 0


def _forms(args: argparse.Namespace) -> list[str]:
    typed = "h5,png" if args.write is None else args.write
    forms = comma_separated(typed)
    if not forms or not set(forms) <= set(FORMS):
        raise UsageError(f"--write {args.write!r}; allowed: {', '.join(FORMS)}")
    if not (args.genes or args.signature or args.all):
        raise UsageError("type --genes A,B, --signature FILE.gmt:NAME or --all")
    if args.all and not args.signature and not {"h5", "h5ad"} & set(forms):
        raise UsageError(f"--write {typed} needs genes by name; type --genes A,B in place of --all")
    return forms


def _columns(args: argparse.Namespace, decoder: GeneDecoder) -> list[int]:
    if not args.all:
        return decoder.columns(list(dict.fromkeys(comma_separated(args.genes or ""))))
    if decoder.genes is None:
        warn(
            f"the {decoder.n_genes} columns of {decoder.name} have no names, because their list is not "
            "published; give --panel genes.txt if you have them"
        )
    return list(range(decoder.n_genes))


# --- files ----------------------------------------------------------------------------------------


def _write_forms(
    slide: SlideFeatures,
    decoder: GeneDecoder,
    asked: GeneSelection,
    forms: list[str],
    args: argparse.Namespace,
) -> str:
    """Write the files of one slide; returns their names for the terminal."""
    from seal_extract.genes.expression_file import expression_path, write_expression
    from seal_extract.genes.predict import SignatureScores

    scores = SignatureScores(slide, decoder)
    path, written, problem = expression_path(slide, args.out), [], ""
    if "h5" in forms:
        write_expression(
            slide,
            decoder,
            path,
            asked.columns,
            signatures=asked.signatures,
            scores=scores,
            overwrite=args.overwrite,
        )
        written.append(path)
    if "h5ad" in forms:
        written.append(path.with_suffix(".h5ad"))
        problem = _write_h5ad(slide, decoder, scores, asked, written[-1], args)
    drawn = replace(asked, genes=(), columns=()) if args.all else asked
    if "geojson" in forms and drawn.names:
        written.append(path.with_suffix(".geojson"))
        _write_tiles(slide, decoder, scores, drawn, written[-1], args.overwrite)
    if "png" in forms and len(slide.grid):
        try:
            written += _draw_maps(slide, decoder, scores, drawn, path.with_suffix(""), args)
        except SlideOpenError as exc:
            if args.write is not None:
                names = ", ".join(map(str, written))
                raise SlideOpenError(f"no picture: {exc}{names and f' (written: {names})'}") from exc
            problem = f"; no picture: {exc}"  # png was not typed, and the tables need no slide
    return f"{len(slide.grid):,} patches -> {', '.join(map(str, written)) or 'nothing to draw'}{problem}"


def _write_h5ad(
    slide: SlideFeatures,
    decoder: GeneDecoder,
    scores: SignatureScores,
    asked: GeneSelection,
    path: Path,
    args: argparse.Namespace,
) -> str:
    """Write the table with a picture of the slide; returns the reason if the slide cannot be read."""
    from seal_extract.features.scverse import origin_overview, read_h5ad_provenance, write_h5ad
    from seal_extract.genes.expression_file import table_provenance
    from seal_extract.genes.predict import predicted

    selection = asked.to_write(path, read_h5ad_provenance(path), decoder, overwrite=args.overwrite)
    if selection is None:
        return ""
    overview, problem = None, ""
    try:
        overview = origin_overview(slide, args.slides)
    except SlideError as exc:
        problem = f"; no picture in {path.name}: {exc}"
    write_h5ad(
        slide,
        path,
        overview,
        selection.genes,
        predicted(slide, decoder, selection.columns),
        observed=dict(
            zip((s.name for s in selection.signatures), scores.of(selection.signatures), strict=True)
        ),
        provenance=table_provenance(slide, decoder, selection),
    )
    return problem


def _write_tiles(
    slide: SlideFeatures,
    decoder: GeneDecoder,
    scores: SignatureScores,
    asked: GeneSelection,
    path: Path,
    overwrite: bool,
) -> None:
    from seal_extract.tissue.geojson import read_made_of, write_patches

    selection = asked.to_write(path, read_made_of(path), decoder, overwrite=overwrite)
    if selection is not None:
        values = _values(slide, decoder, scores, selection)
        write_patches(path, slide.grid.xy_l0, slide.grid.patch_size_l0, values, selection.as_json())


def _values(
    slide: SlideFeatures, decoder: GeneDecoder, scores: SignatureScores, selection: GeneSelection
) -> dict[str, NDArray[np.float32]]:
    """Float32 [N] of each gene and signature."""
    from seal_extract.genes.predict import predict_genes

    genes = predict_genes(slide, decoder, selection.columns).T if selection.columns else ()
    return dict(zip(selection.names, [*genes, *scores.of(selection.signatures)], strict=True))


def _draw_maps(
    slide: SlideFeatures,
    decoder: GeneDecoder,
    scores: SignatureScores,
    asked: GeneSelection,
    stem: Path,
    args: argparse.Namespace,
) -> list[Path]:
    """Draw a heat map ``SLIDE_GENE.png`` of each gene and signature."""
    from seal_extract.features.store import open_origin
    from seal_extract.genes.expression_file import LOG1P
    from seal_extract.view.pictures import draw_heatmap, read_made_of

    maps = {}
    for one in asked.each():
        file_name = re.sub(r"[^\w.+-]+", "_", one.names[0])[:80]
        path = stem.with_name(f"{stem.name}_{file_name}.png")
        maps[path] = one.to_write(path, read_made_of(path), decoder, overwrite=args.overwrite)
    missing = {path: selection for path, selection in maps.items() if selection is not None}
    if missing:
        with closing(open_origin(slide, args.slides)) as opened:
            for path, selection in missing.items():
                ((name, values),) = _values(slide, decoder, scores, selection).items()
                count = sum(len(s.weights) for s in selection.signatures)
                draw_heatmap(
                    opened,
                    slide.grid,
                    values,
                    path,
                    name,
                    unit=f"mean of {count} genes, in standard deviations" if count else LOG1P,
                    encoder=decoder.name,
                    made_of=selection.as_json(),
                )
    return list(maps)
