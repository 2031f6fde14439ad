"""The slides of a collection as a viewer asks for them, by number: opened, read and computed when asked, and
kept in bounded memory.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray

from seal_extract.errors import SealExtractError, UsageError
from seal_extract.features.store import SlideFeatures, sample_rows
from seal_extract.names import shown
from seal_extract.patches.grid import PatchGrid
from seal_extract.slides.drawing import read_thumbnail
from seal_extract.tissue.geojson import read_polygons
from seal_extract.view.cache import BoundedCache
from seal_extract.view.collection import Collection, ShownSlide
from seal_extract.view.colours import CLUSTERS, Components
from seal_extract.view.gene_maps import GeneMaps
from seal_extract.view.heatmap import PatchRaster
from seal_extract.view.layers import (
    Attention,
    Layer,
    cluster_layer,
    embedding_layer,
    find_attention,
    scale_layer,
)
from seal_extract.view.neighbours import alike_in_others, alike_in_slide
from seal_extract.view.tiles import SlideTiles, jpeg, png

if TYPE_CHECKING:
    from seal_extract.genes.search import Found

TILE_BYTES, FEATURE_BYTES, LAYER_BYTES = 256 << 20, 1 << 30, 64 << 20
MOST_OPEN = 8  # slides at a time
SAMPLED_SLIDES, SAMPLED_ROWS = 64, 8192  # of a cohort, for colours
PATCH_IMAGE_PX = 160
ALIKE = 8  # neighbours shown


class Gallery:
    """A collection that answers a viewer's questions; safe to use from several threads."""

    def __init__(self, collection: Collection, genes: GeneMaps) -> None:
        self.collection, self.genes = collection, genes
        self._version = secrets.token_hex(4)  # in addresses: nothing is taken for an answer of another run
        self._open: BoundedCache[SlideTiles] = BoundedCache(MOST_OPEN)
        self._tiles: BoundedCache[tuple[bytes, str]] = BoundedCache(TILE_BYTES, lambda t: len(t[0]))
        self._features: BoundedCache[SlideFeatures] = BoundedCache(FEATURE_BYTES, _bytes_of)
        self._layers: BoundedCache[Layer] = BoundedCache(LAYER_BYTES, lambda y: y.rgb.nbytes * 3)
        self._small: BoundedCache[Any] = BoundedCache(64)  # of a slide or the cohort: colours, means

    # --- the list -------------------------------------------------------------------------------------

    def slides(self) -> dict[str, Any]:
        """Every slide in a line."""
        return {
            "version": self._version,
            "out": shown(self.collection.out.resolve().name),
            "encoder": self.collection.encoder,
            "slides": [self._line(i, slide) for i, slide in enumerate(self.collection.slides)],
        }

    def _line(self, index: int, slide: ShownSlide) -> dict[str, Any]:
        row = slide.status
        return {
            "index": index,
            "name": shown(slide.name),
            "status": "failed" if slide.features is None else "done",
            "problem": slide.problem and shown(slide.problem),
            "patches": row.patches if row else None,
            "tissue_mm2": row.tissue_mm2 if row else None,
            "case": shown(row.case_id) if row else "",
            "read_errors": row.read_errors if row else None,
            "thumbnail": os.path.exists(slide.overlay),  # a name may be too long to be looked for
        }

    def thumbnail(self, index: int) -> bytes:
        """A small JPEG of a slide with its patches.

        Raises:
            UsageError: there is none.
        """
        picture = read_thumbnail(self._shown(index).overlay)
        if picture is None:
            raise UsageError(f"{self._shown(index).name} has no overlay")
        return picture

    # --- one slide ------------------------------------------------------------------------------------

    def slide(self, index: int) -> dict[str, Any]:
        """What the page needs to show a slide.

        Raises:
            SealExtractError: it has moved, or cannot be opened.
        """
        this, tiles, features = self._shown(index), self._slide(index), self._read(index)
        grid, raster = features.grid, _raster(features.grid)
        attention = self._attention(index)
        return {
            "index": index,
            "name": shown(this.name),
            "size_l0": list(tiles.slide.size_l0),
            "mpp": tiles.slide.mpp,
            "mpp_source": this.provenance["slide"]["mpp_source"],
            "zooms": tiles.zooms,
            "patches": len(grid),
            "patch_px": grid.patch_px,
            "patch_mpp": grid.mpp,
            "patch_size_l0": grid.patch_size_l0,
            "dim": features.dim,
            "bounds_l0": None if raster is None else list(raster.bounds_l0),
            "tissue": tissue_rings(this.tissue),
            "attention": [a.title for a in attention],
            "clusters": [CLUSTERS[0], min(CLUSTERS[1], max(CLUSTERS[0], len(grid)))],
        }

    def tile(self, index: int, zoom: int, column: int, row: int) -> tuple[bytes, str]:
        """See `SlideTiles.tile`."""
        return self._tiles.get((index, zoom, column, row), lambda: self._slide(index).tile(zoom, column, row))

    def patches(self, index: int) -> bytes:
        """Top-left corners of all patches, level-0 pixels: int32 [N, 2], little-endian."""
        return self._read(index).grid.xy_l0.astype("<i4").tobytes()

    # --- layers ---------------------------------------------------------------------------------------

    def layer(self, index: int, kind: str, of: str) -> Layer:
        """A colour per patch.

        Args:
            index: of the slide.
            kind: ``"embedding"``, ``"clusters"``, ``"genes"`` or ``"attention"``.
            of: nothing; how many; a gene, genes or a set; which, counted from 0.

        Raises:
            UsageError: an unknown kind, or nothing of that name.
            SealExtractError: there are no genes.
        """
        return self._layers.get((index, kind, of), lambda: self._make_layer(index, kind, of))

    def layer_png(self, index: int, kind: str, of: str) -> bytes:
        """A layer as a picture of a pixel per patch."""
        raster = _raster(self._read(index).grid)
        if raster is None:
            raise UsageError(f"{self._shown(index).name} has no patches")
        return png(raster.paint(self.layer(index, kind, of).rgb))

    def layer_values(self, index: int, kind: str, of: str) -> bytes:
        """What a layer's colours stand for, float32 [N], little-endian; nothing where it is no number."""
        values = self.layer(index, kind, of).values
        return b"" if values is None else values.astype("<f4").tobytes()

    def _make_layer(self, index: int, kind: str, of: str) -> Layer:
        features = self._read(index)
        if not len(features.grid):
            raise UsageError(f"{self._shown(index).name} has no patches to colour")
        if kind == "embedding":
            return embedding_layer(self._components(), features.features, self._finished())
        if kind == "clusters":
            k = _number(of, "clusters", CLUSTERS)
            return cluster_layer(self._components(), features.features, k, self._finished())
        if kind == "genes":
            return scale_layer(*self.genes.values(features, of))
        if kind == "attention":
            found = self._attention(index)
            chosen = _number(of, "attention", (0, len(found) - 1))
            return found[chosen].layer(features.grid.xy_l0)
        raise UsageError(f"the layer is {kind!r}; allowed: embedding, clusters, genes, attention")

    def _components(self) -> Components:
        """Fitted to the cohort: the same for all its slides."""
        kept: Components = self._small.get("components", lambda: Components.of(self._sample()))
        return kept

    def _sample(self) -> NDArray[np.float32]:
        """Embeddings from over the cohort, float32 [M, D]."""
        files = [s.features for s in self.collection.slides if s.features is not None]
        chosen = files[:: max(1, -(-len(files) // SAMPLED_SLIDES))]
        rows = [sample_rows(path, -(-SAMPLED_ROWS // len(chosen))) for path in chosen]
        return np.concatenate(rows)

    def _finished(self) -> int:
        return sum(slide.features is not None for slide in self.collection.slides)

    def _attention(self, index: int) -> tuple[Attention, ...]:
        files = self._shown(index).attention
        kept: tuple[Attention, ...] = self._small.get(("attention", index), lambda: find_attention(files))
        return kept

    # --- a patch --------------------------------------------------------------------------------------

    def patch(self, index: int, row: int) -> dict[str, Any]:
        """Where a patch lies and the genes predicted for it.

        Raises:
            UsageError: there is no such patch.
        """
        features = self._read(index)
        self._check_row(index, row)
        genes: list[dict[str, Any]] = []
        if self.genes.state()["named"]:
            baseline = self._small.get(("baseline", index), lambda: self.genes.baseline(features))
            genes = self.genes.of_patch(features, row, baseline)
        return {"row": row, "xy_l0": features.grid.xy_l0[row].tolist(), "genes": genes}

    def patch_image(self, index: int, row: int) -> bytes:
        """A patch as a JPEG of 160 px.

        Raises:
            UsageError: there is no such patch.
            ReadError: the slide is damaged there.
        """
        self._check_row(index, row)
        tiles, grid = self._slide(index), self._read(index).grid
        x, y = grid.xy_l0[row].tolist()
        box = (x, y, x + grid.patch_size_l0, y + grid.patch_size_l0)
        return jpeg(tiles.picture(box, (PATCH_IMAGE_PX, PATCH_IMAGE_PX)))

    def alike(self, index: int, row: int, scope: str) -> list[dict[str, Any]]:
        """The patches that look most like one, in its slide or in all others.

        Args:
            index: of the slide.
            row: the patch.
            scope: ``"slide"`` or ``"cohort"``.

        Raises:
            UsageError: there is no such patch or scope.
        """
        self._check_row(index, row)
        if scope == "slide":
            found = alike_in_slide(self._read(index), row, ALIKE)
        elif scope == "cohort":
            found = alike_in_others(self._read(index), row, list(self._cohort().values()), ALIKE)
        else:
            raise UsageError(f"the scope is {scope!r}; allowed: slide, cohort")
        numbers = {features.path: number for number, features in self._cohort().items()}
        return [self._neighbour(numbers[one.slide.path], one) for one in found]

    def _neighbour(self, index: int, found: Found) -> dict[str, Any]:
        name = shown(self._shown(index).name)
        return {"slide": index, "name": name, "row": found.row, "cosine": found.score}

    def _cohort(self) -> dict[int, SlideFeatures]:
        """The features of all slides that have patches, by their number; none of their rows is held."""
        finished = [(i, s) for i, s in enumerate(self.collection.slides) if s.features is not None]
        kept: dict[int, SlideFeatures] = self._small.get(
            "cohort", lambda: {i: f for i, s in finished if len((f := s.read()).grid)}
        )
        return kept

    def _check_row(self, index: int, row: int) -> None:
        count = len(self._read(index).grid)
        if not 0 <= row < count:
            raise UsageError(
                f"there is no patch {row}; {self._shown(index).name} has {count}, counted from 0"
            )

    # --- a region -------------------------------------------------------------------------------------

    def region(self, index: int, polygon: Sequence[Sequence[float]]) -> dict[str, Any]:
        """How large a polygon in level-0 pixels is, how many patches have their centre in it, their genes."""
        from seal_extract.genes.region import areas_mm2, patches_inside

        features = self._read(index)
        drawn = [shapely.Polygon(polygon)]
        inside = patches_inside(features.grid, drawn)
        outline = read_outline(self._shown(index).tissue)
        area, tissue = areas_mm2(drawn, outline, self._slide(index).slide.mpp)
        answer: dict[str, Any] = {
            "patches": int(inside.sum()),
            "area_mm2": area,
            "tissue_mm2": tissue,
            "genes": [],
            "why": "",
        }
        if not inside.any() or inside.all():
            return answer | {"why": "draw it around some of the patches, not around none or all"}
        state = self.genes.state()
        if not state["named"]:
            return answer | {"why": state["why"]}
        return answer | self.genes.of_region(features, inside)

    # --- what is kept ---------------------------------------------------------------------------------

    def _shown(self, index: int) -> ShownSlide:
        slides = self.collection.slides
        if not 0 <= index < len(slides):
            raise UsageError(f"there is no slide {index}; there are {len(slides)}, counted from 0")
        return slides[index]

    def _slide(self, index: int) -> SlideTiles:
        return self._open.get(index, lambda: SlideTiles(self._shown(index).open()))

    def _read(self, index: int) -> SlideFeatures:
        return self._features.get(index, self._shown(index).read)


def _bytes_of(features: SlideFeatures) -> int:
    return len(features.grid) * (features.dim * 4 + 16)


def _raster(grid: PatchGrid) -> PatchRaster | None:
    return PatchRaster.of(grid) if len(grid) else None


def tissue_rings(path: Path) -> list[list[list[int]]]:
    """The outline's rings in level-0 pixels; none where it was never written or was damaged since."""
    polygons = read_outline(path) or ()
    rings = [shapely.get_coordinates(ring)[:-1] for ring in shapely.get_rings(polygons)]
    return [np.round(ring).astype(int).tolist() for ring in rings]


def read_outline(path: Path) -> list[shapely.Polygon] | None:
    """The tissue's polygons in level-0 pixels; None where they were never written or were damaged since."""
    try:
        return read_polygons(path)[0]
    except SealExtractError:
        return None


def _number(text: str, what: str, allowed: tuple[int, int]) -> int:
    low, high = allowed
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not low <= int(text) <= high:
        raise UsageError(f"{what} is {text[:20]!r}; allowed: {low} to {high}")
    return int(text)
