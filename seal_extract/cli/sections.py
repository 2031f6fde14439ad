"""``seal-extract train`` and ``spots``, which read sections of spatial transcriptomics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.features import given_panel
from seal_extract.cli.options import add, encoder_request
from seal_extract.cli.terminal import echo, print_each, progress
from seal_extract.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from seal_extract.genes.omics import OmicsEncoder
    from seal_extract.train.sections import Section


def add_train_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract train``."""
    p.description = (
        "Align an encoder with spatial transcriptomics, by SEAL, multi-scale contrast "
        "or a baseline. The same command resumes a run that was stopped."
    )
    p.set_defaults(handler=run_train)
    p.add_argument("config", type=Path, metavar="CONFIG.toml", help="all options; the README has an example")
    p.add_argument(
        "--check",
        action="store_true",
        help="only check the options, and whether encoder and folders exist; print all options as JSON",
    )


def run_train(args: argparse.Namespace) -> int:
    """Train and write the encoder's folder, or only check the configuration."""
    import msgspec

    from seal_extract.train.config import check, read_config
    from seal_extract.train.formats import names_of

    config = read_config(args.config)
    if args.check:
        check(config, names_of(config.data.sections))
        echo(*msgspec.json.format(msgspec.json.encode(config)).decode().splitlines())
        return 0
    from seal_extract.train.run import run

    trained = run(config, log=progress(args))
    echo(f"use it with  seal-extract slide.svs --encoder {trained.path}")
    return 0


def add_spots_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract spots``."""
    p.description = (
        "Embed the patch and the expression of every spot of a section, joined by barcode in one "
        "AnnData file: obsm X_image and X_expression."
    )
    p.set_defaults(handler=run_spots)
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


def run_spots(args: argparse.Namespace) -> int:
    """Print a line for each section; after a failure go on with the next, and return 1."""
    from seal_extract.evaluate.spots import embed_spots, was_smoothed
    from seal_extract.train.formats import sections_of

    for option, value in (("--batch-size", args.batch_size), ("--patch-px", args.patch_px)):
        if value < 1:
            raise UsageError(f"{option} is {value}; allowed: 1 or more")
    names = None if args.names is None else [name.strip() for name in args.names.split(",")]
    sections = sections_of(args.source, names, slide=args.slide, mpp=args.slide_mpp)
    omics = None if args.image_only else _omics(args)
    encoder = encoder_request(args.encoder, args).load()
    both = "image and expression" if omics is not None else "image"

    def embed(section: Section) -> str:
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
        return f"{section.name}: {both} embeddings by {encoder.spec.name} -> {path}"

    return print_each(sections, embed, alone=len(sections) == 1)


def _omics(args: argparse.Namespace) -> OmicsEncoder:
    from seal_extract.genes.omics import load_omics

    try:
        omics = load_omics(args.omics or args.encoder, offline=args.offline)
    except (UsageError, CheckpointError) as exc:
        raise type(exc)(f"{exc}; or type --image-only for the embeddings of the patches alone") from exc
    omics.genes = given_panel(args) or omics.genes
    return omics
