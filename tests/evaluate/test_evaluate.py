"""Evaluation: the ridge and Pearson's r against numbers worked out otherwise, and what chance must give."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import shared
from encoder_fixtures import TINY_CONCH
from section_files import write_study

from seal_extract.demo import untrained_encoder
from seal_extract.encoders.folder import write as write_folder
from seal_extract.encoders.heads import ExpressionDecoder
from seal_extract.encoders.spec import Decoder
from seal_extract.errors import UsageError
from seal_extract.evaluate.compare import Embeddings, compare, permuted_rows, retrieve, tables
from seal_extract.evaluate.expression import (
    FIXED,
    TUNED,
    Fold,
    Probe,
    fit_probe,
    leave_one_out,
    pearson,
    random_splits,
    score_fold,
)
from seal_extract.evaluate.handcrafted import FEATURES, handcrafted_features
from seal_extract.evaluate.run import sections_seen
from seal_extract.evaluate.table import Row, Table, to_csv
from seal_extract.train.formats import load_sections
from seal_extract.train.pairs import make_pairs
from seal_extract.train.seal import new_omics
from seal_extract.train.sections import choose_panel

RNG = np.random.default_rng


def linear_data(rows=240, features=6, genes=4, noise=0.5, seed=0):
    """Three sections of rows whose expression is linear in the embeddings, and noise."""
    rng = RNG(seed)
    x = rng.normal(size=(rows, features))
    y = x @ rng.normal(size=(features, genes)) + noise * rng.normal(size=(rows, genes)) + 3
    return x.astype(np.float32), y.astype(np.float32), np.repeat(["a", "b", "c"], rows // 3)


def in_folds(images, expression=None):
    """One encoder's embeddings for all folds."""
    return dict.fromkeys("abc", Embeddings(images, expression))


def folds_of(expression, sections):
    panel = tuple(f"g{i}" for i in range(expression.shape[1]))
    return [
        Fold(name, train, held_out, expression, panel, sections, sections)
        for name, train, held_out in leave_one_out(sections)
    ]


# --- Pearson's r ------------------------------------------------------------------------------


def test_pearson_is_the_textbooks():
    observed = np.array([[1.0, 2.0], [2.0, 1.0], [3.0, 4.0], [4.0, 3.0]])
    predicted = np.array([[10.0, 1.0], [20.0, 2.0], [30.0, 3.0], [40.0, 4.0]])
    assert pearson(predicted, observed) == pytest.approx([1.0, 0.6])
    assert pearson(-predicted, observed) == pytest.approx([-1.0, -0.6])
    by_numpy = [np.corrcoef(predicted[:, i], observed[:, i])[0, 1] for i in range(2)]
    assert pearson(predicted, observed) == pytest.approx(by_numpy)


def test_a_constant_gene_has_no_r_and_a_constant_prediction_has_none_to_gain():
    observed = np.array([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]])
    r = pearson(np.array([[1.0, 0.3], [2.0, 0.3], [3.0, 0.3]]), observed)
    assert np.isnan(r[0])
    assert r[1] == 0
    x, y, sections = linear_data()
    y[sections == "a", 0] = 1.5
    score = score_fold(x, folds_of(y, sections)[0])
    assert score.constant == 1
    assert score.mean == pytest.approx(np.nanmean(score.per_gene))


# --- the ridge --------------------------------------------------------------------------------


def alpha_of(fitted):
    return fitted[-1].alpha


def weights_of(fitted):
    """From standardised features to expression."""
    return fitted[1].components_.T @ fitted[-1].coef_.T


def test_the_ridge_of_one_feature_by_hand():
    fitted = fit_probe(np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]]))
    # standardised x is (-1, 1), centred y (-2, 2); alpha 100 / (1 x 1): 4 / (2 + 100)
    assert alpha_of(fitted) == 100
    assert fitted.predict([[0.0], [2.0]]).ravel() == pytest.approx([3 - 4 / 102, 3 + 4 / 102])


def test_the_ridge_solves_the_benchmarks_normal_equations():
    """The benchmark fits raw expression without an intercept, which changes no weight."""
    x, y, _ = linear_data()
    z = (x - x.mean(0, dtype=float)) / x.std(0, dtype=float)
    fitted = fit_probe(x, y)
    assert alpha_of(fitted) == pytest.approx(100 / (6 * 4))
    for targets, tolerance in ((y - y.mean(0, dtype=float), 1e-9), (y, 1e-5)):
        weights = np.linalg.solve(z.T @ z + 100 / 24 * np.eye(6), z.T @ targets)
        assert weights_of(fitted) == pytest.approx(weights, abs=tolerance)


