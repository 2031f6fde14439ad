"""``seal-extract search``: find patches by gene, similarity or profile; compare the genes of a region."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.cli.features import add_features, decoder_for, given_panel, keep_sound, read_given
from seal_extract.cli.options import mpp
from seal_extract.cli.search_results import open_results, query_of, short_names, write_found, write_genes
from seal_extract.cli.terminal import echo
from seal_extract.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from seal_extract.features.store import SlideFeatures
    from seal_extract.genes.index import Found, Index, Rows

BY_LIKENESS = ("patch", "image", "profile")  # queries that an index answers


def add_search_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract search``."""
    p.description = (
        "Find patches of finished slides by gene, signature, expression profile, patch or image, "
        "or the genes of a region. Writes found.csv, a contact sheet and tiles for QuPath, or genes.csv."
    )
    p.set_defaults(handler=run_search)
    add_features(p)
    asked = p.add_mutually_exclusive_group()
    asked.add_argument("--gene", metavar="NAME", help="patches where the predicted expression is highest")
    asked.add_argument("--signature", metavar="FILE.gmt:NAME|A:1,B:-1", help="the same for a set of genes")
    asked.add_argument(
        "--profile", type=Path, metavar="FILE.csv",
        help="patches most similar to the expression of a sample; each line has a gene and its count",
    )  # fmt: skip
    asked.add_argument(
        "--patch",
        metavar="SLIDE:X,Y",
        help="patches most similar to the one at this place, in level-0 pixels",
    )
    asked.add_argument(
        "--image", type=Path, metavar="FILE", help="patches most similar to a picture; needs --image-mpp"
    )
    asked.add_argument(
        "--region", metavar="SLIDE:FILE.geojson", help="genes that differ in the areas drawn on a slide"
    )
    p.add_argument("--image-mpp", type=mpp, metavar="UM", help="µm/px of --image, or 20x")
    p.add_argument("-k", type=int, default=24, metavar="N", help="number of patches to find (default: 24)")
    p.add_argument("--per-slide", type=int, metavar="N", help="highest number of patches from one slide")
    p.add_argument(
        "--permutations", type=int, default=999, metavar="N", help="random draws for --region (default: 999)"
    )
    p.add_argument(
        "--index", choices=["exact", "build", "use"], default="exact",
        help="exact compares every patch; build makes or updates an index beside the features, and answers "
        "--patch, --image and --profile with it; use takes the index as it is (default: exact)",
    )  # fmt: skip
    p.add_argument("-o", "--out", type=Path, help="folder (default: search/QUERY)")
    p.add_argument(
        "--overwrite", action="store_true", help="replace the results of another query in the folder"
    )
    p.add_argument("--omics", type=Path, metavar="FILE", help="the expression encoder, for --profile")


def run_search(args: argparse.Namespace) -> int:
    """Print and write the results; the exit status is 1 if a slide or the pictures were left out."""
    from seal_extract.genes.index import check_one_encoder

    query = query_of(args)
    if query is None and args.index != "build":
        raise UsageError(
            "type what to search for, such as --gene NAME or --patch SLIDE:X,Y, or --index build"
        )
    if query is not None and args.index == "use" and query[0] not in BY_LIKENESS:
        raise UsageError(f"--index use answers {', '.join(BY_LIKENESS)} only; leave it out with --{query[0]}")
    slides, damaged = read_given(args.features, args.encoder)
    check_one_encoder(slides)
    name, outlines = _region(args.region) if args.region is not None else ("", Path())
    if name and args.index == "exact":
        slides = [_named(slides, name)]
    if args.index != "use":
        slides, damaged = keep_sound(slides, damaged)
    index = None if args.index == "exact" else _index(slides, args)
    status = 1 if damaged else 0
    if query is None:
        return status
    if args.region is not None:
        _genes_of_region(_named(slides, name), outlines, args)
        return status
    found = _find(slides, index, args)
    out = open_results(args, slides)
    return max(status, write_found(found, short_names(slides), _sheet(slides, args), out, args.slides))


def _find(slides: list[SlideFeatures], index: Index | None, args: argparse.Namespace) -> list[Found]:
    from seal_extract.genes.gene_lists import Signature, read_signature
    from seal_extract.genes.index import ExactIndex
    from seal_extract.genes.search import search_expression

    if args.gene is not None or args.signature is not None:
        decoder = decoder_for(slides, args)
        if args.gene is not None:
            decoder.columns([args.gene])
            signature = Signature(args.gene, {args.gene: 1.0})
        else:
            signature = read_signature(args.signature)
            echo(signature.coverage(decoder))
        return search_expression(slides, decoder, signature, args.k, per_slide=args.per_slide)
    if args.per_slide is not None:
        raise UsageError("--per-slide applies to --gene and --signature only; leave it out")
    skip = None
    if args.profile is not None:
        query, project = _query_of_profile(slides[0], args)
        if project is not None and args.index != "exact":
            raise UsageError(
                f"--index {args.index} holds embeddings before the projection head, and --profile is "
                "compared behind it; leave --index out"
            )
        if project is not None:
            index = ExactIndex(slides, project=project)
    elif args.patch is not None:
        skip = _patch(slides, args.patch)
        query = skip.slide.features[skip.row]
    else:
        query = _query_of_image(slides[0], args)
    return (index or ExactIndex(slides)).search(query, args.k, skip=skip)


