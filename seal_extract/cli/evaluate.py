"""``seal-extract evaluate``: prints and writes the tables of an evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import Parser, add, add_common
from seal_extract.cli.terminal import echo, progress_line

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest


def evaluate_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract evaluate``."""
    p = Parser(
        prog="seal-extract evaluate",
        description="Predict gene expression from an encoder's embeddings by the HEST-Benchmark's protocol, "
        "and retrieve spots by image. The tables compare permuted rows, handcrafted features and the encoder "
        "before alignment.",
    )
    p.set_defaults(handler=run)
    add(
        p,
        "--encoder",
        required=True,
        help="a name or a folder; {fold} in it stands for what is held out, with an encoder for each",
    )
    p.add_argument("--base", metavar="NAME|FOLDER", help="the same encoder before alignment")
    p.add_argument(
        "--sections",
        required=True,
        type=Path,
        metavar="CONFIG.toml|FOLDER",
        help="the configuration of a training run, or a folder of sections, as of `seal-extract spots`",
    )
    p.add_argument("--by", default="section", metavar="WHAT", help="section or patient (default: section)")
    p.add_argument(
        "--genes", type=int, default=250, metavar="N", help="number of most variable genes (default: 250)"
    )
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for evaluation.md, .csv and .json")
    p.add_argument("--overwrite", action="store_true", help="replace the files of another evaluation")
    add(p, "--mpp", default=0.5)
    add(p, "--patch-px", default=224)
    add(p, "--batch-size", default=64, help="patches per forward pass (default: 64)")
    p.add_argument("--seeds", type=int, default=10, metavar="N", help="permutations of rows (default: 10)")
    add(p, "--precision", "--device", "--offline")
    add_common(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Print the tables, and where they were written."""
    from seal_extract.evaluate.run import EvaluateOptions, evaluate, output_files
    from seal_extract.train.formats import sections_of

    options = EvaluateOptions(args.by, args.genes, args.patch_px, args.mpp, args.batch_size, args.seeds)
    output_files(args.out, args.overwrite)
    encoder = _request(args.encoder, args)
    base = None if args.base is None else _request(args.base, args)
    sections = sections_of(args.sections)
    show = progress_line(args.quiet)
    try:
        found = evaluate(sections, encoder, base, options=options, log=show)
    finally:
        show("")
    echo(*found.to_markdown().split("\n"))
    for file in found.write(args.out, overwrite=args.overwrite):
        echo(f"-> {file}")
    return 0


def _request(name: str, args: argparse.Namespace) -> EncoderRequest:
    from seal_extract.encoders.request import EncoderRequest

    return EncoderRequest(name, device=args.device, precision=args.precision, offline=args.offline)
