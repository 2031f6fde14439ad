"""Each format of others' files becomes a section; what is missing or contradicts is refused in one line."""

import gzip
import re
import shutil
import sys

import h5py
import numpy as np
import pytest
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
from seal_extract.train.formats import KINDS, load_sections
from seal_extract.train.formats.source import mpp_by_pitch


def load(kind, folder, names=("S1",), **options):
    return load_sections([{"kind": kind, "folder": str(folder), "names": list(names), **options}])


class Folder:
    """Sections of one kind in one folder."""

    def __init__(self, kind, folder, name="S1", **options):
        self.kind, self.folder, self.name, self.options = kind, folder, name, options

    def load(self, **options):
        (section,) = load(self.kind, self.folder, [self.name], **self.options | options)
        return section

    def refuses(self, message, **options):
        with pytest.raises(UsageError, match=message) as caught:
            self.load(**options)
        assert "\n" not in str(caught.value)


def dense(section):
    return section.counts.toarray() if issparse(section.counts) else section.counts


@pytest.fixture
def tables(tmp_path):
    write_st_tables(tmp_path)
    return Folder("st-tables", tmp_path, "A1")


@pytest.fixture
def anndata(tmp_path):
    write_h5ad(tmp_path / "S1.h5ad")
    draw(tmp_path / "S1.png", (50, 50))
    return Folder("anndata", tmp_path)


@pytest.fixture
def visium(tmp_path):
    write_visium(tmp_path)
    return Folder("visium", tmp_path, slide=str(draw(tmp_path / "he.png", (50, 50))))


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


# --- tables -----------------------------------------------------------------------------------------


def test_tables(tmp_path):
    counts = write_st_tables(tmp_path)
    tables = Folder("st-tables", tmp_path, "A1")
    section = tables.load()
    assert (section.patient, section.lattice, section.genes) == ("A", "square", GENES)
    assert section.mpp == pytest.approx(0.5)
    np.testing.assert_array_equal(section.counts, counts)
    np.testing.assert_allclose(section.xy_l0, places(square(3, 4), "square", 400.0))
    assert section.barcodes[:2] == ("2x2", "3x2")
    np.testing.assert_array_equal(section.array_rc[1], [2, 3])
    assert (section.neighbours() >= 0).sum(1).max() == 4
    assert tables.load(patient="P9", mpp=0.51).patient == "P9"


def test_spots_without_counts_and_counts_without_spots_are_left_out_and_said(tmp_path):
    counts = write_st_tables(tmp_path, drop_places=2, drop_counts=1)
    message = "A1: 1 spots without counts and 2 counts without a spot are left out, 9 stay"
    with pytest.warns(UserWarning, match=message):
        section = Folder("st-tables", tmp_path, "A1").load()
    np.testing.assert_array_equal(section.counts, counts[1:10])


def test_tables_refuse(tables):
    message = "A1: mpp is 0.25, but by the pitch of its spots it is 0.5 µm/px; correct mpp, or leave it out"
    tables.refuses(message, mpp=0.25)
    spots = tables.folder / "spots/A1_selection.tsv"
    spots.write_text("x\ty\n1\t2\n")
    tables.refuses("is no table of spots .*it needs x, y, pixel_x, pixel_y")
    spots.write_text("x\ty\tpixel_x\tpixel_y\n90\t90\t1\t2\n")
    tables.refuses(r"A1: no spot has both counts \(2x2, ...\) and a position \(90x90")
    (tables.folder / "counts/A1.tsv.gz").write_bytes(b"no gzip")
    tables.refuses("is no table of counts")
    tables.name = "A2"
    tables.refuses(r"has no counts/A2.tsv.gz or counts/A2.tsv; check folder and names")


def test_tables_of_normalised_counts(tmp_path):
    write_st_tables(tmp_path, counts=np.log1p(counts_of(12)))
    tables = Folder("st-tables", tmp_path, "A1")
    tables.refuses('A1: counts are not whole numbers.*counts_are = "log1p"')
    section = tables.load(counts_are="log1p")
    np.testing.assert_array_equal(section.log1p(), section.counts)


