"""``seal-extract evaluate``: the comparison's tables, printed and written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import Parser, add, add_common, mpp
from seal_extract.cli.terminal import echo, progress_line

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest


def evaluate_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract evaluate``."""
    p = Parser(
        prog="seal-extract evaluate",
        description="Predict gene expression from an encoder's embeddings by the HEST-Benchmark's protocol, "
        "and find spots by image: beside permuted rows, hand-made features and the encoder before alignment.",
    )
    p.set_defaults(handler=run)
    p.add_argument(
        "--encoder",
        required=True,
        metavar="NAME|FOLDER",
        help="{fold} in a folder stands for the section or patient held out: one encoder for each",
    )
    p.add_argument("--base", metavar="NAME|FOLDER", help="the same encoder before alignment")
    p.add_argument(
        "--sections",
        required=True,
        type=Path,
        metavar="CONFIG.toml|FOLDER",
        help="the config of a training, or a folder with counts/, spots/ and images/ as her2st has",
    )
    p.add_argument("--by", default="section", metavar="WHAT", help="section or patient (default: section)")
    p.add_argument(
        "--genes", type=int, default=250, metavar="N", help="the most variable ones (default: 250)"
    )
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for evaluation.md, .csv and .json")
    p.add_argument("--overwrite", action="store_true", help="replace those of another evaluation")
    p.add_argument("--mpp", type=mpp, default=0.5, metavar="UM", help="µm/px, or 20x (default: 0.5)")
    p.add_argument("--patch-px", type=int, default=224, metavar="N", help="side in pixels (default: 224)")
    p.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="patches per forward (default: 64)"
    )
    p.add_argument("--seeds", type=int, default=10, metavar="N", help="orders of permuted rows (default: 10)")
    add(p, "--precision", "--device", "--offline")
    add_common(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Print the tables, then where they were written."""
    from seal_extract.evaluate.run import EvaluateOptions, evaluate, output_files
    from seal_extract.train.config import sections_of

    options = EvaluateOptions(args.by, args.genes, args.patch_px, args.mpp, args.batch_size, args.seeds)
    output_files(args.out, args.overwrite)
    encoder = _request(args.encoder, args)
    base = None if args.base is None else _request(args.base, args)
    sections = sections_of(args.sections)
    tell = progress_line(args.quiet)
    try:
        found = evaluate(sections, encoder, base, options=options, log=tell)
    finally:
        tell("")
    echo(*found.to_markdown().split("\n"))
    for file in found.write(args.out, overwrite=args.overwrite):
        echo(f"-> {file}")
    return 0


def _request(name: str, args: argparse.Namespace) -> EncoderRequest:
    from seal_extract.encoders.request import EncoderRequest

    return EncoderRequest(name, device=args.device, precision=args.precision, offline=args.offline)
