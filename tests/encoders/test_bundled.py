"""The encoder that comes with the package: found by name from anywhere, and the command's default."""

import subprocess
import sys

import h5py
import numpy as np
import torch
from synthetic_slide import write_synthetic_slide

from seal_extract import list_encoders, load_encoder, load_omics
from seal_extract.cli import main
from seal_extract.encoders.registry import DEFAULT, bundled, find_spec


def test_it_is_named_loads_and_predicts_genes_by_name():
    assert DEFAULT in [spec.name for spec in list_encoders()]
    encoder = load_encoder(DEFAULT, offline=True)
    assert encoder.spec == find_spec(DEFAULT)
    patches = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    embedded = encoder.encode(patches)
    assert embedded.shape == (2, encoder.spec.dim)
    assert encoder.genes is not None
    assert "CEACAM6" in encoder.genes
    assert encoder.predict_expression(embedded).shape == (2, len(encoder.genes))


def test_its_expression_half_is_found_by_the_same_name():
    omics, encoder = load_omics(DEFAULT), load_encoder(DEFAULT)
    assert omics.genes == encoder.genes
    assert omics.encode(np.ones((3, omics.n_genes), np.float32)).shape == (3, encoder.spec.dim)


def test_it_is_small_and_says_what_it_is():
    (folder,) = (path for name, path in bundled().items() if name == DEFAULT)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    for words in ("CC BY 4.0", "Andersson et al.", "## Limits", "## Figures"):
        assert words in card


def test_it_is_found_from_any_folder(tmp_path):
    code = "from seal_extract import load_encoder; print(load_encoder('seal-tiny', offline=True).spec.name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == DEFAULT, done.stderr


def test_it_is_what_the_command_takes_by_default_and_says_so(tmp_path, capsys):
    slide = write_synthetic_slide(tmp_path / "a.svs", (2000, 1600), mpp=0.25)
    assert main([str(slide), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert "the encoder is seal-tiny" in capsys.readouterr().err
    (features,) = (tmp_path / "out").rglob("features_seal-tiny/a.h5")
    with h5py.File(features) as file:
        assert file["features"].shape[1] == load_encoder(DEFAULT).spec.dim
        assert np.isfinite(file["features"][()]).all()
