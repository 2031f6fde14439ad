"""``--slide-level``: what pools a slide's patches, checked before any slide is read, written after each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.terminal import fail
from seal_extract.errors import OutputError, SealExtractError, UsageError

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.features.store import SlideFeatures
    from seal_extract.pooling import Pooling
    from seal_extract.run.options import ExtractOptions
    from seal_extract.run.status_table import SlideResult


class SlideLevels:
    """The slide-level files of a run."""

    def __init__(
        self, asked: Sequence[str], encoders: Sequence[EncoderRequest], out: Path, options: ExtractOptions
    ) -> None:
        """Open every checkpoint and hold it to the encoders' widths.

        Raises:
            UsageError: a file that is not there, a model of other features, or two of one name.
            CheckpointError: a file that is no CLAM or ABMIL model.
        """
        self._asked = self._failed = 0
        self._out, self._options = out, options
        self._poolings = [_open(name) for name in dict.fromkeys(_split(asked))]
        names = [pooling.name for pooling in self._poolings]
        if len(set(names)) < len(names):
            raise UsageError(f"--slide-level has files of one name ({', '.join(names)}); rename one of them")
        if self._poolings:
            from seal_extract.pooling.pooling import check_width

            for pooling in self._poolings:
                for encoder in encoders:
                    check_width(pooling, encoder.spec.dim, encoder.spec.name)

    def lines(self, result: SlideResult) -> Iterator[str | SealExtractError]:
        """Pool each encoder's features of a slide in each way asked for: what to say of it, or why not."""
        for features in result.features:
            for pooling in self._poolings:
                what = f"{result.path.name}: slide level by {pooling.name}"
                try:
                    self._asked += 1
                    yield f"{what}, {self._write(features, result.name, pooling)}"
                except SealExtractError as exc:
                    self._failed += 1
                    yield type(exc)(f"{what}: {exc}")

    def status(self) -> int:
        """The exit status, with how many failed."""
        if self._failed:
            return fail(f"{self._failed} of {self._asked} slide-level files failed", 1)
        return 0

    def _write(self, features: SlideFeatures, name: str, pooling: Pooling) -> str:
        from seal_extract.features.layouts import layout_of_grid
        from seal_extract.pooling import pool_slide

        layout = layout_of_grid(self._options.layout, self._out, features.grid)
        path = layout.slide_level(name, f"{pooling.name}-{features.provenance['encoder']['name']}")
        if not len(features.grid):
            return f"no patches to pool{_without(path, self._options.overwrite)}"
        made = pool_slide(features, pooling, path, overwrite=self._options.overwrite)
        told = " x ".join(map(str, made.features.shape))
        if made.probabilities is not None:
            told += f", class probabilities {' '.join(f'{p:.3g}' for p in made.probabilities)}"
        if made.finished_before:
            told += ", finished before"
            if made.is_older:
                told += (
                    " by an older version (no class probabilities, and Patho-Bench cannot read it): delete "
                    "the file and type the same command to have it written anew, which encodes nothing"
                )
        return f"{told} -> {path}"


def _split(asked: Sequence[str]) -> Iterator[str]:
    for text in asked:
        yield from [text] if Path(text).exists() else (name.strip() for name in text.split(","))


def _open(name: str) -> Pooling:
    from seal_extract.pooling import open_pooling

    return open_pooling(name)


def _without(path: Path, overwrite: bool) -> str:
    """No file may lie there that was made of patches which this slide has no more."""
    if not path.exists():
        return ""
    if not overwrite:
        raise OutputError(f"{path} exists, made of patches that are no more; type --overwrite to delete it")
    path.unlink()
    return f", deleted {path}"
