"""``seal-extract encoders``, ``download`` and ``doctor``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import add, encoder_request
from seal_extract.cli.terminal import echo, fail
from seal_extract.errors import MissingOnHubError

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder, WeightFile
    from seal_extract.encoders.spec import Published


def add_encoders_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract encoders``."""
    p.description = "The encoders to choose from."
    p.set_defaults(handler=run_table)


def run_table(args: argparse.Namespace) -> int:
    """The encoders to choose from, and which of them lie in the cache; no network is asked."""
    from seal_extract.encoders import list_encoders
    from seal_extract.encoders.cache import is_cached

    head = ("name", "D", "trained at", "µm/px is", "precision", "cached", "gated", "pinned to commit, sha256")
    rows = [(*head, "weights", "licence of the weights")]
    for s in list_encoders():
        layout = s.published
        here = layout is not None and s.on_hub and is_cached(s.source, layout.files, layout.commit)
        facts = (s.name, str(s.dim), s.trained_at, BASES.get(s.mpp_basis, ""), s.precision, _yes(here))
        rows.append((*facts, _yes(layout is not None and layout.gated), _pin(layout), s.page, s.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        echo("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


BASES = {"stated": "stated", "magnification": "from a magnification", "convention": "a convention"}


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _pin(layout: Published | None) -> str:
    """Beginnings of commit and hash of its main file."""
    if layout is None or layout.commit is None:
        return "no"
    hashes = [layout.sha256[file][:12] for file in layout.files if file in layout.sha256]
    return ", ".join([layout.commit[:12], *hashes])


def add_download_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract download``."""
    p.description = "Fetch the weights of encoders into the Hub's cache; then --offline finds them."
    p.set_defaults(handler=run_download)
    p.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="names from `seal-extract encoders`, or of slide encoders such as feather-univ2",
    )
    add(p, "--revision")


def run_download(args: argparse.Namespace) -> int:
    """Fetch weights, those of the expression half and the base of adapters included.

    Everything is loaded once: what is in the cache is whole.
    """
    from seal_extract.encoders import load_encoder
    from seal_extract.encoders.slide_encoders import SLIDE_ENCODERS

    for name in args.names:
        if name in SLIDE_ENCODERS:
            from seal_extract.pooling import open_pooling

            echo(f"{name}: {open_pooling(name)}, complete")
            continue
        encoder = load_encoder(name, revision=args.revision, device="cpu")
        files = [*encoder.weights, *_expression_half(encoder, name, args.revision)]
        for file in files:
            echo(f"{name}: {file.file} of {file.source}, {file.size / 1e9:.2f} GB, complete")
    return 0


def _expression_half(encoder: Encoder, name: str, revision: str | None) -> list[WeightFile]:
    """Its file, fetched and loaded once; a repository without one is said to have none, and that is all."""
    from seal_extract.genes.omics import load_omics

    layout = encoder.spec.published
    if layout is None or layout.decoder is None:
        return []
    try:
        weights = load_omics(name, revision=revision).weights
    except MissingOnHubError as exc:
        echo(f"{name}: without the expression encoder, which embeddings do not need: {exc}")
        return []
    return [weights] if weights else []


def add_doctor_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract doctor``."""
    p.description = "Try each thing a run depends on by itself; of a slide, encode 8 patches."
    p.set_defaults(handler=run_doctor)
    p.add_argument("slide", nargs="?", type=Path, metavar="SLIDE")
    add(p, "--slide-mpp", "--override-mpp")
    add(p, "--encoder", help="load it: which files it is made of, which adapters were merged")
    add(p, "--checkpoint", "--adapter", "--revision")
    add(p, "--offline", help="leave out what asks the network")
    p.set_defaults(device="cpu")


def run_doctor(args: argparse.Namespace) -> int:
    """Print one line per check; return 1 if a check fails."""
    from seal_extract.doctor import examine

    failed = 0
    mpps = {"slide_mpp": args.slide_mpp, "override_mpp": args.override_mpp}
    encoder = encoder_request(args.encoder, args) if args.encoder else None
    for result in examine(args.slide, **mpps, encoder=encoder, offline=args.offline):
        echo(result)
        failed += result.state == "FAILS"
    return fail(f"{failed} of the checks above failed", 1) if failed else 0
