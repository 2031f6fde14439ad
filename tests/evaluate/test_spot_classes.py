"""Classes of spots: what a probe must find, what permuted labels must not, and who is left out."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import one_line
from encoder_fixtures import TINY_CONCH
from PIL import Image
from section_files import MARGIN_PX, hexagon, places, write_h5ad

from seal_extract.demo import untrained_encoder
from seal_extract.evaluate.spot_classes import cluster_ari, score_split

COLOURS = {"L1": (200, 120, 160), "L2": (120, 60, 140), "": (90, 90, 90)}
DONORS = {"A1": "anna", "A2": "anna", "B1": "bert"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three sections of two donors, whose spots lie on squares of the colour of their layer."""
    folder = tmp_path_factory.mktemp("layers")
    untrained_encoder(replace(TINY_CONCH, patch_px=64)).save_pretrained(folder / "encoder")
    xy = places(hexagon(), "hexagonal", 200.0).astype(int)
    for seed, (name, donor) in enumerate(DONORS.items()):
        rng = np.random.default_rng(seed)
        layers = rng.choice(["L1", "L2", ""], len(xy), p=[0.45, 0.45, 0.1])
        image = np.full((int(xy[:, 1].max() + MARGIN_PX), int(xy[:, 0].max() + MARGIN_PX), 3), 240)
        for (x, y), layer in zip(xy, layers, strict=True):
            image[y - 40 : y + 40, x - 40 : x + 40] = COLOURS[layer]
        image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        (folder / "st").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"st/{name}.png")
        obs = {"layer": [layer or None for layer in layers], "subject": donor, "one": "same"}
        obs["rare"] = ["L2" if name == "B1" and layer == "L2" else "L1" for layer in layers]
        write_h5ad(folder / f"st/{name}.h5ad", obs=obs)
    return folder


def words_of(place, out, *more):
    usual = ("evaluate", "spots", place / "st", "--encoder", place / "encoder", "-o", out, "-q")
    return (*usual, "--slide-mpp", 0.5, "--patch-px", 64, *more)


def test_the_probe_scores_by_hand():
    labels = np.array(["a"] * 8 + ["b"] * 8 + ["a", "a", "a", "b"])
    x = np.where(labels == "a", -1.0, 1.0)[:, None] + np.zeros((20, 2))
    x[17] = 1.0  # an a that looks like a b
    score = score_split(x, labels, ("held out", np.arange(16), np.arange(16, 20)))
    assert score.confusion.tolist() == [[2, 1], [0, 1]]
    assert score.balanced_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert score.weighted_f1 == pytest.approx((3 * 0.8 + 1 * 2 / 3) / 4)
    assert cluster_ari(x[[0, 1, 2, 8, 9]], labels[[0, 1, 2, 8, 9]]) == 1
    assert np.isnan(cluster_ari(x[:4], labels[:4]))


def test_the_command_finds_layers_by_donor_and_names_the_random_split(run, place, tmp_path):
    words = words_of(place, tmp_path, "--label", "layer", "--donor", "subject", "--base", place / "encoder")
    status, out, err = run(*words)
    assert (status, err) == (0, [])
    assert out[0] == "**Classes of spots, leave one donor out: balanced accuracy**"
    assert "|  | anna | bert | mean ± sd |" in out
    report = json.loads((tmp_path / "spot_classes.json").read_text())
    titles = [table["title"].removeprefix("Classes of spots") for table in report["tables"]]
    figures = ("balanced accuracy", "weighted F1")
    assert titles == [
        *(f", leave one donor out: {figure}" for figure in figures),
        *(f", random split over spots: {figure}" for figure in figures),
        ": ARI of clusters",
    ]
    by_donor, _, at_random, _, clusters = report["tables"]
    lines = [row["line"] for row in by_donor["rows"]]
    both = ["encoder", "encoder, before alignment"]
    assert lines == [*both, "handcrafted features", "encoder, labels permuted"]
    assert by_donor["rows"][2]["mean"] == at_random["rows"][2]["mean"] == 1
    assert by_donor["rows"][3]["mean"] < 0.8
    assert "both sides of a split" in at_random["note"]
    assert clusters["rows"][2]["folds"] == dict.fromkeys(DONORS, 1.0)
    assert set(report["classes"]) == {"L1", "L2"}  # spots without a class are left out
    found = np.array(report["confusion_true_by_predicted"]["leave one donor out"]["handcrafted features"])
    assert found.sum() == sum(report["classes"].values()) < 75


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"A1 has no classes of spots; type --label COLUMN"),
        (("--label", "nothing"), r"A1 has no obs\['nothing'\]; it has array_row, array_col, layer, subject"),
        (("--label", "one"), r"all spots are of one class, same; allowed: two classes or more"),
        (("--label", "layer", "--donor", "one"), r"all sections are of one donor, same; .*type --by section"),
        (("--label", "rare", "--donor", "subject"), r"without donor bert all spots are of one class, L1"),
        (("--label", "layer", "--by", "spot"), r"--by is 'spot'; allowed: donor, section"),
    ],
)
def test_what_is_refused(run, place, tmp_path, words, message):
    one_line(run(*words_of(place, tmp_path, *words)), 2, message)
    assert not list(tmp_path.iterdir())


def test_a_configuration_names_the_column_and_without_donors_sections_are_left_out(run, place, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        'name = "x"\nencoder = "x"\nout = "x"\n[data]\n[[data.sections]]\nkind = "anndata"\n'
        f'folder = "{place}/st"\nnames = ["A1", "B1"]\nmpp = 0.5\nlabel_column = "layer"\n'
    )
    usual = ("evaluate", "spots", config, "--encoder", place / "encoder", "-o", tmp_path / "out", "-q")
    one_line(run(*usual, "--label", "layer"), 2, r'type label_column = "..." in its \[\[data.sections\]\]')
    status, out, _ = run(*usual, "--patch-px", 64)
    assert status == 0
    assert out[0].startswith("**No file states donors, so that each section counts as one.")
    assert "|  | A1 | B1 | mean ± sd |" in out