def test_components_are_those_of_the_training_rows_and_as_many_as_asked_for():
    x, y, _ = linear_data()
    x[:, 0] += 50 * x[:, 1]  # scale must not matter: features are standardised first
    fitted = fit_probe(x, y, Probe("two", components=2))
    z = (x - x.mean(0, dtype=float)) / x.std(0, dtype=float)
    axes = np.linalg.eigh(z.T @ z)[1][:, ::-1][:, :2]
    t = z @ axes
    weights = axes @ np.linalg.solve(t.T @ t + 100 / 8 * np.eye(2), t.T @ (y - y.mean(0)))
    assert weights_of(fitted) == pytest.approx(weights, abs=1e-5)
    assert fit_probe(x[:4], y[:4])[1].n_components_ == 4


def test_a_constant_feature_does_no_harm():
    x, y, _ = linear_data()
    with_constant = np.hstack([x, np.full((len(x), 1), 0.1, np.float32)])
    probe = Probe("fixed", alphas=(1.0,))
    moved = with_constant + np.array([0] * 6 + [9])
    expected = fit_probe(x, y, probe).predict(x)
    assert fit_probe(with_constant, y, probe).predict(moved) == pytest.approx(expected, abs=1e-6)


def test_held_out_rows_do_not_touch_the_fit():
    x, y, sections = linear_data()
    fold = folds_of(y, sections)[0]
    before = score_fold(x, fold, TUNED)
    other = x.copy()
    other[fold.held_out[1:]] *= 100
    assert score_fold(other, fold, TUNED).predicted[0] == pytest.approx(before.predicted[0])


def test_alpha_is_chosen_large_for_noise_and_small_for_signal():
    x, y, sections = linear_data(noise=0.1)
    assert alpha_of(fit_probe(x, y, TUNED, sections)) <= 10
    noise = RNG(1).normal(size=(240, 200))
    weak = y + 20 * RNG(2).normal(size=y.shape)
    assert alpha_of(fit_probe(np.hstack([x, noise]), weak, TUNED, sections)) >= 100
    one_group = fit_probe(x, y, TUNED, np.repeat("a", 240))
    assert alpha_of(fit_probe(x, y, TUNED)) == alpha_of(one_group)


def test_linear_expression_is_predicted_and_permuted_rows_are_not():
    x, y, sections = linear_data(rows=600, features=40, genes=12)
    noise = RNG(3).normal(size=x.shape)
    found = compare({"linear": in_folds(x), "noise": in_folds(noise)}, folds_of(y, sections))
    assert found.mean("linear") > 0.9
    for probe in (FIXED, TUNED):
        assert found.permuted[probe.name].shape == (10, 3)
        assert abs(found.permuted[probe.name].mean()) < 0.1
        assert abs(found.mean("noise", probe)) < 0.1


def test_a_permutation_stays_within_the_training_rows_of_a_section():
    x = np.arange(12.0)[:, None]
    sections = np.repeat(["a", "b", "c"], 4)
    fold = folds_of(np.tile(x, 2), sections)[1]
    moved = permuted_rows(x, fold, seed=0)[:, 0]
    assert moved[4:8].tolist() == [4, 5, 6, 7]
    assert sorted(moved[:4]) == [0, 1, 2, 3]
    assert sorted(moved[8:]) == [8, 9, 10, 11]
    assert moved.tolist() != x[:, 0].tolist()


def test_folds_may_have_their_own_encoder_and_panel():
    x, y, sections = linear_data()
    folds = folds_of(y, sections)
    short = replace(folds[2], expression=y[:, :2], panel=("g0", "g1"))
    own = {fold: Embeddings(images) for fold, images in {"a": x, "b": x[:, :3], "c": x}.items()}
    found = compare({"own": own}, [folds[0], folds[1], short], probes=[FIXED], seeds=2)
    assert [len(score.per_gene) for score in found.scores["own", FIXED.name]] == [4, 4, 2]


def test_leave_one_out_holds_out_every_group_once():
    folds = list(leave_one_out(["p", "p", "q", "r"]))
    assert [(name, t.tolist(), h.tolist()) for name, t, h in folds] == [
        ("p", [2, 3], [0, 1]),
        ("q", [0, 1, 3], [2]),
        ("r", [0, 1, 2], [3]),
    ]


