"""``seal-extract search``: patches by gene, by likeness or by profile; genes by region."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.fail import fail
from seal_extract.cli.genes import add_decoder, add_slides, decoder_for, finished_features
from seal_extract.cli.options import add_common, mpp
from seal_extract.errors import SealExtractError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from seal_extract.genes.index import Index, Rows
    from seal_extract.genes.region import RegionGenes
    from seal_extract.genes.search import Found
    from seal_extract.store import SlideFeatures

SHOWN = 15  # lines printed


def search_parser() -> argparse.ArgumentParser:
    """Options of ``seal-extract search``."""
    p = argparse.ArgumentParser(
        prog="seal-extract search",
        description="Find patches of finished slides by gene, signature, expression profile, patch or image, "
        "or the genes of a region. Writes found.csv, a contact sheet and tiles for QuPath.",
    )
    p.set_defaults(handler=run)
    p.add_argument(
        "features", nargs="+", type=Path, metavar="OUT|SLIDE.h5", help="a run's -o, or features files"
    )
    asked = p.add_mutually_exclusive_group(required=True)
    asked.add_argument("--gene", metavar="NAME", help="patches where it is predicted to be highest")
    asked.add_argument("--signature", metavar="FILE.gmt:NAME|A:1,B:-1", help="likewise of a set of genes")
    asked.add_argument(
        "--profile", type=Path, metavar="FILE.csv",
        help="patches most like a sample's expression: a gene and its count in each line",
    )  # fmt: skip
    asked.add_argument(
        "--patch", metavar="SLIDE:X,Y", help="patches most like the one there, in level-0 pixels"
    )
    asked.add_argument(
        "--image", type=Path, metavar="FILE", help="patches most like a picture, with --image-mpp"
    )
    asked.add_argument(
        "--region", metavar="SLIDE:FILE.geojson", help="genes over-represented in the areas drawn on a slide"
    )
    p.add_argument("--image-mpp", type=mpp, metavar="UM", help="µm/px of --image, or 20x")
    p.add_argument("-k", type=int, default=24, metavar="N", help="patches to find (default: 24)")
    p.add_argument("--per-slide", type=int, metavar="N", help="at most so many of one slide")
    p.add_argument("--permutations", type=int, default=999, metavar="N", help="of --region (default: 999)")
    p.add_argument("--panel", type=Path, metavar="FILE", help="the gene of each column, one per line")
    p.add_argument(
        "--index", choices=["exact", "build", "use"], default="exact",
        help="exact looks at every patch; build makes or updates a FAISS index beside the features and uses "
        "it, use takes it as it is (default: exact)",
    )  # fmt: skip
    p.add_argument("-o", "--out", type=Path, default=Path("search"), help="folder (default: search)")
    p.add_argument("--omics", type=Path, metavar="FILE", help="the encoder's expression half, for --profile")
    add_decoder(p)
    add_slides(p)
    add_common(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Print what was found, then where it was written."""
    from seal_extract.genes.index import check_one_encoder

    slides = finished_features(args.features, args.encoder)
    check_one_encoder(slides)
    if args.region is not None:
        return _genes_of_region(slides, args)
    found = _find(slides, args)
    for rank, one in enumerate(found[:SHOWN], 1):
        x, y = one.xy_l0
        print(f"{rank:3}  {one.score:8.4f}  {one.slide.path.stem}  ({x}, {y})")
    return _write(found, _title(args), args)


def _find(slides: list[SlideFeatures], args: argparse.Namespace) -> list[Found]:
    from seal_extract.genes.search import search_expression
    from seal_extract.genes.signature import Signature, read_signature

    if args.gene is not None or args.signature is not None:
        decoder = decoder_for(slides, args)
        if args.gene is not None:
            decoder.columns([args.gene])
            signature = Signature(args.gene, {args.gene: 1.0})
        else:
            signature = read_signature(args.signature)
        return search_expression(slides, decoder, signature, args.k, per_slide=args.per_slide)
    if args.per_slide is not None:
        raise UsageError("--per-slide goes with --gene and --signature; leave it out")
    skip = None
    if args.profile is not None:
        query, project = _query_of_profile(slides[0], args)
        if project is not None:
            return _behind_the_head(slides, project, args).search(query, args.k)
    elif args.patch is not None:
        skip = _patch(slides, args.patch)
        query = skip.slide.features[skip.row]
    else:
        query = _query_of_image(slides[0], args)
    return _index(slides, args).search(query, args.k, skip=skip)


