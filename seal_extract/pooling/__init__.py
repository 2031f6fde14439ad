"""Slide-level embeddings: the patches of a slide pooled by their mean or by a trained model.

    pooling = open_pooling("clam.pt")                          # or "mean"
    features = read_features("out/20x_224px_0px_overlap/features_seal-conch/a.h5")
    slide = pool_slide(features, pooling, "a.h5")              # features [D'] or [C, D'], attention [C, N]

A checkpoint does not say which encoder it was trained on. Only the width of the features can be checked, and
two encoders may have the same width, as `conch` and `seal-conch` do.
"""

from __future__ import annotations

from pathlib import Path

from seal_extract.errors import UsageError
from seal_extract.pooling.slide_level import (
    MEAN,
    MeanPooling,
    Pooled,
    Pooling,
    SlideLevel,
    pool_slide,
    read_slide_level,
)

__all__ = [
    "MEAN",
    "MeanPooling",
    "Pooled",
    "Pooling",
    "SlideLevel",
    "open_pooling",
    "pool_slide",
    "read_slide_level",
]


def open_pooling(asked: str | Path) -> Pooling:
    """Open the mean, or the model of a checkpoint.

    Args:
        asked: ``"mean"``, or the file of a CLAM or ABMIL model; see `checkpoint` for the layouts known.

    Raises:
        UsageError: it is neither.
        CheckpointError: the file does not hold exactly such a model.
    """
    if str(asked) == MEAN:
        return MeanPooling()
    path = Path(asked)
    if not path.exists():
        raise UsageError(
            f"--slide-level {asked} is not a file; allowed: {MEAN}, or the checkpoint (.pt, .pth, "
            f".safetensors) of a CLAM (also its mil) or ABMIL model"
        )
    if path.stem == MEAN:
        raise UsageError(f"--slide-level {asked} would get the name of the {MEAN}; rename the file")
    from seal_extract.pooling.checkpoint import read_model

    return read_model(path)
