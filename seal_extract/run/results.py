"""What became of a slide, as every way to run hands it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seal_extract.errors import SealExtractError
from seal_extract.features.store import SlideFeatures
from seal_extract.slides.listing import SlideEntry

Progress = Callable[[Path, int, int], None]  # slide, patches done, patches in all


@dataclass(frozen=True)
class SlideResult:
    """A slide's features, or the error that stopped it.

    Attributes:
        entry: the slide.
        features: one per encoder, in their order; empty if it failed.
        error: None if it went well.
        seconds: from the end of the slide before it to its own.
        finished_before: whether nothing had to be done.
    """

    entry: SlideEntry
    features: tuple[SlideFeatures, ...]
    error: SealExtractError | None
    seconds: float
    finished_before: bool = False

    @property
    def path(self) -> Path:
        """Of the slide; see `SlideEntry`."""
        return self.entry.path

    @property
    def name(self) -> str:
        """Of the slide's results."""
        return self.entry.name