# --- AnnData ----------------------------------------------------------------------------------------


def test_anndata(anndata):
    table = np.arange(50, dtype=np.float64).reshape(25, 2)
    obs = {"patient": ["P7"] * 25, "arm": ["P8"] * 25}
    counts = write_h5ad(anndata.folder / "S1.h5ad", obs=obs, obsm={"X_visiumformer": table})
    section = anndata.load(obsm="X_visiumformer", pitch_um=100.0)
    assert issparse(section.counts)
    np.testing.assert_array_equal(dense(section), counts)
    assert (section.patient, section.lattice, section.genes) == ("P7", "hexagonal", GENES)
    assert section.mpp == pytest.approx(0.5)
    assert section.slide == anndata.folder / "S1.png"
    assert section.barcodes == barcodes_of(25)
    np.testing.assert_allclose(section.xy_l0, places(hexagon(), "hexagonal", 200.0))
    np.testing.assert_array_equal(section.array_rc, hexagon())
    np.testing.assert_array_equal(section.embeddings, table)
    assert section.embeddings.dtype == np.float32
    assert (section.neighbours() >= 0).sum(1).max() == 6
    assert anndata.load(patient_column="arm").patient == "P8"
    assert anndata.load(patient="P9").patient == "P9"
    assert anndata.load().mpp is None  # the slide's file states it
    assert anndata.load(mpp=0.4).mpp == 0.4
    assert anndata.load(lattice="none").neighbours().shape == (25, 0)


def test_anndata_of_a_layer_and_of_named_columns(tmp_path):
    counts = counts_of(25, seed=3)
    path, layers = tmp_path / "h5ad/S1.h5ad", {"raw": csr_matrix(counts)}
    write_h5ad(path, "square", counts=np.log1p(counts), layers=layers)
    draw(tmp_path / "slides/S1 HE.png", (50, 50))
    folder = Folder("anndata", tmp_path / "h5ad", slide="../slides/{name} HE.png")
    section = folder.load(layer="raw", genes_column="symbol")
    np.testing.assert_array_equal(dense(section), counts)
    assert (section.genes[0], section.lattice, section.patient) == ("symACTB", "square", "S1")
    assert folder.load(counts_are="log1p").scale == "log1p"
    folder.refuses("counts are not whole numbers")
    folder.refuses(r"has no layers\['counts'\]; it has raw", layer="counts")
    folder.refuses(r"S1 has no var\['id'\]; it has symbol", genes_column="id")


def test_anndata_leaves_out_what_lies_beside_the_tissue(anndata):
    counts = write_h5ad(anndata.folder / "S1.h5ad", obs={"in_tissue": [1] * 20 + [0] * 5})
    np.testing.assert_array_equal(dense(anndata.load()), counts[:20])


def test_anndata_with_positions_in_obs_alone(anndata):
    xy, path = places(hexagon(), "hexagonal", 200.0), anndata.folder / "S1.h5ad"
    write_h5ad(path, obs={"pxl_row_in_fullres": xy[:, 1], "pxl_col_in_fullres": xy[:, 0]})
    with h5py.File(path, "r+") as file:
        del file["obsm/spatial"]
    np.testing.assert_allclose(anndata.load().xy_l0, xy)


def test_spots_that_share_a_place_on_the_array_have_no_neighbours(anndata):
    write_h5ad(anndata.folder / "S1.h5ad", obs={"array_row": [1] * 25, "array_col": [1] * 25})
    with pytest.warns(UserWarning, match="S1: spots share a row and column, so none has neighbours"):
        assert anndata.load().neighbours().shape == (25, 0)


