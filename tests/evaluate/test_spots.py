"""Spots with the embedding of their patch and of their expression, joined by barcode in one AnnData."""

import anndata
import h5py
import numpy as np
import pytest
import torch
from cohort_fixtures import write_untrained_encoder
from section_files import GENES, barcodes_of, counts_of, draw, hexagon, write_hest, write_visium

from seal_extract import load_encoder
from seal_extract.cli import main
from seal_extract.errors import OutputError, UsageError
from seal_extract.evaluate.spots import embed_spots
from seal_extract.genes.omics import OmicsEncoder
from seal_extract.train.formats import find_sections

SPOTS = len(hexagon())
META = {"pixel_size_um_estimated": 0.5, "st_technology": "Visium"}
STATED = {"patch_size_src": 224, "patch_size_target": 224, "downsample": 1.0, "pixel_size": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_untrained_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(folder, device="cpu")


@pytest.fixture
def omics():
    """An expression half for the genes in reverse, with random weights."""
    made = OmicsEncoder("untrained-demo", 192, len(GENES), hidden=(16, 12))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    made.genes = GENES[::-1]
    return made


def write_patches(path, order, stated=STATED):
    """HEST's ready-cut patches of some spots, in some order; each is of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    greys = np.asarray(order, np.uint8)[:, None, None, None] * 9
    with h5py.File(path, "w") as file:
        file["img"] = np.broadcast_to(greys, (len(order), 224, 224, 3))
        file["coords"] = np.zeros((len(order), 2), np.int64)
        file["barcode"] = np.array([[barcodes_of(SPOTS)[i].encode()] for i in order])
        file["coords"].attrs.update(stated)


def precut(folder, order=range(SPOTS), stated=STATED):
    """A section of HEST of which only the ready-cut patches were downloaded."""
    write_hest(folder, meta=META, slide=False)
    write_patches(folder / "patches/TENX1.h5", order, stated)
    (section,) = find_sections(folder)
    return section


def expected_expression(omics, rows):
    """Counts to 10,000 a spot, log1p, half from the spots around, in the order of the encoder's genes."""
    counts, place = counts_of(SPOTS), {tuple(rc): i for i, rc in enumerate(hexagon().tolist())}
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    steps = ((0, 2), (0, -2), (1, 1), (1, -1), (-1, 1), (-1, -1))
    smoothed = []
    for (r, c), i in place.items():
        around = [values[place[(r + dr, c + dc)]] for dr, dc in steps if (r + dr, c + dc) in place]
        smoothed.append((values[i] + np.mean(around, axis=0)) / 2)
    return omics.encode(np.array(smoothed, np.float32)[rows, ::-1].copy()).numpy()


def test_ready_cut_patches_and_expression_meet_by_barcode(tmp_path, encoder, omics):
    order = [11, 3, 24, 0, 7]
    section = precut(tmp_path, order)
    with pytest.warns(UserWarning, match="20 of 25 spots are left out, as they have no patch"):
        path = embed_spots(section, encoder, tmp_path / "out", omics)
    assert path == tmp_path / "out/TENX1.h5ad"
    made = anndata.read_h5ad(path)
    rows = sorted(order)
    assert made.obs_names.tolist() == [barcodes_of(SPOTS)[i] for i in rows]
    grey = torch.tensor(rows, dtype=torch.uint8)[:, None, None, None].mul(9).expand(-1, 3, 224, 224)
    np.testing.assert_allclose(made.obsm["X_image"], encoder.encode(grey).numpy(), atol=1e-5)
    np.testing.assert_allclose(made.obsm["X_expression"], expected_expression(omics, rows), atol=1e-5)
    np.testing.assert_array_equal(made.X.toarray(), counts_of(SPOTS)[rows])
    assert made.var_names.tolist() == list(GENES)
    assert made.obs[["array_row", "array_col"]].to_numpy().tolist() == hexagon()[rows].tolist()
    assert made.uns["smoothed"]


def test_patches_are_cut_from_the_slide_where_it_is_there(tmp_path, encoder, omics):
    write_hest(tmp_path, meta=META)
    draw(tmp_path / "wsis/TENX1.tif", (1400, 1200))
    write_patches(tmp_path / "patches/TENX1.h5", [0, 1])
    (section,) = find_sections(tmp_path)
    with pytest.warns(UserWarning, match="7 of 25 spots are left out, as their patches would leave"):
        made = anndata.read_h5ad(embed_spots(section, encoder, tmp_path / "out", omics))
    assert len(made) == SPOTS - 7
    assert np.unique(made.obsm["X_image"].round(5), axis=0).shape[0] == len(made)


def test_the_same_request_is_finished_and_another_is_refused(tmp_path, encoder, omics):
    section = precut(tmp_path)
    path = embed_spots(section, encoder, tmp_path, omics)
    before = path.stat().st_mtime_ns
    assert embed_spots(section, encoder, tmp_path, omics) == path
    assert path.stat().st_mtime_ns == before
    for other in ({"smooth": False}, {"omics": None}):
        with pytest.raises(OutputError, match="was made of something else; type --overwrite"):
            embed_spots(section, encoder, tmp_path, **{"omics": omics} | other)
    embed_spots(section, encoder, tmp_path, omics, smooth=False, overwrite=True)
    assert not anndata.read_h5ad(path).uns["smoothed"]


def test_genes_are_never_guessed(tmp_path, encoder, omics):
    section = precut(tmp_path)
    omics.genes = (*GENES[:2], "OTHER1", "OTHER2", "OTHER3")
    with pytest.raises(UsageError, match=r"TENX1 has 2 of the 5 genes of untrained-demo, such as ACTB"):
        embed_spots(section, encoder, tmp_path / "out", omics)
    omics.genes = None
    with pytest.raises(UsageError, match=r"--panel genes.txt, one name per line .*, or --image-only"):
        embed_spots(section, encoder, tmp_path / "out", omics)
    omics.genes = (*GENES[:4], "OTHER")
    with pytest.warns(UserWarning, match="4 of the 5 genes of untrained-demo; the others count as 0"):
        embed_spots(section, encoder, tmp_path / "out", omics)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({}, "does not state the µm/px of its patches; download its slide, from which patches are cut"),
        (STATED | {"downsample": 2.0}, "holds patches of 224 px at 1 µm/px, asked are 224 px at 0.5"),
    ],
)
def test_ready_cut_patches_of_another_scale_are_refused(tmp_path, encoder, stated, message):
    section = precut(tmp_path, stated=stated)
    with pytest.raises(UsageError, match=message):
        embed_spots(section, encoder, tmp_path / "out")


@pytest.mark.filterwarnings("default:.*spots are left out")
def test_the_command_takes_space_rangers_folder(tmp_path, folder, capsys, monkeypatch):
    write_visium(tmp_path / "visium/outs")
    draw(tmp_path / "full.png", (1400, 1200))
    monkeypatch.chdir(tmp_path)
    words = ["spots", "visium", "--encoder", str(folder), "-o", "out"]
    assert main([*words, "--slide", "full.png"]) == 1
    assert "omics.safetensors" in (said := capsys.readouterr().err)
    assert "type --image-only for the embeddings of the patches alone" in said
    assert main([*words, "--image-only"]) == 2
    assert "no full-resolution image; type --slide FILE" in capsys.readouterr().err
    assert main([*words, "--slide", "full.png", "--image-only"]) == 0
    out, err = capsys.readouterr()
    assert out == "visium: image embeddings by untrained-demo -> out/visium.h5ad\n"
    assert "7 of 25 spots are left out" in err
    made = anndata.read_h5ad("out/visium.h5ad")
    assert made.obsm["X_image"].shape == (SPOTS - 7, 192)
    assert main(["spots", "out", "--encoder", str(folder)]) == 2
    assert "has no visium.tif" in capsys.readouterr().err
