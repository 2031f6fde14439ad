"""Features for the scverse tools: one AnnData file or one SpatialData store per slide.

AnnData needs the package anndata, SpatialData the ``[scverse]`` extra. Rows are copied piece by piece,
so that the features of a slide need not fit into memory.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError, how_to_install
from seal_extract.features.feature_file import PIXELS, PROVENANCE, create_rows
from seal_extract.features.store import SlideFeatures, open_origin, read_pieces
from seal_extract.hdf5 import DAMAGED, new_hdf5, open_hdf5
from seal_extract.names import shown
from seal_extract.publish import claimed, writing
from seal_extract.slides.overview import Overview, read_overview

OVERVIEW_PX = 2000  # longest side of the picture of a slide, as in those of 10x Genomics
LOWRES_PX = 600  # longest side of the smaller picture, as in Space Ranger's output


@dataclass(frozen=True)
class ScverseForm:
    """A form of file or store, one per slide.

    Attributes:
        suffix: suffix of the file name.
        write: ``write(features, path, overview)``.
        read_provenance: reads how a file was made; None for files of other tools.
        needs: the module that has to be installed.
        takes_empty: whether a slide without patches can be written.
    """

    suffix: str
    write: Callable[[SlideFeatures, Path, Overview | None], None]
    read_provenance: Callable[[Path], dict[str, Any] | None]
    needs: str
    takes_empty: bool = True

    def check_installed(self) -> None:
        """Refuse before any work if the module is missing.

        Raises:
            UsageError: it is not installed.
        """
        if find_spec(self.needs) is None:
            raise UsageError(f"{self.needs} is not installed; {how_to_install('scverse')}")


def origin_overview(features: SlideFeatures, slides: Path | None = None) -> Overview:
    """The slide of these features at low resolution, at most `OVERVIEW_PX` wide and high.

    Raises:
        SlideError: the slide cannot be found, opened or read.
    """
    with closing(open_origin(features, slides)) as slide:
        return read_overview(slide, slide.mpp * max(slide.size_l0) / OVERVIEW_PX, holes=True)


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
    """Write an AnnData file, in which each patch is an observation and each feature a variable.

    ``X`` is float32 [N, D]. ``obsm["spatial"]``, float64 [N, 2], holds the centres of the patches in level-0
    pixels. ``obs`` holds their top-left corners ``x_l0`` and ``y_l0``, and ``observed``. ``uns`` holds
    ``mpp`` (µm/px at level 0), ``patch_size_l0``, ``patch_um``, ``encoder``, ``slide``, ``seal_extract`` (the
    provenance as JSON), and ``spatial``, the picture of the slide that scanpy and squidpy plot.

    Args:
        features: features of the slide.
        path: the file.
        overview: the slide at low resolution; without it there is no ``spatial``.
        variables: names of the columns of ``X``, if it is another table of the same patches, such as their
            expression; by default the columns of the features.
        pieces: the rows of that table in order, float32 [B, D] each.
        observed: further columns of ``obs``, [N] each; a ``/`` in a name becomes ``_``.
        provenance: provenance of that table; by default that of the features.

    Raises:
        OutputError: the file cannot be written.
        UsageError: anndata is not installed, or a column has no possible name.
    """
    SCVERSE["anndata"].check_installed()
    from anndata.io import write_elem
    from pandas import DataFrame

    slide = shown(path.stem)
    x, y = features.grid.xy_l0.T
    columns = {"x_l0": x, "y_l0": y} | _as_columns(observed or {})
    encoder = features.provenance["encoder"]["name"]
    names = [f"{encoder}_{i}" for i in range(features.dim)] if variables is None else list(variables)
    uns = _facts(features, slide)
    uns[PROVENANCE] = json.dumps(features.provenance if provenance is None else provenance)
    if overview is not None:
        uns["spatial"] = {slide: _picture(features, overview)}
    with new_hdf5(path) as (file, _):
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        rows = create_rows(file, "X", (len(features.grid), len(names)), np.float32)
        rows.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        done = 0
        for piece in read_pieces(features.path) if pieces is None else pieces:
            rows[done : done + len(piece)] = piece
            done += len(piece)
        write_elem(file, "obs", DataFrame(columns, index=_patch_names(slide, features)))
        write_elem(file, "var", DataFrame(index=names))
        write_elem(file, "obsm", {"spatial": _centres(features)})
        write_elem(file, "uns", uns, dataset_kwargs={"compression": "gzip"})
        for empty in ("layers", "obsp", "varm", "varp"):
            write_elem(file, empty, {})


def _picture(features: SlideFeatures, overview: Overview) -> dict[str, dict[str, Any]]:
    """Two pictures and their scales, in the form of Space Ranger that scanpy and squidpy read."""
    height, width = overview.rgb.shape[:2]
    shrunk = min(1.0, LOWRES_PX / max(height, width))
    size = (max(1, round(width * shrunk)), max(1, round(height * shrunk)))
    images = {"hires": overview.rgb, "lowres": cv2.resize(overview.rgb, size, interpolation=cv2.INTER_AREA)}
    scales = {  # pixels per level-0 pixel
        f"tissue_{name}_scalef": rgb.shape[1] / width / overview.downsample for name, rgb in images.items()
    }
    diameter = {"spot_diameter_fullres": float(features.grid.patch_size_l0)}
    return {"images": images, "scalefactors": scales | diameter}


def read_h5ad_provenance(path: Path) -> dict[str, Any] | None:
    """How an ``.h5ad`` was made; None if this package did not write it."""
    try:
        with open_hdf5(path) as file:
            return dict(json.loads(file["uns"][PROVENANCE].asstr()[()]))
    except (*DAMAGED, TypeError):
        return None


def _as_columns(observed: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Replace ``/`` in names, and refuse names that HDF5 or `write_h5ad` cannot take."""
    columns: dict[str, NDArray[np.float32]] = {}
    for name, values in observed.items():
        column = name.replace("/", "_")
        if column in {"", ".", "_index", "x_l0", "y_l0", *columns}:
            raise UsageError(f"AnnData cannot hold a column named {column!r}; give it another name")
        columns[column] = values
    return columns


# --- SpatialData ------------------------------------------------------------------------------------


def write_spatialdata(features: SlideFeatures, path: Path, overview: Overview | None = None) -> None:
    """Write a SpatialData store: ``shapes["patches"]``, squares in level-0 pixels, annotated by a table.

    An overview of the slide becomes ``images["slide"]``. The coordinate system ``global`` is in level-0
    pixels, ``um`` in micrometres. The table is the one of `write_h5ad`.

    Raises:
        OutputError: the store cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations that these libraries announce to each other
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
    """How a SpatialData store was made; None if this package did not write it."""
    for name in ("zarr.json", ".zattrs"):
        try:
            entries = json.loads((path / name).read_text())
            text = entries.get("attributes", entries)[PROVENANCE]
        except (OSError, KeyError, TypeError, ValueError):
            continue
        return dict(json.loads(text))
    return None


def _publish_store(store: Any, path: Path) -> None:
    """Write beside the final name and rename, so that a folder with its final name is complete."""
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
    "anndata": ScverseForm(".h5ad", write_h5ad, read_h5ad_provenance, "anndata"),
    "spatialdata": ScverseForm(".zarr", write_spatialdata, read_store_provenance, "spatialdata", False),
}
