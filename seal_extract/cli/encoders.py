"""``seal-extract encoders``, ``download``, ``doctor`` and ``demo``."""

from __future__ import annotations

import argparse

from seal_extract.cli.fail import fail
from seal_extract.cli.slides import embed_one


def run_table(args: argparse.Namespace) -> int:
    """The encoders to choose from, and which of them lie in the cache; no network is asked."""
    from seal_extract.encoders import list_encoders
    from seal_extract.encoders.hub import is_cached

    row = "{:<14} {:>5}  {:<20} {:<9} {:<7} {:<46} {}".format
    print(row("name", "D", "trained at", "precision", "cached", "weights, and their gate", "licence"))
    for s in list_encoders():
        cached = "yes" if s.source and is_cached(s.source, s.published.files if s.published else ()) else "no"
        print(row(s.name, s.dim, s.trained_at, s.precision, cached, s.page, s.licence))
    return 0


def run_download(args: argparse.Namespace) -> int:
    """Fetch weights, the base of adapters included, and load them once: what is in the cache is whole."""
    from seal_extract.encoders import load_encoder

    for name in args.names:
        encoder = load_encoder(name, revision=args.revision, device="cpu")
        for file in encoder.weights:
            print(f"{name}: {file.file} of {file.source}, {file.size / 1e9:.2f} GB, complete", flush=True)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """One line per thing tried; 1 if something fails."""
    from seal_extract.doctor import examine

    failed = 0
    for finding in examine(args.slide, slide_mpp=args.slide_mpp, offline=args.offline):
        print(finding, flush=True)
        failed += finding.state == "FAILS"
    return fail(f"{failed} of the things above fail", 1) if failed else 0


def run_demo(args: argparse.Namespace) -> int:
    """Make what the demo needs and run on it as on any slide."""
    from seal_extract.demo import write_demo_slide, write_untrained_encoder
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.plan import ExtractOptions

    print(f"encoder  {args.out / 'encoder'} (random weights: for trying, never for science)")
    encoder = write_untrained_encoder(args.out / "encoder")
    slide = args.slide or write_demo_slide(args.out)
    print(f"slide    {slide}", flush=True)
    options = ExtractOptions(overwrite=True, slide_mpp=args.slide_mpp)
    print(embed_one(slide, EncoderRequest(encoder), args.out / "out", options, args.quiet))
    print(f"look at  {args.out / 'out' / 'overlays' / slide.stem}.jpg")
    return 0
