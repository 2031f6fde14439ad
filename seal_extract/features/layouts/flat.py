"""One folder of ``{slide}.h5``, as Patho-Bench and loaders like MIL-Lab's take it: one encoder, one -o."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seal_extract.features.layouts.layout import Layout


@dataclass(frozen=True)
class FlatLayout(Layout):
    """``OUT/{slide}.h5``: features and coords."""

    name = "flat"
    one_encoder = True

    def features(self, slide: str, encoder: str) -> Path:
        """Features of a slide, by its name without suffix."""
        return self.out / f"{slide}.h5"
