"""Search between images and genes: by expression, by likeness, of a region; the command."""

import csv
import json
import re
import zlib

import h5py
import numpy as np
import pytest
import shapely
from cohort_fixtures import assert_refused, link_cohort
from cohort_fixtures import run_here as run
from gene_fixtures import features_file
from PIL import Image

from seal_extract import extract, open_slide
from seal_extract.errors import UsageError
from seal_extract.features.store import list_features
from seal_extract.genes.gene_lists import Signature, read_profile
from seal_extract.genes.index import ExactIndex, Found
from seal_extract.genes.omics import load_omics
from seal_extract.genes.predict import (
    areas_mm2,
    benjamini_hochberg,
    patches_inside,
    predict_genes,
    region_genes,
)
from seal_extract.genes.search import best, embed_picture, embed_profile, search_expression
from seal_extract.run.cohort import extract_cohort
from seal_extract.tissue.geojson import inside_polygons
from seal_extract.view.pictures import read_patch


@pytest.fixture(scope="module")
def out(drawn_slides, tiny, tmp_path_factory):
    """A finished run over a few drawn slides by the bundled encoder."""
    folder = tmp_path_factory.mktemp("run")
    extract_cohort(link_cohort(folder / "slides", drawn_slides, 3), tiny, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def slides(out):
    return list_features(out)[0]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def at(slide, beside=0):
    """The first patch of a slide, as it is typed; or a pixel in it."""
    x, y = (slide.grid.xy_l0[0] + beside).tolist()
    return f"{slide.path.stem}:{x},{y}"


def rows_of(found):
    return [(one.slide.path.stem, one.row) for one in found]


# --- by expression ----------------------------------------------------------------------------


def test_a_gene_is_found_where_it_is_predicted_to_be_highest(slides, decoder):
    found = search_expression(slides, decoder, Signature("CD24", {"CD24": 1.0}), 4)
    values = [predict_genes(s, decoder, decoder.columns(["CD24"]))[:, 0] for s in slides]
    expected = np.sort(np.concatenate(values))[::-1][:4]
    np.testing.assert_allclose([one.score for one in found], expected, rtol=1e-6)


def test_at_most_so_many_of_a_slide(slides, decoder):
    found = search_expression(slides, decoder, Signature("S", {"CD24": 1.0, "A2M": 1.0}), 9, per_slide=1)
    assert sorted(one.slide.path for one in found) == sorted(s.path for s in slides)


def test_equal_scores_come_in_the_order_of_slides_and_rows(slides):
    found = best(slides, [np.zeros(len(s.grid)) for s in slides], 3)
    assert rows_of(found) == [(s.path.stem, row) for s in slides for row in range(len(s.grid))][:3]


# --- by likeness ------------------------------------------------------------------------------


def test_the_patch_that_was_asked_with_is_left_out(slides):
    asked = Found(slides[0], 1, 1.0)
    index, query = ExactIndex(slides), slides[0].features[1]
    assert rows_of(index.search(query, 1)) == [(slides[0].path.stem, 1)]
    assert (slides[0].path.stem, 1) not in rows_of(index.search(query, 5, skip=asked))


def test_a_picture_of_a_patch_finds_that_patch(slides, tiny, tmp_path):
    grid = slides[0].grid
    with open_slide(slides[0].provenance["slide"]["path"]) as slide:
        read_patch(slide, slides[0], 0, grid.patch_px).save(tmp_path / "patch.png")
    query = embed_picture(tiny, tmp_path / "patch.png", grid.mpp, slides[0])
    found = ExactIndex(slides).search(query, 1)
    assert found[0].score > 0.99
    with pytest.raises(UsageError, match=r"224 x 224 px at 0\.4 µm/px; allowed: 0\.5 µm/px or finer"):
        embed_picture(tiny, tmp_path / "patch.png", 0.4, slides[0])
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    picture = (tmp_path / "noise.png").read_bytes()
    second = picture.rindex(b"IDAT")
    broken, huge = picture[:second] + bytes(4) + picture[second + 4 :], bytearray(picture)
    huge[16:24] = (20_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    damages = {"": b"no picture", "exceeds limit": bytes(huge), "broken PNG": broken}
    for why, damaged in damages.items():
        (tmp_path / "damaged.png").write_bytes(damaged)
        with pytest.raises(UsageError, match=rf"damaged\.png cannot be read as a picture \(.*{why}"):
            embed_picture(tiny, tmp_path / "damaged.png", 0.5, slides[0])


def test_a_profile_is_embedded_as_a_spot_of_training_is(tmp_path):
    omics = load_omics("seal-tiny")
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, len(omics.genes))
    table = tmp_path / "p.csv"
    table.write_text("gene,count\n" + "".join(f"{g},{c}\n" for g, c in zip(omics.genes, counts, strict=True)))
    row = np.log1p(counts[None] * (1e4 / counts.sum())).astype(np.float32)
    np.testing.assert_allclose(embed_profile(omics, read_profile(table)), omics.encode(row)[0], atol=1e-5)
    with pytest.raises(UsageError, match="the profile names 1 of the 500 genes"):
        embed_profile(omics, {omics.genes[0]: 3.0})


@pytest.mark.parametrize(
    "text",
    ["A,1e308\nB,1e308", f"A,{'1' * 200_000}", "A,1\nA,2", "A,1\nB,-1", "A,1\nB", "A,0", "gene,count"],
)
def test_profiles_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "p.csv").write_text(text + "\n")
    with pytest.raises(UsageError, match="give a gene and its count"):
        read_profile(tmp_path / "p.csv")


