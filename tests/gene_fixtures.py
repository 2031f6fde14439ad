"""Features files of any rows, and decoders of any size."""

import numpy as np

from seal_extract.encoders.files import WeightFile
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


def random_decoder(dim, genes):
    """As SEAL's, over 512 hidden numbers."""
    import torch

    from seal_extract.encoders.heads import ExpressionDecoder
    from seal_extract.encoders.spec import Decoder
    from seal_extract.genes.decoder import GeneDecoder

    torch.manual_seed(0)
    layers = ExpressionDecoder(dim, Decoder(512, genes)).to_empty(device="cpu").requires_grad_(False)
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    weights = WeightFile("", None, "x", 0, 0, "0")
    return GeneDecoder("x", dim, genes, tuple(f"GENE{i}" for i in range(genes)), weights, layers)
