"""Predicted expression: the decoder alone, signatures, files beside the features, the command."""

import json
import os
from dataclasses import replace

import h5py
import numpy as np
import pytest
from cohort_fixtures import assert_refused
from cohort_fixtures import run_here as run
from conftest import run_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from seal_extract import extract, load_encoder
from seal_extract.errors import EncoderError, OutputError, SlideOpenError, UsageError
from seal_extract.features.store import open_origin
from seal_extract.genes.decoder import decoder_of, load_decoder
from seal_extract.genes.expression_file import expression_path, find_expression, write_expression
from seal_extract.genes.gene_lists import Signature, read_gmt, read_panel, read_profile, read_signature
from seal_extract.genes.predict import (
    SignatureScores,
    fit_signatures,
    moments,
    predict_genes,
    signature_scores,
)


@pytest.fixture(scope="module")
def finished(drawn_slides, tiny, tmp_path_factory):
    """Features of a few drawn slides by the bundled encoder."""
    out = tmp_path_factory.mktemp("finished")
    return [extract(slide, tiny, out) for slide in drawn_slides]


# --- the decoder ------------------------------------------------------------------------------


def test_the_decoder_alone_predicts_what_its_encoder_predicts(tiny, decoder, finished):
    features = finished[0].features
    expected = tiny.predict_expression(features).numpy()
    np.testing.assert_array_equal(decoder.predict(features), expected)
    np.testing.assert_allclose(decoder.predict(features, [7, 2]), expected[:, [7, 2]], atol=1e-5)
    assert decoder.genes == tiny.genes


def test_the_decoder_of_features_is_found_and_one_of_other_weights_is_refused(finished, decoder, tmp_path):
    assert decoder_of(finished[0].provenance).weights == decoder.weights
    other = load_encoder("seal-tiny", device="cpu")
    other.decoder.genes.bias += 1
    other.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"made by seal-tiny with weights \w+, and .* has \w+; give"):
        decoder_of(finished[0].provenance, encoder=tmp_path)


def test_an_encoder_without_a_decoder_is_refused(encoder_folder):
    with pytest.raises(EncoderError, match="untrained-demo has no expression decoder; those that"):
        load_decoder(encoder_folder)


def test_the_panel_names_the_columns_or_is_refused(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"genes": None}))
    unnamed = load_decoder(tmp_path)
    with pytest.raises(UsageError, match="the gene names of the 500 columns of seal-tiny are not published"):
        unnamed.columns(["CD24"])
    with pytest.raises(UsageError, match="the gene panel has 2 names; seal-tiny has 500 columns"):
        load_decoder(tmp_path, panel=["A", "B"])
    assert load_decoder(tmp_path, panel=[f"G{i}" for i in range(500)]).columns(["G7"]) == [7]


@pytest.mark.parametrize("rows", [np.zeros((3, 127)), np.zeros(128), np.full((2, 128), np.nan)])
def test_features_that_cannot_be_its_own_are_refused(decoder, rows):
    with pytest.raises(UsageError, match=r"takes \[N, 128\]|NaN"):
        decoder.predict(rows)


# --- signatures -------------------------------------------------------------------------------


def test_signatures_as_they_are_typed(tmp_path):
    gmt = tmp_path / "hallmark.gmt"
    gmt.write_text("ONE\thttp://x\tCD24\tERBB3\t\nTWO\t\tA2M\n")
    assert read_signature(f"{gmt}:ONE") == Signature("ONE", {"CD24": 1.0, "ERBB3": 1.0})
    assert read_signature("CD24:2, A2M:-1,ERBB3").weights == {"CD24": 2.0, "A2M": -1.0, "ERBB3": 1.0}
    assert list(read_gmt(gmt)) == ["ONE", "TWO"]
    with pytest.raises(UsageError, match=r"holds no set ONCE; type .*:NAME, such as ONE"):
        read_signature(f"{gmt}:ONCE")
    with pytest.raises(UsageError, match="holds 2 sets; type"):
        read_signature(str(gmt))


@pytest.mark.parametrize("text", ["CD24:x", "CD24,CD24", ",", "CD24:0", "CD24:inf"])
def test_lists_that_are_no_signature_are_refused(text):
    with pytest.raises(UsageError, match=r"allowed: FILE\.gmt:NAME|finite weights"):
        read_signature(text)


