"""``seal-extract bench``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.errors import UsageError

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder

TO_STDOUT = "-"


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table or JSON."""
    file = _json_file(args.json)
    from seal_extract.bench import BenchOptions, bench
    from seal_extract.encoders.build import pick_device
    from seal_extract.plan import ExtractOptions

    choices = {f.name: getattr(args, f.name) for f in fields(ExtractOptions) if hasattr(args, f.name)}
    options = BenchOptions(args.patches, args.repeats, args.against == "openslide", args.size_px)
    run = ExtractOptions(**choices)
    say = _silent if args.quiet or not sys.stderr.isatty() else _say
    try:
        report = bench(
            args.slides,
            None if args.reading_only else _encoder(args),
            run=run,
            options=options,
            device=pick_device(args.device),
            say=say,
        )
    finally:
        say("")
    text = json.dumps(report.to_json(), indent=1, default=str)
    if args.json is None:
        print("\n".join(report.lines()))
    elif file is None:
        print(text)
    else:
        _write(file, text)
    return 0


def _json_file(given: str | None) -> Path | None:
    """Where JSON goes, if not to standard output.

    Raises:
        UsageError: ``--json slide.svs`` would write over the slide.
    """
    if given in (None, TO_STDOUT):
        return None
    file = Path(str(given))
    if file.suffix != ".json":
        raise UsageError(f"--json {file} is no name that ends in .json; give slides before --json")
    return file


def _write(file: Path, text: str) -> None:
    from seal_extract.publish import publish, writing

    with publish(file) as part, writing(file):
        part.write_text(text + "\n", encoding="utf-8")
    print(f"figures -> {file}")


def _encoder(args: argparse.Namespace) -> Encoder:
    from seal_extract.encoders.request import EncoderRequest

    if args.encoder is not None:
        return EncoderRequest(
            args.encoder,
            checkpoint=args.checkpoint,
            device=args.device,
            precision=args.precision,
            offline=args.offline,
        ).load()
    if args.checkpoint is not None:
        raise UsageError(f"--checkpoint {args.checkpoint} is of no encoder; type --encoder NAME too")
    import torch

    from seal_extract.demo import untrained_encoder
    from seal_extract.encoders.build import pick_device

    encoder = untrained_encoder().to(pick_device(args.device))
    encoder.precision = getattr(torch, encoder.spec.precision_for(encoder.device.type, args.precision))
    return encoder


def _say(what: str) -> None:
    """What is being done, in a line that the next replaces."""
    print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def _silent(what: str) -> None:
    pass
