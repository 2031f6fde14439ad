"""Finished slides of random features in each layout."""

import numpy as np

from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layouts import layout_of_grid
from seal_extract.features.store import grid_fields
from seal_extract.features.verify import verify
from seal_extract.patches.grid import PatchGrid

DIM = 24
SIZE = (8000, 6000)
CONSUMER_OF = {"trident": "trident", "clam": "clam", "stamp": "stamp", "flat": "patho-bench"}


def grid_of(n, patch_size_l0=512):
    """``n`` patches, ten to a row."""
    xy = np.stack([np.arange(n) % 10, np.arange(n) // 10], axis=1).astype(np.int64) * patch_size_l0
    return PatchGrid(xy, 256, 0.5, patch_size_l0, 0, 0, patch_size_l0)


def provenance_of(grid, mpp=0.25, encoder="tiny"):
    return {
        "request": {"pipeline": 1},
        "slide": {"path": "a.svs", "size_l0": list(SIZE), "mpp": mpp, "mpp_source": "drawn"},
        "grid": grid_fields(grid),
        "encoder": {"name": encoder},
        "read_errors": 0,
    }


def write(out, layout, n=50, name="a", mpp=0.25, encoder="tiny", seed=1, features=None):
    """A finished slide in a layout: (the layout, its rows, its grid)."""
    grid = grid_of(n)
    if features is None:
        features = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    place, label = layout_of_grid(layout, out, grid), SlideLabel(name, SIZE, mpp)
    provenance = provenance_of(grid, mpp, encoder)
    provenance["slide"]["path"] = f"{name}.svs"
    place.write_coords(label, grid, provenance)
    with place.write_features(label, grid, encoder, DIM, provenance) as writer:
        for start in range(0, n, 16):
            writer.append(features[start : start + 16])
    return place, features, grid


def short_of(folder, consumer):
    """What falls short of a consumer; CLAM's resize is no fault of the files."""
    return [f for f in verify(folder, consumer) if not f.is_warning]


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