NAMES = st.text(st.characters(codec="utf-8"), max_size=6)
LINES = st.lists(
    st.lists(NAMES | st.sampled_from(["CD24", "1", "", '"', "\0", "\x1b[2J"]), max_size=5), max_size=5
)


TABLES = st.builds(
    lambda rows, mark: "\n".join(map(mark.join, rows)).encode(), LINES, st.sampled_from("\t,;:")
)


@given(data=st.binary(max_size=60) | TABLES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_gene_list_holds_is_read_or_refused_in_one_line(data, tmp_path):
    """And what was read can be written as names in HDF5 and JSON."""
    path = tmp_path / "x.gmt"
    path.write_bytes(data)
    typed = data.decode("utf-8", "surrogateescape")
    for read in (read_gmt, read_panel, read_profile, lambda _: read_signature(typed)):
        try:
            found = read(path)
        except UsageError as exc:
            assert len(str(exc).splitlines()) == 1
            continue
        if read is read_profile:
            assert 0 < sum(found.values()) < np.inf
        if read in (read_gmt, read_panel):
            with h5py.File(tmp_path / "x.h5", "w") as file:
                file.create_dataset("names", data=np.array(list(found), object), dtype=h5py.string_dtype())
                assert file["names"].asstr()[()].tolist() == list(found)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX's")
@pytest.mark.parametrize("read", [read_gmt, read_panel, read_profile])
def test_a_pipe_is_refused(read, tmp_path):
    os.mkfifo(tmp_path / "pipe.gmt")
    with pytest.raises(UsageError, match="it is not a regular file; give"):
        read(tmp_path / "pipe.gmt")


def test_unknown_genes_are_refused(decoder):
    with pytest.raises(UsageError, match="cd24 is not among the genes of seal-tiny; the nearest are CD24"):
        decoder.columns(["cd24"])
    with pytest.raises(UsageError, match=r"none of the 1 genes of X .* is among the 500 of seal-tiny"):
        Signature("X", {"NOGENE": 1.0}).known_to(decoder)


def test_moments_are_those_of_all_patches_together(finished, decoder):
    rows = np.concatenate([decoder.predict(f.features) for f in finished]).astype(np.float64)
    mean, deviation = moments(finished, decoder)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-9)
    np.testing.assert_allclose(deviation, rows.std(0), rtol=1e-6, atol=1e-9)


def test_a_signature_is_a_weighted_mean_of_standardised_genes(finished, decoder):
    signature = Signature("S", {"CD24": 2.0, "A2M": -1.0, "NOGENE": 1.0})
    columns = decoder.columns(["CD24", "A2M"])
    rows = np.concatenate([decoder.predict(f.features, columns) for f in finished]).astype(np.float64)
    standard = (rows - rows.mean(0)) / rows.std(0)
    expected = (2 * standard[:, 0] - standard[:, 1]) / 3
    found = signature_scores(finished, decoder, signature)
    assert [len(scores) for scores in found] == [len(f.grid) for f in finished]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


# --- files ------------------------------------------------------------------------------------


def test_expression_lies_beside_the_features_in_their_order(finished, decoder, tmp_path):
    features = finished[0]
    columns = decoder.columns(["CD24", "A2M"])
    path = expression_path(features, tmp_path)
    written = write_expression(features, decoder, path, columns)
    assert find_expression(path) == written
    assert written.genes == ("CD24", "A2M")
    np.testing.assert_array_equal(written.column("A2M"), predict_genes(features, decoder, columns)[:, 1])
    with h5py.File(path) as file, h5py.File(features.path) as source:
        np.testing.assert_array_equal(file["coords"][()], source["coords"][()])
        assert file["expression"].shape == (len(features.grid), 2)


