"""``seal-extract train CONFIG.toml``: a line per epoch, and an encoder's folder at the end."""

from __future__ import annotations

import argparse
from pathlib import Path

from seal_extract.cli.options import Parser, add_common
from seal_extract.cli.terminal import echo


def train_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract train``."""
    p = Parser(
        prog="seal-extract train",
        description="Align an encoder with spatial transcriptomics, by SEAL, multi-scale contrast "
        "or a baseline. The same command resumes a run that was stopped.",
    )
    p.set_defaults(handler=run_train)
    p.add_argument("config", type=Path, metavar="CONFIG.toml", help="all options; the README has an example")
    p.add_argument(
        "--check", action="store_true", help="only check the options, and whether encoder and folders exist"
    )
    add_common(p)
    return p


def run_train(args: argparse.Namespace) -> int:
    """Train and write the encoder's folder, or only check the configuration."""
    from seal_extract.train.config import check, read_config
    from seal_extract.train.formats import names_of

    config = read_config(args.config)
    if args.check:
        check(config, names_of(config.data.sections))
        echo(config)
        return 0
    from seal_extract.train.run import run

    trained = run(config, log=lambda line: None if args.quiet else echo(line))
    echo(f"use it with  seal-extract slide.svs --encoder {trained.path}")
    return 0
