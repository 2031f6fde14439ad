"""Embeddings of patients: all patches as one bag, or the mean of the slides, as Patho-Bench fuses them."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from cohort_fixtures import run_here
from conftest import one_line
from feature_fixtures import short_of
from mil_models import model_of, rows_of, save, write_features

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.store import list_features
from seal_extract.pooling import open_pooling, pool_slide
from seal_extract.pooling.patient_level import fuse_early, fuse_late

COUNTS = {"a": 30, "b": 7, "c": 4500}


@pytest.fixture
def slides(tmp_path):
    """Three slides of different numbers of patches; one patch of ``b`` could not be read."""
    made = []
    for i, (name, count) in enumerate(COUNTS.items()):
        rows, unreadable = rows_of(count, seed=i) * 2, (3,) if name == "b" else ()
        rows[list(unreadable)] = 0
        made.append(write_features(tmp_path, rows, name=name, unreadable=unreadable))
    return made


def bag_of(slides):
    """The patches that could be read, slide after slide."""
    return torch.from_numpy(np.concatenate([f.features[f.features.any(1)] for f in slides]))


@pytest.mark.parametrize("kind", ["CLAM_MB small", "ABMIL of MIL-Lab", "TANGLE"])
def test_a_bag_is_the_model_on_all_patches_and_the_late_one_the_mean_over_slides(tmp_path, slides, kind):
    model, pooling = model_of(kind), open_pooling(save(model_of(kind), tmp_path / "m.pt"))
    early = fuse_early("P1", slides, pooling, tmp_path / "early.h5")
    levels = [pool_slide(f, pooling, tmp_path / "level" / f.path.name) for f in slides]
    late = fuse_late("P1", levels, tmp_path / "late.h5")
    model = model.double()
    with torch.inference_mode():
        want, scores = model.pooled(bag_of(slides).double())
        each = [model.pooled(bag_of([f]).double())[0] for f in slides]
    np.testing.assert_allclose(early.features, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(late.features, torch.stack(each).mean(0), rtol=1e-6, atol=1e-6)
    with h5py.File(early.path) as file:
        read = ~np.isnan(file["attention_scores"][0])
        assert np.flatnonzero(~read).tolist() == [33]
        np.testing.assert_allclose(file["attention"][:, read], scores.softmax(1), rtol=1e-5, atol=1e-9)
        assert np.bincount(file["slide"]).tolist() == list(COUNTS.values())
        np.testing.assert_array_equal(file["coords"], np.concatenate([f.grid.xy_l0 for f in slides]))
        assert file["coords"].attrs["patch_size_level0"] == 512
    assert early.provenance["bag"] == early.provenance["slides"] == ["a", "b", "c"]
    assert repr(early).startswith("PatientLevel(early.h5: ")


def test_the_order_of_slides_changes_no_byte_of_the_numbers_and_nothing_is_done_twice(tmp_path, slides):
    pooling = open_pooling(save(model_of("CLAM_SB small"), tmp_path / "m.pt"))
    levels = [pool_slide(f, pooling, tmp_path / "level" / f.path.name) for f in slides]
    for fuse, given in (
        (lambda s, p: fuse_early("P", s, pooling, p), slides),
        (lambda s, p: fuse_late("P", s, p), levels),
    ):
        one, other = fuse(given, tmp_path / "1.h5"), fuse(given[::-1], tmp_path / "2.h5")
        assert one.features.tobytes() == other.features.tobytes()
        assert fuse(given[::-1], tmp_path / "1.h5").finished_before
        with pytest.raises(
            OutputError, match=r"made with another request \(slides .*\); delete it if slides"
        ):
            fuse(given[:2], tmp_path / "1.h5")
        (tmp_path / "1.h5").unlink()
        (tmp_path / "2.h5").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size_l0": 1024}, r"patch_size_level0 \(512 and 1024\)"),
        ({"patch_px": 224}, r"patches \(256 px at 0.5 µm/px and 224 px"),
    ],
)
def test_slides_that_cannot_be_one_bag_are_refused(tmp_path, slides, change, words):
    slides[1] = replace(slides[1], grid=replace(slides[1].grid, **change))
    with pytest.raises(
        UsageError, match=f"slides a and b of patient P1 differ in {words}.*--patient-level late"
    ):
        fuse_early("P1", slides, open_pooling("mean"), tmp_path / "p.h5")


def test_slides_of_another_encoder_or_other_weights_are_refused(tmp_path, slides):
    made = slides[1].provenance
    for change, words in (
        ({"encoder": {"name": "other"}}, r"encoder \(tiny and other\)"),
        ({"request": {"pipeline": 1, "encoder": {"weights": ["1"]}}}, "weights and cannot"),
    ):
        slides[1] = replace(slides[1], provenance=made | change)
        with pytest.raises(UsageError, match=words):
            fuse_early("P1", slides, open_pooling("mean"), tmp_path / "p.h5")


# --- the command line -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory, drawn_slides):
    """Two patients, one of them with two slides."""
    path = tmp_path_factory.mktemp("patients") / "list.csv"
    rows = [f"{slide},{case}" for slide, case in zip(drawn_slides, ("P 1", "P2", "P 1"), strict=True)]
    path.write_text("\n".join(["slide,case_id", *rows]))
    return path


@pytest.fixture(scope="module")
def made(table, encoder_folder):
    """The command, its result, and its folder."""
    out = table.parent / "out"
    words = (table, "-o", out, "--encoder", encoder_folder, "--slide-level", "mean")
    words += ("--patient-level", "early,late", "--log-json", table.with_name("log.jsonl"))
    return words, run_here(*words), out


def files_of(out, name):
    (folder,) = out.glob(f"*/patient_features_{name}-untrained-demo")
    return {path.stem: path for path in folder.glob("*.h5")}


def test_a_table_gives_each_patient_a_file_for_each_fusion(made):
    _, done, out = made
    assert (done.returncode, done.stderr) == (0, "")
    told = [line.partition(", 192 -> ")[0] for line in done.stdout.splitlines() if "patient level" in line]
    assert told == [
        f"{case}: patient level by mean, {fusion} fusion of {count}"
        for case, count in (("P 1", "2 slides"), ("P2", "1 slide"))
        for fusion in ("early", "late")
    ]
    features = {f.path.stem: f.features for f in list_features(out)[0]}
    both = [features["0"], features["2"]]
    for fusion, want in (
        ("early", np.concatenate(both).mean(0, np.float64)),
        ("late", np.mean([one.mean(0, np.float64) for one in both], 0)),
    ):
        path = files_of(out, f"{fusion}_mean")["P 1"]
        with h5py.File(path) as file:
            assert file["features"].shape == (1, 192)
            np.testing.assert_allclose(file["features"][0], want, rtol=1e-6, atol=1e-7)
        assert short_of(path.parent, "patho-bench") == []
    events = [json.loads(line)["event"] for line in (out.parent / "log.jsonl").read_text().splitlines()]
    assert events.count("patient level") == 4


def test_a_second_run_leaves_them_and_a_patient_with_a_failed_slide_fails_alone(made, run, table, tmp_path):
    words, _, out = made
    before = files_of(out, "early_mean")["P 1"].read_bytes()
    (tmp_path / "bad.svs").write_text("no slide")
    longer = tmp_path / "list.csv"
    longer.write_text(f"{table.read_text()}\n{tmp_path / 'bad.svs'},P 1")
    status, lines, err = run(longer, *words[1:])
    assert status == 1
    told = [line for line in lines if "patient level" in line]
    assert all(line.startswith("P2: ") and "finished before" in line for line in told)
    assert len(told) == 2
    assert sum("P 1: patient level by mean, " in line and "bad.svs failed, and" in line for line in err) == 2
    assert "2 of 4 patient-level files failed" in err[-1]
    assert files_of(out, "early_mean")["P 1"].read_bytes() == before


def test_a_patient_level_that_the_run_cannot_give_is_one_line(
    run, table, drawn_slides, encoder_folder, tmp_path
):
    given = ("-o", tmp_path / "out", "--encoder", encoder_folder)
    mean, late = ("--slide-level", "mean"), ("--patient-level", "late")
    bad = tmp_path / "bad.csv"
    bad.write_text(f"slide,case_id\n{drawn_slides[0]},../P1")
    for words, message in (
        ((table, *mean, "--patient-level", "middle"), "is 'middle'; allowed: early, late"),
        ((table, *late), "type --slide-level mean too"),
        ((table, *mean, *late, "--shard", "1/2"), "--shard takes a part of them"),
        ((table, *mean, *late, "--retry-failed"), "--retry-failed takes a part of them"),
        ((drawn_slides[0], *mean, *late), "give a table with a column case_id"),
        ((bad, *mean, *late), r"the case_id '../P1' cannot be the name of a file"),
    ):
        one_line(run(*words, *given), 2, message)
    assert not (tmp_path / "out").exists()