def test_genes_are_added_to_a_file_of_the_same_features_and_weights(finished, decoder, tmp_path):
    path = tmp_path / "a.h5"
    write_expression(finished[0], decoder, path, [7])
    before = path.stat().st_mtime_ns
    write_expression(finished[0], decoder, path, [7])
    assert path.stat().st_mtime_ns == before
    first, second = decoder.genes[7], decoder.genes[2]
    both = write_expression(finished[0], decoder, path, [2])
    assert both.genes == find_expression(path).genes == (first, second)
    np.testing.assert_array_equal(both.column(second), predict_genes(finished[0], decoder, [7, 2])[:, 1])
    before = path.stat().st_mtime_ns
    assert write_expression(finished[0], decoder, path, [2]).genes == (first, second)
    assert path.stat().st_mtime_ns == before
    assert write_expression(finished[0], decoder, path, [2], overwrite=True).genes == (second,)
    assert write_expression(finished[0], decoder, path).genes == decoder.genes
    swapped = replace(decoder, genes=(decoder.genes[1], decoder.genes[0], *decoder.genes[2:]))
    with pytest.raises(OutputError, match=r"holds .*; type --overwrite to replace it, or another -o"):
        write_expression(finished[0], swapped, path, [1])


def test_a_signature_is_decoded_once_however_many_files_it_goes_to(finished, decoder):
    read = []

    class Counting:
        columns = decoder.columns

        def predict_each(self, rows, columns):
            read.append(len(columns))
            return decoder.predict_each(rows, columns)

    one, two = fit_signatures(
        finished, decoder, [Signature("1", {"CD24": 1.0}), Signature("2", {"A2M": 1.0})]
    )
    scores = SignatureScores(finished[0], Counting())
    found = [scores.of(asked) for asked in ([one], [one, two], [two], [])]
    assert read == [1, 1]
    assert [len(each) for each in found] == [1, 2, 1, 0]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[2][0], SignatureScores(finished[0], decoder).of([two])[0])


def test_a_file_without_columns_and_signatures_counts_as_finished(finished, decoder, tmp_path):
    """As the version before wrote it."""
    path = tmp_path / "a.h5"
    write_expression(finished[0], decoder, path, [3])
    with h5py.File(path, "a") as file:
        provenance = json.loads(file.attrs["seal_extract"])
        for entry in ("source", "genes", "columns", "signatures"):
            del provenance[entry]
        provenance["features"] = finished[0].provenance  # with the slide's folder
        file.attrs["seal_extract"] = json.dumps(provenance)
    before = path.stat().st_mtime_ns
    write_expression(finished[0], decoder, path, [3])
    assert path.stat().st_mtime_ns == before
    assert write_expression(finished[0], decoder, path, [5]).genes == (decoder.genes[3], decoder.genes[5])


def test_a_slide_that_has_moved_is_found_by_its_name_or_asked_for(drawn_slides, tiny, tmp_path):
    slide = tmp_path / "here" / "a.svs"
    slide.parent.mkdir()
    slide.write_bytes(drawn_slides[0].read_bytes())
    features = extract(slide, tiny, tmp_path / "out")
    slide.rename(tmp_path / "a.svs")
    with pytest.raises(SlideOpenError, match="no longer there; give the folder that holds it as --slides"):
        open_origin(features)
    open_origin(features, tmp_path).close()
    with pytest.raises(SlideOpenError, match=r"holds no file of the name a\.svs"):
        open_origin(features, tmp_path / "out")


# --- the command ------------------------------------------------------------------------------


