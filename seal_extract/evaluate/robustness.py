"""How much embeddings follow scanner and stain, from features of tissue that was scanned several times.

Three views: patches of one place seen by two scanners (PLISM, owkin/plism-benchmark); neighbours of the same
biology against those of the same scanner (RI of PathoROB, arXiv 2507.17845, MaRI and CRoMa, arXiv 2607.25497,
computed by the package croma); clusters of mean-pooled slides against scanner and specimen (after SEAL,
arXiv 2602.14177, whose clustering is not published).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, mutual_info_score

from seal_extract.errors import UsageError, first_line, how_to_install
from seal_extract.evaluate.labels import find_slides
from seal_extract.evaluate.run import Log
from seal_extract.evaluate.table import Report, Row, Table
from seal_extract.features.store import SlideFeatures, read_features
from seal_extract.slides.listing import read_rows
from seal_extract.train.formats.source import needed

REPORT = "robustness"  # name of its files
KS = (1, 3, 5, 10)
KINDS = ("across scanners", "across stains", "across scanners and stains")
SEEDS = 20  # of k-means
CANDIDATES = (5, 11, 21)  # numbers of neighbours, of which RI and MaRI take the best for nearest neighbours
CROMA_ROWS = 20_000  # patches of all slides together: every one is compared with every other
BLOCK = 1024  # rows of similarities at a time
PATCHES = 2000
Array = NDArray[Any]


@dataclass(frozen=True)
class Scan:
    """A row of the table of slides.

    Attributes:
        slide: name of its features.
        specimen: the tissue on it; scans of one specimen show the same places.
        scanner: that it was scanned by.
        stain: the staining protocol; empty where there is one only.
        label: the biology that neighbours should share; by default the specimen.
    """

    slide: str
    specimen: str
    scanner: str
    stain: str
    label: str


def read_scans(path: Path) -> list[Scan]:
    """The table of slides: CSV with the columns slide, specimen, scanner, and optionally stain and label.

    Raises:
        UsageError: a column or value is missing, a slide stands twice, there is one scanner or specimen only,
            or a scanner with one slide.
    """
    columns, rows = read_rows(path)
    if lacking := [name for name in ("slide", "specimen", "scanner") if name not in columns]:
        raise UsageError(
            f"{path} has no {lacking[0]}; it needs the columns slide, specimen and scanner, and may have "
            "stain and label"
        )
    scans = []
    for _, row in rows:
        slide, specimen, scanner = (row.get(name, "") for name in ("slide", "specimen", "scanner"))
        scans.append(Scan(slide, specimen, scanner, row.get("stain", ""), row.get("label") or specimen))
    for i, scan in enumerate(scans):
        if not (scan.slide and scan.specimen and scan.scanner):
            raise UsageError(f"{path}: row {i + 1} lacks its slide, specimen or scanner; fill it in")
    for slide, count in Counter(scan.slide for scan in scans).items():
        if count > 1:
            raise UsageError(f"{path}: {slide} stands {count} times; name each slide once")
    scanners = Counter(scan.scanner for scan in scans)
    for scanner, count in scanners.items():
        if count < 2:
            raise UsageError(f"{path}: scanner {scanner} has one slide; allowed: two or more of each scanner")
    if len(scanners) < 2 or len({scan.specimen for scan in scans}) < 2:
        raise UsageError(f"{path} has {len(scanners)} scanner or one specimen; allowed: two or more of both")
    return scans


def evaluate_robustness(
    folder: Path,
    scans: Sequence[Scan],
    *,
    patches: int = PATCHES,
    log: Log = lambda what: None,
) -> Report:
    """Measure how far scanner and stain show in the features of each encoder of a run.

    Args:
        folder: of a finished run, with features of all slides, by one or several encoders.
        scans: from `read_scans`.
        patches: of each slide at most, evenly spaced.
        log: called with the name of each step.

    Returns:
        The report, with the picture of `draw`.

    Raises:
        UsageError: as `find_slides`; or fewer than 1 patch.
        OutputError: features cannot be read.
    """
    if patches < 1:
        raise UsageError(f"--patches is {patches}; allowed: 1 or more")
    remarks: list[str] = []
    pairs: dict[str, dict[str, list[Array]]] = {}  # by encoder and kind
    neighbours, clusters, pooled = {}, {}, {}
    for encoder, features in find_slides([folder], [scan.slide for scan in scans]).items():
        log(f"{encoder}: reading")
        read = [_rows_and_mean(f.path, patches) for f in features]
        rows, pooled[encoder] = [some for some, _ in read], np.stack([mean for _, mean in read])
        log(f"{encoder}: patches of one place")
        pairs[encoder] = _pairs(scans, features, rows)
        log(f"{encoder}: neighbours")
        neighbours[encoder] = _neighbours(scans, rows, remarks)
        clusters[encoder] = cluster_agreement(pooled[encoder], scans)
    made = []
    for kind in KINDS:
        of_kind = {encoder: found[kind] for encoder, found in pairs.items() if found[kind]}
        if of_kind:
            made.append(_pair_table(kind, of_kind))
    if not made:
        remarks.append(
            "No two slides of one specimen have the same places in the same order, so that patches cannot be "
            "compared one by one; embed registered scans with the same --coords"
        )
    made += [_neighbour_table(neighbours), _cluster_table(clusters, len({s.scanner for s in scans}))]
    about = {
        "slides": {s.slide: {k: v for k, v in vars(s).items() if k != "slide"} for s in scans},
        "patches": patches,
    }
    details = {
        "pairs": {
            encoder: {kind: np.round(values, 6).tolist() for kind, values in found.items()}
            for encoder, found in pairs.items()
        }
    }
    return Report(REPORT, made, about, list(dict.fromkeys(remarks)), details, draw(pooled, scans))


def _rows_and_mean(path: Path, most: int) -> tuple[Array, Array]:
    """Some rows of a slide, and the mean of all."""
    features: Array = read_features(path).features
    return _spaced(features, most), np.asarray(features.mean(0))


def _spaced(rows: Array, most: int) -> Array:
    """At most so many rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    some: Array = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
    return some


