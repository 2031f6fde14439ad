"""Features for the scverse tools: one AnnData file or one SpatialData store per slide.

The ``.h5ad`` is written row by row in the form that anndata documents, without anndata, so that a slide's
features need not fit into memory. Reading it, and SpatialData, take the ``[scverse]`` extra.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError, how_to_install
from seal_extract.features.feature_file import CHUNK_BYTES, PIXELS, PROVENANCE
from seal_extract.features.store import SlideFeatures, read_pieces
from seal_extract.hdf5 import DAMAGED, new_hdf5, open_hdf5
from seal_extract.names import shown
from seal_extract.publish import claimed, writing
from seal_extract.slides.overview import Overview

LOWRES_PX = 600  # longest side of the smaller picture, as of Space Ranger's


@dataclass(frozen=True)
class ScverseForm:
    """A file or store per slide.

    Attributes:
        suffix: of its name.
        write: ``write(features, path, overview)``.
        read_provenance: what made the file, or None where this package did not.
        needs: module that has to be installed, or None.
        takes_empty: whether a slide without patches can be written.
    """

    suffix: str
    write: Callable[[SlideFeatures, Path, Overview | None], None]
    read_provenance: Callable[[Path], dict[str, Any] | None]
    needs: str | None = None
    takes_empty: bool = True

    def check_installed(self) -> None:
        """Refuse before any work where the extra is missing.

        Raises:
            UsageError: it is.
        """
        if self.needs is not None and find_spec(self.needs) is None:
            raise UsageError(f"{self.needs} is not installed; {how_to_install('scverse')}")


# --- AnnData ----------------------------------------------------------------------------------------


def write_h5ad(
    features: SlideFeatures,
    path: Path,
    overview: Overview | None = None,
    variables: Sequence[str] | None = None,
    pieces: Iterable[NDArray[np.float32]] | None = None,
    *,
    observed: dict[str, NDArray[np.float32]] | None = None,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write an AnnData file: a patch is an observation, a feature a variable.

    ``X`` float32 [N, D]; ``obsm["spatial"]`` float64 [N, 2], the patches' centres in level-0 pixels;
    ``obs`` ``x_l0``, ``y_l0``, their top-left corners, and what was ``observed``; ``uns`` ``mpp`` (µm/px at
    level 0), ``patch_size_l0``, ``patch_um``, ``encoder``, ``slide`` and ``seal_extract``, the provenance as
    JSON; and ``spatial``, the slide's picture with its scale factors, by which scanpy and squidpy plot.

    Args:
        features: of the slide.
        path: the file.
        overview: the slide; without it there is no ``spatial``.
        variables: names of the columns of ``X``, where it is another table of the same patches, such as their
            expression; the columns of the features by default.
        pieces: its rows in order, float32 [B, D], some at a time.
        observed: further columns of ``obs``, [N] each; a ``/`` in a name becomes ``_``.
        provenance: of that table; the features' own by default.

    Raises:
        OutputError: it cannot be written.
    """
    grid, slide, encoder = features.grid, shown(path.stem), features.provenance["encoder"]["name"]
    further = _as_columns(observed or {})
    with new_hdf5(path) as (file, _):
        _tag(file, "anndata", "0.1.0")
        names = [f"{encoder}_{i}" for i in range(features.dim)] if variables is None else list(variables)
        rows = read_pieces(features.path) if pieces is None else pieces
        _write_rows(file, (len(grid), len(names)), rows)
        x, y = grid.xy_l0.T
        _frame(file, "obs", _patch_names(slide, features), {"x_l0": x, "y_l0": y} | further)
        _frame(file, "var", names, {})
        _array(_dict(file, "obsm"), "spatial", _centres(features))
        for empty in ("layers", "obsp", "varm", "varp"):
            _dict(file, empty)
        uns = _dict(file, "uns")
        made_of = json.dumps(features.provenance if provenance is None else provenance)
        for key, value in (_facts(features, slide) | {PROVENANCE: made_of}).items():
            text = isinstance(value, str)
            dataset = uns.create_dataset(key, data=value, dtype=h5py.string_dtype() if text else None)
            _tag(dataset, "string" if text else "numeric-scalar", "0.2.0")
        if overview is not None:
            _write_picture(_dict(_dict(uns, "spatial"), slide), features, overview)