def test_the_command_writes_every_form(finished, decoder, tmp_path):
    files = [f.path for f in finished]
    done = run("genes", *files, "--genes", "CD24,A2M", "--signature", "CD24:1,A2M:-1", "-o", tmp_path,
               "--write", "h5,h5ad,geojson,png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    stem = files[0].stem
    tiles = json.loads((tmp_path / f"{stem}.geojson").read_text())["features"]
    assert len(tiles) == len(finished[0].grid)
    x, y = finished[0].grid.xy_l0[0].tolist()
    assert tiles[0]["geometry"]["coordinates"][0][0] == [x, y]
    assert set(tiles[0]["properties"]["measurements"]) == {"CD24", "A2M", "CD24:1,A2M:-1"}
    expected = predict_genes(finished[0], decoder, decoder.columns(["CD24"]))
    found = [tile["properties"]["measurements"]["CD24"] for tile in tiles]
    np.testing.assert_allclose(found, expected[:, 0], rtol=1e-5)
    with h5py.File(tmp_path / f"{stem}.h5ad") as file:
        assert [name.decode() for name in file["var/_index"][()]] == ["CD24", "A2M"]
        assert set(file[f"uns/spatial/{stem}/images"]) == {"hires", "lowres"}
        np.testing.assert_allclose(file["X"][:, 0], expected[:, 0], rtol=1e-6)
    with Image.open(tmp_path / f"{stem}_CD24.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_signatures_reach_every_table(finished, decoder, tmp_path):
    out, gmt = finished[0].path.parents[2], tmp_path / "sets.gmt"
    gmt.write_text("UP/DOWN\t\tCD24\tA2M\nOTHER\t\tERBB3\tCD24\n")
    words = ["genes", out, "--signature", f"{gmt}:UP/DOWN", "--write", "h5,h5ad,geojson", "-o", tmp_path]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    signatures = read_gmt(gmt).values()
    slides = [finished[i] for i in np.argsort([f.path for f in finished])]
    first, second = (signature_scores(slides, decoder, signature)[0] for signature in signatures)
    table = find_expression(tmp_path / slides[0].path.name)
    np.testing.assert_allclose(table.column("UP/DOWN"), first, atol=1e-6)
    assert (table.genes, table.signatures) == ((), ("UP/DOWN",))

    done = run(*words, "--genes", "CD24", "--signature", f"{gmt}:OTHER")
    assert done.returncode == 0, done.stderr
    table = find_expression(tmp_path / slides[0].path.name)
    assert (table.genes, table.signatures) == (("CD24",), ("UP/DOWN", "OTHER"))
    tiles = json.loads((tmp_path / slides[0].path.name).with_suffix(".geojson").read_text())["features"]
    with h5py.File((tmp_path / slides[0].path.name).with_suffix(".h5ad")) as file:
        np.testing.assert_allclose(file["X"][:, 0], table.column("CD24"), atol=1e-6)
        for name, column, scores in (("UP/DOWN", "UP_DOWN", first), ("OTHER", "OTHER", second)):
            np.testing.assert_allclose(table.column(name), scores, atol=1e-6)
            np.testing.assert_allclose(file["obs"][column], scores, atol=1e-6)
            found = [tile["properties"]["measurements"][name] for tile in tiles]
            np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5)


def test_one_name_for_two_columns_is_refused(finished, tmp_path):
    words = ["genes", finished[0].path, "--genes", "CD24", "--signature", "CD24", "-o", tmp_path]
    assert_refused("CD24 would name two columns of one table; give the signature another name", *words)


@pytest.mark.parametrize("form", ["h5", "h5ad", "geojson", "png"])
def test_no_form_is_replaced_unasked(finished, tmp_path, form):
    words = ["genes", finished[0].path, "--genes", "CD24", "--write", form, "-o", tmp_path]
    assert run(*words).returncode == 0
    (path,) = tmp_path.iterdir()
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert run(*words).returncode == 0  # it is finished
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    path.write_bytes(b"mine")
    done = run(*words)
    assert (done.returncode, path.read_bytes()) == (1, b"mine")
    assert f"{path} exists and holds something else; type --overwrite" in done.stderr
    assert run(*words, "--overwrite").returncode == 0
    assert path.read_bytes()[:8] == before[0][:8]
    other = tmp_path / "other" / finished[0].path.name
    other.parent.mkdir()
    other.write_bytes(finished[1].path.read_bytes())  # another slide of that name
    done = run("genes", other, *words[2:])
    assert done.returncode == 1
    assert "holds genes or signatures of other features, weights or slides; type --overwrite" in done.stderr


def test_all_genes_of_a_run(finished, tmp_path):
    out = finished[0].path.parents[2]
    done = run("genes", out, "--all", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f.path.name for f in finished}
    assert len(find_expression(tmp_path / finished[0].path.name).genes) == 500


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--genes", "CD42"], "CD42 is not among the genes"),
        ([], "type --genes A,B, --signature FILE.gmt:NAME or --all"),
        (["--all", "--write", "pdf"], "allowed: h5, h5ad, geojson, png"),
        (["--all", "--write", "png"], "needs genes by name; type --genes A,B in place of --all"),
        (["--list", "--genes", "NOGENE*"], "none of the 500 genes of seal-tiny matches NOGENE*"),
        (["--all", "--panel", "missing.txt"], "cannot read the gene panel"),
        (["--signature", "none.gmt:X"], "cannot read none.gmt"),
    ],
)
def test_the_command_refuses_in_one_line(finished, words, answer):
    assert_refused(answer, "genes", finished[0].path, *words)


def test_a_list_needs_an_encoder():
    assert_refused("type the -o of a run, or --encoder NAME, to list the genes of its", "genes", "--list")