# --- patches of one place -----------------------------------------------------------------------------


def compare_places(a: Array, b: Array) -> tuple[float, Array]:
    """PLISM's two figures for the same places on two slides.

    Args:
        a: [N, D].
        b: [N, D], row by row the same place.

    Returns:
        The mean cosine similarity of a place with itself, and for each k of `KS` the share of patches whose
        own place on the other slide is among the k most similar of the 2 N - 1 other patches of both slides,
        the mean of both directions.
    """
    both = np.concatenate([a, b]).astype(np.float32)
    both /= np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
    partner = np.roll(np.arange(len(both)), len(a))
    own = (both * both[partner]).sum(1)
    rank = np.empty(len(both), np.int64)
    for start in range(0, len(both), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(both)))
        similarity = both[rows] @ both.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        own_here = similarity[np.arange(len(rows)), partner[rows]]
        rank[rows] = (similarity > own_here[:, None]).sum(1)
    return float(own.mean()), np.array([(rank < k).mean() for k in KS])


def _pairs(
    scans: Sequence[Scan], features: Sequence[SlideFeatures], rows: Sequence[Array]
) -> dict[str, list[Array]]:
    """For each kind, cosine similarity and top-k of every pair of slides that show the same places."""
    found: dict[str, list[Array]] = {kind: [] for kind in KINDS}
    for i, j in combinations(range(len(scans)), 2):
        a, b = scans[i], scans[j]
        differs = (a.scanner != b.scanner) + 2 * (a.stain != b.stain)
        if a.specimen != b.specimen or not differs or not _same_places(features[i], features[j]):
            continue
        cosine, top = compare_places(rows[i], rows[j])
        found[KINDS[differs - 1]].append(np.array([cosine, *top]))
    return found


def _same_places(a: SlideFeatures, b: SlideFeatures) -> bool:
    if a.barcodes is not None or b.barcodes is not None:
        return a.barcodes == b.barcodes
    return np.array_equal(a.grid.xy_l0, b.grid.xy_l0)


def _pair_table(kind: str, found: Mapping[str, list[Array]]) -> Table:
    rows = [Row(encoder, tuple(np.median(values, axis=0).tolist())) for encoder, values in found.items()]
    note = (
        f"Median over {len(next(iter(found.values())))} pairs of slides. Top k: the same place on the other "
        "slide is among the k most similar patches of both slides. Comparable for the same patches only."
    )
    columns = ("cosine", *(f"top {k}" for k in KS))
    return Table(f"Robustness, PLISM's figures {kind}", columns, tuple(rows), note, summary="")


# --- neighbours ---------------------------------------------------------------------------------------


