"""Slides: figures by other packages, a label that tissue carries and one that it does not, stopped runs."""

import csv
import json
from itertools import zip_longest

import numpy as np
import pytest
import torch
from conftest import one_line
from feature_fixtures import DIM, SIZE, grid_of, provenance_of
from safetensors import safe_open
from sklearn import metrics

from seal_extract.cli import main
from seal_extract.errors import UsageError
from seal_extract.evaluate import slide_heads
from seal_extract.evaluate.cox import fit_cox
from seal_extract.evaluate.labels import find_slides, read_labels
from seal_extract.evaluate.slide_metrics import resampled, score
from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layouts import layout_of_grid
from seal_extract.features.store import read_features
from seal_extract.pooling import open_pooling
from seal_extract.pooling.slide_level import pool_rows

PATIENTS = 16
SURVIVAL = ("--label", "days", "--event", "event")


def write_slide(out, name, features, encoder="ours", patch_px=256, weights=None):
    grid = grid_of(len(features))
    provenance = provenance_of(grid, encoder=encoder) | {"unreadable": []}
    provenance["grid"]["patch_px"] = patch_px
    provenance["request"] = {"slide": name, "encoder": weights or encoder}
    provenance["slide"]["path"] = f"{name}.svs"
    place = layout_of_grid("trident", out, grid)
    with place.write_features(SlideLabel(name, SIZE, 0.25), grid, encoder, DIM, provenance) as writer:
        writer.append(features.astype(np.float32))
    return place.features(name, encoder)


def write_cohort(out):
    """Half of the patches show status and risk to one encoder; the last patient has two slides."""
    rng, rows = np.random.default_rng(0), []
    shows = rng.normal(size=(3, DIM))
    for patient in range(PATIENTS):
        status, risk = patient % 2, rng.normal()
        time, censored = rng.exponential(np.exp(-2 * risk)), rng.exponential(3)
        for slide in range(1 + (patient == PATIENTS - 1)):
            noise, seen = rng.normal(size=(20 + patient, DIM)), rng.random((20 + patient, 1)) < 0.5
            for encoder, strength in (("ours", 4), ("base", 0)):
                features = noise + strength * (seen * shows[status] + 0.5 * risk * shows[2])
                write_slide(out, f"s{patient}_{slide}", features, encoder)
            row = {"slide_id": f"s{patient}_{slide}.svs", "case_id": f"p{patient}", "label": "np"[status]}
            row |= {"coin": "abc"[patient * 7 % 5 % 3], "days": min(time, censored) + 0.001}
            rows.append(
                row
                | {"event": int(time <= censored), "one": "same", "fold_0": ("train", "test")[patient < 8]}
            )
    return rows


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("cohort")
    rows = write_cohort(out)
    write_table(out / "labels.csv", [{k: v for k, v in row.items() if k != "fold_0"} for row in rows])
    return out, rows


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setattr(slide_heads, "EPOCHS", 1)


def words_of(cohort, out, *more):
    features = sorted(cohort[0].glob("*/features_*"))[::-1]  # ours, then the base
    return ("evaluate", "slides", *features, "--labels", cohort[0] / "labels.csv", "-o", out, "-q", *more)


# --- figures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_figures_are_those_of_scikit_learn_also_of_resamples(classes):
    rng = np.random.default_rng(classes)
    truth, predicted = rng.integers(classes, size=40), rng.dirichlet(np.ones(classes), 40).round(1)
    rows = rng.integers(40, size=40)
    weights = np.stack([np.ones(40, int), np.bincount(rows, minlength=40)])
    found = score(weights, truth, predicted)
    for i, (t, p) in enumerate([(truth, predicted), (truth[rows], predicted[rows])]):
        of_class = [metrics.roc_auc_score(t == k, p[:, k]) for k in range(classes)]
        assert found["AUC"][i] == pytest.approx(of_class[1] if classes == 2 else np.mean(of_class))
        said = p.argmax(1)
        assert found["balanced accuracy"][i] == pytest.approx(metrics.balanced_accuracy_score(t, said))
        assert found["weighted F1"][i] == pytest.approx(metrics.f1_score(t, said, average="weighted"))
        kappa = metrics.cohen_kappa_score(t, said, weights="quadratic", labels=range(classes))
        assert found["quadratic kappa"][i] == pytest.approx(kappa)


