"""OME-Zarr stores written by hand: the metadata as the specification states them, the arrays by zarr."""

import json
import shutil
from pathlib import Path

import zarr

IS_ZARR_2 = zarr.__version__.startswith("2.")
UNITS = {"t": "second", "z": "micrometer", "y": "micrometer", "x": "micrometer"}
TYPES = {"t": "time", "c": "channel"}


def halved(pixels, count=2):
    """``pixels`` [H, W, 3] and ``count`` levels below, each of means over 2 x 2 pixels."""
    levels = [pixels]
    for _ in range(count):
        h, w = (side // 2 for side in levels[-1].shape[:2])
        blocks = levels[-1][: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3)
        levels.append(blocks.mean((1, 3)).round().astype(pixels.dtype))
    return levels


def write_store(
    path, levels, *, version="0.4", axes="cyx", chunk=128, shard=None, mpp=0.5, units=UNITS, fill=0, **more
):
    """Write ``levels`` [H, W, C], finest first, into the folder ``path``; more goes into the attributes."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    zarr_format = 2 if version == "0.4" else 3
    size = levels[0].shape[1]
    datasets = []
    for i, pixels in enumerate(levels):
        shape = [dict(zip("yxc", pixels.shape, strict=True)).get(axis, 1) for axis in axes]
        sides = [chunk if axis in "yx" else length for axis, length in zip(axes, shape, strict=True)]
        array = _array(path / str(i), shape, sides, shard, pixels.dtype, fill, zarr_format)
        array[...] = pixels.transpose(["yxc".index(axis) for axis in axes if axis in "yxc"]).reshape(shape)
        step = round(size / pixels.shape[1])
        scale = [mpp * step if axis in "yx" else 1.0 for axis in axes]
        datasets.append({"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    named = [{"name": axis, "type": TYPES.get(axis, "space")} for axis in axes]
    for axis in named:
        if axis["name"] in units:
            axis["unit"] = units[axis["name"]]
    write_attributes(path, {"multiscales": [{"axes": named, "datasets": datasets}], **more}, version)
    return path


def _array(path, shape, chunks, shard, dtype, fill, zarr_format):
    if shard is not None:
        shards = [shard if side == max(chunks) else side for side in chunks]
        given = {"shape": shape, "chunks": chunks, "shards": shards, "dtype": dtype, "fill_value": fill}
        return zarr.create_array(str(path), **given)
    given = {} if IS_ZARR_2 else {"zarr_format": zarr_format}
    return zarr.open_array(
        str(path), mode="w", shape=shape, chunks=chunks, dtype=dtype, fill_value=fill, **given
    )


def write_attributes(path, attributes, version="0.4"):
    """Write the metadata of a group."""
    path.mkdir(parents=True, exist_ok=True)
    if version == "0.4":
        for one in attributes.get("multiscales", ()):
            one.setdefault("version", version)
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps(attributes))
    else:
        group = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"ome": {"version": version, **attributes}},
        }
        (path / "zarr.json").write_text(json.dumps(group))


def chunk_file(path, level, row, column):
    """The file of a chunk of a store of format 2 with the axes c, y, x."""
    return Path(path, str(level), f"0.{row}.{column}")