# --- regions ----------------------------------------------------------------------------------


def test_points_in_polygons_with_holes():
    square = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    hole = np.array([[4.0, 4], [6, 4], [6, 6], [4, 6]])
    points = np.array([[1.0, 1], [5, 5], [11, 5], [9.9, 9.9]])
    assert inside_polygons([shapely.Polygon(square, [hole])], points).tolist() == [True, False, False, True]


class Linear:
    """A decoder whose genes are the features themselves."""

    genes, n_genes, name = ("up", "down", "flat", "same"), 4, "linear"

    def predict(self, features, columns=None):
        return np.asarray(features, np.float32)


@pytest.fixture
def stripes(tmp_path):
    """20 x 20 patches: in the 100 of the top left quarter one gene is higher and one lower."""
    rng = np.random.default_rng(0)
    y, x = np.divmod(np.arange(400), 20)
    inside = (x < 10) & (y < 10)
    rows = rng.normal(3, 1, size=(400, 4))
    rows[:, 0] += 1.5 * inside
    rows[:, 1] -= 1.5 * inside
    rows[:, 3] = 1.0
    return features_file(tmp_path / "a.h5", rows), inside


def test_genes_of_a_region_come_with_effect_and_p(stripes):
    slide, inside = stripes
    found = region_genes(slide, Linear(), inside, permutations=199)
    rows = slide.features.astype(np.float64)
    gap = rows[inside].mean(0) - rows[~inside].mean(0)
    pooled = np.sqrt((rows[inside].var(0) * 100 + rows[~inside].var(0) * 300) / 398)
    expected = dict(zip(Linear.genes, gap / np.where(pooled > 0, pooled, 1), strict=True))
    assert found.genes[0] == "up"
    assert found.genes[-1] == "down"
    for gene, effect in zip(found.genes, found.effect, strict=True):
        assert effect == pytest.approx(expected[gene], abs=1e-4)
    p = dict(zip(found.genes, zip(found.p_patches, found.p_pieces, strict=True), strict=True))
    assert p["up"][0] == 1 / 200
    assert p["up"][1] < 0.05
    assert p["down"] == (1, 1)
    assert p["same"] == (1, 1)