def test_anndata_refuses(anndata):
    path = anndata.folder / "S1.h5ad"
    write_h5ad(path, obs={"patient": ["P1"] * 20 + ["P2"] * 5})
    anndata.refuses("S1 is of 2 patients, P1, P2; a section is of one")
    anndata.refuses(r"has no obs\['who'\]; it has array_row", patient_column="who")
    anndata.options = {"patient": "P1"}
    anndata.refuses(r"slide .*gone.tif does not exist", slide="gone.tif")
    anndata.refuses(r"has no obsm\['X_pca'\]; it has spatial", obsm="X_pca")
    anndata.refuses("lattice is 'round'; allowed: auto, hexagonal, none, square", lattice="round")
    path.write_bytes(b"this is no HDF5")
    anndata.refuses("S1.h5ad is no AnnData file that can be read")
    write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["obs/array_row"]
        file["obs"].attrs["column-order"] = np.array(["array_col"], object)
    assert anndata.load().lattice == "none"
    anndata.refuses("but there are no array_row and array_col", lattice="hexagonal")
    anndata.refuses("pitch_um needs array_row and array_col on a lattice", pitch_um=100)
    with h5py.File(path, "r+") as file:
        del file["obsm/spatial"]
    anndata.refuses(r'neither obsm\["spatial"\] nor pxl_col_in_fullres')
    write_h5ad(path, obsm={"spatial": np.full((25, 2), np.nan)})
    anndata.refuses(r"positions of spots are \[25, 2\], 50 of them no numbers")
    (anndata.folder / "S1.png").unlink()
    anndata.refuses(r"has no S1.tif or S1.tiff .*check folder")
    path.unlink()
    anndata.refuses(r"has no S1.h5ad; check folder and names")


@pytest.mark.parametrize("kind", ["anndata", "hest", "visium"])
def test_genes_that_occur_twice(kind, tmp_path):
    twice, counts = ("ACTB", "CD3E", "ACTB", "MKI67", "VIM"), counts_of(25)
    slide = str(draw(tmp_path / "S1.png", (50, 50)))
    folder = Folder(kind, tmp_path, **({"slide": slide} if kind == "visium" else {}))
    if kind == "anndata":
        write_h5ad(tmp_path / "S1.h5ad", counts=counts, genes=twice)
    elif kind == "hest":
        write_hest(tmp_path, "S1", counts=counts, genes=twice)
    else:
        write_visium(tmp_path, counts, genes=twice)
    folder.refuses('S1: 1 genes occur twice, the first is ACTB; type duplicates = "sum" to add their counts')
    section = folder.load(duplicates="sum")
    assert section.genes == ("ACTB", "CD3E", "MKI67", "VIM")
    np.testing.assert_array_equal(dense(section)[:, 0], counts[:, 0] + counts[:, 2])
    np.testing.assert_array_equal(dense(section)[:, 1:], counts[:, [1, 3, 4]])
    folder.refuses("duplicates is 'first'; allowed: refuse, sum", duplicates="first")
    message = "duplicates = .sum. adds counts, but counts_are is 'log1p'"
    folder.refuses(message, duplicates="sum", counts_are="log1p")


# --- HEST -------------------------------------------------------------------------------------------

META = {"pixel_size_um_estimated": 0.51, "pixel_size_um_embedded": 0.25, "st_technology": "Visium"}


def test_hest(tmp_path):
    counts = write_hest(tmp_path, meta=META | {"patient": "Patient 1", "dataset_title": "Breast"})
    section = Folder("hest", tmp_path, "TENX1").load()
    np.testing.assert_array_equal(dense(section), counts)
    assert section.mpp == pytest.approx(0.5)  # by the pitch, which the metadata agree with
    assert (section.patient, section.lattice) == ("Patient 1 of Breast", "hexagonal")
    assert section.slide == tmp_path / "wsis/TENX1.tif"


def test_hest_of_other_technologies_goes_by_its_metadata(tmp_path):
    meta = {"pixel_size_um_estimated": 0.7, "st_technology": "Spatial Transcriptomics"}
    write_hest(tmp_path, meta=meta | {"patient": float("nan")}, lattice="square")
    hest = Folder("hest", tmp_path, "TENX1")
    section = hest.load()
    assert (section.mpp, section.patient, section.lattice) == (0.7, "TENX1", "square")
    assert section.mpp_source == "pixel_size_um_estimated of its metadata"
    assert hest.load(mpp=0.6, patient="P2").mpp == 0.6