def _neighbours(scans: Sequence[Scan], rows: Sequence[Array], remarks: list[str]) -> tuple[float, ...]:
    """RI, its support, MaRI, CRoMa and its lower tail, by the package croma; NaN where it refuses."""
    try:
        import croma
    except ImportError:
        remarks.append(f"RI, MaRI and CRoMa need the package croma; {how_to_install('robustness')}")
        return (float("nan"),) * 5
    rows = [_spaced(of, max(1, CROMA_ROWS // len(rows))) for of in rows]
    slide = np.repeat(np.arange(len(scans)), [len(of) for of in rows]).tolist()
    manifest = needed("pandas").DataFrame(
        {
            "sample_id": np.arange(len(slide)),
            "image_path": "",
            "label": [scans[i].label for i in slide],
            "group_id": [scans[i].slide for i in slide],
            "scanner": [scans[i].scanner for i in slide],
        }
    )
    given = (np.concatenate(list(rows)), manifest)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ri = croma.RI.compute(*given, confounder_column="scanner", k_candidates=list(CANDIDATES))
            mari = croma.MaRI.compute(*given, confounder_column="scanner", k_candidates=list(CANDIDATES))
            margin = croma.CRoMa.compute(*given, confounder_column="scanner")
    except (ValueError, RuntimeError) as exc:
        remarks.append(f"RI, MaRI and CRoMa are left out: {first_line(exc)}")
        return (float("nan"),) * 5
    figures = (ri.value, ri.support, mari.value, margin.value, margin.ltm_alpha)
    return tuple(map(float, figures))


def _neighbour_table(found: Mapping[str, tuple[float, ...]]) -> Table:
    note = (
        "Neighbours of the same biology on another scanner against those of other biology on the same "
        "scanner. RI and MaRI: above 0.5 biology wins; support is the share of patches that count. CRoMa: "
        "above 0 biology wins; the tail is the mean of the worst tenth."
    )
    columns = ("RI", "support", "MaRI", "CRoMa", "CRoMa, tail")
    rows = tuple(Row(encoder, values) for encoder, values in found.items())
    return Table("Robustness, neighbours (RI, MaRI, CRoMa)", columns, rows, note, summary="")


# --- clusters of slides -------------------------------------------------------------------------------


def cluster_agreement(pooled: Array, scans: Sequence[Scan]) -> Array:
    """ARI and MI (nats) of clusters of slides with the scanner, then with the specimen: float64 [seeds, 4].

    k-means on L2-normalised mean embeddings, with as many clusters as scanners, once for each seed.

    Args:
        pooled: [S, D], the mean embedding of each slide.
        scans: the slides.
    """
    unit = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    scanners, specimens = [s.scanner for s in scans], [s.specimen for s in scans]
    found = []
    for seed in range(SEEDS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fewer distinct slides than clusters
            cluster = KMeans(len(set(scanners)), n_init=1, random_state=seed).fit_predict(unit)
        figures = (adjusted_rand_score, mutual_info_score)
        found.append([figure(of, cluster) for of in (scanners, specimens) for figure in figures])
    return np.array(found, np.float64)


def _cluster_table(found: Mapping[str, Array], k: int) -> Table:
    rows = [
        Row(encoder, tuple(values.mean(0).tolist()), tuple(values.std(0, ddof=1).tolist()))
        for encoder, values in found.items()
    ]
    note = (
        f"k-means of the L2-normalised mean embeddings of slides, k = {k} scanners; mean ± sd of {SEEDS} "
        "seeds. With the scanner, lower is more robust; 0 is chance for ARI."
    )
    columns = ("ARI, scanner", "MI, scanner", "ARI, specimen", "MI, specimen")
    return Table("Robustness, clusters of slides", columns, tuple(rows), note, summary="")


def draw(pooled: Mapping[str, Array], scans: Sequence[Scan]) -> Any:
    """A matplotlib figure: t-SNE of the slides of each encoder, coloured by scanner and by specimen."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(9, 4 * len(pooled)), layout="constrained")
    axes = figure.subplots(len(pooled), 2, squeeze=False)
    for (encoder, rows), pair in zip(pooled.items(), axes, strict=True):
        perplexity = min(30.0, (len(rows) - 1) / 3)
        xy = TSNE(perplexity=perplexity, init="random", random_state=0).fit_transform(rows)
        for axis, what in zip(pair, ("scanner", "specimen"), strict=True):
            values = [getattr(scan, what) for scan in scans]
            for i, value in enumerate(dict.fromkeys(values)):
                there = np.array([v == value for v in values])
                axis.scatter(*xy[there].T, color=colormaps["tab20"](i % 20), label=value, s=24)
            axis.set(title=f"{encoder}, by {what}", xticks=[], yticks=[])
            if len(set(values)) <= 20:
                axis.legend(fontsize=7)
    return figure