def test_p_of_what_the_region_has_nothing_to_do_with_is_anything(tmp_path):
    """Under the null the p-values are uniform: as many below a half as above."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(225, 300))
    slide = features_file(tmp_path / "a.h5", rows)
    decoder = Linear()
    decoder.genes, decoder.n_genes = tuple(f"g{i}" for i in range(300)), 300
    found = region_genes(slide, decoder, np.arange(225) % 15 < 5, permutations=99)
    for p in (found.p_patches, found.p_pieces):
        assert 0.4 < (p <= 0.5).mean() < 0.6
        assert 0.01 < (p <= 0.05).mean() < 0.11


def test_q_values_are_those_of_benjamini_and_hochberg():
    p = np.array([0.04, 0.001, 0.03, 0.2, 0.001, 1.0])
    by_hand = [0.06, 0.003, 0.06, 0.24, 0.003, 1.0]
    np.testing.assert_allclose(benjamini_hochberg(p), by_hand)


def test_the_area_of_a_region_and_of_the_tissue_in_it():
    region = [shapely.box(100, 100, 1100, 600)]
    tissue = [shapely.box(-500, 0, 600, 5000) - shapely.box(200, 200, 400, 400)]
    area, on_tissue = areas_mm2(region, tissue, 0.5)
    assert area == pytest.approx(1000 * 500 * 0.25e-6, rel=1e-9)
    assert on_tissue == pytest.approx((500 * 500 - 200 * 200) * 0.25e-6, rel=2e-3)
    assert areas_mm2([*region, *region], None, 0.5) == (area, None)


@pytest.mark.parametrize(("inside", "what"), [(False, "no patch"), (True, "every patch")])
def test_a_region_without_patches_or_with_all_is_refused(stripes, inside, what):
    with pytest.raises(UsageError, match=f"the region holds {what} of a; draw one with some of its 400"):
        region_genes(stripes[0], Linear(), np.full(400, inside))


# --- the command ------------------------------------------------------------------------------


def test_the_command_finds_patches_and_writes_them(out, slides, tmp_path):
    done = run("search", out, "--gene", "CD24", "-k", 4, "-o", tmp_path / "gene")
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "gene" / "found.csv")
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    by_name = {s.path.stem: s for s in slides}
    first = by_name[rows[0]["slide"]]
    assert first.grid.xy_l0[int(rows[0]["row"])].tolist() == [int(rows[0]["x_l0"]), int(rows[0]["y_l0"])]
    tiles = json.loads((tmp_path / "gene" / f"{rows[0]['slide']}.geojson").read_text())["features"]
    assert tiles[0]["properties"]["measurements"]["score"] == pytest.approx(float(rows[0]["score"]), rel=1e-5)
    with Image.open(tmp_path / "gene" / "contact_sheet.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(2**24)) > 500

    done = run("search", out, "--patch", at(slides[0], 10), "-k", 3, "-o", tmp_path / "patch")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_the_command_makes_an_index_of_a_run_and_not_of_a_part(out, slides, tmp_path):
    pytest.importorskip("faiss")
    asked = ["--patch", at(slides[0], 10), "-k", 3, "-o", tmp_path]
    exact = run("search", out, *asked).stdout.splitlines()
    done = run("search", out, *asked, "--index", "build")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("3 slides added, 0 changed, 0 dropped, 0 kept -> ")
    assert done.stdout.splitlines()[1:] == exact
    assert run("search", out, *asked, "--index", "use").stdout.splitlines() == exact
    line = "--index build needs the -o of a whole run"
    assert_refused(line, "search", slides[0].path, *asked, "--index", "build")


def test_the_command_tells_the_genes_of_a_region(out, slides, tmp_path):
    grid = slides[0].grid
    x0, y0 = grid.xy_l0[0].tolist()
    ring = [[x0, y0], [x0 + 300, y0], [x0 + 300, y0 + 300], [x0, y0 + 300], [x0, y0]]
    drawn = {"type": "Polygon", "coordinates": [ring]}
    (tmp_path / "r.geojson").write_text(json.dumps(drawn))
    asked = f"{slides[0].path.stem}:{tmp_path / 'r.geojson'}"
    done = run("search", out, "--region", asked, "-o", tmp_path, "--permutations", 19)
    if patches_inside(grid, [shapely.Polygon(ring)]).all():
        pytest.skip("the drawn slide has one patch only")
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "genes.csv")
    assert len(rows) == 500
    for p, q in (("p_patches", "q_patches"), ("p_pieces", "q_pieces")):
        expected = benjamini_hochberg(np.array([float(row[p]) for row in rows]))
        np.testing.assert_allclose([float(row[q]) for row in rows], expected, rtol=1e-4)
    assert "area of the region 0.005625 mm², of the tissue in it 0.00" in done.stdout
    assert "500 genes (the first 15 are shown)" in done.stdout


def test_an_index_is_built_whatever_else_is_asked(slides, tmp_path):
    pytest.importorskip("faiss")
    features = []
    for slide in slides:
        features.append(tmp_path / "run" / slide.path.name)
        features[-1].parent.mkdir(exist_ok=True)
        features[-1].write_bytes(slide.path.read_bytes())
    done = run("search", tmp_path / "run", "--index", "build")
    assert done.stdout.partition(" -> ")[0] == "3 slides added, 0 changed, 0 dropped, 0 kept"
    features[1].unlink()
    done = run("search", tmp_path / "run", "--gene", "CD24", "--index", "build", "-o", tmp_path / "found")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 slides added, 0 changed, 1 dropped, 2 kept -> ")


def test_results_are_not_replaced_by_another_query(out, slides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--gene", "CD24"], ["--gene", "A2M"], ["--patch", at(slides[0])]):
        assert run("search", out, *words).returncode == 0
    folders = {"gene_CD24", "gene_A2M", f"patch_{re.sub('[:,]', '_', at(slides[0]))}"}
    assert {path.name for path in (tmp_path / "search").iterdir()} == folders
    kept = (tmp_path / "search/gene_CD24/found.csv").read_bytes()
    done = run("search", out, "--gene", "A2M", "-o", "search/gene_CD24")
    assert (done.returncode, (tmp_path / "search/gene_CD24/found.csv").read_bytes()) == (1, kept)
    assert "found.csv belongs to another search; type --overwrite to replace it, or another -o" in done.stderr
    assert run("search", out, "--gene", "CD24", "-k", 1).returncode == 0  # the same query
    assert len((tmp_path / "search/gene_CD24/found.csv").read_text().splitlines()) == 2
    assert len(list((tmp_path / "search/gene_CD24").glob("*.geojson"))) == 1
    assert run("search", out, "--gene", "A2M", "-o", "search/gene_CD24", "--overwrite").returncode == 0
    assert (tmp_path / "search/gene_CD24/found.csv").read_bytes() != kept


def test_two_slides_of_one_name_have_files_of_their_own(slides, tmp_path):
    for folder, slide in zip("ab", slides, strict=False):
        (tmp_path / folder / "features").mkdir(parents=True)
        (tmp_path / folder / "features" / "s.h5").write_bytes(slide.path.read_bytes())
    done = run("search", tmp_path, "--gene", "CD24", "-k", 99, "-o", tmp_path / "found")
    assert done.returncode == 0, done.stderr
    names = {"a__features__s", "b__features__s"}
    assert {row["slide"] for row in table(tmp_path / "found" / "found.csv")} == names
    assert {path.stem for path in (tmp_path / "found").glob("*.geojson")} == names


def test_a_damaged_slide_is_named_and_the_others_are_searched(slides, tmp_path):
    for slide in slides:
        (tmp_path / slide.path.name).write_bytes(slide.path.read_bytes())
    with h5py.File(tmp_path / slides[0].path.name, "a") as file:
        file["features"][0, 0] = np.nan
    whole = (tmp_path / slides[1].path.name).read_bytes()
    (tmp_path / slides[1].path.name).write_bytes(whole[: len(whole) // 2])
    for words in (["--gene", "CD24"], ["--signature", "CD24,A2M"], ["--patch", at(slides[2])]):
        done = run("search", tmp_path, *words, "-k", 99, "-o", tmp_path / words[0])
        assert done.returncode == 1
        assert f"{slides[0].path.name} holds NaN or infinity; encode that slide again" in done.stderr
        assert f"{slides[1].path.name} cannot be read" in done.stderr
        found = table(tmp_path / words[0] / "found.csv")
        assert {row["slide"] for row in found} == {slides[2].path.stem}


def test_a_slide_that_has_moved_costs_the_sheet_only(drawn_slides, tiny, tmp_path):
    slide = tmp_path / "a.svs"
    slide.write_bytes(drawn_slides[0].read_bytes())
    extract(slide, tiny, tmp_path / "out")
    slide.unlink()
    done = run("search", tmp_path / "out", "--gene", "CD24", "-o", tmp_path / "found")
    assert done.returncode == 1
    assert "no contact sheet" in done.stderr
    assert "give the folder that holds it as --slides" in done.stderr
    assert (tmp_path / "found" / "found.csv").exists()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--gene", "CD42"], "CD42 is not among the genes"),
        (["--patch", "nobody:1,1"], "there is no slide nobody here; the nearest are slide_"),
        (["--patch", "slide_0000"], "type SLIDE:X,Y in level-0 pixels"),
        (["--gene", "CD24", "-k", "0"], "allowed: 1 or more"),
        (["--patch", "slide_0000:999999,0"], "no patch of slide_0000 contains"),
        (["--image", "x.png"], "give its µm/px, such as --image-mpp 0.5"),
        (["--profile", "none.csv"], "none.csv: No such file or directory; give a table of genes and counts"),
        (["--region", "slide_0000"], "type SLIDE:FILE.geojson"),
        (["--gene", "CD24", "--per-slide", "0"], "allowed: 1 or more"),
        (["--gene", "CD24", "--index", "use"], "--index use answers patch, image, profile only; leave it"),
        ([], "type what to search for, such as --gene NAME or --patch SLIDE:X,Y, or --index build"),
    ],
)
def test_the_command_refuses_in_one_line(out, words, answer, tmp_path):
    assert_refused(answer, "search", out, *words, "-o", tmp_path)
