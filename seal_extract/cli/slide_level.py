"""``--slide-level``: pool the patches of each slide; checkpoints are checked before any slide is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.terminal import exit_status
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
        self._poolings: list[Pooling] = []
        if asked:
            from seal_extract.pooling import open_pooling

            self._poolings = [open_pooling(name) for name in dict.fromkeys(_split(asked))]
        names = [pooling.name for pooling in self._poolings]
        if len(set(names)) < len(names):
            raise UsageError(f"--slide-level has files of one name ({', '.join(names)}); rename one of them")
        if self._poolings:
            from seal_extract.pooling.slide_level import check_width

            for pooling in self._poolings:
                for encoder in encoders:
                    check_width(pooling, encoder.spec.dim, encoder.spec.name)

    def pool(self, result: SlideResult) -> Iterator[str | SealExtractError]:
        """Pool the features of each encoder in each way asked for; yields one line or error for each."""
        for features in result.features:
            for pooling in self._poolings:
                what = f"{result.path.name}: slide level by {pooling.name}"
                try:
                    self._asked += 1
                    yield f"{what}, {self._write(features, result.name, pooling)}"
                except SealExtractError as exc:
                    self._failed += 1
                    yield type(exc)(f"{what}: {exc}")

    def exit_status(self) -> int:
        """0, or 1 if a file failed, with a line that says how many."""
        return exit_status(self._failed, self._asked, "slide-level files")

    def _write(self, features: SlideFeatures, name: str, pooling: Pooling) -> str:
        from seal_extract.features.layouts import layout_of_grid
        from seal_extract.pooling import pool_slide

        layout = layout_of_grid(self._options.layout, self._out, features.grid)
        path = layout.slide_level(name, f"{pooling.name}-{features.provenance['encoder']['name']}")
        if not len(features.grid):
            return f"no patches to pool{_without(path, self._options.overwrite)}"
        made = pool_slide(features, pooling, path, overwrite=self._options.overwrite)
        line = " x ".join(map(str, made.features.shape))
        if made.probabilities is not None:
            line += f", class probabilities {' '.join(f'{p:.3g}' for p in made.probabilities)}"
        if made.finished_before:
            line += ", finished before"
            if made.is_older:
                line += (
                    " by an older version (without class probabilities, and unreadable for Patho-Bench): "
                    "delete the file and run the same command again to write it anew without encoding"
                )
        return f"{line} -> {path}"


def _split(asked: Sequence[str]) -> Iterator[str]:
    for text in asked:
        yield from [text] if Path(text).exists() else (name.strip() for name in text.split(","))


def _without(path: Path, overwrite: bool) -> str:
    """Delete a file made from patches that the slide no longer has, if --overwrite permits it."""
    if not path.exists():
        return ""
    if not overwrite:
        raise OutputError(
            f"{path} was made from patches that the slide no longer has; type --overwrite to delete it"
        )
    path.unlink()
    return f", deleted {path}"
