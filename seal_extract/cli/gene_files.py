"""What ``seal-extract genes`` writes of a slide: a table, AnnData, tiles for QuPath, heat maps."""

from __future__ import annotations

import argparse
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.errors import SlideError, SlideOpenError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from seal_extract.features.store import SlideFeatures
    from seal_extract.genes.contents import Contents
    from seal_extract.genes.decoder import GeneDecoder

FORMS = ("h5", "h5ad", "geojson", "png")


def write_forms(
    slide: SlideFeatures, decoder: GeneDecoder, asked: Contents, forms: list[str], args: argparse.Namespace
) -> str:
    """Write what was asked for of one slide; what was written, in words."""
    from seal_extract.genes.predict import expression_path, write_expression

    path, written = expression_path(slide, args.out), []
    if "h5" in forms:
        write_expression(
            slide, decoder, path, asked.columns, signatures=asked.signatures, overwrite=args.overwrite
        )
        written.append(path)
    problem = ""
    if "h5ad" in forms:
        written.append(path.with_suffix(".h5ad"))
        problem = _write_h5ad(slide, decoder, asked, written[-1], args)
    shown = replace(asked, genes=(), columns=()) if args.all else asked
    if "geojson" in forms and (shown.genes or shown.signatures):
        written.append(path.with_suffix(".geojson"))
        _write_tiles(slide, decoder, shown, written[-1], args.overwrite)
    if "png" in forms and len(slide.grid):
        try:
            written += _draw(slide, decoder, shown, path.with_suffix(""), args)
        except (
            SlideOpenError
        ) as exc:  # expression needs no slide: where nobody typed png, the tables are enough
            if args.write is not None:
                names = ", ".join(str(file) for file in written)
                raise SlideOpenError(
                    f"no picture: {exc}" + (f" (written: {names})" if names else "")
                ) from exc
            problem = f"; no picture: {exc}"
    return f"{len(slide.grid):,} patches -> {', '.join(map(str, written)) or 'nothing to draw'}{problem}"


def _write_h5ad(
    slide: SlideFeatures, decoder: GeneDecoder, asked: Contents, path: Path, args: argparse.Namespace
) -> str:
    """Write the table with a picture of the slide; why there is none, in words."""
    from seal_extract.features.origin import origin_overview
    from seal_extract.features.scverse import read_h5ad_provenance, write_h5ad
    from seal_extract.genes.contents import Contents, file_provenance, to_write
    from seal_extract.genes.predict import predicted, score

    held = Contents.read(read_h5ad_provenance(path), decoder)
    contents = to_write(path, held, asked, overwrite=args.overwrite)
    if contents is None:
        return ""
    overview, problem = None, ""
    try:
        overview = origin_overview(slide, args.slides)
    except SlideError as exc:  # the table is whole without it
        problem = f"; no picture in {path.name}: {exc}"
    write_h5ad(
        slide,
        path,
        overview,
        contents.genes,
        predicted(slide, decoder, contents.columns),
        observed={s.name: score(slide, decoder, s) for s in contents.signatures},
        provenance=file_provenance(slide, decoder, contents),
    )
    return problem


def _write_tiles(
    slide: SlideFeatures, decoder: GeneDecoder, asked: Contents, path: Path, overwrite: bool
) -> None:
    from seal_extract.genes.contents import Contents, to_write
    from seal_extract.tissue.geojson import read_made_of, write_patches

    held = Contents.read(read_made_of(path), decoder)
    contents = to_write(path, held, asked, overwrite=overwrite)
    if contents is not None:
        numbers = _numbers(slide, decoder, contents)
        write_patches(path, slide.grid.xy_l0, slide.grid.patch_size_l0, numbers, contents.entries())


def _numbers(
    slide: SlideFeatures, decoder: GeneDecoder, contents: Contents
) -> dict[str, NDArray[np.float32]]:
    """Float32 [N] of each gene and signature."""
    from seal_extract.genes.predict import predict_genes, score

    rows = predict_genes(slide, decoder, contents.columns)
    genes = dict(zip(contents.genes, rows.T, strict=True))
    return genes | {s.name: score(slide, decoder, s) for s in contents.signatures}


def _draw(
    slide: SlideFeatures, decoder: GeneDecoder, asked: Contents, stem: Path, args: argparse.Namespace
) -> list[Path]:
    """A heat map of each: ``SLIDE_GENE.png``."""
    from seal_extract.features.origin import open_origin
    from seal_extract.genes.contents import LOG1P, Contents, to_write
    from seal_extract.view.heatmap import draw_heatmap, read_made_of

    wanted = {}
    for one in asked.each():
        name = one.names[0]
        path = stem.with_name(f"{stem.name}_{_as_file_name(name)}.png")
        held = Contents.read(read_made_of(path), decoder)
        wanted[path] = to_write(path, held, one, overwrite=args.overwrite)
    if any(wanted.values()):
        with closing(open_origin(slide, args.slides)) as opened:
            for path, contents in wanted.items():
                if contents is not None:
                    ((name, values),) = _numbers(slide, decoder, contents).items()
                    count = sum(len(s.weights) for s in contents.signatures)
                    unit = f"mean of {count} genes, in standard deviations" if count else LOG1P
                    draw_heatmap(
                        opened,
                        slide.grid,
                        values,
                        path,
                        name,
                        unit=unit,
                        encoder=decoder.name,
                        made_of=contents.entries(),
                    )
    return list(wanted)


def _as_file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)[:80]
