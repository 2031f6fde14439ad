"""The HEST-Benchmark: its folders as they lie on the Hub, and figures that HEST's own code gives."""

import json
import re
import warnings
from dataclasses import replace

import anndata
import h5py
import numpy as np
import pandas
import pytest
from conftest import one_line
from encoder_fixtures import TINY_CONCH
from scipy.sparse import csr_matrix

from seal_extract.demo import untrained_encoder
from seal_extract.evaluate.hest import Task, predict, read_expression, read_tasks, score_task

GENES = ("KRT8", "CD74")
SPOTS = 12
STATED = {"patch_size_src": 64, "patch_size_target": 64, "downsample": 1.0, "pixel_size": 0.5}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    untrained_encoder(replace(TINY_CONCH, patch_px=64)).save_pretrained(folder)
    return folder


def write_task(
    folder, samples=("S1", "S2", "S3"), stated=STATED, counts=None, columns=("CD74", "ACTB", "KRT8")
):
    """A task of the benchmark: patches of one colour, in another order than the spots, which count it."""
    for part in ("patches", "adata", "splits"):
        (folder / part).mkdir(parents=True)
    (folder / "var_50genes.json").write_text(json.dumps({"genes": GENES}))
    for seed, name in enumerate(samples):
        rng = np.random.default_rng(seed)
        reds, order = rng.integers(20, 220, SPOTS + 3), rng.permutation(SPOTS)
        patches = rng.integers(0, 30, (SPOTS, 64, 64, 3), dtype=np.uint8)
        patches[..., 0] += reds[order].astype(np.uint8)[:, None, None]
        with h5py.File(folder / f"patches/{name}.h5", "w") as file:
            file["img"], file["coords"] = patches, np.arange(2 * SPOTS).reshape(-1, 2) * 64
            file["barcode"] = np.array([[f"spot{i}".encode()] for i in order])
            file["coords"].attrs.update(stated)
        table = np.stack([300 - reds, rng.integers(0, 9, SPOTS + 3), reds], 1) if counts is None else counts
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that stand twice
            obs = pandas.DataFrame({"in_tissue": 0}, index=[f"spot{i}" for i in range(SPOTS + 3)])
            data = anndata.AnnData(csr_matrix(table.astype(np.float32)), obs, pandas.DataFrame(index=columns))
        data.write_h5ad(folder / f"adata/{name}.h5ad")
    for i, held_out in enumerate(samples):
        for side in ("train", "test"):
            rows = [
                f"{s},patches/{s}.h5,adata/{s}.h5ad" for s in samples if (s == held_out) == (side == "test")
            ]
            text = "\n".join(["sample_id,patches_path,expr_path", *rows]) + "\n"
            (folder / f"splits/{side}_{i}.csv").write_text(text)


