"""Slide-level embeddings: the patches of a slide pooled by their mean or by a trained model.

    pooling = open_pooling("clam.pt")                          # or "mean", or "feather-univ2"
    features = read_features("out/20x_224px_0px_overlap/features_seal-conch/a.h5")
    slide = pool_slide(features, pooling, "a.h5")              # features [D'] or [C, D'], attention [C, N]

A checkpoint does not say which encoder it was trained on. Only the width of the features can be checked, and
two encoders may have the same width, as `conch` and `seal-conch` do. Of a slide encoder that has a name the
encoder is known, and other features are refused.
"""

from __future__ import annotations

from pathlib import Path

from seal_extract.encoders.slide_encoders import (
    SlideEncoder,
    find_slide_encoder,
    names_that_run,
    refuse_foreign,
)
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


def open_pooling(asked: str | Path, offline: bool = False) -> Pooling:
    """Open the mean, a slide encoder that has a name, or the model of a checkpoint.

    Args:
        asked: ``"mean"``; a name of `SLIDE_ENCODERS`, or ``NAME=FILE`` with its weights on this disk; or the
            file of a CLAM or ABMIL model; see `checkpoint` for the layouts known.
        offline: never use the network.

    Raises:
        UsageError: it is none of them.
        CheckpointError: the file does not hold exactly such a model.
        HubError: the Hub does not deliver the weights of a named one.
    """
    if str(asked) == MEAN:
        return MeanPooling()
    name, _, file = str(asked).partition("=")
    row = find_slide_encoder(name)
    if row is not None:
        return _open_named(row, file, offline)
    path = Path(asked)
    if not path.exists():
        raise UsageError(
            f"--slide-level {asked} is not a file; allowed: {MEAN}, {', '.join(names_that_run())}, or the "
            f"checkpoint (.pt, .pth, .safetensors) of a CLAM (also its mil) or ABMIL model"
        )
    if path.stem == MEAN:
        raise UsageError(f"--slide-level {asked} would get the name of the {MEAN}; rename the file")
    from seal_extract.pooling.checkpoint import read_model

    return read_model(path)


def _open_named(row: SlideEncoder, file: str, offline: bool) -> Pooling:
    refuse_foreign(row)
    if not (file or row.source):
        raise UsageError(
            f"the weights of {row.name} are not fetched; download {row.layout.files[0]} from its authors and "
            f"type --slide-level {row.name}=FILE"
        )
    from seal_extract.pooling.checkpoint import read_named

    return read_named(row, file, offline)