def _query_of_profile(
    slide: SlideFeatures, args: argparse.Namespace
) -> tuple[NDArray[np.float32], Callable[[Rows], Rows] | None]:
    """The embedding of the profile, and the projection of images if both halves have a projection head."""
    from seal_extract.genes.decoder import image_head, recorded_source
    from seal_extract.genes.gene_lists import read_profile
    from seal_extract.genes.omics import compared_behind_heads, load_omics
    from seal_extract.genes.search import embed_profile

    counts = read_profile(args.profile)
    source, revision = recorded_source(slide.provenance, args.encoder, args.omics)
    omics = load_omics(args.omics or source, revision=revision, offline=args.offline)
    omics.genes = given_panel(args) or omics.genes
    embedding, project = embed_profile(omics, counts), None
    made_by = slide.provenance["encoder"]
    if compared_behind_heads(omics, made_by["name"], bool(made_by.get("projection_head"))):
        project = image_head(
            slide.provenance, encoder=args.encoder, checkpoint=args.checkpoint, offline=args.offline
        )
    known = sum(gene in counts for gene in omics.genes or ())
    echo(f"{args.profile.name}: {known} of the {omics.n_genes} genes of {omics.name}; the others count as 0")
    return embedding, project


def _query_of_image(slide: SlideFeatures, args: argparse.Namespace) -> NDArray[np.float32]:
    from seal_extract.encoders import load_encoder
    from seal_extract.genes.decoder import recorded_source
    from seal_extract.genes.search import embed_picture

    if args.image_mpp is None:
        raise UsageError("a picture does not state its scale; give its µm/px, such as --image-mpp 0.5")
    source, revision = recorded_source(slide.provenance, args.encoder, args.checkpoint)
    encoder = load_encoder(
        source,
        checkpoint=args.checkpoint,
        revision=revision,
        precision=slide.provenance["encoder"]["precision"],
        offline=args.offline,
    )
    return embed_picture(encoder, args.image, args.image_mpp, slide)


def _patch(slides: list[SlideFeatures], text: str) -> Found:
    """The patch at ``SLIDE:X,Y``."""
    import numpy as np

    from seal_extract.genes.index import Found

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
            f"no patch of {match[1]} contains ({xy[0]}, {xy[1]}); its {len(slide.grid)} patches lie on tissue"
        )
    return Found(slide, int(np.argmax(inside)), 1.0)


def _named(slides: list[SlideFeatures], name: str) -> SlideFeatures:
    found = [slide for slide in slides if slide.path.stem == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{len(found)} feature files belong to a slide {name}; give one of them in place of the folder"
        )
    near = get_close_matches(name, [slide.path.stem for slide in slides], n=3, cutoff=0.3)
    raise UsageError(
        f"there is no slide {name} here; the nearest are {', '.join(near or [slides[0].path.stem])}"
    )


def _index(slides: list[SlideFeatures], args: argparse.Namespace) -> Index:
    from seal_extract.genes.faiss_index import build, index_folder, open_index

    folder = index_folder(slides)
    if args.index == "use":
        return open_index(slides, folder)
    if any(path.is_file() for path in args.features):
        raise UsageError(
            "--index build needs the -o of a whole run, because it drops slides that are not given"
        )
    index = build(slides, folder)
    echo(f"{index.changes} -> {folder}")
    return index


# --- regions ------------------------------------------------------------------------------------


def _region(text: str) -> tuple[str, Path]:
    """Split ``SLIDE:FILE.geojson``."""
    name, _, file = text.partition(":")
    if not file:
        raise UsageError(f"--region {text!r}; type SLIDE:FILE.geojson with areas drawn in QuPath")
    return name, Path(file)


def _genes_of_region(slide: SlideFeatures, outlines: Path, args: argparse.Namespace) -> None:
    from seal_extract.genes.predict import areas_mm2, patches_inside, region_genes
    from seal_extract.tissue.geojson import read_polygons
    from seal_extract.view.collection import read_outline
    from seal_extract.view.report import outline_path

    polygons, _ = read_polygons(outlines)
    decoder = decoder_for([slide], args)
    inside = patches_inside(slide.grid, polygons)
    found = region_genes(slide, decoder, inside, permutations=args.permutations)
    out = open_results(args, [slide])
    area, tissue = areas_mm2(polygons, read_outline(outline_path(slide)), slide.provenance["slide"]["mpp"])
    on_tissue = (
        "unknown, because its outline is not beside the features" if tissue is None else f"{tissue:.4g} mm²"
    )
    echo(
        f"{found.patches} of {len(slide.grid)} patches inside; area of the region {area:.4g} mm², "
        f"of the tissue in it {on_tissue}; {found.permutations} draws; q: Benjamini-Hochberg over "
        f"{len(found.genes)} genes"
    )
    write_genes(found, out)


def _sheet(slides: list[SlideFeatures], args: argparse.Namespace) -> dict[str, Any]:
    """Title, score and query of the contact sheet."""
    from seal_extract.genes.search import cut_picture

    kind, asked = query_of(args) or ("", "")
    title, score = {
        "gene": ("high predicted expression of", "predicted log1p expression"),
        "signature": ("high signature", "score of the signature"),
        "profile": ("like the profile", "cosine"),
        "patch": ("like the patch", "cosine"),
        "image": ("like the picture", "cosine"),
    }[kind]
    query: Any = None
    if kind == "patch":
        query = _patch(slides, asked)
    elif kind == "image":
        query = cut_picture(args.image, args.image_mpp, slides[0])
    return {"title": f"{title} {asked.rpartition('/')[2]}", "score": score, "query": query}