def test_the_genes_that_can_be_asked_for_are_listed(finished, decoder):
    done = run("genes", "--list", "--encoder", "seal-tiny")
    assert done.stdout.split() == list(decoder.genes)
    done = run("genes", finished[0].path, "--list", "--genes", "cd2*,A2M")
    assert done.stdout.split() == [g for g in decoder.genes if g.startswith("CD2") or g == "A2M"]


def test_genes_that_are_not_in_the_panel_are_named(finished, tmp_path):
    words = ["--signature", "CD24,NADA,A2M,NOPE", "--write", "h5", "-o", tmp_path]
    done = run("genes", finished[0].path, *words)
    assert "CD24,NADA,A2M,NOPE: 2 of 4 genes are in the panel; missing: NADA, NOPE\n" in done.stdout


def test_a_moved_slide_costs_the_pictures_only(drawn_slides, tiny, tmp_path):
    slide = tmp_path / "a.svs"
    slide.write_bytes(drawn_slides[0].read_bytes())
    extract(slide, tiny, tmp_path / "out")
    slide.unlink()
    table = tmp_path / "genes" / "a.h5"
    done = run("genes", tmp_path / "out", "--genes", "CD24", "-o", table.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"-> {table}; no picture: the slide {slide} is no longer there; give the folder" in done.stdout
    done = run("genes", tmp_path / "out", "--genes", "A2M", "-o", table.parent, "--write", "h5,png")
    assert done.returncode == 1
    assert f"a: no picture: the slide {slide} is no longer there" in done.stderr
    assert f"(written: {table})" in done.stderr
    assert find_expression(table).genes == ("CD24", "A2M")


def test_a_slide_of_nan_is_named_and_the_others_are_done(finished, decoder, tmp_path):
    paths = []
    for features in finished:
        paths.append(tmp_path / "run" / features.path.name)
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(features.path.read_bytes())
    with h5py.File(paths[1], "a") as file:
        file["features"][0, 0] = np.nan
    done = run("genes", tmp_path / "run", "--signature", "CD24:1,A2M:-1", "--write", "h5", "-o", tmp_path)
    assert done.returncode == 1
    assert f"{paths[1]} holds NaN or infinity; encode that slide again" in done.stderr
    assert "1 of 3 slides failed" in done.stderr
    kept = [features for i, features in enumerate(finished) if i != 1]
    signature = read_signature("CD24:1,A2M:-1")
    for features, scores in zip(kept, signature_scores(kept, decoder, signature), strict=True):
        table = find_expression(tmp_path / features.path.name)
        np.testing.assert_allclose(table.column(signature.name), scores, atol=1e-6)
    assert not (tmp_path / paths[1].name).exists()


def test_two_slides_of_one_name_are_not_written_over_each_other(finished, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.h5").write_bytes(finished[0].path.read_bytes())
    files = [tmp_path / folder / "s.h5" for folder in ("a", "b")]
    line = "would both become s.h5; give them in two commands, each with its own -o"
    assert_refused(line, "genes", *files, "--genes", "CD24", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- at scale ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_2000_genes_of_100_000_patches(tmp_path):
    """Prints seconds beyond reading, and the memory; run with -s."""
    (tmp_path / "scale.py").write_text(SCALE)
    done = run_file(tmp_path / "scale.py", tmp_path)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert "765 MB written" in done.stdout


SCALE = """
import resource, sys, time
from pathlib import Path
import numpy as np
from gene_fixtures import features_file, random_decoder
from seal_extract.features.store import read_pieces
from seal_extract.genes.expression_file import write_expression

folder, n, dim, genes = Path(sys.argv[1]), 100_000, 512, 2000
rows = np.random.default_rng(0).standard_normal((n, dim), dtype=np.float32)
features = features_file(folder / "a.h5", rows)
decoder = random_decoder(dim, genes)
start = time.perf_counter()
for piece in read_pieces(features.path):
    pass
reading = time.perf_counter() - start
start = time.perf_counter()
write_expression(features, decoder, folder / "out.h5")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
size = (folder / "out.h5").stat().st_size / 2**20
print(f"{n:,} patches of {dim}, {genes} genes: {seconds:.1f} s, of them {reading:.1f} s reading; "
      f"peak {peak:.2f} GB; {size:.0f} MB written")
"""