# --- retrieval --------------------------------------------------------------------------------


def test_equal_embeddings_are_found_first_and_ties_share_their_ranks():
    points = RNG(0).normal(size=(50, 8))
    found = retrieve(points * 7, points)  # length does not matter
    assert found.to_expression.recall == {1: 1.0, 5: 1.0, 10: 1.0}
    assert found.to_expression.median_rank == found.to_image.median_rank == 1
    assert found.chance.recall == {1: 0.02, 5: 0.1, 10: 0.2}
    # rows of the identity, shifted by one: the right partner shares ranks 2 to N with all others
    found = retrieve(np.eye(4), np.roll(np.eye(4), 1, axis=0), ks=(1, 2, 3))
    assert found.to_expression.recall == {1: 0, 2: 0, 3: 1}
    assert found.to_expression.median_rank == 3
    found = retrieve(np.ones((101, 4)), np.ones((101, 4)))
    assert found.to_expression.median_rank == found.chance.median_rank == 51
    assert found.to_expression.recall[10] == 0


def test_the_two_directions_by_hand():
    images = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    expression = np.array([[1.0, 0.0], [1.0, 0.1], [0.6, 0.8]])
    found = retrieve(images, expression, ks=(1, 2))
    # image 1 is nearest to expression 2; expression 1 to image 0, and expression 2 to image 1
    assert found.to_expression.recall == pytest.approx({1: 2 / 3, 2: 1})
    assert found.to_image.recall == pytest.approx({1: 1 / 3, 2: 1})


def test_random_embeddings_are_at_chance():
    found = retrieve(RNG(0).normal(size=(800, 16)), RNG(1).normal(size=(800, 16)))
    assert found.to_expression.recall[10] == pytest.approx(found.chance.recall[10], abs=0.012)
    assert found.to_image.median_rank == pytest.approx(found.chance.median_rank, rel=0.1)


# --- tables -----------------------------------------------------------------------------------


def test_the_table_has_every_contender_and_the_same_numbers_everywhere():
    x, y, sections = linear_data()
    contenders = {"enc": in_folds(x, x), "base": in_folds(x[:, :2]), "handcrafted": in_folds(x[:, :1])}
    made = tables(compare(contenders, folds_of(y, sections), seeds=3))
    first = made[0]
    assert [row.name for row in first.rows] == ["enc", "enc, rows permuted", "base", "handcrafted"]
    assert first.columns == ("a", "b", "c")
    assert first.rows[1].spread is not None
    joint = next(table for table in made if "space of the alignment" in table.title)
    both = ["enc, image to expression", "enc, expression to image"]
    assert [row.name for row in joint.rows] == [*both, "chance"]
    assert joint.rows[0].values == (1.0, 1.0, 1.0)

    numbers = {(t, line, fold): v for t, line, fold, v, _ in list(csv.reader(io.StringIO(to_csv(made))))[1:]}
    as_json = json.loads(json.dumps(first.to_json(), allow_nan=False))
    assert float(numbers[first.title, "base", "b"]) == as_json["rows"][2]["folds"]["b"]
    assert f"| base | {first.rows[2].values[0]:.3f} |" in first.to_markdown()


def test_independent_columns_have_intervals_and_paired_differences():
    rows = (Row("ours", (0.5, 0.6, 0.55, 0.7)), Row("base", (0.4, 0.55, 0.5, 0.5)))
    table = Table("r", ("a", "b", "c", "d"), rows, unit="section")
    (difference,) = (as_json := table.to_json())["differences"]
    assert difference["line"] == "ours minus base"
    assert difference["folds"] == pytest.approx({"a": 0.1, "b": 0.05, "c": 0.05, "d": 0.2})
    half = 3.182446 * np.std([0.1, 0.05, 0.05, 0.2], ddof=1) / 2  # Student's t for 3 degrees of freedom
    assert difference["interval"] == pytest.approx([0.1 - half, 0.1 + half])
    written = {(line, fold): v for _, line, fold, v, _ in csv.reader(io.StringIO(to_csv([table])))}
    assert float(written["ours minus base", "95 % interval, high"]) == difference["interval"][1]
    assert float(written["base", "95 % interval, low"]) == as_json["rows"][1]["interval"][0]

    assert "|  | a | b | c | d | mean ± sd | 95 % interval |" in table.to_markdown()
    line = "| ours minus base | 0.100 | 0.050 | 0.050 | 0.200 | 0.100 ± 0.071 | -0.013 to 0.213 |"
    assert line in table.to_markdown()

    bootstrapped = replace(table, rows=(replace(rows[0], interval=(0.1, 0.9)), rows[1]))
    assert bootstrapped.interval(bootstrapped.rows[0]) == (0.1, 0.9)
    dependent = replace(table, unit="").to_json()
    assert (dependent["differences"], dependent["rows"][0]["interval"]) == ([], None)
    assert (
        Table("r", ("a", "b"), (Row("ours", (0.1, 0.2)),), unit="section").to_json()["rows"][0]["interval"]
        is None
    )


