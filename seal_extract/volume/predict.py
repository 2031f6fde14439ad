"""Expression of every plane of a volume: features and genes per plane as for slides, and one OME-Zarr.

Each plane is embedded once where it or a neighbour has tissue, along with those that are decoded with it.
Their embeddings lie in temporary files below the results; memory holds the expression of one plane.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layouts import open_layout
from seal_extract.features.store import SlideFeatures, find_features
from seal_extract.genes.expression_file import Expression, expression_path, write_expression
from seal_extract.patches.grid import PatchGrid, make_grid
from seal_extract.run.embed import Embedder, open_embedder
from seal_extract.run.provenance import PIPELINE, describe, first_difference
from seal_extract.slides.entry import SlideEntry
from seal_extract.tissue.mask import TissueMask
from seal_extract.volume.model import ROWS, VolumeEncoder
from seal_extract.volume.ome_zarr import find_domains, refuse_foreign, write_ome_zarr
from seal_extract.volume.patches import opened, see
from seal_extract.volume.volume import Plane, Volume


def predict_volume(
    volume: Volume,
    model: VolumeEncoder,
    out: Path,
    *,
    genes: Sequence[str] | None = None,
    min_tissue: float = 0.5,
    all_tissue: bool = False,
    allow_upsampling: bool = False,
    domains: int = 0,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Predict every plane and write ``NAME.ome.zarr``; finished planes of the same request are kept.

    Args:
        volume: from `open_volume`.
        model: from `load_volume_encoder`.
        out: folder for the results, in the layout ``trident``.
        genes: to write; all of the panel by default.
        min_tissue: smallest share of tissue in a patch.
        all_tissue: take every patch of every plane, where tissue cannot be found as in H&E.
        allow_upsampling: permit planes that are coarser than the patches of the model.
        domains: number of spatial domains to find over all planes; 0 finds none.
        overwrite: replace files that another request made.
        log: called with a line for each plane.

    Returns:
        The OME-Zarr, see `write_ome_zarr`.

    Raises:
        UsageError: an unknown gene; no tissue anywhere.
        OutputError: a file is in the way, or cannot be written.
        SlideError: a plane that cannot be opened or read.
    """
    names = tuple(model.decoder.named() if genes is None else dict.fromkeys(genes))
    columns, store = model.decoder.columns(names), out / f"{model.name}.ome.zarr"
    refuse_foreign(store)
    tissue = {"min_tissue": min_tissue, "all_tissue": all_tissue}
    run = _Run(volume, model, out, tissue, allow_upsampling, overwrite)
    embedded: list[SlideFeatures] = []
    made: list[Expression] = []
    with closing(run):
        for plane in range(len(volume)):
            kept = None if overwrite else run.finished(plane)
            features = kept or run.write(plane)
            embedded.append(features)
            path, replaced = expression_path(features), kept is None
            made.append(write_expression(features, model.decoder, path, columns, overwrite=replaced))
            log(f"{volume.planes[plane].name}: {len(features.grid)} patches -> {path}")
    write_ome_zarr(store, volume, made, names, find_domains(embedded, domains) if domains else None)
    return store