def _write_picture(group: h5py.Group, features: SlideFeatures, overview: Overview) -> None:
    """The slide as scanpy and squidpy read it of Space Ranger: two pictures and their scales."""
    height, width = overview.rgb.shape[:2]
    shrunk = min(1.0, LOWRES_PX / max(height, width))
    size = (max(1, round(width * shrunk)), max(1, round(height * shrunk)))
    lowres = cv2.resize(overview.rgb, size, interpolation=cv2.INTER_AREA)
    images, scales = _dict(group, "images"), _dict(group, "scalefactors")
    for name, rgb in (("hires", overview.rgb), ("lowres", lowres)):
        _tag(images.create_dataset(name, data=rgb, compression="gzip"), "array", "0.2.0")
        scale = rgb.shape[1] / width / overview.downsample  # pixels per level-0 pixel
        _tag(scales.create_dataset(f"tissue_{name}_scalef", data=scale), "numeric-scalar", "0.2.0")
    diameter = float(features.grid.patch_size_l0)
    _tag(scales.create_dataset("spot_diameter_fullres", data=diameter), "numeric-scalar", "0.2.0")


def read_h5ad_provenance(path: Path) -> dict[str, Any] | None:
    """What made an ``.h5ad``, or None where this package did not."""
    try:
        with open_hdf5(path) as file:
            return dict(json.loads(file["uns"][PROVENANCE].asstr()[()]))
    except (*DAMAGED, TypeError):
        return None