def test_a_row_prints_mean_and_sample_sd():
    row = Row("x", (0.1, 0.2, 0.3))
    assert row.cells() == ["x", "0.100", "0.200", "0.300", "0.200 ± 0.100"]
    assert Row("x", (0.1,), (0.05,)).cells() == ["x", "0.100 ± 0.050", "0.100"]
    assert Table("t", ("c",), (Row("x", (float("nan"),)),)).to_json()["rows"][0]["mean"] is None
    assert Row("x", (float("nan"), 0.2)).cells()[1] == "-"


# --- handcrafted features -----------------------------------------------------------------------


def test_features_are_named_finite_and_the_same_alone_or_together():
    patches = RNG(0).integers(0, 256, (5, 3, 48, 48), dtype=np.uint8)
    patches[1], patches[2], patches[3] = 0, 255, 128
    features = handcrafted_features(patches)
    assert features.shape == (5, len(FEATURES))
    assert features.dtype == np.float32
    assert len(set(FEATURES)) == len(FEATURES)
    assert np.isfinite(features).all()
    assert handcrafted_features(patches[4:]) == pytest.approx(features[4:])
    assert handcrafted_features(patches[:0]).shape == (0, len(FEATURES))


def test_colours_are_told_apart():
    def of(rgb, name):
        patch = np.broadcast_to(np.array(rgb, np.uint8)[None, :, None, None], (1, 3, 64, 64))
        return handcrafted_features(patch)[0, FEATURES.index(name)]

    assert of((200, 100, 50), "red mean") == 200
    assert of((255, 255, 255), "glass share") == 1
    nucleus = np.array([0.650, 0.704, 0.286])
    assert of(256 * 10**-nucleus - 1, "haematoxylin mean") == pytest.approx(1, abs=0.02)
    assert of(256 * 10**-nucleus - 1, "eosin mean") == pytest.approx(0, abs=0.02)
    assert of(256 * 10**-nucleus - 1, "nuclear share") == 1


def test_coarse_texture_is_felt_at_coarse_scales():
    fine = np.indices((64, 64)).sum(0) % 2 * 255
    coarse = np.indices((64, 64)).sum(0) // 16 % 2 * 255
    patches = np.stack([np.stack([p] * 3) for p in (fine, coarse)]).astype(np.uint8)
    at = handcrafted_features(patches)[:, FEATURES.index("haematoxylin gradient at 8 px")]
    assert at[1] > at[0] + 1


@pytest.mark.parametrize(
    "patches",
    [np.zeros((1, 3, 64, 64)), np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 3, 16, 16), np.uint8)],
)
def test_what_is_no_patch_is_refused(patches):
    with pytest.raises(UsageError, match=r"allowed: uint8 \[N, 3, S, S\], S 32 or more"):
        handcrafted_features(patches)


# --- bad input --------------------------------------------------------------------------------


