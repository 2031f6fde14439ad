"""``seal-extract encoders``, ``download`` and ``doctor``."""

from __future__ import annotations

import argparse
import json
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.cli.options import add, encoder_request
from seal_extract.cli.terminal import echo, fail
from seal_extract.errors import MissingOnHubError, UsageError

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder, WeightFile
    from seal_extract.encoders.spec import EncoderSpec


OPEN = ("Apache-2.0", "MIT", "BSD-3-Clause")  # licences that `--licence open` stands for
BASES = {"stated": "stated", "magnification": "from a magnification", "convention": "a convention"}
FEW = 3  # encoders of which everything is printed, and not one line each


def add_encoders_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract encoders``."""
    p.description = f"The encoders to choose from; up to {FEW} of them with pins, precision and paper."
    p.set_defaults(handler=run_table)
    p.add_argument("words", nargs="*", metavar="WORD", help="those with one of these words in name or source")
    p.add_argument("--licence", metavar="WORD", help=f"of this licence; open: {', '.join(OPEN)}")
    p.add_argument("--ungated", action="store_true", help="those that ask nobody to accept terms on the Hub")
    p.add_argument("--cached", action="store_true", help="those whose weights are on this machine")
    p.add_argument("--json", action="store_true", help="print all facts as JSON")


def run_table(args: argparse.Namespace) -> int:
    """Print the encoders that were asked for; no network is asked, and only installed files are read."""
    from seal_extract.encoders.registry import list_encoders

    facts = [_facts(spec) for spec in list_encoders()]
    asked = [f for f in facts if _is_asked(f, args)]
    if args.json:
        echo(*json.dumps(asked, indent=1, ensure_ascii=False).splitlines())
    elif not asked:
        near = get_close_matches(" ".join(args.words).lower(), [f["name"] for f in facts], n=2)
        hint = f"; did you mean {' or '.join(near)}" if near else ""
        raise UsageError(f"no encoder matches{hint}; for all {len(facts)} type: seal-extract encoders")
    elif len(asked) <= FEW:
        for one in asked:
            _print_details(one)
    else:
        _print_table(asked)
    return 0


def _facts(spec: EncoderSpec) -> dict[str, Any]:
    """Everything to know about an encoder before it is loaded, as JSON."""
    from seal_extract.encoders.cache import is_cached
    from seal_extract.encoders.registry import ALIASES, bundled, group_of

    layout = spec.layout
    here = spec.on_hub and is_cached(spec.source, layout.files, layout.commit)
    return {
        "name": spec.name,
        "also_called": [alias for alias, name in ALIASES.items() if name == spec.name],
        "group": group_of(spec.name),
        "dim": spec.dim,
        "patch_px": spec.patch_px,
        "mpp": [] if spec.mpp is None else [spec.mpp, *spec.also_mpp],
        "mpp_basis": spec.mpp_basis,
        "input": str(spec.input),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "precision": spec.precision,
        "errors": dict(spec.errors),
        "cached": here or spec.name in bundled(),
        "gated": layout.gated,
        "source": spec.source,
        "page": spec.page,
        "files": list(layout.files),
        "commit": layout.commit,
        "sha256": dict(layout.sha256),
        "licence": spec.licence,
        "paper": spec.paper,
    }


def _is_asked(facts: dict[str, Any], args: argparse.Namespace) -> bool:
    names = " ".join([facts["name"], facts["source"], *facts["also_called"]]).lower()
    licence = facts["licence"].lower()
    by_word = not args.words or any(word.lower() in names for word in args.words)
    by_licence = not args.licence or (
        facts["licence"] in OPEN if args.licence == "open" else args.licence.lower() in licence
    )
    return by_word and by_licence and not (args.ungated and facts["gated"]) and facts["cached"] >= args.cached


def _print_table(asked: list[dict[str, Any]]) -> None:
    """One line each, below 80 columns, by group."""
    rows = [("name", "D", "px", "µm/px", "access", "licence of the weights")]
    for f in asked:
        mpp = " ".join(f"{m:g}" for m in f["mpp"]) or "-"
        access = "cached" if f["cached"] else "gated" if f["gated"] else "-"
        licence = f["licence"].removesuffix(" licence")
        rows.append((f["name"], str(f["dim"]), str(f["patch_px"]), mpp, access, licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    echo(f"  {head}")
    for group in dict.fromkeys(f["group"] for f in asked):
        echo("", group)
        echo(*(f"  {line}" for f, line in zip(asked, lines, strict=True) if f["group"] == group))
    echo(
        "",
        f"{len(asked)} encoders; timm:NAME is any model of timm. Gated: accept its terms first.",
        "A name, or part of one, shows pins, precision and paper; --help has the filters.",
    )


def _print_details(facts: dict[str, Any]) -> None:
    mpp = ", ".join(f"{m:g}" for m in facts["mpp"])
    basis = f" ({BASES[facts['mpp_basis']]})" if facts["mpp_basis"] else ""
    scale = f" at {mpp} µm/px{basis}" if mpp else ", µm/px not stated"
    error = facts["errors"].get(facts["precision"])
    measured = f"at most {error:.1e} from float32" if error else "nothing faster was measured"
    statistics = (f"{what} {' '.join(f'{v:.4g}' for v in facts[what])}" for what in ("mean", "std"))
    hashes = [f"sha256 {sha256[:12]} of {file}" for file, sha256 in facts["sha256"].items()]
    pins = [f"commit {facts['commit'][:12]}"] if facts["commit"] else []
    lines = {
        "embedding": f"{facts['dim']} numbers per patch of {facts['patch_px']} px{scale}",
        "input": facts["input"],
        "statistics": ", ".join(statistics),
        "weights": ", ".join(facts["files"]),
        "page": facts["page"] + (", gated: accept its terms there" if facts["gated"] else ""),
        "cached": "yes" if facts["cached"] else "no",
        "pinned to": ", ".join([*pins, *hashes]) or "nothing",
        "on a GPU": f"{facts['precision']}: {measured}",
        "licence": facts["licence"],
        "paper": facts["paper"],
        "other names": ", ".join(facts["also_called"]),
    }
    echo(facts["name"], *(f"  {what:<11}  {text}" for what, text in lines.items() if text), "")


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
