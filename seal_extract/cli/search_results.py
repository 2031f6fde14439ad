"""The results of ``seal-extract search``: one folder per query; another query does not replace them."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.cli.terminal import echo, fail
from seal_extract.errors import OutputError, SealExtractError
from seal_extract.names import cell
from seal_extract.publish import publish, writing

if TYPE_CHECKING:
    from seal_extract.features.store import SlideFeatures
    from seal_extract.genes.index import Found
    from seal_extract.genes.predict import RegionGenes

QUERIES = ("gene", "signature", "profile", "patch", "image", "region")
QUERY = "query.json"
RESULTS = ("found.csv", "genes.csv", "contact_sheet.png")
SHOWN = 15  # lines printed


def query_of(args: argparse.Namespace) -> tuple[str, str] | None:
    """Kind and text of the query, such as ``("gene", "CD24")``; None without a query."""
    given = ((kind, getattr(args, kind)) for kind in QUERIES)
    return next(((kind, str(value)) for kind, value in given if value is not None), None)


def open_results(args: argparse.Namespace, slides: Sequence[SlideFeatures]) -> Path:
    """Make the folder for the results of a query, and write the query to ``query.json``.

    The default is ``search/QUERY``. Results of the same query are replaced.

    Raises:
        OutputError: the folder holds results of another query, and ``--overwrite`` was not typed.
    """
    query = query_of(args)
    assert query is not None
    kind, asked = query
    features = "\n".join(sorted(str(path.resolve()) for path in args.features))
    same = {"query": kind, "asked": asked, "content": _content(asked), "features": _hash(features.encode())}
    name = re.sub(r"[^\w.+-]+", "_", f"{kind}_{asked.rpartition('/')[2]}")[:80]
    out: Path = args.out or Path("search") / name
    before = [path for name in RESULTS if (path := out / name).exists()]
    if before and not args.overwrite and not same.items() <= _read(out / QUERY).items():
        raise OutputError(
            f"{before[0]} belongs to another search; type --overwrite to replace it, or another -o"
        )
    with writing(out):
        for path in before + [tile for tile in out.glob("*.geojson") if _is_result(tile)]:
            path.unlink()
    details = {
        "k": args.k,
        "per_slide": args.per_slide,
        "index": args.index,
        "slides": len(slides),
        "patches": sum(len(slide.grid) for slide in slides),
        "encoder": slides[0].provenance["encoder"]["name"],
        "weights": [w["sha256"] for w in slides[0].provenance["encoder"].get("weights", [])],
    }
    with publish(out / QUERY) as part:
        part.write_text(json.dumps(same | details, indent=1), encoding="utf-8")
    return out


def _content(asked: str) -> str | None:
    """The hash of the file that a query names."""
    for text in (asked, asked.partition(":")[2], asked.rpartition(":")[0]):
        try:
            return _hash(Path(text).read_bytes())
        except (OSError, ValueError):
            continue
    return None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_result(tiles: Path) -> bool:
    from seal_extract.tissue.geojson import read_made_of

    return (read_made_of(tiles) or {}).get("kind") == "search"


# --- patches ------------------------------------------------------------------------------------


def short_names(slides: Iterable[SlideFeatures]) -> dict[Path, str]:
    """A name for each feature file: the slide's name, with folders in front where several have it."""
    paths = {slide.path for slide in slides}
    names: dict[Path, str] = {}
    for path in paths:
        parts = (*path.parts[:-1], path.stem)
        for count in range(1, len(parts) + 1):
            tail = parts[-count:]
            if not any((*p.parts[:-1], p.stem)[-count:] == tail for p in paths if p != path):
                break
        names[path] = "__".join(tail)
    return names


def write_found(
    found: Sequence[Found], names: dict[Path, str], sheet: dict[str, Any], out: Path, slides: Path | None
) -> int:
    """Print the first patches; write all as a table, as tiles for QuPath and as a contact sheet."""
    from seal_extract.view.pictures import draw_contact_sheet

    for rank, one in enumerate(found[:SHOWN], 1):
        x, y = one.xy_l0
        echo(f"{rank:3}  {one.score:8.4f}  {names[one.slide.path]}  ({x}, {y})")
    head = ("rank", "slide", "row", "x_l0", "y_l0", "patch_size_l0", "score")
    rows = [
        (rank, names[one.slide.path], one.row, *one.xy_l0, one.slide.grid.patch_size_l0, f"{one.score:.6g}")
        for rank, one in enumerate(found, 1)
    ]
    _table(out / "found.csv", head, rows)
    _write_tiles(found, names, out)
    echo(_more(len(found), "patches", out))
    try:
        draw_contact_sheet(found, out / "contact_sheet.png", slides=slides, names=names, **sheet)
    except SealExtractError as exc:
        return fail(f"no contact sheet: {exc}", 1)
    return 0


def _more(count: int, what: str, place: Path) -> str:
    unseen = f" (the first {SHOWN} are shown)" if count > SHOWN else ""
    return f"{count} {what}{unseen} -> {place}"


def _write_tiles(found: Sequence[Found], names: dict[Path, str], out: Path) -> None:
    """Tiles of each slide for QuPath."""
    import numpy as np

    from seal_extract.tissue.geojson import write_patches

    by_slide: dict[Path, list[Found]] = {}
    for one in found:
        by_slide.setdefault(one.slide.path, []).append(one)
    for path, some in by_slide.items():
        grid = some[0].slide.grid
        xy_l0 = grid.xy_l0[[one.row for one in some]]
        scores = {"score": np.array([one.score for one in some])}
        write_patches(out / f"{names[path]}.geojson", xy_l0, grid.patch_size_l0, scores, {"kind": "search"})


# --- genes --------------------------------------------------------------------------------------


def write_genes(found: RegionGenes, out: Path) -> None:
    """Print the first genes of a region and write all as a table."""
    columns = {
        "cohens_d": found.effect,
        "mean_inside": found.inside,
        "mean_outside": found.outside,
        "p_patches": found.p_patches,
        "q_patches": found.q_patches,
        "p_pieces": found.p_pieces,
        "q_pieces": found.q_pieces,
    }
    echo(" ".join([f"{'gene':16}", *(f"{name:>12}" for name in columns)]))
    for i, gene in enumerate(found.genes[:SHOWN]):
        echo(" ".join([f"{gene:16}", *(f"{values[i]:12.3g}" for values in columns.values())]))
    rows = zip(*columns.values(), strict=True)
    table = [(gene, *(f"{v:.6g}" for v in row)) for gene, row in zip(found.genes, rows, strict=True)]
    _table(out / "genes.csv", ("gene", *columns), table)
    echo(_more(len(found.genes), "genes", out / "genes.csv"))


def _table(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with publish(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [cell(value) if isinstance(value, str) else value for value in row] for row in (head, *rows)
        )
