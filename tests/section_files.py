"""Sections one can count by hand: spots on a lattice, their slide, and the files that others keep them in."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.sparse import csc_matrix, csr_matrix

from seal_extract.train.sections import Section

GENES = ("ACTB", "CD3E", "EPCAM", "MKI67", "VIM")
MARGIN_PX = 100.0


def hexagon(rows=5, columns=5):
    """Rows and columns of Visium: columns of even rows are even, of odd rows odd."""
    return np.array([(r, c) for r in range(rows) for c in range(r % 2, 2 * columns, 2)], np.int64)


def square(rows=5, columns=5):
    return np.array([(r, c) for r in range(rows) for c in range(columns)], np.int64)


def places(array_rc, lattice, pitch_px):
    """Centres (x, y) of spots on a slide that lies as the array does."""
    r, c = array_rc.T
    x, y = (c / 2, r * np.sqrt(3) / 2) if lattice == "hexagonal" else (c, r)
    return np.stack([x, y], 1) * pitch_px + MARGIN_PX


def counts_of(spots, seed=0):
    return np.random.default_rng(seed).poisson(5, (spots, len(GENES))).astype(np.float32)


def barcodes_of(spots):
    return tuple(f"SPOT{i:03}-1" for i in range(spots))


def draw(path, size_px=(1200, 1000), seed=0):
    """A picture in which every pixel differs from its neighbours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size_px[1], size_px[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def make_section(lattice="square", array_rc=None, **over):
    """A section in memory; ``over`` takes the place of what it has by default."""
    if array_rc is None:
        array_rc = hexagon() if lattice == "hexagonal" else square()
    spots = len(array_rc)
    values = {
        "name": "S1",
        "patient": "P1",
        "slide": Path("S1.png"),
        "mpp": 0.5,
        "mpp_source": "mpp",
        "genes": GENES,
        "counts": counts_of(spots),
        "scale": "counts",
        "xy_l0": places(array_rc, lattice, 200.0),
        "barcodes": barcodes_of(spots),
        "array_rc": array_rc,
        "lattice": lattice,
    }
    return Section(**(values | over))


def write_st_tables(folder, name="A1", counts=None, pitch_px=400.0, drop_places=0, drop_counts=0):
    """A section in her2st's three folders; 200 µm are ``pitch_px``."""
    array_rc = square(3, 4) + 2
    counts = counts_of(len(array_rc)) if counts is None else counts
    xy = places(array_rc - 2, "square", pitch_px)
    _write_tables(folder, name, GENES, counts, array_rc, xy, drop_places, drop_counts)
    draw(folder / f"images/{name}.jpg", (200, 200))
    return counts


def write_study(folder, names, pitch_px, genes, counts_by):
    """Sections in tables of 6 x 6 spots; each lies on a square of one colour, from which its counts come."""
    rng, array_rc = np.random.default_rng(0), square(6, 6) + 1
    for name in names:
        colours = rng.integers(60, 220, (8, 8, 3), dtype=np.uint8)
        counts = np.array([counts_by(rng, colours[r, c].astype(int)) for r, c in array_rc])
        _write_tables(folder, name, genes, counts, array_rc, (array_rc[:, ::-1] + 0.5) * pitch_px)
        image = colours.repeat(pitch_px, 0).repeat(pitch_px, 1)
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"images/{name}.png")


