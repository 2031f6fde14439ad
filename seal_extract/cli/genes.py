"""``seal-extract genes``: predicted expression of finished slides, as tables and as pictures."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.fail import fail
from seal_extract.cli.options import add_common
from seal_extract.errors import SealExtractError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from seal_extract.genes.decoder import GeneDecoder
    from seal_extract.store import SlideFeatures

FORMS = ("h5", "h5ad", "geojson", "png")


def genes_parser() -> argparse.ArgumentParser:
    """Options of ``seal-extract genes``."""
    p = argparse.ArgumentParser(
        prog="seal-extract genes",
        description="Predict gene expression from the features of an encoder that carries an expression "
        "decoder, such as seal-conch; write it beside them.",
    )
    p.set_defaults(handler=run)
    p.add_argument(
        "features", nargs="+", type=Path, metavar="SLIDE.h5|OUT", help="features files, or a run's -o"
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
    which.add_argument("--panel", type=Path, metavar="FILE", help="the gene of each column, one per line")
    add_decoder(p)
    p.add_argument(
        "--write",
        default="h5,png",
        metavar="FORM,...",
        help=f"of {', '.join(FORMS)}: a table beside the features, AnnData, tiles for QuPath, heat maps "
        "(default: h5,png); the last two of genes that are named, not of --all",
    )
    p.add_argument("-o", "--out", type=Path, help="folder (default: expression_ENCODER beside the features)")
    p.add_argument("--overwrite", action="store_true", help="replace expression of other genes or weights")
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
    from seal_extract.genes.predict import expression_path, signature_scores
    from seal_extract.genes.signature import read_signature

    forms = _forms(args)
    slides = finished_features(args.features, args.encoder)
    one_file_each(slides, lambda slide: expression_path(slide, args.out))
    decoder = decoder_for(slides, args)
    columns = _columns(args, decoder)
    signatures = [read_signature(text) for text in args.signature]
    for signature in signatures:
        known, _ = signature.known_to(decoder)
        print(f"{signature.name}: {len(known)} of {len(signature.weights)} genes are in the panel")
    scored = [signature_scores(slides, decoder, signature) for signature in signatures]
    failed = 0
    for i, slide in enumerate(slides):
        scores = {s.name: values[i] for s, values in zip(signatures, scored, strict=True)}
        try:
            print(f"{slide.path.stem}: {_one(slide, decoder, columns, scores, forms, args)}", flush=True)
        except SealExtractError as exc:
            failed += 1
            fail(f"{slide.path.stem}: {exc}", 1)
    return fail(f"{failed} of {len(slides)} slides failed", 1) if failed else 0


def finished_features(paths: Sequence[Path], encoder: str | None) -> list[SlideFeatures]:
    """The features files given, and those in folders that were given.

    Raises:
        UsageError: there is none, or they are of several encoders.
    """
    from seal_extract.store import list_features, read_features

    slides: list[SlideFeatures] = []
    for path in paths:
        slides += list_features(path) if path.is_dir() else [read_features(path)]
    names = sorted({slide.provenance["encoder"]["name"] for slide in slides})
    wanted = [
        s for s in slides if encoder is None or len(names) == 1 or s.provenance["encoder"]["name"] == encoder
    ]
    if len(names) > 1 and (encoder is None or not wanted):
        raise UsageError(f"these are features of {', '.join(names)}; choose one with --encoder")
    return wanted


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
    forms = [form.strip() for form in args.write.split(",") if form.strip()]
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise UsageError(f"--write {args.write!r}; allowed: {', '.join(FORMS)}")
    if not (args.genes or args.signature or args.all):
        raise UsageError("type --genes A,B, --signature FILE.gmt:NAME or --all")
    return forms


def _columns(args: argparse.Namespace, decoder: GeneDecoder) -> list[int]:
    if args.all:
        if decoder.genes is None:
            print(
                f"seal-extract: the {decoder.n_genes} columns of {decoder.name} have no names, for nobody "
                "has published them; give --panel genes.txt if you have them",
                file=sys.stderr,
            )
        return list(range(decoder.n_genes))
    names = [name.strip() for name in (args.genes or "").split(",") if name.strip()]
    return decoder.columns(list(dict.fromkeys(names)))


@dataclass(frozen=True)
class _Map:
    """Numbers of one slide's patches."""

    values: NDArray[np.float32]  # [N]
    unit: str


def _one(
    slide: SlideFeatures,
    decoder: GeneDecoder,
    columns: list[int],
    scores: dict[str, NDArray[np.float32]],
    forms: list[str],
    args: argparse.Namespace,
) -> str:
    """Write what was asked for of one slide; what was written, in words."""
    from seal_extract.genes.decoder import column_names
    from seal_extract.genes.predict import LOG1P, expression_path, predict_genes, predicted, write_expression
    from seal_extract.geojson import write_patches
    from seal_extract.scverse import write_h5ad

    path, written = expression_path(slide, args.out), []
    names = column_names(decoder)
    genes = [names[i] for i in columns]
    if columns and "h5" in forms:
        write_expression(slide, decoder, path, columns, overwrite=args.overwrite)
        written.append(path)
    if columns and "h5ad" in forms:
        written.append(path.with_suffix(".h5ad"))
        write_h5ad(slide, written[-1], genes, predicted(slide, decoder, columns))
    maps = {name: _Map(values, "standard deviations") for name, values in scores.items()}
    if columns and not args.all:
        rows = predict_genes(slide, decoder, columns)
        maps |= {gene: _Map(values, LOG1P) for gene, values in zip(genes, rows.T, strict=True)}
    if "geojson" in forms and maps:
        written.append(path.with_suffix(".geojson"))
        numbers = {name: one.values for name, one in maps.items()}
        write_patches(written[-1], slide.grid.xy_l0, slide.grid.patch_size_l0, numbers)
    if "png" in forms and maps and len(slide.grid):
        written += _draw(slide, maps, path.with_suffix(""), args.slides)
    return f"{len(slide.grid):,} patches -> {', '.join(str(file) for file in written) or 'nothing to draw'}"


def _draw(slide: SlideFeatures, maps: dict[str, _Map], stem: Path, slides: Path | None) -> list[Path]:
    """A heat map of each: ``SLIDE_GENE.png``."""
    from seal_extract.view.heatmap import draw_heatmap
    from seal_extract.view.origin import open_origin

    written = []
    with closing(open_origin(slide, slides)) as opened:
        for name, one in maps.items():
            written.append(stem.with_name(f"{stem.name}_{_as_file_name(name)}.png"))
            draw_heatmap(opened, slide.grid, one.values, written[-1], name, unit=one.unit)
    return written


def _as_file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)[:80]