def _write_rows(file: h5py.File, shape: tuple[int, int], pieces: Iterable[NDArray[np.float32]]) -> None:
    n, dim = shape
    chunks = (max(1, min(n, CHUNK_BYTES // (4 * dim))), dim) if n and dim else None
    rows, done = file.create_dataset("X", shape, np.float32, chunks=chunks, fletcher32=chunks is not None), 0
    for piece in pieces:
        rows[done : done + len(piece)] = piece
        done += len(piece)
    _tag(rows, "array", "0.2.0")


def _frame(file: h5py.File, name: str, index: list[str], columns: dict[str, NDArray[Any]]) -> None:
    group = file.create_group(name)
    _tag(group, "dataframe", "0.2.0")
    group.attrs["_index"] = "_index"
    group.attrs.create("column-order", np.array(list(columns), object), dtype=h5py.string_dtype())
    names = group.create_dataset("_index", data=np.array(index, object), dtype=h5py.string_dtype())
    _tag(names, "string-array", "0.2.0")
    for key, values in columns.items():
        _array(group, key, values)


def _as_columns(observed: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """By names that HDF5 takes, none of them twice or one of our own."""
    columns: dict[str, NDArray[np.float32]] = {}
    for name, values in observed.items():
        column = name.replace("/", "_")
        if column in {"", ".", "_index", "x_l0", "y_l0", *columns}:
            raise UsageError(
                f"AnnData has no place for a column {column!r} of that name; give it another name"
            )
        columns[column] = values
    return columns


def _dict(parent: h5py.Group, name: str) -> h5py.Group:
    group = parent.create_group(name)
    _tag(group, "dict", "0.1.0")
    return group


def _array(group: h5py.Group, name: str, values: NDArray[Any]) -> None:
    _tag(group.create_dataset(name, data=values), "array", "0.2.0")


def _tag(item: h5py.Group | h5py.Dataset, kind: str, version: str) -> None:
    item.attrs.update({"encoding-type": kind, "encoding-version": version})


# --- SpatialData ------------------------------------------------------------------------------------


def write_spatialdata(features: SlideFeatures, path: Path, overview: Overview | None = None) -> None:
    """Write a SpatialData store: ``shapes["patches"]``, squares in level-0 pixels, annotated by a table.

    An overview of the slide becomes ``images["slide"]``. Coordinate systems: ``global``, level-0 pixels, and
    ``um``, micrometres. The table is `write_h5ad`'s.

    Raises:
        OutputError: it cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries tell one another of their next releases
        _write_store(features, path, overview)


def _write_store(features: SlideFeatures, path: Path, overview: Overview | None) -> None:
    from anndata import AnnData

    from_array: Any = import_module("dask.array").from_array  # typed in some versions only
    from geopandas import GeoDataFrame
    from pandas import Categorical, DataFrame
    from shapely import box
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    grid, slide, size = features.grid, shown(path.stem), features.grid.patch_size_l0
    facts, names = _facts(features, slide), _patch_names(slide, features)
    x, y = grid.xy_l0.T
    shapes = ShapesModel.parse(
        GeoDataFrame(geometry=box(x, y, x + size, y + size), index=names),
        transformations={"global": Identity(), "um": Scale([facts["mpp"]] * 2, axes=("x", "y"))},
    )
    images = {}
    if overview is not None:
        axes = ("x", "y")
        images["slide"] = Image2DModel.parse(
            np.moveaxis(overview.rgb, 2, 0),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={
                "global": Scale([overview.downsample] * 2, axes=axes),
                "um": Scale([overview.downsample * facts["mpp"]] * 2, axes=axes),
            },
        )
    obs = DataFrame({"x_l0": x, "y_l0": y, "patch": names}, index=names)
    obs["region"] = Categorical(["patches"] * len(grid))
    var = DataFrame(index=[f"{facts['encoder']}_{i}" for i in range(features.dim)])
    with open_hdf5(features.path) as file:
        rows = file[PIXELS]
        lazy = from_array(rows, chunks=(rows.chunks[0] * 16, features.dim))  # written piece by piece
        table = AnnData(lazy, obs, var, uns=facts, obsm={"spatial": _centres(features)})
        table = TableModel.parse(table, region="patches", region_key="region", instance_key="patch")
        store = SpatialData(
            images=images,
            shapes={"patches": shapes},
            tables={"table": table},
            attrs={PROVENANCE: json.dumps(features.provenance)},
        )
        _publish_store(store, path)


def read_store_provenance(path: Path) -> dict[str, Any] | None:
    """What made a SpatialData store, or None where this package did not."""
    for name in ("zarr.json", ".zattrs"):
        try:
            entries = json.loads((path / name).read_text())
            text = entries.get("attributes", entries)[PROVENANCE]
        except (OSError, KeyError, TypeError, ValueError):
            continue
        return dict(json.loads(text))
    return None


def _publish_store(store: Any, path: Path) -> None:
    """A folder with its final name is complete, as a file is."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with claimed(path.parent, as_folder=True) as part:
            store.write(part / path.name)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(part / path.name, path)


# --- both -------------------------------------------------------------------------------------------


def _patch_names(slide: str, features: SlideFeatures) -> list[str]:
    return list(features.barcodes or (f"{slide}_{row}" for row in range(len(features.grid))))


def _centres(features: SlideFeatures) -> NDArray[np.float64]:
    """Level-0 pixels, float64 [N, 2]."""
    return features.grid.xy_l0.astype(np.float64) + features.grid.patch_size_l0 / 2


def _facts(features: SlideFeatures, slide: str) -> dict[str, Any]:
    grid, provenance = features.grid, features.provenance
    return {
        "slide": slide,
        "encoder": provenance["encoder"]["name"],
        "mpp": provenance["slide"]["mpp"],
        "patch_size_l0": grid.patch_size_l0,
        "patch_um": grid.patch_size_l0 * provenance["slide"]["mpp"],
    }


SCVERSE = {
    "anndata": ScverseForm(".h5ad", write_h5ad, read_h5ad_provenance),
    "spatialdata": ScverseForm(".zarr", write_spatialdata, read_store_provenance, "spatialdata", False),
}