def test_hest_refuses(tmp_path):
    hest = Folder("hest", tmp_path, "TENX1")
    write_hest(tmp_path, slide=False, lattice="square")
    hest.refuses("has no wsis/TENX1.tif or patches/TENX1.h5")
    write_hest(tmp_path, lattice="square")
    hest.refuses(r"TENX1: µm/px is unknown; type mpp = 0\.5")
    write_hest(tmp_path, meta=META | {"pixel_size_um_estimated": 0.25})
    hest.refuses("pixel_size_um_estimated of its metadata is 0.25, but by the pitch of its spots it is 0.5")
    (tmp_path / "metadata/TENX1.json").write_text("{")
    hest.refuses("is no JSON")


# --- Visium -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "header"), [(".", True), ("outs", False), ("S1", False), ("S1/outs", True)]
)
def test_visium(where, header, tmp_path):
    counts = write_visium(tmp_path / where, header=header)
    draw(tmp_path / "S1.png", (50, 50))
    section = Folder("visium", tmp_path, slide="{name}.png", patient="P1").load()
    np.testing.assert_array_equal(dense(section), counts)
    assert issparse(section.counts)
    assert (section.patient, section.lattice, section.genes) == ("P1", "hexagonal", GENES)
    assert section.mpp == pytest.approx(0.5)
    np.testing.assert_allclose(section.xy_l0, places(hexagon(), "hexagonal", 200.0))
    np.testing.assert_array_equal(section.array_rc, hexagon())
    assert (section.neighbours() >= 0).sum(1).max() == 6


def test_visium_by_ids_and_of_gene_expression_alone(visium):
    kinds = ["Gene Expression"] * 3 + ["Antibody Capture"] * 2
    counts = write_visium(visium.folder, kinds=kinds, genes=("A", "A", "B", "CD3", "CD4"))
    section = visium.load(genes_by="id")
    assert section.genes == ("ENSG00000000000", "ENSG00000000001", "ENSG00000000002")
    np.testing.assert_array_equal(dense(section), counts[:, :3])


def test_visium_refuses(visium):
    folder, matrix = visium.folder, visium.folder / "filtered_feature_bc_matrix.h5"
    visium.refuses("no full-resolution image; type --slide FILE, the image that it was given", slide=None)
    hires = draw(folder / "spatial/tissue_hires_image.png", (50, 50))
    message = "tissue_hires_image.png is a downscaled copy; give slide = the full-resolution"
    visium.refuses(message, slide=str(hires))
    visium.refuses("genes_by is 'name'; allowed: id, symbol", genes_by="name")
    write_10x(matrix, counts_of(25), kinds=["Antibody Capture"] * 5)
    visium.refuses("has no feature of type Gene Expression")
    table = folder / "spatial/tissue_positions.csv"
    table.write_text("barcode,x,y\nA,1,2\n")
    visium.refuses("is no table of spots .*it needs barcode, in_tissue, array_row")
    table.unlink()
    visium.refuses("has no spatial/tissue_positions.csv or spatial/tissue_positions_list")
    write_visium(folder)
    matrix.write_bytes(b"no HDF5")
    visium.refuses("is no matrix of Space Ranger .*it needs matrix/barcodes")
    with h5py.File(matrix, "w") as file:
        file.create_group("GRCh38")  # of Cell Ranger 2
    visium.refuses("is no matrix of Space Ranger")
    matrix.unlink()
    visium.refuses(r"has no filtered_feature_bc_matrix.h5, nor has S1 or outs in it")