def _query_of_profile(
    slide: SlideFeatures, args: argparse.Namespace
) -> tuple[NDArray[np.float32], Callable[[Rows], Rows] | None]:
    """The profile's embedding, and what brings images into its space where their half has a head."""
    from seal_extract.genes.decoder import image_head, whereabouts
    from seal_extract.genes.omics import compared_behind_heads, load_omics
    from seal_extract.genes.panel import read_panel
    from seal_extract.genes.search import embed_profile, read_profile

    counts = read_profile(args.profile)
    asked = args.encoder or whereabouts(slide.provenance)
    omics = load_omics(args.omics or asked, offline=args.offline)
    if args.panel is not None:
        omics.genes = read_panel(args.panel)
    embedding, project = embed_profile(omics, counts), None
    made_by = slide.provenance["encoder"]
    if compared_behind_heads(omics, made_by["name"], bool(made_by.get("projection_head"))):
        project = image_head(
            slide.provenance, encoder=args.encoder, checkpoint=args.checkpoint, offline=args.offline
        )
    known = sum(gene in counts for gene in omics.genes or ())
    print(f"{args.profile.name}: {known} of the {omics.n_genes} genes of {omics.name}; the others count as 0")
    return embedding, project


def _behind_the_head(
    slides: list[SlideFeatures], project: Callable[[Rows], Rows], args: argparse.Namespace
) -> Index:
    """An index over the images as the expression half sees them; that of FAISS holds them as they are."""
    from seal_extract.genes.index import ExactIndex

    if args.index != "exact":
        raise UsageError(
            f"--index {args.index} holds embeddings before the projection head, and --profile is compared "
            "behind it; leave --index out"
        )
    return ExactIndex(slides, project=project)


def _query_of_image(slide: SlideFeatures, args: argparse.Namespace) -> NDArray[np.float32]:
    from seal_extract.encoders import load_encoder
    from seal_extract.genes.decoder import whereabouts
    from seal_extract.genes.search import embed_picture

    if args.image_mpp is None:
        raise UsageError("a picture does not say its scale; give its µm/px as --image-mpp, such as 0.5")
    encoder = load_encoder(
        args.encoder or whereabouts(slide.provenance),
        checkpoint=args.checkpoint,
        precision=slide.provenance["encoder"]["precision"],
        offline=args.offline,
    )
    return embed_picture(encoder, args.image, args.image_mpp, slide)


def _patch(slides: list[SlideFeatures], text: str) -> Found:
    """The patch that holds a place, as ``SLIDE:X,Y``."""
    import numpy as np

    from seal_extract.genes.search import Found

    match = re.fullmatch(r"(.+):(\d+),(\d+)", text)
    if match is None:
        raise UsageError(
            f"--patch {text!r}; type SLIDE:X,Y in level-0 pixels, such as {slides[0].path.stem}:0,0"
        )
    slide = _named(slides, match[1])
    xy = np.array([int(match[2]), int(match[3])])
    inside = ((slide.grid.xy_l0 <= xy) & (xy < slide.grid.xy_l0 + slide.grid.patch_size_l0)).all(1)
    if not inside.any():
        raise UsageError(
            f"no patch of {match[1]} holds ({xy[0]}, {xy[1]}); its {len(slide.grid)} lie on tissue"
        )
    return Found(slide, int(np.argmax(inside)), 1.0)


def _named(slides: list[SlideFeatures], name: str) -> SlideFeatures:
    found = [slide for slide in slides if slide.path.stem == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{len(found)} features files are of a slide {name}; give one of them in place of the folder"
        )
    near = get_close_matches(name, [slide.path.stem for slide in slides], n=3, cutoff=0.3)
    raise UsageError(
        f"there is no slide {name} here; the nearest are {', '.join(near or [slides[0].path.stem])}"
    )


