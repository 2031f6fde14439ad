"""``seal-extract spots``: image and expression embeddings of the spots of spatial transcriptomics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import Parser, add, add_common
from seal_extract.cli.terminal import echo, fail
from seal_extract.errors import CheckpointError, SealExtractError, UsageError

if TYPE_CHECKING:
    from seal_extract.genes.omics import OmicsEncoder


def spots_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract spots``."""
    p = Parser(
        prog="seal-extract spots",
        description="Embed the patch and the expression of every spot of a section, joined by barcode in one "
        "AnnData file: obsm X_image and X_expression.",
    )
    p.set_defaults(handler=run)
    p.add_argument(
        "source",
        type=Path,
        metavar="FOLDER|CONFIG.toml",
        help="a folder of HEST, of Space Ranger (Visium, Visium HD), with NAME.h5ad and NAME.tif, or with "
        "images/, counts/ and spots/; or the configuration of a training run",
    )
    p.add_argument("-o", "--out", type=Path, default=Path("out"), help="folder for NAME.h5ad (default: out)")
    add(p, "--encoder", required=True, help="a SEAL encoder, or a folder")
    add(p, "--checkpoint")
    p.add_argument("--omics", type=Path, metavar="FILE", help="its expression encoder, if in another file")
    add(p, "--panel")
    p.add_argument("--image-only", action="store_true", help="leave out the embeddings of the expression")
    p.add_argument("--no-smooth", action="store_true", help="do not average expression with neighbours")
    p.add_argument("--names", metavar="NAME[,NAME]", help="sections to embed (default: all in the folder)")
    p.add_argument("--slide", metavar="FILE", help="the full-resolution image that Space Ranger was given")
    add(p, "--slide-mpp", help="µm/px of the image, if no file states it")
    add(p, "--mpp", default=0.5)
    add(p, "--patch-px", default=224)
    add(p, "--batch-size", default=64, help="patches per forward pass (default: 64)")
    add(p, "--precision", "--device", "--offline")
    p.add_argument("--overwrite", action="store_true", help="replace files that have another provenance")
    add_common(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Print a line for each section; after a failure go on with the next, and return 1."""
    from seal_extract.encoders import load_encoder
    from seal_extract.evaluate.spots import embed_spots, was_smoothed
    from seal_extract.train.formats import sections_of

    for name, least in (("batch_size", 1), ("patch_px", 1)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: {least} or more")
    names = None if args.names is None else [name.strip() for name in args.names.split(",")]
    sections = sections_of(args.source, names, slide=args.slide, mpp=args.slide_mpp)
    omics = None if args.image_only else _omics(args)
    encoder = load_encoder(
        args.encoder,
        checkpoint=args.checkpoint,
        device=args.device,
        precision=args.precision,
        offline=args.offline,
    )
    failed = 0
    for section in sections:
        try:
            path = embed_spots(
                section,
                encoder,
                args.out,
                omics,
                patch_px=args.patch_px,
                mpp=args.mpp,
                smooth=not args.no_smooth and was_smoothed(args.encoder),
                batch_size=args.batch_size,
                overwrite=args.overwrite,
            )
        except SealExtractError as exc:
            if len(sections) == 1:
                raise
            failed += 1
            fail(f"FAILED {exc}", 1)
            continue
        both = "image and expression" if omics is not None else "image"
        echo(f"{section.name}: {both} embeddings by {encoder.spec.name} -> {path}")
    return 1 if failed else 0


def _omics(args: argparse.Namespace) -> OmicsEncoder:
    from seal_extract.genes.gene_lists import read_panel
    from seal_extract.genes.omics import load_omics

    try:
        omics = load_omics(args.omics or args.encoder, offline=args.offline)
    except (UsageError, CheckpointError) as exc:
        raise type(exc)(f"{exc}; or type --image-only for the embeddings of the patches alone") from exc
    if args.panel is not None:
        omics.genes = read_panel(args.panel)
    return omics