def test_visium_hd(tmp_path):
    pytest.importorskip("pyarrow")
    hd = Folder("visium-hd", tmp_path, slide=str(draw(tmp_path / "he.png", (50, 50))))
    for bin_um in (8, 16):
        write_visium_hd(tmp_path, bin_um, pitch_px=2.0 * bin_um)
        section = hd.load(bin_um=bin_um)
        assert section.mpp == pytest.approx(0.5)
        assert (len(section), section.lattice) == (36, "square")
        np.testing.assert_allclose(section.xy_l0, places(square(6, 6), "square", 2.0 * bin_um))
        assert (section.neighbours() >= 0).sum(1).max() == 4
    hd.refuses(r"has no binned_outputs/square_002um/filtered", bin_um=2)
    (tmp_path / "binned_outputs/square_008um/spatial/tissue_positions.parquet").write_bytes(b"no parquet")
    hd.refuses("is no table of bins .*it needs barcode, in_tissue")


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
    Folder(kind, tmp_path, slide=str(slide)).refuses(message)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "xenium"}, f"kind of sections is 'xenium'; allowed: {', '.join(KINDS)}"),
        ({"kind": ["visium"]}, r"kind of sections is \['visium'\]; allowed"),
        ({"kind": None}, "kind of sections is None; allowed"),
        ({"mmp": 0.5}, "no option 'mmp'; did you mean mpp.*Allowed: folder, names, mpp, counts_are"),
        ({"mpp": "0.5"}, "sections of kind st-tables: mpp is '0.5'; it has to be float or nothing, got str"),
        ({"mpp": -1}, "mpp is -1; it has to be float > 0"),
        ({"kind": "visium-hd", "bin_um": True}, "bin_um is True; it has to be int, got bool"),
        ({"names": "TENX1"}, "names is 'TENX1'; it has to be list, got str"),
        ({"names": []}, "no sections are named"),
        ({"names": ["A1", "A1"]}, "sections A1, A1: one is named twice; name each once"),
        ({"folder": "nowhere"}, "there is no folder nowhere for sections of kind st-tables"),
    ],
)
def test_sources_that_cannot_be_meant(tmp_path, table, message):
    with pytest.raises(UsageError, match=message):
        load_sections([{"kind": "st-tables", "folder": str(tmp_path), "names": ["A1"]} | table])


def test_two_names_for_the_same_spots_are_refused(visium):
    with pytest.raises(UsageError, match=r"S1 and S2 are the same spots of he.png; give each its own folder"):
        load("visium", visium.folder, ["S1", "S2"], **visium.options)


def test_several_sources(tmp_path):
    write_st_tables(tmp_path)
    write_hest(tmp_path, meta=META)
    tables = {"kind": "st-tables", "folder": str(tmp_path), "names": ["A1"]}
    sections = load_sections([tables, {"kind": "hest", "folder": str(tmp_path), "names": ["TENX1"]}])
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
        root / "counts/A1.tsv.gz": Folder("st-tables", root, "A1"),
        root / "counts/B1.tsv": Folder("st-tables", root, "B1"),
        root / "spots/B1_selection.tsv": Folder("st-tables", root, "B1"),
        root / "V1/spatial/tissue_positions.csv": Folder("visium", root, "V1", slide="V1/full.png"),
        root / "metadata/H1.json": Folder("hest", root, "H1"),
    }


@given(data=st.data())
@settings(max_examples=250, deadline=None)
@pytest.mark.filterwarnings("ignore:.*are left out, :UserWarning", "ignore:.*share a row:UserWarning")
def test_whatever_tables_of_a_section_hold_is_read_or_refused_in_one_line(folders, data):
    path = data.draw(st.sampled_from(list(folders)))
    whole = path.read_bytes()
    pieces = re.split(rb"([\s,:\"]+)", whole) if path.suffix != ".gz" else [bytes([b]) for b in whole]
    for _ in range(data.draw(st.integers(1, 3))):
        word = data.draw(st.sampled_from(WORDS) | st.binary(max_size=3))
        pieces[data.draw(st.integers(0, len(pieces) - 1))] = word
    path.write_bytes(b"".join(pieces))
    try:
        section = folders[path].load()
        assert section.neighbours().shape[0] == len(section)
    except UsageError as exc:
        assert len(str(exc).splitlines()) == 1
    finally:
        path.write_bytes(whole)