class _Run:
    """The planes whose embeddings are at hand, and the patches of each."""

    def __init__(
        self,
        volume: Volume,
        model: VolumeEncoder,
        out: Path,
        tissue: dict[str, Any],
        allow_upsampling: bool,
        overwrite: bool,
    ) -> None:
        spec = model.encoder.spec
        if spec.mpp is None:
            raise UsageError(f"{spec.name} does not state its µm/px; train it with patch_mpp")
        self.patch, self.planes = (spec.patch_px, spec.mpp), model.depth.options.planes
        self.volume, self.model = volume, model
        self.tissue, self.allow_upsampling, self.overwrite = tissue, allow_upsampling, overwrite
        out.mkdir(parents=True, exist_ok=True)
        self.layout = open_layout("trident", out, *self.patch, 0)
        self.embedder: Embedder = open_embedder(model.encoder, spec.patch_px)
        self.at_hand: dict[int, NDArray[np.float32]] = {}  # of planes: [cells, D], in nameless files
        self.begun: set[int] = set()  # first planes of the chunks that were embedded
        self.grids: dict[int, tuple[TissueMask | None, PatchGrid]] = {}

    def close(self) -> None:
        """Give back threads and temporary files."""
        self.embedder.close()
        self.at_hand.clear()

    def finished(self, plane: int) -> SlideFeatures | None:
        """The features that the same request wrote before.

        Raises:
            OutputError: another request wrote them.
        """
        path = self.layout.find(self.volume.planes[plane].name, self.model.name)
        if path is None:
            return None
        features = find_features(path)
        difference = "not ours"
        if features is not None:
            request = json.loads(json.dumps(self.request(plane)))
            difference = first_difference(features.provenance["request"], request) or ""
        if difference:
            raise OutputError(
                f"{path} exists, made with another request ({difference}); "
                "type --overwrite to replace it, or another -o"
            )
        return features

    def request(self, plane: int) -> dict[str, Any]:
        """All that decides the features of a plane."""
        volume, here = self.volume, self.volume.planes[plane]
        return {
            "pipeline": PIPELINE,
            "slide": {
                "file": here.path.name,
                "plane": here.name,
                "size_l0": list(volume.size_px),
                "mpp": volume.mpp,
            },
            "options": {"patch_px": self.patch[0], "mpp": self.patch[1], **self.tissue},
            "volume": {
                "spacing_um": volume.spacing_um,
                "planes": [_decisive(volume.planes[i]) for i in volume.around(plane, self.planes)],
            },
            "encoder": self.model.identity,
        }

    def write(self, plane: int) -> SlideFeatures:
        """Embed the patches of a plane through depth, and write its files."""
        volume, name = self.volume, self.volume.planes[plane].name
        for first in sorted({i - i % volume.chunk for i in volume.around(plane, self.planes)} - self.begun):
            self._embed(range(first, min(first + volume.chunk, len(volume))), plane)
        mask, grid = self.grids.pop(plane)
        with opened(volume, plane) as slide:
            way = f"through {self.planes} planes"
            entry = SlideEntry(volume.planes[plane].path, name)
            provenance = describe(entry, slide, mask, grid, self.request(plane), self.model.description, way)
        if volume.planes[plane].origin is not None:  # without which that file would be looked at in its place
            provenance["slide"]["plane"] = volume.planes[plane].origin
        label = SlideLabel(name, volume.size_px, volume.mpp)
        self.layout.write_coords(label, grid, provenance, overwrite=self.overwrite)
        with self.layout.write_features(
            label, grid, self.model.name, self.model.encoder.spec.dim, provenance, overwrite=self.overwrite
        ) as writer:
            window = [self.at_hand[i] for i in volume.around(plane, self.planes)]
            cells = self._cells(grid)
            for start in range(0, len(grid), ROWS):
                deep = np.stack([rows[cells[start : start + ROWS]] for rows in window], axis=1)  # [B, k, D]
                planes = torch.from_numpy(deep).to(self.model.encoder.device)
                writer.append(self.model.depth.decoded_embedding(planes).cpu().numpy())
        for i in [i for i in self.at_hand if i < plane + 1 - self.planes // 2]:
            del self.at_hand[i]
        return SlideFeatures(self.layout.place(name, self.model.name, grid), grid, provenance)

    def _grid(self, plane: int) -> tuple[TissueMask | None, PatchGrid]:
        from seal_extract.tissue.segmentation import find_tissue

        with opened(self.volume, plane) as slide:
            side = max(slide.size_l0)
            everywhere = TissueMask(np.ones((1, 1), np.bool_), slide.mpp * side, side, slide.size_l0)
            mask = everywhere if self.tissue["all_tissue"] else find_tissue(slide)
            least, upsampling = self.tissue["min_tissue"], self.allow_upsampling
            grid = make_grid(slide, mask, *self.patch, min_tissue=least, allow_upsampling=upsampling)
        return None if mask is everywhere else mask, grid

    def _cells(self, grid: PatchGrid) -> NDArray[np.int64]:
        """The number of each patch among all that the frame has room for, row by row."""
        across = self.volume.size_px[0] // grid.patch_size_l0
        return np.asarray(grid.xy_l0 // grid.patch_size_l0 @ [1, across])

    def _embed(self, together: range, plane: int) -> None:
        """Embed planes of one chunk, where the patches of this plane and of later ones look at them."""
        self.begun.add(together.start)
        half = self.planes // 2
        needed = []
        for i in range(max(plane, together.start - half), min(together.stop + half, len(self.volume))):
            if i != plane and not self.overwrite and self.finished(i) is not None:
                continue
            if i not in self.grids:
                self.grids[i] = self._grid(i)
            grid = self.grids[i][1]
            size_l0 = grid.patch_size_l0
            across, down = (max(1, side // size_l0) for side in self.volume.size_px)
            seen = {*self.volume.around(i, self.planes)} & {*together}
            needed += [j * across * down + self._cells(grid) for j in seen]
        which, cells = np.divmod(np.unique(np.concatenate(needed)), across * down)
        for i in together:
            with TemporaryFile(dir=self.layout.out) as file:  # which lives as long as the map of it
                shape = (across * down, self.model.encoder.spec.dim)
                self.at_hand[i] = np.memmap(file, np.float32, "w+", shape=shape)
        corners = np.stack([cells % across, cells // across], axis=1) * size_l0
        device = self.model.encoder.device
        for rows, values in see(self.volume, which, corners, size_l0, self.patch, self.embedder, device):
            for i in np.unique(which[rows]):
                here = which[rows] == i
                self.at_hand[i][cells[rows[here]]] = values[here]


def _decisive(plane: Plane) -> list[Any]:
    """Its name, the content of its file, and the transform of a section or the window of a stack."""
    origin = plane.origin or {}
    return [plane.name, plane.content(), origin.get("transform") or origin.get("window")]