def _write_tables(folder, name, genes, counts, array_rc, xy, drop_places=0, drop_counts=0):
    for part in ("counts", "spots"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines = [f"{c}x{r}\t" + "\t".join(map(str, row)) for (r, c), row in zip(array_rc, counts, strict=True)]
    with gzip.open(folder / f"counts/{name}.tsv.gz", "wt") as file:
        file.write("\n".join(["\t" + "\t".join(genes), *lines[drop_counts:]]) + "\n")
    rows = [f"{c}\t{r}\t{c + 0.1}\t{r - 0.1}\t{x}\t{y}" for (r, c), (x, y) in zip(array_rc, xy, strict=True)]
    text = "\n".join(["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y", *rows[: len(rows) - drop_places]]) + "\n"
    (folder / f"spots/{name}_selection.tsv").write_text(text)


def write_10x(path, counts, genes=GENES, ids=None, kinds=None):
    """A 10x HDF5 matrix: features are rows, barcodes columns, by columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = csc_matrix(counts.T.astype(np.int32))
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(barcodes_of(len(counts)), "S")
        matrix["shape"] = np.array(columns.shape, np.int32)
        for key in ("data", "indices", "indptr"):
            matrix[key] = getattr(columns, key)
        features = matrix.create_group("features")
        features["name"] = np.array(genes, "S")
        features["id"] = np.array(ids or [f"ENSG{i:011}" for i in range(len(genes))], "S")
        features["feature_type"] = np.array(kinds or ["Gene Expression"] * len(genes), "S")


def position_rows(array_rc, xy, off_tissue=0):
    """Space Ranger's columns, row by row; some more spots that lie beside the tissue."""
    rows = [
        (barcode, 1, r, c, y, x)
        for barcode, (r, c), (x, y) in zip(barcodes_of(len(array_rc)), array_rc, xy, strict=True)
    ]
    return rows + [(f"BESIDE{i}-1", 0, 90 + i, 90 + i, 5.0, 5.0) for i in range(off_tissue)]


COLUMNS = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"


def write_visium(outs, counts=None, header=True, pitch_px=200.0, **matrix):
    """A folder of Space Ranger; 100 µm are ``pitch_px``."""
    array_rc = hexagon()
    counts = counts_of(len(array_rc)) if counts is None else counts
    write_10x(outs / "filtered_feature_bc_matrix.h5", counts, **matrix)
    rows = position_rows(array_rc, places(array_rc, "hexagonal", pitch_px), off_tissue=3)
    lines = [COLUMNS] * header + [",".join(map(str, row)) for row in rows]
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    (outs / "spatial").mkdir(exist_ok=True)
    (outs / "spatial" / name).write_text("\n".join(lines) + "\n")
    return counts


def write_visium_hd(outs, bin_um=8, pitch_px=16.0):
    import pandas

    array_rc = square(6, 6)
    counts = counts_of(len(array_rc))
    bins = outs / f"binned_outputs/square_{bin_um:03}um"
    write_10x(bins / "filtered_feature_bc_matrix.h5", counts)
    rows = position_rows(array_rc, places(array_rc, "square", pitch_px), off_tissue=3)
    (bins / "spatial").mkdir()
    table = pandas.DataFrame(rows, columns=COLUMNS.split(","))
    table.to_parquet(bins / "spatial/tissue_positions.parquet", engine="pyarrow")
    return counts


def write_h5ad(
    path, lattice="hexagonal", counts=None, genes=GENES, obs=None, obsm=None, pitch_px=200.0, **more
):
    """An AnnData of spots on a lattice, sparse, with rows and columns; ``obs`` and ``obsm`` are added."""
    import anndata
    import pandas

    array_rc = hexagon() if lattice == "hexagonal" else square()
    counts = counts_of(len(array_rc)) if counts is None else counts
    columns = {"array_row": array_rc[:, 0], "array_col": array_rc[:, 1]} | (obs or {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        data = anndata.AnnData(
            csr_matrix(counts),
            obs=pandas.DataFrame(columns, index=list(barcodes_of(len(array_rc)))),
            var=pandas.DataFrame({"symbol": [f"sym{g}" for g in genes]}, index=list(genes)),
            obsm={"spatial": places(array_rc, lattice, pitch_px)} | (obsm or {}),
            **more,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_h5ad(path)
    return counts


def write_hest(folder, name="TENX1", meta=None, slide=True, **h5ad):
    counts = write_h5ad(folder / f"st/{name}.h5ad", **h5ad)
    if slide:
        draw(folder / f"wsis/{name}.tif", (200, 200))
    if meta is not None:
        (folder / "metadata").mkdir(exist_ok=True)
        (folder / f"metadata/{name}.json").write_text(json.dumps(meta))
    return counts