def _index(slides: list[SlideFeatures], args: argparse.Namespace) -> Index:
    if args.index == "exact":
        from seal_extract.genes.index import ExactIndex

        return ExactIndex(slides)
    from seal_extract.genes.faiss_index import build, index_folder, open_index

    folder = index_folder(slides)
    if args.index == "use":
        return open_index(slides, folder)
    if any(path.is_file() for path in args.features):
        raise UsageError(
            "--index build is of a whole run, for it drops what it is not given; give the run's -o"
        )
    index = build(slides, folder)
    print(f"{index.changes} -> {folder}")
    return index


# --- what is written ----------------------------------------------------------------------------


def _write(found: list[Found], title: str, args: argparse.Namespace) -> int:
    from seal_extract.view.contact_sheet import draw_contact_sheet

    table = args.out / "found.csv"
    head = ("rank", "slide", "row", "x_l0", "y_l0", "patch_size_l0", "score")
    _table(
        table,
        head,
        (
            (rank, one.slide.path.stem, one.row, *one.xy_l0, one.slide.grid.patch_size_l0, f"{one.score:.6g}")
            for rank, one in enumerate(found, 1)
        ),
    )
    _tiles(found, args.out)
    print(f"{len(found)} patches -> {args.out}")
    try:
        draw_contact_sheet(found, args.out / "contact_sheet.png", title, args.slides)
    except SealExtractError as exc:
        return fail(f"no contact sheet: {exc}", 1)
    return 0


def _tiles(found: list[Found], out: Path) -> None:
    """Tiles of each slide for QuPath."""
    import numpy as np

    from seal_extract.geojson import write_patches

    by_slide: dict[Path, list[Found]] = {}
    for one in found:
        by_slide.setdefault(one.slide.path, []).append(one)
    for path, some in by_slide.items():
        slide = some[0].slide
        xy_l0 = slide.grid.xy_l0[[one.row for one in some]]
        scores = {"score": np.array([one.score for one in some])}
        write_patches(out / f"{path.stem}.geojson", xy_l0, slide.grid.patch_size_l0, scores)


def _genes_of_region(slides: list[SlideFeatures], args: argparse.Namespace) -> int:
    from seal_extract.genes.region import patches_inside, region_genes
    from seal_extract.geojson import read_polygons

    name, _, file = args.region.partition(":")
    if not file:
        raise UsageError(f"--region {args.region!r}; type SLIDE:FILE.geojson, of areas drawn in QuPath")
    slide = _named(slides, name)
    polygons, _ = read_polygons(Path(file))
    decoder = decoder_for([slide], args)
    inside = patches_inside(slide.grid, polygons)
    found = region_genes(slide, decoder, inside, permutations=args.permutations)
    _print_genes(found, len(slide.grid))
    table = args.out / "genes.csv"
    head = ("gene", "cohens_d", "mean_inside", "mean_outside", "p_patches", "p_pieces")
    columns = (found.effect, found.inside, found.outside, found.p_patches, found.p_pieces)
    rows = zip(*columns, strict=True)
    _table(
        table, head, ((gene, *(f"{v:.6g}" for v in row)) for gene, row in zip(found.genes, rows, strict=True))
    )
    print(f"{len(found.genes)} genes -> {table}")
    return 0


def _print_genes(found: RegionGenes, patches: int) -> None:
    print(f"{found.patches} of {patches} patches inside; {found.permutations} draws")
    print(f"{'gene':16} {'Cohen d':>8} {'inside':>8} {'outside':>8} {'p patches':>10} {'p pieces':>9}")
    for i, gene in enumerate(found.genes[:SHOWN]):
        print(
            f"{gene:16} {found.effect[i]:8.3f} {found.inside[i]:8.3f} {found.outside[i]:8.3f} "
            f"{found.p_patches[i]:10.3g} {found.p_pieces[i]:9.3g}"
        )


def _table(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    from seal_extract.publish import publish, writing

    with publish(path) as part, writing(path), part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def _title(args: argparse.Namespace) -> str:
    asked = {
        "high predicted expression of": args.gene,
        "high signature": args.signature,
        "like the profile": args.profile,
        "like the patch": args.patch,
        "like the picture": args.image,
    }
    return next(f"{what} {value}" for what, value in asked.items() if value is not None)
