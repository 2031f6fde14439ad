"""Depth recovers what one plane does not show; every line of the table says what it says by construction."""

import json

import numpy as np
import pytest
from synthetic_volume import GENES, SIDE, TILES, section, write_encoder, write_volume

from seal_extract.errors import SealExtractError
from seal_extract.evaluate.volume import (
    BETWEEN,
    BOTH,
    DEPTH,
    FLAT,
    PERMUTED,
    UNSEEN,
    _interpolated,
    _ssim,
    evaluate_volume,
)
from seal_extract.train.config import LoopOptions, OmicsOptions
from seal_extract.volume.config import DepthOptions, VolumeConfig, VolumeData
from seal_extract.volume.volume import open_volume


def config(path, encoder, **over):
    values = {
        "name": "deep",
        "encoder": str(encoder),
        "out": "unused",
        "voi": VolumeData(str(path), sections=()),
        "genes": GENES,
        "smooth": False,
        "patch_px": SIDE,
        "batch_size": 12,
        "epochs": (0, 0, 8),
        "depth": DepthOptions(width=32, dropout=0.0),
        "omics": OmicsOptions(hidden=(32, 16), epochs=1),
        "loop": LoopOptions(lr=4e-3, weight_decay=0.01),
    }
    return VolumeConfig(**(values | over))


@pytest.mark.parametrize(
    ("variant", "over"),
    [
        ("regression", {"batch_size": 6, "epochs": (0, 0, 5)}),
        pytest.param("alignment", {}, marks=pytest.mark.slow),
    ],
)
def test_depth_recovers_expression_that_one_plane_does_not_show(tmp_path, variant, over):
    path, expression = write_volume(tmp_path / "volume")
    sections = {str(path): [section(path, plane, expression) for plane in (4, 1, 3)]}
    options = config(path, write_encoder(tmp_path / "encoder"), variant=variant, **over)
    lines = evaluate_volume(options, tmp_path / "out", sections=sections)
    r = {line.name: line.r.mean() for line in lines}
    assert {line.section for line in lines} == {"P3"}
    assert r[DEPTH] > 0.8, r
    assert abs(r[FLAT]) < 0.2
    assert abs(r[BETWEEN]) < 0.2  # planes have nothing to do with each other
    assert abs(r[PERMUTED]) < 0.2
    assert UNSEEN not in r  # there is no third section to train on
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(report["per_gene"]) == 5 * GENES
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert f"| {DEPTH} | {r[DEPTH]:.3f} |" in table
    assert BOTH in table
    checkpoint = next((tmp_path / "out").rglob("checkpoint.pt"))
    trained_at = checkpoint.stat().st_mtime_ns
    again = evaluate_volume(options, tmp_path / "out", sections=sections, overwrite=True)
    assert checkpoint.stat().st_mtime_ns == trained_at  # as after a stop, nothing is trained twice
    assert {line.name: line.r.mean() for line in again} == r
    with pytest.raises(SealExtractError, match="P1 has no measured section above and below it; allowed: P3"):
        evaluate_volume(options, tmp_path / "other", ["P1"], sections=sections)


@pytest.mark.slow  # three trainings
def test_other_volumes_teach_what_depth_means(tmp_path):
    """Stage 2 by itself: the line that is not trained on the given sections recovers expression."""
    (path, here), (other, there) = (write_volume(tmp_path / str(i), seed=i) for i in range(2))
    given = {str(path): [section(path, plane, here) for plane in (1, 3, 4, 5)]}
    given[str(other)] = [section(other, plane, there) for plane in (1, 2, 3, 4)]
    options = config(path, write_encoder(tmp_path / "encoder"), variant="regression", batch_size=6,
                     epochs=(1, 3, 0), volumes=(VolumeData(str(other), sections=()),))  # fmt: skip
    lines = evaluate_volume(options, tmp_path / "out", ["P3"], sections=given)
    r = {line.name: line.r.mean() for line in lines}
    assert r[UNSEEN] > 0.8, r
    assert abs(r[FLAT]) < 0.2


def test_interpolation_weighs_both_sides_by_their_depth(tmp_path):
    path, expression = write_volume(tmp_path / "volume", planes=5)
    flat = np.zeros_like(expression)
    flat[:] = np.array([0.5, 1.5, 0.5, 0.5, 4.5])[:, None, None]
    volume, panel = open_volume(path), section(path, 0, expression).genes
    given = [section(path, 1, flat), section(path, 4, flat)]
    xy = section(path, 2, flat).xy_l0 * volume.mpp
    found = _interpolated(volume, section(path, 2, flat), given, panel, xy)
    np.testing.assert_allclose(found, 2.5)  # a third of the way from 1.5 to 4.5


def test_ssim_of_maps_one_can_draw():
    xy = np.stack(np.divmod(np.arange(TILES**2), TILES), 1) * 100.0
    rng = np.random.default_rng(0)
    observed = np.stack([xy[:, 0], rng.normal(size=len(xy)), np.ones(len(xy))], 1).astype(np.float32)
    np.testing.assert_allclose(_ssim(observed, observed, xy), 1)
    noisy = observed + rng.normal(0, 0.5, observed.shape).astype(np.float32) * observed.std(0)
    close, far = (_ssim(noisy, observed, xy)[:2], _ssim(rng.permutation(observed), observed, xy)[:2])
    assert (close > far + 0.2).all()
