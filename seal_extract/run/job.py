"""What the stages of a run hand to each other: a slide with all that was asked for it, resolved once.

It begins as a `SlideJob`, becomes an `OpenSlide`, and goes from thread to thread through a `Channel`.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from seal_extract.errors import GeometryError, SealExtractError, SlideError
from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layouts import Layout, layout_of_grid, open_layout
from seal_extract.patches.grid import PatchGrid, make_grid, mpp_of_name, read_grid
from seal_extract.run.options import ExtractOptions
from seal_extract.slides.entry import SlideEntry, open_entry
from seal_extract.slides.slide import Slide, absolute

if TYPE_CHECKING:
    from seal_extract.patches.regions import PatchReader
    from seal_extract.slides.entry import FileStamp
    from seal_extract.slides.readers import Array
    from seal_extract.tissue.mask import TissueMask

T = TypeVar("T")
COORDS_NAMES = ("{}_patches.h5", "{}.h5")
ROI_NAMES = ("{}.geojson", "{}.json")
GRID_FOLDER = re.compile(r"[\d.e+-]+x_(\d+)px_(\d+)px_overlap")


@dataclass(frozen=True)
class SlideJob:
    """A slide to embed.

    Attributes:
        entry: the slide, and what a table says of it.
        options: all choices; ``coords`` and ``roi`` are the files of this slide.
        out: folder for the results.
        error: why the slide cannot be embedded, if that is known before it is opened.
        finished: features files of a former run, by the name of the encoder.
        complete: names of the encoders whose files are all there, with tokens where they are asked for.
    """

    entry: SlideEntry
    options: ExtractOptions
    out: Path
    error: SealExtractError | None = None
    finished: Mapping[str, Path] = field(default_factory=dict)
    complete: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entry: SlideEntry, out: Path, options: ExtractOptions) -> SlideJob:
        """Find the files of a slide in the folders that ``options`` names; a table may give its tissue."""
        coords, roi = options.coords, entry.roi or options.roi
        try:
            coords = coords and _file_for(entry, coords, COORDS_NAMES, "--coords")
            roi = roi and _file_for(entry, roi, ROI_NAMES, "--roi")
        except GeometryError as exc:
            return cls(entry, options, out, exc)
        if (coords, roi) != (options.coords, options.roi):
            options = replace(options, coords=coords, roi=roi)
        return cls(entry, options, out)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """See `PatchOptions.fingerprint`."""
        return self.options.fingerprint()

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Where features of the slide may lie: coordinates from a file decide the folder by their grid."""
        o = self.options
        if o.coords is None or o.layout != "trident":
            return (open_layout(o.layout, self.out, o.patch_px, o.mpp, o.overlap_px),)
        grids = filter(None, (GRID_FOLDER.fullmatch(path.name) for path in sorted(self.out.glob("*x_*"))))
        return tuple(
            open_layout(o.layout, self.out, int(name[1]), mpp_of_name(name[0]), int(name[2]))
            for name in grids
        )

    def layout_of(self, grid: PatchGrid) -> Layout:
        """Where the results go."""
        return layout_of_grid(self.options.layout, self.out, grid)

    def open(self) -> Slide:
        """Open the slide in this process; see `open_entry`."""
        if self.error is not None:
            raise self.error
        return open_entry(self.entry, self.options.slide_mpp, self.options.override_mpp)

    def resolved(self) -> SlideJob:
        """The same, independent of the working folder."""
        return replace(
            self, entry=self.entry.resolved(), options=self.options.resolved(), out=absolute(self.out)
        )


def _file_for(entry: SlideEntry, given: Path, names: tuple[str, ...], option: str) -> Path:
    """The file of a slide: ``given`` itself, or the one in that folder.

    Raises:
        GeometryError: there is none.
    """
    if given.is_file():
        return given
    candidates = [
        given / name.format(stem) for stem in dict.fromkeys((entry.name, entry.path.stem)) for name in names
    ]
    found = [c for c in candidates if c.is_file()]
    if not found:
        allowed = " or ".join(c.name for c in candidates)
        raise GeometryError(f"{option} {given} is neither a file nor a folder with {allowed}; check the path")
    return found[0]


