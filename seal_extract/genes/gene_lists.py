"""Lists of genes: panels, signatures and the counts of a sample, from text files or as typed.

A panel names each column of an expression table. A signature is a set of genes with a weight for each, often
from a GMT file, the format of the Molecular Signatures Database: each line has the name of a set, a
description and the genes, separated by tabs.
"""

from __future__ import annotations

import csv
import math
import os
import stat
import unicodedata
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.errors import UsageError

if TYPE_CHECKING:
    from seal_extract.genes.decoder import GeneDecoder

MAX_BYTES = 256_000_000  # all of MSigDB as GMT has 20 MB
MAX_LISTED = 20  # missing genes that `Signature.coverage` lists by name


# --- panels ---------------------------------------------------------------------------------------


def read_panel(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read gene names, in the order of the columns, from a text file with one name per line.

    Raises:
        UsageError: the file is missing, not UTF-8 text or empty, or a line does not hold exactly one name.
    """
    text = _read_text(path, f"the gene panel {path}", "one name per line")
    names = tuple(line.strip() for line in text.splitlines())
    for number, name in enumerate(names, 1):
        if not name or any(separator in name for separator in ",;\t") or not _is_plain(name):
            raise UsageError(f"line {number} of the gene panel {path} is {name!r}; give one name per line")
    if not names:
        raise UsageError(f"the gene panel {path} is empty; give one name per line")
    return names


# --- signatures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    """A set of genes with a weight for each.

    Attributes:
        name: name of the set.
        weights: weight of each gene, finite and not 0; 1 in sets from GMT files.
    """

    name: str
    weights: dict[str, float]

    def __post_init__(self) -> None:
        bad = [gene for gene, weight in self.weights.items() if not math.isfinite(weight) or weight == 0]
        if not self.weights or bad:
            what = f"the weight {self.weights[bad[0]]:g} for {bad[0]}" if bad else "no gene"
            raise UsageError(
                f"the signature {self.name} has {what}; give genes with finite weights other than 0"
            )
        unprintable = next((name for name in (self.name, *self.weights) if not _is_plain(name)), None)
        if unprintable is not None:
            raise UsageError(
                f"{unprintable!r} is not a name of a gene or signature; give names in plain text"
            )

    def __repr__(self) -> str:
        return f"Signature({self.name}: {len(self.weights)} genes)"

    def known_to(self, decoder: GeneDecoder) -> tuple[list[int], list[float]]:
        """Column and weight of each gene of the signature that the decoder predicts.

        Raises:
            UsageError: the decoder predicts none of them, or its columns have no names.
        """
        column_of = {gene: i for i, gene in enumerate(decoder.named())}
        known = [gene for gene in self.weights if gene in column_of]
        if not known:
            first = ", ".join(list(self.weights)[:3])
            raise UsageError(
                f"none of the {len(self.weights)} genes of {self.name} ({first}, ...) is among the "
                f"{decoder.n_genes} of {decoder.name}, such as {decoder.named()[0]}; choose another signature"
            )
        return [column_of[gene] for gene in known], [self.weights[gene] for gene in known]

    def coverage(self, decoder: GeneDecoder) -> str:
        """A sentence that counts the genes that the decoder predicts and lists the missing ones.

        Raises:
            UsageError: see `known_to`.
        """
        known, missing = len(self.known_to(decoder)[0]), sorted(set(self.weights).difference(decoder.named()))
        others = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        names = f"; missing: {', '.join(missing[:MAX_LISTED])}{others}" if missing else ""
        return f"{self.name}: {known} of {len(self.weights)} genes are in the panel{names}"


def read_signature(text: str) -> Signature:
    """Read a signature as typed: ``FILE.gmt:NAME``, ``FILE.gmt`` of one set, or ``GENE:WEIGHT,GENE:WEIGHT``.

    Raises:
        UsageError: the file or the set does not exist, or a weight is not a number.
    """
    head, colon, name = text.rpartition(":")
    if text.lower().endswith(".gmt"):
        return _choose(read_gmt(text), None, text)
    if colon and head.lower().endswith(".gmt"):
        return _choose(read_gmt(head), name, head)
    weights: dict[str, float] = {}
    for part in text.split(","):
        gene, _, weight = part.strip().partition(":")
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = math.nan
        if not gene or gene in weights or math.isnan(value):
            raise UsageError(
                f"the signature {text!r} has {part!r}; allowed: FILE.gmt:NAME, or GENE:WEIGHT,GENE:WEIGHT "
                "with each gene once"
            )
        weights[gene] = value
    return Signature(text, weights)


def read_gmt(path: str | Path) -> dict[str, Signature]:
    """Read all sets of a GMT file, by name.

    Raises:
        UsageError: the file is missing, not text or empty, or a line is not a set.
    """
    lines = _read_text(path, str(path), "a GMT file, such as MSigDB's").splitlines()
    sets: dict[str, Signature] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = (field.strip() for field in line.split("\t"))
        genes = [gene for gene in rest[1:] if gene]
        if not name or not genes or name in sets:
            raise UsageError(
                f"line {number} of {path} is not a gene set, or repeats a name; allowed: name, description "
                "and genes, separated by tabs"
            )
        sets[name] = Signature(name, dict.fromkeys(genes, 1.0))
    if not sets:
        raise UsageError(f"{path} holds no gene set; give a GMT file, such as MSigDB's")
    return sets


def _choose(sets: dict[str, Signature], name: str | None, path: str) -> Signature:
    if name is None and len(sets) == 1:
        return next(iter(sets.values()))
    if name in sets:
        return sets[name]
    near = get_close_matches(name or "", sets, n=3, cutoff=0.3) or list(sets)[:3]
    what = f"no set {name}" if name else f"{len(sets)} sets"
    raise UsageError(f"{path} holds {what}; type {path}:NAME, such as {' or '.join(near)}")


# --- counts of a sample ---------------------------------------------------------------------------


def read_profile(path: Path) -> dict[str, float]:
    """Read the counts of one sample by gene, from a CSV or TSV file with a gene and its count in each line.

    Raises:
        UsageError: the file cannot be read, or a line is not a gene with its count.
    """
    give = "give a gene and its count in each line"
    text = _read_text(path, str(path), "a table of genes and counts, as CSV or TSV")
    rows = csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ",")
    counts: dict[str, float] = {}
    try:
        for number, row in enumerate(rows, 1):
            if not row or (number == 1 and not _is_count(row[-1])):  # the first line may be a header
                continue
            gene = row[0].strip()
            if len(row) != 2 or not gene or gene in counts or not _is_count(row[1]):
                raise UsageError(
                    f"line {number} of {path} is {row}; give a gene and its count, each gene once"
                )
            counts[gene] = float(row[1])
    except csv.Error as exc:
        raise UsageError(f"{path} is not a table ({exc}); {give}") from exc
    if not 0 < sum(counts.values()) < float("inf"):
        raise UsageError(f"{path} holds no counts, or counts that are too large; {give}")
    return counts


def _is_count(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


# --- text -----------------------------------------------------------------------------------------


def _is_plain(name: str) -> bool:
    """Whether HDF5 and JSON can hold a name: no control character, no byte that was not UTF-8."""
    return not any(unicodedata.category(char) in ("Cc", "Cs") for char in name)


def _read_text(path: str | os.PathLike[str], what: str, give: str) -> str:
    """The text of a small UTF-8 file; errors name the file (``what``) and the content to ``give``."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"it has {status.st_size / 1e6:.0f} MB; allowed: {MAX_BYTES / 1e6:.0f}")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as exc:
        reason = str(exc.strerror if isinstance(exc, OSError) else exc)
        if isinstance(exc, UnicodeDecodeError):
            reason = "it is not UTF-8 text"
        raise UsageError(f"cannot read {what}: {reason}; give {give}") from exc
