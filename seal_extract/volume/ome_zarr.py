"""What was predicted of all planes as one OME-Zarr of version 0.4: expression, and spatial domains as labels.

Zarr's format 2 is JSON and compressed chunks, which are written here, as versions of its library differ.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.feature_file import PROVENANCE
from seal_extract.features.scverse import read_store_provenance
from seal_extract.features.store import SlideFeatures, read_pieces, sample_rows
from seal_extract.genes.expression_file import EXPRESSION, Expression
from seal_extract.hdf5 import open_hdf5
from seal_extract.names import shareable
from seal_extract.publish import claimed, writing
from seal_extract.train.formats.source import needed
from seal_extract.volume.volume import Volume

GENES_AT_ONCE = 16  # of a chunk
SAMPLED = 50_000  # patches of all planes that domains are found on
MOST_DOMAINS = 100


def find_domains(planes: Sequence[SlideFeatures], count: int) -> list[NDArray[np.int32]]:
    """Clusters of the embeddings of all planes together, by k-means on standardised columns.

    Args:
        planes: features of each plane.
        count: how many.

    Returns:
        For each plane int32 [N], from 1.

    Raises:
        UsageError: fewer than two, too many, or fewer patches than domains.
    """
    rows = np.concatenate([sample_rows(one.path, max(1, SAMPLED // len(planes))) for one in planes])
    if not 2 <= count <= min(MOST_DOMAINS, len(rows)):
        raise UsageError(f"--domains is {count}; allowed: 2 to {min(MOST_DOMAINS, len(rows))}")
    mean, sd = rows.mean(0), np.maximum(rows.std(0), 1e-6)
    found = needed("sklearn.cluster").KMeans(count, n_init=4, random_state=0).fit((rows - mean) / sd)
    return [
        np.concatenate(
            [np.empty(0, np.int32)]
            + [found.predict((piece - mean) / sd).astype(np.int32) + 1 for piece in read_pieces(one.path)]
        )
        for one in planes
    ]


def write_ome_zarr(
    path: Path,
    volume: Volume,
    planes: Sequence[Expression],
    genes: Sequence[str],
    domains: Sequence[NDArray[np.int32]] | None = None,
) -> None:
    """Write float32 (c, z, y, x): a channel for each gene, a pixel for each patch, NaN where there is none.

    Domains are the label image ``labels/domains`` of (z, y, x), 0 where there is no patch. One plane is in
    memory at a time.

    Args:
        path: the folder; one that this package wrote is replaced.
        volume: for the places of its planes.
        planes: expression of each plane.
        genes: which of it.
        domains: of the patches of each plane.

    Raises:
        UsageError: no plane has a patch.
        OutputError: the folder is another tool's, or cannot be written.
    """
    refuse_foreign(path)
    step: int = planes[0].provenance["grid"]["patch_size_l0"]
    nx, ny = (side // step for side in volume.size_px)
    um = {"z": volume.spacing_um, "y": step * volume.mpp, "x": step * volume.mpp}
    with writing(path), claimed(path.parent, as_folder=True) as claim:
        part, written, highest = claim / path.name, 0, np.zeros(len(genes))
        put = _array(part / "0", (len(genes), len(planes), ny, nx), (GENES_AT_ONCE, 1, ny, nx), "<f4", "NaN")
        label = part / "labels" / "domains"
        if domains is not None:
            put_domain = _array(label / "0", (len(planes), ny, nx), (1, ny, nx), "<i4", 0)
        for z, plane in enumerate(planes):
            with open_hdf5(plane.path) as file:
                values, xy = file[EXPRESSION][()], file["coords"][()] // step
            values = values[:, [plane.genes.index(gene) for gene in genes]]
            written, highest = written + len(values), np.maximum(highest, values.max(0, initial=0))
            for c in range(0, len(genes), GENES_AT_ONCE):
                dense = np.full((GENES_AT_ONCE, 1, ny, nx), np.nan, "<f4")
                some = values[:, c : c + GENES_AT_ONCE].T
                dense[: len(some), 0, xy[:, 1], xy[:, 0]] = some
                put((c // GENES_AT_ONCE, z, 0, 0), dense)
            if domains is not None:
                labels = np.zeros((1, ny, nx), "<i4")
                labels[0, xy[:, 1], xy[:, 0]] = domains[z]
                put_domain((z, 0, 0), labels)
        if not written:
            raise UsageError(
                f"{volume.path}: no plane has tissue in any patch; type --all-tissue to take all"
            )
        channels = [
            {"label": gene, "color": "FFFFFF", "active": i == 0, "window": _window(high)}
            for i, (gene, high) in enumerate(zip(genes, highest.tolist(), strict=True))
        ]
        origin = {
            "unit": planes[0].provenance["unit"],
            "genes": list(genes),
            "planes": [plane.name for plane in volume.planes],
            "made_of": [shareable(plane.provenance["features"]) for plane in planes],
        }
        image = _multiscales(path.name, um, ["c"])
        _group(part, {**image, "omero": {"channels": channels}, PROVENANCE: json.dumps(origin)})
        if domains is not None:
            _group(label.parent, {"labels": ["domains"]})
            source = {"version": "0.4", "source": {"image": "../../"}}
            _group(label, {**_multiscales("domains", um), "image-label": source})
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)


def refuse_foreign(path: Path) -> None:
    """Refuse a folder that this package did not write.

    Raises:
        OutputError: it is another tool's.
    """
    if path.exists() and read_store_provenance(path) is None:
        raise OutputError(f"{path} exists and is not ours; choose another -o")


def _group(folder: Path, attributes: dict[str, Any]) -> None:
    (folder / ".zgroup").write_text(json.dumps({"zarr_format": 2}), encoding="utf-8")
    (folder / ".zattrs").write_text(json.dumps(attributes), encoding="utf-8")


def _array(
    folder: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, fill: object
) -> Callable[[tuple[int, ...], NDArray[Any]], None]:
    """A new array; what is returned writes a whole chunk at its place."""
    folder.mkdir(parents=True)
    facts = {
        "zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": dtype, "order": "C", "filters": None,
        "fill_value": fill, "compressor": {"id": "zlib", "level": 1}, "dimension_separator": "/",
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(facts), encoding="utf-8")

    def put(place: tuple[int, ...], values: NDArray[Any]) -> None:
        chunk = folder.joinpath(*map(str, place))
        chunk.parent.mkdir(parents=True, exist_ok=True)
        chunk.write_bytes(zlib.compress(values.tobytes(), 1))

    return put


def _multiscales(name: str, um: dict[str, float], before: Sequence[str] = ()) -> dict[str, Any]:
    """One resolution; the centre of the first patch lies half a patch from the corner, at depth 0."""
    axes = [{"name": axis, "type": "channel"} for axis in before]
    axes += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in um]
    ones, shift = [1.0] * len(before), [0.0 if axis == "z" else um[axis] / 2 for axis in um]
    transformations = [
        {"type": "scale", "scale": [*ones, *um.values()]},
        {"type": "translation", "translation": [0.0] * len(before) + shift},
    ]
    datasets = [{"path": "0", "coordinateTransformations": transformations}]
    return {"multiscales": [{"version": "0.4", "name": name, "axes": axes, "datasets": datasets}]}


def _window(high: float) -> dict[str, float]:
    return {"start": 0.0, "end": high or 1.0, "min": 0.0, "max": high or 1.0}