def find_tissue_and_grid(slide: Slide, options: ExtractOptions) -> tuple[TissueMask | None, PatchGrid, Array]:
    """Find the tissue and lay the grid, or take either from the file that ``options`` names.

    Returns:
        The tissue, None where the coordinates came from a file; the grid; and the picture to draw both on,
        uint8 [h, w, 3]: the slide as it was read to find the tissue, unless that is too coarse for the eye.

    Raises:
        SlideError: the slide cannot be read, is not brightfield, or is coarser than the target.
        GeometryError: the file that ``options`` names does not fit the slide.
    """
    from seal_extract.slides.overview import read_picture  # imports OpenCV
    from seal_extract.tissue.mask import TissueMask
    from seal_extract.tissue.segmentation import find_tissue_and_picture

    if options.coords is not None:
        grid = read_grid(options.coords, slide)
        grid = replace(grid, inside_l0=slide.bounds_l0) if options.edges == "keep" else grid
        return None, grid, read_picture(slide)
    if options.roi is None:
        mask, picture = find_tissue_and_picture(slide)
    else:
        mask = TissueMask.from_geojson(options.roi, slide)
        try:
            tissue, picture = find_tissue_and_picture(slide)
        except SlideError:  # tissue may be drawn because none can be found
            picture = read_picture(slide)
        else:
            found = tissue.mask
            if found.any() and not (found & mask.mask).any():
                warnings.warn(
                    f"{options.roi}: no polygon overlaps the tissue found in {slide.path.name}; was it drawn "
                    "on another slide?",
                    stacklevel=2,
                )
    grid = make_grid(
        slide,
        mask,
        options.patch_px,
        options.mpp,
        overlap_px=options.overlap_px,
        min_tissue=options.min_tissue,
        mpp_tolerance=options.mpp_tolerance,
        allow_upsampling=options.allow_upsampling,
        edges=options.edges,
    )
    return mask, grid, picture


@dataclass(frozen=True)
class Output:
    """What one encoder will write of a slide.

    Attributes:
        encoder: its position among the encoders of the run.
        provenance: of the features; read errors are added as they come.
        overwrite: replace the files that are there.
        features: write the features file.
        tokens: write the file of tokens.
    """

    encoder: int
    provenance: dict[str, Any]
    overwrite: bool
    features: bool = True
    tokens: bool = False


@dataclass(frozen=True, eq=False)
class OpenSlide:
    """A slide that is open and ready to be read.

    Attributes:
        job: the slide and everything that was asked for it.
        slide: open.
        mask: its tissue; None where the coordinates came from a file.
        grid: its patches.
        picture: uint8 [h, w, 3], the whole slide, to draw both on.
        reader: reads them.
        layout: where its files go.
        stamp: the state of the slide's files when it was opened.
        outputs: one per encoder that has still to see it.
    """

    job: SlideJob
    slide: Slide
    mask: TissueMask | None
    grid: PatchGrid
    picture: Array
    reader: PatchReader
    layout: Layout
    stamp: FileStamp
    outputs: tuple[Output, ...] = ()

    @property
    def label(self) -> SlideLabel:
        """What files say of the slide."""
        return SlideLabel(self.job.entry.name, self.slide.size_l0, self.slide.mpp)

    def close(self) -> None:
        """Close the slide, and what its reader has opened."""
        self.reader.close()
        self.slide.close()


# --- from thread to thread ------------------------------------------------------------------------------


class Stopped(Exception):
    """The run was stopped while this thread waited for another one."""


class Channel(Generic[T]):
    """Items from one thread to another, in order; iterating waits for the next item, until `end`.

    ``queue.Queue`` can be shut down in this way from Python 3.13 on.
    """

    def __init__(self, size: int | None = None, senders: int = 1) -> None:
        """Hold at most ``size`` items, any number by default; it ends when all ``senders`` have ended it."""
        self._size, self._senders = size, senders
        self._items: deque[T] = deque()
        self._turn = 0
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Hand over an item; waits while the channel is full.

        Raises:
            Stopped: the channel was stopped.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room())
            self.check()
            self._items.append(item)
            self._changed.notify_all()

    def put_in_turn(self, turn: int, item: T | None) -> None:
        """`put` by one of several threads, after those whose ``turn``, from 0, is before; None is no item."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or (turn == self._turn and self._has_room()))
            self.check()
            self._turn += 1
            if item is not None:
                self._items.append(item)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._size is None or len(self._items) < self._size

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come: iterating ends after the items that are there, or raises ``error``."""
        with self._changed:
            self._error = self._error or error
            self._senders -= 1
            self._ended = self._error is not None or self._senders <= 0
            self._changed.notify_all()

    def stop(self) -> None:
        """Make both sides raise `Stopped`, at once if they are waiting."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def check(self) -> None:
        """Raise `Stopped` if the channel was stopped."""
        if self._stopped:
            raise Stopped

    def is_ready(self) -> bool:
        """Whether iterating goes on without waiting."""
        return bool(self._items) or self._ended or self._stopped

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(self.is_ready)
            self.check()
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
        if self._error is not None:
            raise self._error
        raise StopIteration
