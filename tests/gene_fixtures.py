"""Features files of any rows, for tests of searches and of the index."""

import numpy as np

from seal_extract.features.feature_file import write_rows
from seal_extract.features.store import grid_fields, read_features
from seal_extract.patches.grid import PatchGrid


def features_file(path, rows, encoder="x", dtype=np.float32):
    """Write rows as the features of patches on a square; the first word of ``encoder`` is its name."""
    rows = np.asarray(rows, dtype)
    side = max(1, int(np.ceil(len(rows) ** 0.5)))
    xy = np.stack(np.divmod(np.arange(len(rows)), side)[::-1], 1).astype(np.int64) * 224
    name, grid = encoder.split()[0], PatchGrid(xy, 224, 0.5, 224, 0, 0, 224)
    provenance = {
        "encoder": {"name": name},
        "slide": {"mpp": 0.5},
        "grid": grid_fields(grid),
        "request": {"encoder": {"name": name, "weights": encoder}},
    }
    dataset, coords = ("features", xy) if dtype == np.float32 else ("feats", (xy * 0.5).astype(np.float32))
    with write_rows(
        path, dataset, rows.shape, dtype, provenance, lambda f: f.create_dataset("coords", data=coords)
    ) as writer:
        writer.append(rows.astype(np.float32))
    return read_features(path)