def test_the_c_index_by_hand():
    truth = np.array([(1, 1), (2, 0), (2, 1), (3, 1), (3, 0)])  # times and events
    # the first is before all others, the event at 2 before the rest, the event at 3 before the censored one
    found = score(np.ones((1, 5)), truth, np.array([5.0, 1.0, 4.0, 4.0, 6.0]))["C-index"]
    assert found == pytest.approx((3 + 1 + 0.5 + 0) / 8)


@pytest.mark.parametrize(
    ("alpha", "coefficients", "c_index"),
    [
        (0.01, [0.87141, -0.79622, -0.01258, -0.03502, 0.26163, 0.1197, -0.23871, 0.17225], 0.737463),
        (0.07, [0.64449, -0.61722, 0.0, 0.0, 0.17858, 0.03659, -0.2035, 0.09902], 0.732547),
    ],
)
def test_cox_is_scikit_survivals(alpha, coefficients, c_index):
    """By CoxnetSurvivalAnalysis of scikit-survival 0.28.0, with l1_ratio 0.5 and tol 1e-12."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 8)).astype(np.float32) + 2
    time = np.ceil(4 * rng.exponential(np.exp(-x[:, 0] + x[:, 1])) * 10) / 10
    event = rng.random(60) < 0.6
    found, settled = fit_cox(x, time, event, alpha)
    assert settled
    assert found == pytest.approx(coefficients, abs=1e-4)
    figures = score(np.ones((1, 60)), np.stack([time, event], 1), x @ found)
    assert figures["C-index"] == pytest.approx(c_index, abs=1e-6)


def test_patients_are_resampled_with_all_their_samples():
    truth, predicted = np.array([0, 1, 0, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.5, 0.5]])
    folds = [
        (truth, predicted, np.array(["a", "a", "b", "b"])),
        (truth[:2], predicted[:2], np.array(["c", "c"])),
    ]
    own, drawn = resampled(folds, seed=0)
    assert own["AUC"].tolist() == [0.75, 1]
    # fold 1: a alone 1, b alone 0, both as often 0.75; c is there in 19 of 27
    assert set(drawn["AUC"][~np.isnan(drawn["AUC"])].round(3)) > {0.0, 0.5, 0.875, 1.0}
    assert drawn["AUC"].tolist() == resampled(folds, seed=0)[1]["AUC"].tolist()


# --- the command --------------------------------------------------------------------------------------


def scores_of(out, name="slides"):
    """The report, and its lines by figure and name."""
    report = json.loads((out / f"{name}.json").read_text())
    lines = {
        (table["title"].split(": ")[1], row["line"]): row
        for table in report["tables"]
        for row in (*table["rows"], *table["differences"])
    }
    return report, lines


@pytest.fixture(scope="module")
def evaluated(cohort, tmp_path_factory):
    """The folder of a run with all heads."""
    out = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slide_heads, "EPOCHS", 3)
        assert main([str(word) for word in words_of(cohort, out, "--folds", 2)]) == 0
    return out


def test_a_label_that_tissue_carries_is_found_and_another_is_not(run, cohort, evaluated, tmp_path):
    report, found = scores_of(evaluated)
    assert report["classes"] == {"n": 8, "p": 8}
    assert (report["patients"], report["slides"]) == (16, 17)
    for head in ("abmil", "mean-mil", "linear-probe"):
        assert found["AUC", f"ours, {head}"]["mean"] > 0.9
        assert found["AUC", f"ours, {head}, labels permuted"]["mean"] < 0.8
    difference = found["quadratic kappa", "ours minus base, linear-probe"]
    assert 0 < difference["interval"][0] < difference["mean"] < difference["interval"][1]
    assert (evaluated / "slides.md").read_text() in (evaluated / "heads/README.md").read_text()
    lines = (evaluated / "slides.md").read_text().splitlines()
    assert "|  | fold_0 | fold_1 | mean ± sd | 95 % interval |" in lines
    words = ("--label", "coin", "--heads", "linear-probe", "--folds", 3)  # three classes
    status, _, err = run(*words_of(cohort, tmp_path, *words))
    assert (status, err) == (0, [])
    low, high = scores_of(tmp_path, "slides-coin")[1]["AUC", "ours, linear-probe"]["interval"]
    assert low < 0.5 < high
    assert run(*words_of(cohort, tmp_path, *SURVIVAL, "--folds", 2, "--heads", "cox-0.07"))[0] == 0
    found = scores_of(tmp_path, "slides-days")[1]
    page = (tmp_path / "evaluation.html").read_text()
    assert page.index("<h2>Slides and patients: coin") < page.index("<h2>Slides and patients: days")
    assert "ours minus base, cox-0.07" in page
    by_chance = found["C-index", "ours, cox-0.07, labels permuted"]["mean"]
    assert found["C-index", "ours, cox-0.07"]["mean"] > 0.7 > by_chance


def test_a_stopped_run_goes_on_to_the_same_bytes(run, cohort, tmp_path, monkeypatch):
    trained, real = [], slide_heads.train_model
    monkeypatch.setattr(slide_heads, "train_model", lambda *of: trained.append(1) or real(*of))
    words = words_of(cohort, tmp_path, "--folds", 2, "--heads", "abmil", "--patient-level", "late")
    assert run(*words)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert (len(before), len(trained)) == (11, 6)  # 2 encoders and permuted labels, of 2 folds
    for path in (*tmp_path.glob("slides.*"), tmp_path / "heads/base/abmil-fold_1.safetensors"):
        path.unlink()
    assert run(*words)[0] == 0
    assert {path: path.read_bytes() for path in before} == before
    assert len(trained) == 7
    one_line(run(*words), 1, "slides.md exists already; give --overwrite or another -o")
    assert run(*words, "--overwrite")[0] == 0
    assert len(trained) == 7  # heads of the same request stay
    for path in tmp_path.glob("slides.*"):
        path.unlink()
    one_line(run(*words, "--seed", 8), 1, r"was made by another request \(.*\); type --overwrite")


@pytest.mark.parametrize("head", ["abmil", "mean-mil", "linear-probe"])
def test_a_trained_head_pools_slides(cohort, evaluated, head):
    path = evaluated / f"heads/ours/{head}-fold_0.safetensors"
    with safe_open(path, "numpy") as file:
        said = json.loads(file.metadata()["seal_extract"])
    patients = said["request"]["test"]
    patient = next(name for name in patients if name != f"p{PATIENTS - 1}")
    features = read_features(next(cohort[0].rglob(f"features_ours/s{patient[1:]}_0.h5")))
    pooled = pool_rows([features], open_pooling(path))
    assert pooled.probabilities == pytest.approx(said["predicted"][patients.index(patient)], abs=1e-5)
    if head != "abmil":
        assert pooled.attention == pytest.approx(1 / len(features.grid))


@pytest.mark.parametrize(
    ("head", "bag", "expected"),
    [
        ("abmil", 2048, [0.41799, 0.42969, 0.43548, 0.43645, 0.42667, 0.42752, 0.42589, 0.42588]),
        ("abmil", 16, [0.41549, 0.42729, 0.4359, 0.43861, 0.4311, 0.42521, 0.42905, 0.42019]),
        ("linear-probe", 16, [0.51472, 0.45594, 0.44138, 0.51665, 0.47923, 0.48073, 0.51748, 0.48139]),
        ("cox-0.07", 16, [0.0472, -0.3752, -0.3367, -0.3045, -0.5427, -0.202, -0.1576, -0.265]),
    ],
)
def test_heads_are_patho_benchs(cohort, tmp_path, monkeypatch, head, bag, expected):
    """By its own code at 660e770, with TRIDENT's ABMIL at a91fa84, on this cohort's features of the base.

    Its experiments were built by ExperimentFactory with the values of its configurations, seeded by
    ``torch.manual_seed(7)`` before, and run on the CPU. Risks are but for a constant.
    """
    monkeypatch.setattr(slide_heads, "EPOCHS", 20)
    monkeypatch.setattr(slide_heads, "BAG", bag)
    label, event = ("days", "event") if head.startswith("cox") else ("label", None)
    labels = read_labels(write_table(tmp_path / "labels.csv", cohort[1]), label, event=event)
    (fold,) = labels.folds
    names = [slide for sample in labels.samples for slide in sample.slides]
    features = dict(zip(names, find_slides([cohort[0]], names)["base"], strict=True))
    bags = [slide_heads.Bag((tuple(features[name] for name in sample.slides),)) for sample in labels.samples]
    train, test = ([bags[i] for i in side] for side in (fold.train, fold.test))
    found = slide_heads.train_head(
        head, train, labels.truth[fold.train], test, 7, torch.device("cpu")
    ).predicted
    found = found[:, 1] if found.ndim > 1 else found - found[0] + expected[0]
    assert found == pytest.approx(expected, abs=1e-3)


# --- labels, folds and what is refused ----------------------------------------------------------------


def test_folds_of_patho_bench_and_of_clam(run, cohort, tmp_path):
    by_name = {row["slide_id"]: "test" if row["fold_0"] == "test" else "train" for row in cohort[1]}
    folder = tmp_path / "splits"
    folder.mkdir()
    sides = {
        side: [n.removesuffix(".svs") for n, s in by_name.items() if s == side] for side in ("train", "test")
    }
    lines = [f"{i},{a},,{b}" for i, (a, b) in enumerate(zip_longest(*sides.values(), fillvalue=""))]
    (folder / "splits_0.csv").write_text("\n".join([",train,val,test", *lines]) + "\n")
    table = write_table(
        tmp_path / "plain.csv",
        [
            {"slide_id": r["slide_id"].removesuffix(".svs"), "label": r["label"], "case_id": r["case_id"]}
            for r in cohort[1]
        ],
    )
    clam = read_labels(table, "label", splits=folder).folds
    (fold,) = read_labels(write_table(tmp_path / "a.tsv", cohort[1]), "label").folds
    assert [f.test.tolist() for f in clam] == [fold.test.tolist()] == [list(range(8))]
    assert fold.train.tolist() == list(range(8, 16))
    split = [row | {"split": row.pop("fold_0")} for row in map(dict, cohort[1])]
    (named,) = read_labels(write_table(tmp_path / "split.csv", split), "label").folds
    assert (named.name, named.test.tolist()) == ("split", list(range(8)))
    numbered = [row | {"fold": int(row["split"] == "train")} for row in map(dict, split)]
    numbered = [{k: v for k, v in row.items() if k != "split"} for row in numbered]
    first, second = read_labels(write_table(tmp_path / "fold.csv", numbered), "label").folds
    assert first.test.tolist() == second.train.tolist() == list(range(8))
    spread = read_labels(table, "label", folds=4)
    kinds = np.array([sample.label for sample in spread.samples])
    counts = [[(kinds[f.test] == kind).sum() for kind in set(kinds)] for f in spread.folds]
    assert np.ptp(counts, axis=0).max() <= 1  # each class is spread evenly over the folds
    drawn = read_labels(table, "label", folds=4, by="slide")
    assert sorted(np.concatenate([f.test for f in drawn.folds])) == list(range(17))
    assert all(({15, 16} <= {*f.test}) == bool({15, 16} & {*f.test}) for f in drawn.folds)


def changed(**cells):
    """Rows of the table with cells replaced by what a function makes of (number of the row, cell)."""
    return lambda rows: [row | {c: f(i, row[c]) for c, f in cells.items()} for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, ("--label", "one"), r"all 16 samples are of one class, same; allowed: two kinds or more"),
        (None, ("--label", "grade"), r"no column 'grade'; it has slide_id, .*type --label COLUMN"),
        (None, ("--folds", 9), r"--folds is 9, but 8 patients are of class n; allowed: 2 to that number"),
        (None, ("--heads", "cox-0.01"), r"--heads has 'cox-0.01'; allowed: for classes abmil, mean-mil,"),
        (None, (*SURVIVAL, "--heads", "abmil"), r"allowed: for survival cox-0.01, cox-0.02, cox-0.07"),
        (None, ("--label", "days", "--event", "censored"), r"no column 'censored'; .*type --event COLUMN"),
        (changed(event=lambda i, v: "" if i == 3 else v), SURVIVAL, r"p3 has .* the event ''; allowed"),
        (changed(event=lambda i, v: 0), SURVIVAL, r"all 16 samples are without the event"),
        (changed(days=lambda i, v: -1 if i else v), SURVIVAL, r"p1 .* '-1' .*: a time of 0 or more"),
        (changed(case_id=lambda i, v: v if i else ""), (), r"a row lacks its slide_id or case_id"),
        (changed(case_id=lambda i, v: "p1" if i < 2 else v), (), r"patient p1 has 2 different labels"),
        (changed(slide_id=lambda i, v: "s1" if i < 2 else v), (), r"slide 's1' stands 2 times"),
        (changed(slide_id=lambda i, v: "s99_0" if i == 5 else v), (), r"no features by base of 1 slides"),
        (None, ("--labels", "gone.csv"), r"cannot read gone\.csv: No such file or directory; check the path"),
        (lambda rows: [], (), r"has no rows; give a table with the columns slide_id, case_id and a label"),
    ],
)  # fmt: skip
def test_what_is_refused_before_training(run, cohort, tmp_path, change, words, message):
    rows = [{k: v for k, v in row.items() if k != "fold_0"} for row in cohort[1]]
    table = tmp_path / "labels.csv"
    table.write_text("slide_id\n") if change and not change(rows) else write_table(
        table, (change or list)(rows)
    )
    result = run("evaluate", "slides", cohort[0], "--labels", table, "-o", tmp_path / "e", *words)
    one_line((result[0], result[1], result[2][-1:]), 2, message)
    assert not (tmp_path / "e").exists()


def test_a_column_of_labels_that_stands_twice_is_refused(run, cohort, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,case_id,label,label\ns0_0,p0,a,b\n")
    result = run("evaluate", "slides", cohort[0], "--labels", table, "-o", tmp_path / "e")
    one_line(result, 2, r"labels\.csv has 2 columns label; leave one of them")


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (
            lambda i: "test" if i == 16 else "train",
            r"patient p15 is in train and in test of fold_0",
        ),
        (lambda i: "train", r"fold_0 tests no sample"),
        (
            lambda i: "train" if i % 2 == 0 and i < 16 else "test",
            r"fold_0 trains on no sample of class p; allowed: some of each",
        ),
        (lambda i: "exam" if i == 2 else "train", r"p2 is 'exam' in fold_0; allowed: train, val, test"),
    ],
)
def test_folds_that_are_refused(cohort, tmp_path, fold, message):
    table = write_table(tmp_path / "a.csv", [row | {"fold_0": fold(i)} for i, row in enumerate(cohort[1])])
    with pytest.raises(UsageError, match=message):
        read_labels(table, "label")


def test_features_that_are_refused(run, tmp_path):
    rng, out = np.random.default_rng(0), tmp_path / "out"
    rows = [{"slide": f"s{i}", "label": "ab"[i % 2]} for i in range(6)]
    for row in rows:
        write_slide(out, row["slide"], rng.normal(size=(3 * (row["slide"] != "s4"), DIM)))
    table = write_table(tmp_path / "t.csv", rows)
    words = ("evaluate", "slides", out, "--labels", table, "-o", tmp_path / "e", "--folds", 2, "-q")
    one_line(run(*words), 2, r"s4\.h5 has no patches; leave s4 out of the labels")
    path = write_slide(out, "s4", rng.normal(size=(3, DIM)), weights="others")
    one_line(run(*words), 2, r"s4\.h5 are by different weights of ours; embed all slides in one way")
    write_slide(out, "s4", rng.normal(size=(3, DIM)), patch_px=512)
    one_line(run(*words), 2, r"s4\.h5 are by different sizes of patches of ours")
    write_slide(out / "again", "s3", rng.normal(size=(3, DIM)))
    one_line(run(*words), 2, r"s3\.h5 are of one slide and encoder; give the folder of one")
    path.write_bytes(path.read_bytes()[:2000])
    one_line(run(*words), 1, r"s4\.h5 cannot be read .*encode that slide again with --overwrite")
