"""Slide-level embeddings: the patches of a slide pooled into one, by their mean or by a trained attention.

    pooling = open_pooling("clam.pt")                          # or "mean"
    features = read_features("out/20x_224px_0px_overlap/features_seal-conch/a.h5")
    slide = pool_slide(features, pooling, "a.h5")              # features [D'] or [C, D'], attention [C, N]

A checkpoint does not say of which encoder its features were: only their width can be held to it, and two
encoders may share one (`conch` and `seal-conch` do). Whoever gives a checkpoint vouches for the encoder.
"""

from __future__ import annotations

from seal_extract.pooling.file import SlideLevel, pool_slide, read_slide_level
from seal_extract.pooling.pooling import MEAN, MeanPooling, Pooled, Pooling, open_pooling

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
