"""The slides of a collection as a viewer asks for them, by number: opened, read and computed when asked, and
held in bounded memory.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.store import SlideFeatures, sample_rows
from seal_extract.genes.index import ExactIndex, Found
from seal_extract.names import shown
from seal_extract.slides.cache import LruCache
from seal_extract.slides.drawing import read_thumbnail
from seal_extract.view.collection import (
    Collection,
    ShownSlide,
    SlideTiles,
    describe_slide,
    jpeg,
    read_outline,
    tissue_rings,
)
from seal_extract.view.gene_maps import GeneMaps
from seal_extract.view.layers import (
    CLUSTERS,
    Attention,
    Components,
    Layer,
    PatchRaster,
    cluster_layer,
    embedding_layer,
    find_attention,
    scale_layer,
)
from seal_extract.view.volume import PICTURE_PX, Codes, ShownVolume

TILE_BYTES, FEATURE_BYTES, LAYER_BYTES, MAP_BYTES = 256 << 20, 1 << 30, 64 << 20, 128 << 20
MOST_OPEN = 8  # slides at a time
SAMPLED_SLIDES, SAMPLED_ROWS = 64, 8192  # of a cohort, for colours
PATCH_IMAGE_PX = 160
ALIKE = 8  # neighbours shown
LOOKED_AT = 512  # nearest patches of an index; those of the slide itself are left out of them


class Gallery:
    """A collection that answers a viewer's questions; safe to use from several threads.

    Raises, in each method:
        UsageError: there is no such slide, picture, layer or patch.
        SealExtractError: the slide has moved or cannot be opened, a file is damaged, or there are no genes.
    """

    def __init__(self, collection: Collection, genes: GeneMaps) -> None:
        self.collection, self.genes = collection, genes
        self.volume = ShownVolume.find(collection)
        self._version = secrets.token_hex(4)  # in addresses, so that no answer of another run is taken
        self._open: LruCache[SlideTiles] = LruCache(MOST_OPEN)
        self._tiles: LruCache[tuple[bytes, str]] = LruCache(TILE_BYTES, lambda tile: len(tile[0]))
        self._features: LruCache[SlideFeatures] = LruCache(
            FEATURE_BYTES, lambda features: len(features.grid) * (features.dim * 4 + 16)
        )
        self._layers: LruCache[Layer] = LruCache(LAYER_BYTES, lambda layer: layer.rgb.nbytes * 3)
        self._maps: LruCache[tuple[dict[str, Any], Codes]] = LruCache(
            MAP_BYTES, lambda found: found[1].nbytes
        )
        self._small: LruCache[Any] = LruCache(64)  # of a slide or the cohort: components, attention, means

    # --- slides ---------------------------------------------------------------------------------------

    def slides(self) -> dict[str, Any]:
        """The list of slides."""
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
            "read_errors": row.read_errors if row else None,
            "thumbnail": os.path.exists(slide.overlay),  # a name may be too long to be looked for
        }

    def thumbnail(self, index: int) -> bytes:
        """A small JPEG of a slide with its patches."""
        picture = read_thumbnail(self._shown(index).overlay)
        if picture is None:
            raise UsageError(f"{self._shown(index).name} has no overlay")
        return picture

    def slide(self, index: int) -> dict[str, Any]:
        """What the page needs to show a slide."""
        this, features = self._shown(index), self._read(index)
        described = describe_slide(self._slide(index).slide, features, tissue_rings(this.tissue))
        return described | {
            "index": index,
            "case": shown(this.status.case_id) if this.status else "",
            "attention": [a.title for a in self._attention(index)],
            "clusters": [CLUSTERS[0], min(CLUSTERS[1], max(CLUSTERS[0], len(features.grid)))],
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
        """
        return self._layers.get((index, kind, of), lambda: self._make_layer(index, kind, of))

    def layer_png(self, index: int, kind: str, of: str) -> bytes:
        """A layer as a picture of a pixel per patch."""
        layer = self.layer(index, kind, of)
        return layer.png(PatchRaster.of(self._read(index).grid))

    def layer_values(self, index: int, kind: str, of: str) -> bytes:
        """The numbers behind a layer's colours, float32 [N], little-endian; nothing if there are none."""
        values = self.layer(index, kind, of).values
        return b"" if values is None else values.astype("<f4").tobytes()

    def _make_layer(self, index: int, kind: str, of: str) -> Layer:
        features = self._read(index)
        if not len(features.grid):
            raise UsageError(f"{self._shown(index).name} has no patches to colour")
        if kind == "embedding":
            return embedding_layer(self._components(), features.features, len(self._finished()))
        if kind == "clusters":
            k = _number(of, "clusters", CLUSTERS)
            return cluster_layer(self._components(), features.features, k, len(self._finished()))
        if kind == "genes":
            return scale_layer(*self.genes.values(features, of))
        if kind == "attention":
            found = self._attention(index)
            return found[_number(of, "attention", (0, len(found) - 1))].layer(features.grid.xy_l0)
        raise UsageError(f"the layer is {kind!r}; allowed: embedding, clusters, genes, attention")

    def _components(self) -> Components:
        """Fitted to embeddings of the whole cohort."""

        def fit() -> Components:
            files = self._finished()
            chosen = files[:: max(1, -(-len(files) // SAMPLED_SLIDES))]
            each = -(-SAMPLED_ROWS // len(chosen))
            return Components.of(np.concatenate([sample_rows(path, each) for path in chosen]))

        components: Components = self._small.get("components", fit)
        return components

    def _attention(self, index: int) -> tuple[Attention, ...]:
        files = self._shown(index).attention
        found: tuple[Attention, ...] = self._small.get(("attention", index), lambda: find_attention(files))
        return found

    # --- a patch --------------------------------------------------------------------------------------

    def patch(self, index: int, row: int) -> dict[str, Any]:
        """The place of a patch, and the genes predicted for it."""
        features = self._patch(index, row)
        genes: list[dict[str, Any]] = []
        if self.genes.state()["named"]:
            baseline = self._small.get(("baseline", index), lambda: self.genes.baseline(features))
            genes = self.genes.of_patch(features, row, baseline)
        return {"row": row, "xy_l0": features.grid.xy_l0[row].tolist(), "genes": genes}

    def patch_image(self, index: int, row: int) -> bytes:
        """A patch as a JPEG of 160 px."""
        grid = self._patch(index, row).grid
        x, y = grid.xy_l0[row].tolist()
        box = (x, y, x + grid.patch_size_l0, y + grid.patch_size_l0)
        return jpeg(self._slide(index).picture(box, (PATCH_IMAGE_PX, PATCH_IMAGE_PX)))

    def alike(self, index: int, row: int, scope: str) -> list[dict[str, Any]]:
        """The patches that look most like one, in its ``"slide"`` or in all others of the ``"cohort"``."""
        features, cohort = self._patch(index, row), self._cohort()
        query: NDArray[np.float32] = features.features[row]
        if scope == "slide":
            found = ExactIndex([features]).search(query, ALIKE, skip=Found(features, row, 1.0))
        elif scope == "cohort":
            found = _alike_in_others(query, features, list(cohort.values()))
        else:
            raise UsageError(f"the scope is {scope!r}; allowed: slide, cohort")
        numbers = {other.path: number for number, other in cohort.items()}
        return [
            {"slide": number, "name": shown(self._shown(number).name), "row": one.row, "cosine": one.score}
            for one in found
            for number in [numbers[one.slide.path]]
        ]

    def _cohort(self) -> dict[int, SlideFeatures]:
        """The features of all slides that have patches, by their number; none of their rows is held."""

        def read() -> dict[int, SlideFeatures]:
            slides = enumerate(self.collection.slides)
            return {i: f for i, s in slides if s.features is not None and len((f := s.read()).grid)}

        cohort: dict[int, SlideFeatures] = self._small.get("cohort", read)
        return cohort

    # --- a region -------------------------------------------------------------------------------------

    def region(self, index: int, polygon: Sequence[Sequence[float]]) -> dict[str, Any]:
        """The area of a polygon in level-0 pixels, the count of patches centred in it, and their genes."""
        from seal_extract.genes.predict import areas_mm2, patches_inside

        features = self._read(index)
        drawn = [shapely.Polygon(polygon)]
        inside = patches_inside(features.grid, drawn)
        outline = read_outline(self._shown(index).tissue)
        area, tissue = areas_mm2(drawn, outline, self._slide(index).slide.mpp)
        answer: dict[str, Any] = {"patches": int(inside.sum()), "area_mm2": area, "tissue_mm2": tissue}
        answer |= {"genes": [], "why": ""}
        if not inside.any() or inside.all():
            return answer | {"why": "draw it around some of the patches, not around none or all"}
        state = self.genes.state()
        return answer | (self.genes.of_region(features, inside) if state["named"] else {"why": state["why"]})

    # --- a volume -------------------------------------------------------------------------------------

    def describe_volume(self) -> dict[str, Any]:
        """What the page needs to show the volume."""
        return self._volume().describe() | {"version": self._version}

    def plane_picture(self, plane: int, size: str) -> bytes:
        """A plane as a JPEG: a ``"picture"`` to look at, or a ``"slice"`` of the box."""
        volume = self._volume()
        sizes = {"picture": volume.side_px(PICTURE_PX), "slice": volume.slice_px}
        if size not in sizes:
            raise UsageError(f"the size is {size!r}; allowed: {', '.join(sizes)}")
        side = sizes[size]
        return self._tiles.get((plane, *side), lambda: (volume.picture(plane, side), "image/jpeg"))[0]

    def volume_map(self, kind: str, of: str) -> tuple[dict[str, Any], Codes]:
        """See `ShownVolume.map`."""
        return self._maps.get((kind, of), lambda: self._volume().map(kind, of))

    def _volume(self) -> ShownVolume:
        if self.volume is None:
            raise UsageError(f"{self.collection.out} holds no predicted volume")
        return self.volume

    # --- what is held ---------------------------------------------------------------------------------

    def _shown(self, index: int) -> ShownSlide:
        slides = self.collection.slides
        if not 0 <= index < len(slides):
            raise UsageError(f"there is no slide {index}; there are {len(slides)}, counted from 0")
        return slides[index]

    def _finished(self) -> list[Path]:
        return [slide.features for slide in self.collection.slides if slide.features is not None]

    def _slide(self, index: int) -> SlideTiles:
        return self._open.get(index, lambda: SlideTiles(self._shown(index).open()))

    def _read(self, index: int) -> SlideFeatures:
        return self._features.get(index, self._shown(index).read)

    def _patch(self, index: int, row: int) -> SlideFeatures:
        """The features of a slide that has such a patch."""
        features = self._read(index)
        if not 0 <= row < len(features.grid):
            name, patches = self._shown(index).name, len(features.grid)
            raise UsageError(f"there is no patch {row}; {name} has {patches}, counted from 0")
        return features


def _alike_in_others(
    query: NDArray[np.float32], slide: SlideFeatures, cohort: Sequence[SlideFeatures]
) -> list[Found]:
    """From the run's FAISS index if there is one that is up to date; else every row is compared."""
    from seal_extract.genes.faiss_index import index_folder, open_index

    if (folder := index_folder(cohort)).exists():
        try:
            found = open_index(cohort, folder).search(query, LOOKED_AT)
            return [one for one in found if one.slide.path != slide.path][:ALIKE]
        except (UsageError, OutputError):  # it is older than the features, of another encoder, or lacks FAISS
            pass
    others = [other for other in cohort if other.path != slide.path]
    return ExactIndex(others).search(query, ALIKE) if others else []


def _number(text: str, what: str, allowed: tuple[int, int]) -> int:
    low, high = allowed
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not low <= int(text) <= high:
        raise UsageError(f"{what} is {text[:20]!r}; allowed: {low} to {high}")
    return int(text)
