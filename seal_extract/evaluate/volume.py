"""How well expression of a held-out section is predicted from its volume, beside what needs no such model.

A section is held out, and the nearest measured sections above and below it are given. Lines: through depth;
one plane; expression of the two interpolated linearly, which a model has to beat; the mean of the first and
that; not trained on the two; rows permuted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.evaluate.expression import mean_r, pearson
from seal_extract.evaluate.table import Report, Row, Table, output_files
from seal_extract.genes.gene_lists import read_panel
from seal_extract.slides.planes import apply
from seal_extract.train.pairs import Pairs
from seal_extract.train.sections import Expression, Section, choose_panel
from seal_extract.volume.config import DepthOptions, VolumeConfig
from seal_extract.volume.model import load_volume_encoder
from seal_extract.volume.patches import depth_pairs
from seal_extract.volume.train import Given, decisive_options, load_given, train_volume
from seal_extract.volume.volume import Volume

REPORT = "evaluation"  # name of the files
DEPTH, FLAT, BETWEEN, BOTH = "through depth", "one plane", "interpolated", "depth and interpolated"
UNSEEN, PERMUTED = "not trained on the two", "rows permuted"
SIGMA, K1, K2 = 1.5, 0.01, 0.03  # of SSIM: Wang et al., IEEE TIP 13 (2004) 600


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        section: the one held out.
        name: of the line.
        genes: of the panel.
        r: Pearson's r of each gene over the section's spots, float64 [G]; NaN where it does not vary.
        ssim: of each gene's map between the spots, float64 [G].
    """

    section: str
    name: str
    genes: tuple[str, ...]
    r: NDArray[np.float64]
    ssim: NDArray[np.float64]