def test_the_regression_gives_the_figures_of_hests_own_code():
    """Of ``hest.bench.trainer.train_test_reg`` behind its scaler and PCA (mahmoodlab/HEST at afd42c3)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 400)).astype(np.float32)
    y = np.log1p(rng.poisson(np.exp(1 + 0.1 * x @ rng.normal(size=(400, 5)))).astype(float))
    predicted = predict(x[:400], y[:400], x[400:])
    r = [np.corrcoef(predicted[:, i], y[400:, i])[0, 1] for i in range(5)]
    assert r == pytest.approx([0.71035, 0.70714, 0.72613, 0.72205, 0.65433], abs=1e-3)
    assert predicted[0] == pytest.approx([0.51478, 0.28871, -0.57285, -0.35846, 0.18112], abs=5e-3)
    beside = predict(x[:400], np.hstack([y[:400], y[399::-1]]), x[400:], genes=5)
    assert beside[:, :5] == pytest.approx(predicted)  # permuted rows change nothing


def test_expression_is_log1p_of_raw_counts_in_the_order_of_the_patches(tmp_path):
    write_task(tmp_path / "IDC")
    (task,) = read_tasks(tmp_path)
    assert (task.name, task.genes) == ("IDC", GENES)
    assert task.splits[1] == (("S1", "S3"), ("S2",))
    values, whole = read_expression(task.samples["S1"], task.genes)
    rng = np.random.default_rng(0)
    reds, order = rng.integers(20, 220, SPOTS + 3), rng.permutation(SPOTS)
    np.testing.assert_array_equal(values, np.log1p(np.stack([reds, 300 - reds], 1)[order].astype(float)))
    assert whole


def test_a_split_trains_on_its_samples_and_permuted_rows_stay_within_a_sample():
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(60, 4)).astype(np.float32) for name in "abc"}
    # within a sample expression follows nothing; between samples it differs, and so do the embeddings
    y = {name: np.full((60, 1), float(i)) + rng.normal(size=(60, 1)) for i, name in enumerate("abc")}
    for i, name in enumerate("abc"):
        x[name][:, 0] += 9 * i
    task = Task("T", ("g",), {}, ((("a", "b"), ("b", "c")), (("a", "c"), ("a", "c"))))
    scores, permuted = score_task(task, x, y, 3)
    assert [score.fold for score in scores] == ["split 0", "split 1"]
    assert permuted.shape == (2, 3)
    assert permuted.min() > 0.3  # what tells samples apart is left


def test_the_command_prints_hests_table_and_goes_on_where_it_stopped(run, encoder, tmp_path):
    write_task(tmp_path / "bench/IDC")
    write_task(tmp_path / "bench/COAD", ("T1", "T2"), stated={})
    words = (
        "evaluate",
        "hest",
        tmp_path / "bench",
        "--encoder",
        encoder,
        "-o",
        tmp_path / "out",
        "-q",
    )
    status, out, err = run(*words, "--base", encoder)
    assert status == 0, err
    assert out[:4] == [
        "**HEST-Benchmark, Pearson r**",
        "",
        "|  | COAD | IDC | average |",
        "| --- | ---: | ---: | ---: |",
    ]
    name = encoder.name
    lines = [re.match(r"\| ([^|]+) \|", line)[1] for line in out[4:8]]
    assert lines == [name, f"{name}, before alignment", "handcrafted features", f"{name}, rows permuted"]
    report = json.loads((tmp_path / "out/hest.json").read_text())
    assert report["tasks"]["IDC"] == {"samples": ["S2", "S3", "S1"], "splits": 3, "genes": list(GENES)}
    table, coad, idc = report["tables"]
    assert list(coad["rows"][0]["folds"]) == ["split 0", "split 1"]
    of_splits = [list(row["folds"].values()) for row in idc["rows"]]
    assert [row["folds"]["IDC"] for row in table["rows"]] == pytest.approx(np.mean(of_splits, 1))
    assert [row["spread"]["IDC"] for row in table["rows"]] == pytest.approx(np.std(of_splits, 1))
    assert of_splits[2] > [0.5] * 3  # colour is what was counted
    assert set(report["pearson_r_per_gene"]["handcrafted features, COAD"]["split 1"]) == set(GENES)

    one_line(run(*words), 1, "hest.md exists already; give --overwrite or another -o")
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("features_*/*.h5")}
    assert len(made) == 5
    status, _, _ = run(*words, "--overwrite", "--tasks", "IDC")
    assert status == 0
    assert {file: file.stat().st_mtime_ns for file in made} == made


@pytest.mark.parametrize(
    ("words", "broken", "message"),
    [
        (("--tasks", "PRAD"), {}, r"has no task 'PRAD'; allowed: IDC"),
        ((), {"columns": ("CD74", "ACTB", "OTHER")}, r"S2.h5ad lacks 1 of 2 genes or has one twice"),
        ((), {"columns": ("CD74", "KRT8", "KRT8")}, r"S2.h5ad lacks 0 of 2 genes or has one twice"),
        ((), {"counts": np.full((SPOTS + 3, 3), -1)}, r"S2.h5ad holds NaN, infinity or numbers below 0"),
        ((), "patches/S3.h5", r"train_0.csv names .*S3.h5, which is not there; download it"),
        (
            (),
            "var_50genes.json",
            r"no task of the HEST-Benchmark; allowed: a folder with TASK/splits/train_0",
        ),
        ((), "splits/test_1.csv", r"cannot read .*test_1\.csv: No such file or directory; check the path"),
        ((), "splits/train_0.csv", r"IDC has 0 splits and 2 genes"),
    ],
)
def test_what_is_refused(run, encoder, tmp_path, words, broken, message):
    write_task(tmp_path / "IDC", **(broken if isinstance(broken, dict) else {}))
    if isinstance(broken, str):
        (tmp_path / "IDC" / broken).unlink()
    usual = ("evaluate", "hest", tmp_path, "--encoder", encoder, "-o", tmp_path / "out", "-q")
    one_line(run(*usual, *words), 2, message)


def test_a_sample_on_both_sides_is_refused_and_counts_that_are_not_raw_are_told(run, encoder, tmp_path):
    write_task(tmp_path / "IDC", counts=np.random.default_rng(0).random((SPOTS + 3, 3)))
    usual = ("evaluate", "hest", tmp_path, "--encoder", encoder, "-o", tmp_path / "out", "-q")
    status, out, _ = run(*usual)
    assert status == 0
    assert "the counts of S2, S3, S1 are not whole numbers" in out[0]
    (tmp_path / "IDC/splits/test_0.csv").write_text((tmp_path / "IDC/splits/train_0.csv").read_text())
    one_line(run(*usual, "--overwrite"), 2, r"S[23] is also in the test samples; a sample is on one side")
    (tmp_path / "IDC/splits/test_0.csv").write_text("sample\nS1\n")
    message = r"test_0\.csv cannot be read; it needs the columns sample_id, patches_path and expr_path"
    one_line(run(*usual, "--overwrite"), 2, message)
