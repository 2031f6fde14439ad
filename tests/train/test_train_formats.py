"""Each format of others' files becomes a section; what is missing or contradicts is refused in one line."""

import gzip
import re
import shutil
import sys

import h5py
import numpy as np
import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, issparse
from section_files import (
    GENES,
    barcodes_of,
    counts_of,
    draw,
    hexagon,
    places,
    square,
    write_10x,
    write_h5ad,
    write_hest,
    write_st_tables,
    write_visium,
    write_visium_hd,
)

from seal_extract.errors import UsageError
from seal_extract.train.formats import READERS, load_sections
from seal_extract.train.formats.matching import held_to_pitch, mpp_by_pitch


def load(kind, folder, names=("S1",), **options):
    return load_sections([{"kind": kind, "folder": str(folder), "names": list(names), **options}])


def load_one(kind, folder, name="S1", **options):
    (section,) = load(kind, folder, [name], **options)
    return section


def refused(message, kind, folder, name="S1", **options):
    with pytest.raises(UsageError, match=message) as caught:
        load(kind, folder, [name], **options)
    assert "\n" not in str(caught.value)


def dense(section):
    return section.counts.toarray() if issparse(section.counts) else section.counts


# --- µm/px ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lattice", "array_rc"), [("hexagonal", hexagon()), ("square", square())])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 37, 90, 180])
def test_the_pitch_gives_the_resolution_however_the_array_lies(lattice, array_rc, degrees, mirrored):
    turn = np.radians(degrees)
    xy = places(array_rc, lattice, 400.0) @ [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    xy = xy[:, ::-1] if mirrored else xy
    assert mpp_by_pitch(array_rc, lattice, 100.0, xy) == pytest.approx(0.25)


def test_two_spots_or_none_tell_no_resolution():
    assert mpp_by_pitch(square()[:2], "square", 100.0, np.zeros((2, 2))) is None
    assert mpp_by_pitch(square(), "square", 100.0, np.zeros((25, 2))) is None
    with pytest.raises(UsageError, match=r"S1: µm/px is unknown; type mpp = 0\.5"):
        held_to_pitch("S1", None, None)


# --- tables -----------------------------------------------------------------------------------------


def test_tables(tmp_path):
    counts = write_st_tables(tmp_path, "A1")
    section = load_one("st-tables", tmp_path, "A1")
    assert (section.patient, section.lattice, section.genes) == ("A", "square", GENES)
    assert section.mpp == pytest.approx(0.5)
    np.testing.assert_array_equal(section.counts, counts)
    np.testing.assert_allclose(section.xy_l0, places(square(3, 4), "square", 400.0))
    assert section.barcodes[:2] == ("2x2", "3x2")
    np.testing.assert_array_equal(section.array_rc[1], [2, 3])
    assert (section.neighbours() >= 0).sum(1).max() == 4
    assert load_one("st-tables", tmp_path, "A1", patient="P9", mpp=0.51).patient == "P9"


def test_spots_without_counts_and_counts_without_spots_are_left_out_and_said(tmp_path):
    counts = write_st_tables(tmp_path, drop_places=2, drop_counts=1)
    with pytest.warns(
        UserWarning, match="A1: 1 spots without counts and 2 counts without a spot are left out, 9 stay"
    ):
        section = load_one("st-tables", tmp_path, "A1")
    np.testing.assert_array_equal(section.counts, counts[1:10])


def test_tables_refuse(tmp_path):
    write_st_tables(tmp_path)
    refused(
        "A1: mpp is 0.25, but by the pitch of its spots it is 0.5 µm/px",
        "st-tables",
        tmp_path,
        "A1",
        mpp=0.25,
    )
    refused(r"has no counts/A2.tsv.gz or counts/A2.tsv; check folder and names", "st-tables", tmp_path, "A2")
    (tmp_path / "spots/A1_selection.tsv").write_text("x\ty\n1\t2\n")
    refused("is no table of spots .*it needs x, y, pixel_x, pixel_y", "st-tables", tmp_path, "A1")
    (tmp_path / "spots/A1_selection.tsv").write_text("x\ty\tpixel_x\tpixel_y\n90\t90\t1\t2\n")
    refused(r"A1: no spot has both counts \(2x2, ...\) and a place \(90x90", "st-tables", tmp_path, "A1")
    (tmp_path / "counts/A1.tsv.gz").write_bytes(b"no gzip")
    refused("is no table of counts", "st-tables", tmp_path, "A1")


def test_tables_of_normalised_counts(tmp_path):
    write_st_tables(tmp_path, counts=np.log1p(counts_of(12)))
    refused('A1: counts are not whole numbers.*counts_are = "log1p"', "st-tables", tmp_path, "A1")
    section = load_one("st-tables", tmp_path, "A1", counts_are="log1p")
    np.testing.assert_array_equal(section.log1p(), section.counts)


def test_her2st_itself():
    folder = shared("data", "her2st")
    with pytest.warns(UserWarning, match="are left out"):
        sections = load("st-tables", folder, ["C2", "C3", "C4", "C5"])
    assert [len(s) for s in sections] == [187, 180, 184, 181]
    assert {s.patient for s in sections} == {"C"}
    for section in sections:
        assert section.mpp == pytest.approx(0.687, rel=0.01)


# --- AnnData ----------------------------------------------------------------------------------------


def test_anndata(tmp_path):
    table = np.arange(50, dtype=np.float64).reshape(25, 2)
    counts = write_h5ad(
        tmp_path / "S1.h5ad", obs={"patient": ["P7"] * 25, "arm": ["P8"] * 25}, obsm={"X_visiumformer": table}
    )
    draw(tmp_path / "S1.png", (50, 50))
    section = load_one("anndata", tmp_path, obsm="X_visiumformer", pitch_um=100.0)
    assert issparse(section.counts)
    np.testing.assert_array_equal(dense(section), counts)
    assert (section.patient, section.lattice, section.genes) == ("P7", "hexagonal", GENES)
    assert section.mpp == pytest.approx(0.5)
    assert section.slide == tmp_path / "S1.png"
    assert section.barcodes == barcodes_of(25)
    np.testing.assert_allclose(section.xy_l0, places(hexagon(), "hexagonal", 200.0))
    np.testing.assert_array_equal(section.array_rc, hexagon())
    np.testing.assert_array_equal(section.embeddings, table)
    assert section.embeddings.dtype == np.float32
    assert (section.neighbours() >= 0).sum(1).max() == 6
    assert load_one("anndata", tmp_path, patient_column="arm").patient == "P8"
    assert load_one("anndata", tmp_path, patient="P9").patient == "P9"
    assert load_one("anndata", tmp_path).mpp is None  # the slide's file tells
    assert load_one("anndata", tmp_path, mpp=0.4).mpp == 0.4
    assert load_one("anndata", tmp_path, lattice="none").neighbours().shape == (25, 0)


def test_anndata_of_a_layer_and_of_named_columns(tmp_path):
    counts = counts_of(25, seed=3)
    write_h5ad(
        tmp_path / "h5ad/S1.h5ad", "square", counts=np.log1p(counts), layers={"raw": csr_matrix(counts)}
    )
    draw(tmp_path / "slides/S1 HE.png", (50, 50))
    options = {"slide": "../slides/{name} HE.png"}
    section = load_one("anndata", tmp_path / "h5ad", layer="raw", genes_column="symbol", **options)
    np.testing.assert_array_equal(dense(section), counts)
    assert (section.genes[0], section.lattice, section.patient) == ("symACTB", "square", "S1")
    refused("counts are not whole numbers", "anndata", tmp_path / "h5ad", **options)
    refused(r"has no layers\['counts'\]; it has raw", "anndata", tmp_path / "h5ad", layer="counts", **options)
    refused(
        r"S1 has no var\['id'\]; it has symbol", "anndata", tmp_path / "h5ad", genes_column="id", **options
    )
    assert load_one("anndata", tmp_path / "h5ad", counts_are="log1p", **options).scale == "log1p"


def test_anndata_leaves_out_what_lies_beside_the_tissue(tmp_path):
    counts = write_h5ad(tmp_path / "S1.h5ad", obs={"in_tissue": [1] * 20 + [0] * 5})
    draw(tmp_path / "S1.png", (50, 50))
    section = load_one("anndata", tmp_path)
    np.testing.assert_array_equal(dense(section), counts[:20])


def test_anndata_with_places_in_obs_alone(tmp_path):
    xy = places(hexagon(), "hexagonal", 200.0)
    write_h5ad(tmp_path / "S1.h5ad", obs={"pxl_row_in_fullres": xy[:, 1], "pxl_col_in_fullres": xy[:, 0]})
    draw(tmp_path / "S1.png", (50, 50))
    with h5py.File(tmp_path / "S1.h5ad", "r+") as file:
        del file["obsm/spatial"]
    np.testing.assert_allclose(load_one("anndata", tmp_path).xy_l0, xy)


def test_spots_that_share_a_place_on_the_array_have_no_neighbours(tmp_path):
    write_h5ad(tmp_path / "S1.h5ad", obs={"array_row": [1] * 25, "array_col": [1] * 25})
    draw(tmp_path / "S1.png", (50, 50))
    with pytest.warns(UserWarning, match="S1: spots share a row and column, so none has neighbours"):
        assert load_one("anndata", tmp_path).neighbours().shape == (25, 0)


def test_anndata_refuses(tmp_path):
    path = tmp_path / "S1.h5ad"
    refused(r"has no S1.h5ad; check folder and names", "anndata", tmp_path)
    write_h5ad(path, obs={"patient": ["P1"] * 20 + ["P2"] * 5, "text": ["x"] * 25})
    refused(r"has no S1.tif or S1.tiff .*check folder", "anndata", tmp_path, patient="P1")
    draw(tmp_path / "S1.png", (50, 50))
    refused("S1 is of 2 patients, P1, P2; a section is of one", "anndata", tmp_path)
    refused(r"has no obs\['who'\]; it has array_row", "anndata", tmp_path, patient_column="who")
    options = {"patient": "P1"}
    refused(r"slide .*gone.tif does not exist", "anndata", tmp_path, slide="gone.tif", **options)
    refused(r"has no obsm\['X_pca'\]; it has spatial", "anndata", tmp_path, obsm="X_pca", **options)
    refused("lattice is 'round'; allowed: auto, hexagonal", "anndata", tmp_path, lattice="round", **options)
    refused(
        "S1: mpp is 0.25, but by the pitch of its spots it is 0.5 µm/px; correct mpp, or leave it out",
        "anndata",
        tmp_path,
        mpp=0.25,
        pitch_um=100.0,
        **options,
    )
    path.write_bytes(b"this is no HDF5")
    refused("S1.h5ad is no AnnData file that can be read", "anndata", tmp_path, **options)
    write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["obs/array_row"], file["obsm/spatial"]
        file["obs"].attrs["column-order"] = np.array(["array_col"], object)
    refused(r'neither obsm\["spatial"\] nor pxl_col_in_fullres', "anndata", tmp_path)
    write_h5ad(path, obsm={"spatial": np.full((25, 2), np.nan)})
    refused(r"places of spots are \[25, 2\], 50 of them no numbers", "anndata", tmp_path)


def test_a_lattice_needs_rows_and_columns(tmp_path):
    write_h5ad(tmp_path / "S1.h5ad")
    draw(tmp_path / "S1.png", (50, 50))
    with h5py.File(tmp_path / "S1.h5ad", "r+") as file:
        del file["obs/array_row"]
        file["obs"].attrs["column-order"] = np.array(["array_col"], object)
    assert load_one("anndata", tmp_path).lattice == "none"
    refused("but there are no array_row and array_col", "anndata", tmp_path, lattice="hexagonal")
    refused("pitch_um needs array_row and array_col", "anndata", tmp_path, pitch_um=100)


@pytest.mark.parametrize("kind", ["anndata", "hest", "visium"])
def test_genes_that_stand_twice(kind, tmp_path):
    twice = ("ACTB", "CD3E", "ACTB", "MKI67", "VIM")
    counts = counts_of(25)
    if kind == "anndata":
        write_h5ad(tmp_path / "S1.h5ad", counts=counts, genes=twice)
        draw(tmp_path / "S1.png", (50, 50))
    elif kind == "hest":
        write_hest(tmp_path, "S1", counts=counts, genes=twice)
    else:
        write_visium(tmp_path, counts, genes=twice)
    options = {"slide": str(draw(tmp_path / "he.png", (50, 50)))} if kind == "visium" else {}
    refused(
        'S1: 1 genes stand twice, the first ACTB; type duplicates = "sum" to add their counts',
        kind,
        tmp_path,
        **options,
    )
    section = load_one(kind, tmp_path, duplicates="sum", **options)
    assert section.genes == ("ACTB", "CD3E", "MKI67", "VIM")
    np.testing.assert_array_equal(dense(section)[:, 0], counts[:, 0] + counts[:, 2])
    np.testing.assert_array_equal(dense(section)[:, 1:], counts[:, [1, 3, 4]])
    refused("duplicates is 'first'; allowed: refuse, sum", kind, tmp_path, duplicates="first", **options)
    refused(
        "duplicates = .sum. adds counts, but counts_are is 'log1p'",
        kind,
        tmp_path,
        duplicates="sum",
        counts_are="log1p",
        **options,
    )


# --- HEST -------------------------------------------------------------------------------------------

META = {"pixel_size_um_estimated": 0.51, "pixel_size_um_embedded": 0.25, "st_technology": "Visium"}


def test_hest(tmp_path):
    counts = write_hest(tmp_path, meta=META | {"patient": "Patient 1", "dataset_title": "Breast"})
    section = load_one("hest", tmp_path, "TENX1")
    np.testing.assert_array_equal(dense(section), counts)
    assert section.mpp == pytest.approx(0.5)  # by the pitch, which the metadata agree with
    assert (section.patient, section.lattice) == ("Patient 1 of Breast", "hexagonal")
    assert section.slide == tmp_path / "wsis/TENX1.tif"


def test_hest_of_other_technologies_goes_by_its_metadata(tmp_path):
    meta = {
        "pixel_size_um_estimated": 0.7,
        "st_technology": "Spatial Transcriptomics",
        "patient": float("nan"),
    }
    write_hest(tmp_path, meta=meta, lattice="square")
    section = load_one("hest", tmp_path, "TENX1")
    assert (section.mpp, section.patient, section.lattice) == (0.7, "TENX1", "square")
    assert section.mpp_source == "pixel_size_um_estimated of its metadata"
    assert load_one("hest", tmp_path, "TENX1", mpp=0.6, patient="P2").mpp == 0.6


def test_hest_refuses(tmp_path):
    write_hest(tmp_path, slide=False, lattice="square")
    refused("has no wsis/TENX1.tif or patches/TENX1.h5", "hest", tmp_path, "TENX1")
    write_hest(tmp_path, lattice="square")
    refused("TENX1: µm/px is unknown; type mpp", "hest", tmp_path, "TENX1")
    write_hest(tmp_path, meta=META | {"pixel_size_um_estimated": 0.25})
    refused(
        "TENX1: pixel_size_um_estimated of its metadata is 0.25, but by the pitch of its spots it is 0.5",
        "hest",
        tmp_path,
        "TENX1",
    )
    (tmp_path / "metadata/TENX1.json").write_text("{")
    refused("is no JSON", "hest", tmp_path, "TENX1")


# --- Visium -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("where", [".", "outs", "S1", "S1/outs"])
def test_visium(where, header, tmp_path):
    counts = write_visium(tmp_path / where, header=header)
    draw(tmp_path / "S1.png", (50, 50))
    section = load_one("visium", tmp_path, slide="{name}.png", patient="P1")
    np.testing.assert_array_equal(dense(section), counts)
    assert issparse(section.counts)
    assert (section.patient, section.lattice, section.genes) == ("P1", "hexagonal", GENES)
    assert section.mpp == pytest.approx(0.5)
    np.testing.assert_allclose(section.xy_l0, places(hexagon(), "hexagonal", 200.0))
    np.testing.assert_array_equal(section.array_rc, hexagon())
    assert (section.neighbours() >= 0).sum(1).max() == 6


def test_visium_by_ids_and_of_gene_expression_alone(tmp_path):
    kinds = ["Gene Expression"] * 3 + ["Antibody Capture"] * 2
    counts = write_visium(tmp_path, kinds=kinds, genes=("A", "A", "B", "CD3", "CD4"))
    section = load_one("visium", tmp_path, slide=str(draw(tmp_path / "he.png", (50, 50))), genes_by="id")
    assert section.genes == ("ENSG00000000000", "ENSG00000000001", "ENSG00000000002")
    np.testing.assert_array_equal(dense(section), counts[:, :3])


def test_visium_refuses(tmp_path):
    refused(r"has no filtered_feature_bc_matrix.h5, nor has S1 or outs in it", "visium", tmp_path)
    write_visium(tmp_path)
    slide = {"slide": str(draw(tmp_path / "he.png", (50, 50)))}
    refused("no full-resolution image; type --slide FILE, the one that it was given", "visium", tmp_path)
    draw(tmp_path / "spatial/tissue_hires_image.png", (50, 50))
    refused(
        "tissue_hires_image.png is Space Ranger's small copy; give slide = the full-resolution",
        "visium",
        tmp_path,
        slide="spatial/tissue_hires_image.png",
    )
    refused("S1: mpp is 0.25, but by the pitch of its spots it is 0.5", "visium", tmp_path, mpp=0.25, **slide)
    refused("genes_by is 'name'; allowed: symbol, id", "visium", tmp_path, genes_by="name", **slide)
    write_10x(tmp_path / "filtered_feature_bc_matrix.h5", counts_of(25), kinds=["Antibody Capture"] * 5)
    refused("has no feature of type Gene Expression", "visium", tmp_path, **slide)
    (tmp_path / "spatial/tissue_positions.csv").write_text("barcode,x,y\nA,1,2\n")
    refused("is no table of spots .*it needs barcode, in_tissue, array_row", "visium", tmp_path, **slide)
    (tmp_path / "spatial/tissue_positions.csv").unlink()
    refused(
        "has no spatial/tissue_positions.csv or spatial/tissue_positions_list", "visium", tmp_path, **slide
    )
    write_visium(tmp_path)
    (tmp_path / "filtered_feature_bc_matrix.h5").write_bytes(b"no HDF5")
    refused("is no matrix of Space Ranger .*it needs matrix/barcodes", "visium", tmp_path, **slide)
    with h5py.File(tmp_path / "filtered_feature_bc_matrix.h5", "w") as file:
        file.create_group("GRCh38")  # of Cell Ranger 2
    refused("is no matrix of Space Ranger", "visium", tmp_path, **slide)


def test_visium_hd(tmp_path):
    pytest.importorskip("pyarrow")
    for bin_um in (8, 16):
        write_visium_hd(tmp_path, bin_um, pitch_px=2.0 * bin_um)
    slide = str(draw(tmp_path / "he.png", (50, 50)))
    for bin_um in (8, 16):
        section = load_one("visium-hd", tmp_path, slide=slide, bin_um=bin_um)
        assert section.mpp == pytest.approx(0.5)
        assert (len(section), section.lattice) == (36, "square")
        np.testing.assert_allclose(section.xy_l0, places(square(6, 6), "square", 2.0 * bin_um))
        assert (section.neighbours() >= 0).sum(1).max() == 4
    refused(r"has no binned_outputs/square_002um/filtered", "visium-hd", tmp_path, slide=slide, bin_um=2)
    (tmp_path / "binned_outputs/square_008um/spatial/tissue_positions.parquet").write_bytes(b"no parquet")
    refused("is no table of bins .*it needs barcode, in_tissue", "visium-hd", tmp_path, slide=slide)


# --- what is not installed, and what is asked wrongly -----------------------------------------------


@pytest.mark.parametrize(
    ("module", "kind", "install"),
    [
        ("anndata", "anndata", r'type, in your clone of seal-extract: pip install "\.\[train\]"'),
        ("scipy.sparse", "visium", r'type, in your clone of seal-extract: pip install "\.\[train\]"'),
        ("pyarrow", "visium-hd", "type: pip install pyarrow"),
    ],
)
def test_what_is_not_installed_is_named(module, kind, install, tmp_path, monkeypatch):
    slide = draw(tmp_path / "S1.png", (50, 50))
    write_h5ad(tmp_path / "S1.h5ad")
    write_visium(tmp_path)
    if kind == "visium-hd":
        pytest.importorskip("pyarrow")
        write_visium_hd(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    message = f"^{module.split('.')[0]} is not installed; {install}$"
    refused(message, kind, tmp_path, slide=str(slide))


def test_sources_that_cannot_be_meant(tmp_path):
    kinds = ", ".join(READERS)
    for kind in ("xenium", None, ["visium"]):
        with pytest.raises(UsageError, match=rf"kind of sections is .*; allowed: {kinds}"):
            load(kind, tmp_path)
    refused("have no option 'mmp'; allowed: mpp, counts_are, patient", "st-tables", tmp_path, mmp=0.5)
    refused("mpp is '0.5'; it has to be float or int", "st-tables", tmp_path, mpp="0.5")
    refused("bin_um is True; it has to be int", "visium-hd", tmp_path, bin_um=True)
    with pytest.raises(UsageError, match=r'need folder = "..." and names'):
        load_sections([{"kind": "hest", "folder": str(tmp_path), "names": "TENX1"}])
    with pytest.raises(UsageError, match="no sections are named"):
        load("hest", tmp_path, [])


def test_a_section_named_twice_or_read_twice(tmp_path):
    write_visium(tmp_path)
    slide = str(draw(tmp_path / "he.png", (50, 50)))
    with pytest.raises(UsageError, match="sections S1, S1: one stands twice; name each once"):
        load("visium", tmp_path, ["S1", "S1"], slide=slide)
    with pytest.raises(UsageError, match=r"S1 and S2 are the same spots of he.png; give each its own folder"):
        load("visium", tmp_path, ["S1", "S2"], slide=slide)


def test_several_sources(tmp_path):
    write_st_tables(tmp_path)
    write_hest(tmp_path, meta=META)
    sections = load_sections(
        [
            {"kind": "st-tables", "folder": str(tmp_path), "names": ["A1"]},
            {"kind": "hest", "folder": str(tmp_path), "names": ["TENX1"]},
        ]
    )
    assert [s.name for s in sections] == ["A1", "TENX1"]


WORDS = [*b'x " { } \n \t \0 \xff'.split(b" "), b"", b"-1", b"nan", b"1e300", b"1e400", b"1000000000"]
WORDS += [b"9" * 400, b"x" * 140_000, b"[" * 5000, b"null", b"true"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A section of each kind that is kept in text: its file, and how it is read."""
    root = tmp_path_factory.mktemp("text")
    write_st_tables(root, "A1")
    with gzip.open(root / "counts/A1.tsv.gz") as file:
        (root / "counts/B1.tsv").write_bytes(file.read())
    for part in ("spots/{}_selection.tsv", "images/{}.jpg"):
        shutil.copy(root / part.format("A1"), root / part.format("B1"))
    write_visium(root / "V1")
    draw(root / "V1/full.png", (100, 100))
    write_hest(root, "H1", meta={"pixel_size_um_estimated": 0.5, "patient": "P", "st_technology": "Visium"})
    return {
        root / "counts/A1.tsv.gz": ("st-tables", "A1", {}),
        root / "counts/B1.tsv": ("st-tables", "B1", {}),
        root / "spots/B1_selection.tsv": ("st-tables", "B1", {}),
        root / "V1/spatial/tissue_positions.csv": ("visium", "V1", {"slide": str(root / "V1/full.png")}),
        root / "metadata/H1.json": ("hest", "H1", {}),
    }


@given(data=st.data())
@settings(max_examples=250, deadline=None)
@pytest.mark.filterwarnings("ignore:.*are left out, :UserWarning", "ignore:.*share a row:UserWarning")
def test_whatever_tables_of_a_section_hold_is_read_or_refused_in_one_line(folders, data):
    path = data.draw(st.sampled_from(list(folders)))
    kind, name, options = folders[path]
    whole = path.read_bytes()
    pieces = re.split(rb"([\s,:\"]+)", whole) if path.suffix != ".gz" else [bytes([b]) for b in whole]
    for _ in range(data.draw(st.integers(1, 3))):
        word = data.draw(st.sampled_from(WORDS) | st.binary(max_size=3))
        pieces[data.draw(st.integers(0, len(pieces) - 1))] = word
    path.write_bytes(b"".join(pieces))
    try:
        (section,) = load(kind, path.parents[1], [name], **options)
        assert section.neighbours().shape[0] == len(section)
    except UsageError as exc:
        assert len(str(exc).splitlines()) == 1
    finally:
        path.write_bytes(whole)