def evaluate_volume(
    config: VolumeConfig,
    out: Path,
    hold_out: Sequence[str] = (),
    *,
    sections: Given | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> list[Line]:
    """Hold out sections of the volume of interest in turn; write ``evaluation.md``, ``.csv`` and ``.json``.

    Args:
        config: a training; all measured sections are listed in its ``voi``. The genes are the most variable
            ones of the two given sections, or its panel.
        out: folder, in which every line is trained; an evaluation that was stopped continues there.
        hold_out: names; by default each section that has a measured one above and one below.
        sections: in place of those that the configuration names; see `train_volume`.
        overwrite: replace the report of another evaluation; other options need another folder all the same.
        log: called with one line per step.

    Raises:
        UsageError: a section without a measured one above and below it.
        SealExtractError: as `train_volume` and `output_files`.
    """
    output_files(out, overwrite, REPORT)
    volume = config.voi.open()
    others = dict(sections or load_given(config))
    own = list(others.pop(config.voi.volume))
    outside = [s.name for s in own if s.name not in volume.sections]
    if outside:
        raise UsageError(f"{outside[0]} lies outside {volume.path}; name its plane so, or leave it out")
    own.sort(key=lambda s: volume.sections[s.name][0])
    inner = [s.name for s in own[1:-1]]
    for name in hold_out or inner or ["none"]:
        if name not in inner:
            raise UsageError(
                f"{name} has no measured section above and below it; allowed: {', '.join(inner) or 'none'}"
            )
    others[""] = [s for s in others.get("", ()) if s.name not in volume.sections]  # given in turn
    lines: list[Line] = []
    for name in hold_out or inner:
        at = [s.name for s in own].index(name)
        lines += _held_out(config, volume, own, at, others, out / name, log)
    title = f"{{}} of {config.name} on sections held out, mean of the genes"
    tables = [
        _table(title.format("Pearson r"), lines, lambda line: mean_r(line.r)),
        _table(title.format("SSIM"), lines, lambda line: float(line.ssim.mean())),
    ]
    per_gene = [
        {
            "section": line.section,
            "line": line.name,
            "gene": gene,
            "r": None if np.isnan(r) else r,
            "ssim": ssim,
        }
        for line in lines
        for gene, r, ssim in zip(line.genes, line.r.tolist(), line.ssim.tolist(), strict=True)
    ]
    about = {"options": decisive_options(config)}
    Report(REPORT, tables, about, details={"per_gene": per_gene}).write(out, overwrite=overwrite)
    return lines


def _held_out(
    config: VolumeConfig,
    volume: Volume,
    own: list[Section],
    at: int,
    others: Given,
    out: Path,
    log: Callable[[str], None],
) -> list[Line]:
    section, given = own[at], [own[at - 1], own[at + 1]]
    rest = [s for s in own if s is not section and s not in given]
    panel = read_panel(config.panel) if config.panel else choose_panel(given, config.genes)
    seen: list[Pairs] = []

    def predicted(name: str, trained_on: list[Section], **over: object) -> Expression:
        one = replace(config, out=str(out / name.replace(" ", "_")), **over)
        one = replace(one, voi=replace(one.voi, validation=()))
        sections = {**others, "": [*others[""], *trained_on], config.voi.volume: trained_on}
        trained = train_volume(one, sections=sections, panel=panel, log=log, again=True)
        model = load_volume_encoder(trained.path)
        planes, patch = model.depth.options.planes, (config.patch_px, config.patch_mpp)
        seen.append(depth_pairs([(volume, section)], panel, planes, *patch, encoder=model.encoder))
        return model.predict(seen[-1])

    by_line = {
        DEPTH: predicted(DEPTH, given),
        FLAT: predicted(FLAT, given, depth=DepthOptions(planes=1)),
    }
    observed, xy = seen[0].expression, seen[0].xy_um
    by_line[BETWEEN] = _interpolated(volume, section, given, panel, xy)
    by_line[BOTH] = np.asarray((by_line[DEPTH] + by_line[BETWEEN]) / 2, np.float32)
    if rest and config.epochs[0]:
        by_line[UNSEEN] = predicted(UNSEEN, rest, epochs=(*config.epochs[:2], 0))
    by_line[PERMUTED] = np.random.default_rng(0).permutation(by_line[DEPTH])
    return [
        Line(section.name, name, panel, pearson(values, observed), _ssim(values, observed, xy))
        for name, values in by_line.items()
    ]


def _interpolated(
    volume: Volume, section: Section, given: list[Section], panel: Sequence[str], xy: NDArray[np.float64]
) -> Expression:
    """Expression measured on both sides, linearly within each section and between the two by depth."""
    from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

    depth = volume.sections[section.name][0]
    total, weights = np.zeros((len(xy), len(panel))), 0.0
    for other in given:
        plane, to_frame = volume.sections[other.name]
        places, values = apply(to_frame, other.xy_l0) * volume.mpp, other.log1p(panel)
        inside = LinearNDInterpolator(places, values)(xy)
        inside = np.where(np.isnan(inside), NearestNDInterpolator(places, values)(xy), inside)
        weight = 1 / abs(plane - depth)
        total, weights = total + weight * inside, weights + weight
    return np.asarray(total / weights, np.float32)


def _ssim(predicted: Expression, observed: Expression, xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Structural similarity of the maps between the spots, in pixels of half a pitch: float64 [G].

    The range of values is that of the observed gene; pixels outside the spots' hull do not count.
    """
    from scipy.interpolate import LinearNDInterpolator
    from scipy.spatial import cKDTree

    pitch = float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))
    low, high = xy.min(0), xy.max(0)
    x, y = (np.arange(a, b + pitch / 2, pitch / 2) for a, b in zip(low, high, strict=True))
    grid = np.stack(np.meshgrid(x, y), -1)
    maps = [
        LinearNDInterpolator(xy, np.asarray(values, np.float64))(grid) for values in (predicted, observed)
    ]
    inside = np.isfinite(maps[0][..., 0])

    weight = cv2.GaussianBlur(inside.astype(np.float64), (0, 0), SIGMA)

    def blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = cv2.GaussianBlur(np.where(inside, values, 0), (0, 0), SIGMA)
        return np.asarray(sums / np.maximum(weight, 1e-9))

    found = []
    for p, o in zip(np.moveaxis(maps[0], 2, 0), np.moveaxis(maps[1], 2, 0), strict=True):
        span = float(np.ptp(o[inside])) or 1.0
        c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
        mp, mo = blurred(p), blurred(o)
        vp, vo, both = blurred(p * p) - mp * mp, blurred(o * o) - mo * mo, blurred(p * o) - mp * mo
        ssim = (2 * mp * mo + c1) * (2 * both + c2) / ((mp**2 + mo**2 + c1) * (vp + vo + c2))
        found.append(float(ssim[inside].mean()))
    return np.array(found)


def _table(title: str, lines: Sequence[Line], figure: Callable[[Line], float]) -> Table:
    """A row per line, a column per section; NaN where a section has no such line."""
    sections = tuple(dict.fromkeys(line.section for line in lines))
    found = {(line.name, line.section): figure(line) for line in lines}
    rows = [
        Row(name, tuple(found.get((name, section), math.nan) for section in sections))
        for name in dict.fromkeys(line.name for line in lines)
    ]
    return Table(title, sections, tuple(rows), summary="")