def test_bad_input_is_one_line():
    x, y, sections = linear_data()
    fold = folds_of(y, sections)[0]
    holed = x.copy()
    holed[7, 2] = np.nan
    for message, call in [
        (r"embeddings hold NaN or infinity in 1 of 240 rows, first in row 7", lambda: fit_probe(holed, y)),
        (r"embeddings are \[239, 6\], expression is \[240, 4\]", lambda: fit_probe(x[1:], y)),
        (r"embeddings are 239, fold a has 240 rows", lambda: score_fold(x[1:], fold)),
        (r"all 3 rows are of one group, \['p'\]", lambda: list(leave_one_out(["p"] * 3))),
        (r"predicted is \[2, 1\], observed \[3, 1\]", lambda: pearson(np.ones((2, 1)), np.ones((3, 1)))),
        (r"images are \[2, 3\], expression is \[2, 4\]", lambda: retrieve(np.ones((2, 3)), np.ones((2, 4)))),
        (r"1 of them in both", lambda: replace(fold, train=np.arange(3), held_out=np.arange(2, 9))),
        (r"the panel has 3 genes", lambda: replace(fold, panel=fold.panel[1:])),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# --- real pairs -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*left out", "ignore:.*are enlarged")
def test_handcrafted_features_reach_the_yardstick_on_her2st_and_permuted_rows_do_not():
    """The shared data's own yardstick: 0.261 on C2, 0.02 permuted."""
    names = ["C2", "C3", "C4", "C5"]
    source = {"kind": "st-tables", "folder": str(shared("data", "her2st")), "names": names}
    sections = load_sections([source])
    panel = choose_panel(sections[1:], 250)
    pairs = make_pairs(sections, panel)
    of = np.array(names)[pairs.section]
    name, train, held_out = next(leave_one_out(of))
    fold = Fold(name, train, held_out, pairs.expression, panel, of, of)
    found = compare({"handcrafted": {name: Embeddings(handcrafted_features(pairs.patches))}}, [fold])
    assert found.mean("handcrafted", FIXED) > 0.24
    assert found.mean("handcrafted", TUNED) > 0.26
    assert abs(found.permuted[FIXED.name].mean()) < 0.04
    (retrieval,) = found.predicted_retrieval["handcrafted"][0]
    assert retrieval.to_expression.recall[10] > 2.5 * retrieval.chance.recall[10]


# --- the command ------------------------------------------------------------------------------


def write_encoder(folder, encoder, genes=("g3", "g1", "g2"), head=None, omics_head=None):
    """An encoder's folder with a decoder and an expression encoder of random weights."""
    dim = encoder.spec.dim
    decoder = ExpressionDecoder(dim, Decoder(6, 3)).to_empty(device="cpu")
    omics = new_omics(dim, 3, (8, 6))
    generator = torch.Generator().manual_seed(0)
    for parameter in (*omics.parameters(), *decoder.parameters()):
        torch.nn.init.normal_(parameter, generator=generator)
    omics.projection_head = omics_head
    training = {"sections": ["elsewhere"], "config": {"data": {"smooth": True}}}
    halves = (decoder, genes, omics.state_dict())
    write_folder(folder, encoder.spec, encoder.tower, [], *halves, training, head=head)


@pytest.fixture(scope="module")
def tiny():
    return untrained_encoder(TINY_CONCH)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny):
    """Three sections of 36 spots, 200 µm apart at 2 µm/px; the first gene is dark where it is high."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.save_pretrained(folder / "base")
    write_encoder(folder / "encoder", tiny)

    def counts(rng, colour):
        return 255 - colour[0], rng.integers(90), 200

    write_study(folder / "st", ("A1", "A2", "B1"), 100, ("g1", "g2", "g3"), counts)
    return folder


SMALL = ("--genes", 2, "--mpp", 2, "--patch-px", 64, "--seeds", 2, "--quiet")


def test_the_command_prints_the_tables_and_writes_them_and_a_page(run, place, tmp_path):
    words = ("--encoder", place / "encoder", "--base", place / "base", "--sections", place / "st")
    words = (*words, "-o", tmp_path, *SMALL)
    status, out, err = run("evaluate", *words, "--by", "patient")
    assert (status, err) == (0, [])
    assert "|  | A | B | mean ± sd |" in out
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["sections"]["A2"] == {"patient": "A", "spots": 36}
    lines = [row["line"] for row in report["tables"][0]["rows"]]
    assert lines == ["encoder", "encoder, rows permuted", "base, before alignment", "handcrafted features"]
    (joint,) = (t for t in report["tables"] if t["title"] == "Recall at 10, in the space of the alignment")
    both = ["encoder, image to expression", "encoder, expression to image", "chance"]
    assert [row["line"] for row in joint["rows"]] == both
    assert report["tables"][0]["rows"][2]["folds"]["A"] != 0  # its embeddings are not all alike
    assert report["pearson_r_per_gene"]["handcrafted features, held-out ridge, fixed alpha"]["B"]["g1"] > 0.8
    assert (tmp_path / "evaluation.md").read_text().strip() in "\n".join(out)
    assert (tmp_path / "evaluation.csv").read_text().startswith("table,line,fold,value,spread\n")
    assert (
        "<code>seal-extract evaluate --encoder encoder --base base"
        in (tmp_path / "evaluation.html").read_text()
    )
    assert out[-1] == f"-> {tmp_path / 'evaluation.html'}"

    status, _, err = run("evaluate", *words)
    assert status == 1
    assert "evaluation.md exists already; give --overwrite or another -o" in err[0]


def times(factor):
    """A head that multiplies by a number."""
    head = torch.nn.Linear(TINY_CONCH.dim, TINY_CONCH.dim)
    torch.nn.init.zeros_(head.bias)
    torch.nn.init.eye_(head.weight)
    head.weight.data *= factor
    return head


def test_retrieval_goes_through_the_heads_of_both_halves(run, place, tmp_path, tiny):
    def joint(encoder, out):
        words = ("--encoder", encoder, "--sections", place / "st", "-o", tmp_path / out)
        status, _, err = run("evaluate", *words, *SMALL)
        if status:
            return err[0]
        report = json.loads((tmp_path / out / "evaluation.json").read_text())
        return [t["rows"] for t in report["tables"] if "in the space of the alignment" in t["title"]]

    def values(tables):
        return [[row["folds"] for row in rows] for rows in tables]

    without = values(joint(place / "encoder", "without"))
    for name, head, omics_head in (("same", -2, -3), ("against", -1, 1)):
        write_encoder(tmp_path / name, tiny, head=times(head), omics_head=times(omics_head))
        assert (values(joint(tmp_path / name, f"out_{name}")) == without) == (name == "same")
    write_encoder(tmp_path / "one", tiny, head=times(1))
    assert "half of tiny-conch has a projection head and" in joint(tmp_path / "one", "out_one")


def test_an_encoder_for_each_fold_and_one_that_saw_what_is_held_out(run, place, tmp_path):
    for name, seen in (("A1", ["A2", "B1"]), ("A2", ["A1", "B1"]), ("B1", ["A1", "B1"])):
        (tmp_path / "loo" / name).mkdir(parents=True)
        for file in (place / "encoder").iterdir():
            (tmp_path / "loo" / name / file.name).write_bytes(file.read_bytes())
        config = tmp_path / "loo" / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"training": {"sections": seen}}))
    words = ("--encoder", tmp_path / "loo/{fold}", "--sections", place / "st", "-o", tmp_path / "out", *SMALL)
    status, out, _ = run("evaluate", *words)
    assert status == 0
    assert any(line.startswith("| loo, one per fold |") for line in out)
    (warning,) = json.loads((tmp_path / "out/evaluation.json").read_text())["warnings"]
    assert "loo/B1 saw B1 in training, held out in fold B1" in warning
    assert f"**{warning}**" in out


def test_a_random_split_over_spots_is_called_one(run, place, tmp_path):
    words = ("--encoder", place / "base", "--sections", place / "st", "-o", tmp_path, *SMALL)
    status, out, _ = run("evaluate", *words, "--by", "random-spots")
    assert status == 0
    assert out[0].startswith("**Random splits over spots, as in SEAL's in-domain probe: neighbouring spots")
    assert out[4].startswith("|  | random spots 1 | random spots 2 | random spots 3 |")
    name, train, held_out = next(random_splits(["one"], 10))
    assert (name, len(train), sorted([*train, *held_out])) == ("one", 8, list(range(10)))


def test_the_bundled_encoder_saw_its_sections():
    assert sections_seen("seal-tiny") == {"C2", "C3", "C4", "C5"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--by", "slide"), "--by is 'slide'; allowed: section, patient, random-spots"),
        (("--genes", 0), "--genes is 0; allowed: 1 or more"),
        (("--genes", 9), "9 are asked for"),
        (("--sections", "nowhere"), "nowhere holds no section; allowed: the configuration of a training"),
        (("--encoder", "no-such"), "there is no encoder 'no-such'"),
    ],
)
def test_what_the_command_refuses(run, place, tmp_path, words, message):
    usual = ("--encoder", place / "encoder", "--sections", place / "st", "-o", tmp_path, *SMALL)
    status, _, err = run("evaluate", *usual, *words)
    assert status == 2
    assert len(err) == 1
    assert message in err[0]
    assert not list(tmp_path.iterdir())
