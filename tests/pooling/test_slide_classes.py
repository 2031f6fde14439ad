"""What a slide is said to be: class probabilities, CLAM's ``mil``, and the file as Patho-Bench reads it."""

import h5py
import numpy as np
import pytest
import torch
from mil_models import DIM, Mil, model_of, rows_of, save, write_features

from seal_extract.errors import CheckpointError
from seal_extract.features.verify import verify
from seal_extract.pooling import open_pooling, pool_slide, read_slide_level


@pytest.mark.parametrize("n", [1, 9001])
@pytest.mark.parametrize(("classes", "kind"), [(2, "MIL_fc"), (4, "MIL_fc_mc")])
def test_mil_of_clam_is_its_top_patch(tmp_path, classes, kind, n):
    torch.manual_seed(3)
    model, x = Mil(classes=classes).eval(), rows_of(n)
    pooling = open_pooling(save(model, tmp_path / "m.pt"))
    got = pool_slide(write_features(tmp_path, x), pooling, tmp_path / "s.h5")
    with torch.inference_mode():
        features, by, probabilities = model.pooled(torch.from_numpy(x))
    assert (pooling.dim, got.provenance["pooling"]["kind"]) == (DIM, kind)
    np.testing.assert_allclose(got.features, features, atol=1e-6)
    np.testing.assert_allclose(got.scores[0], by, atol=1e-6)
    np.testing.assert_allclose(got.probabilities, probabilities, atol=1e-6)
    assert np.flatnonzero(got.attention).tolist() == [int(by.argmax())]
    assert got.attention.sum() == 1
    with h5py.File(got.path) as file:
        assert "no attention" in file["attention"].attrs["description"]
        assert "one patch" in file["features"].attrs["description"]


def test_mil_never_selects_a_patch_that_could_not_be_read(tmp_path):
    torch.manual_seed(3)
    model, x = Mil().eval(), rows_of(30)
    with torch.inference_mode():
        top = int(model.pooled(torch.from_numpy(x))[1].argmax())
        want = model.pooled(torch.from_numpy(np.delete(x, top, 0)))[0]
    pooling = open_pooling(save(model, tmp_path / "m.pt"))
    got = pool_slide(write_features(tmp_path, x, unreadable=(top,)), pooling, tmp_path / "s.h5")
    np.testing.assert_allclose(got.features, want, atol=1e-6)
    assert got.attention[0, top] == 0
    assert np.isnan(got.scores[0, top])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classifier.weight", torch.zeros(3, 512), r"classifier.weight \[3, 512\], not \[2, 512\]"),
        ("classifiers.weight", torch.zeros(2, 512), r"classifiers.weight \[2, 512\], not \[3, 512\]"),
        ("fc.3.weight", torch.zeros(2), r"1 unexpected \(fc.3.weight\)"),
        ("classifier.bias", None, r"1 missing \(classifier.bias\)"),
    ],
)
def test_a_mil_that_clam_could_not_have_saved_is_refused(tmp_path, key, value, message):
    state = Mil(classes=3 if key.startswith("classifiers") else 2).state_dict() | {key: value}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message):
        open_pooling(tmp_path / "m.pt")


def test_a_classifier_that_does_not_fit_is_refused_and_one_of_another_form_is_passed_over(tmp_path):
    state = model_of("CLAM_SB small").state_dict()
    torch.save(state | {"classifiers.weight": torch.zeros(3, 500)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"classifiers.weight \[3, 500\], not \[3, 512\]"):
        open_pooling(tmp_path / "m.pt")
    torch.save(state | {"classifiers.weight": torch.tensor(1.0)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"classifiers.weight \[\], not \[3, 512\]"):
        open_pooling(tmp_path / "m.pt")
    state = model_of("ABMIL").state_dict()
    state |= {"classifier.2.weight": torch.zeros(2, 1), "classifier.2.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "m.pt")
    got = pool_slide(write_features(tmp_path, rows_of(9)), open_pooling(tmp_path / "m.pt"), tmp_path / "s")
    assert got.features.shape == (500,)
    assert got.probabilities is None


@pytest.mark.parametrize("kind", ["mean", "CLAM_MB small", "ABMIL of MIL-Lab"])
def test_patho_bench_reads_the_files_as_pooled_embeddings(tmp_path, kind):
    asked = kind if kind == "mean" else save(model_of(kind), tmp_path / "m.pt")
    folder = tmp_path / "run" / "slide_features_x"
    made = pool_slide(write_features(tmp_path, rows_of(9)), open_pooling(asked), folder / "a.h5")
    with h5py.File(made.path) as file:
        row = file["features"][:].squeeze(0)  # its loader's own step, which refuses more rows than one
    np.testing.assert_array_equal(row, made.features.ravel())
    assert row.ndim == 1
    assert verify(tmp_path / "run", "patho-bench") == verify(folder, "patho-bench") == ()
    (finding,) = verify(folder, "mil-lab")
    assert "embedding of a whole slide" in finding.problem


@pytest.mark.parametrize("kind", ["mean", "CLAM_MB small"])
def test_files_of_the_version_before_are_read_kept_and_named(tmp_path, kind):
    asked = kind if kind == "mean" else save(model_of(kind), tmp_path / "m.pt")
    features, path = write_features(tmp_path, rows_of(9)), tmp_path / "slide_features_x" / "a.h5"
    embedding = pool_slide(features, open_pooling(asked), path).features
    with h5py.File(path, "r+") as file:
        attrs = {k: v for k, v in file["features"].attrs.items() if k != "rows"}
        for name in {"features", "probabilities"} & file.keys():
            del file[name]
        file.create_dataset("features", data=embedding).attrs.update(attrs)
    kept = path.read_bytes()
    again = pool_slide(features, open_pooling(asked), path)
    assert again.finished_before
    assert again.is_older
    assert path.read_bytes() == kept
    np.testing.assert_array_equal(read_slide_level(path).features, embedding)
    assert again.probabilities is None
    (finding,) = verify(path.parent, "patho-bench")
    assert "expects float32 [1, D] of a whole slide" in finding.problem


def test_the_closing_line_tells_the_classes(run, drawn_slides, encoder_folder, tmp_path):
    torch.manual_seed(3)
    mil = save(Mil(dim=192), tmp_path / "top.pt")
    command = (drawn_slides[0], "-o", tmp_path / "out", "--encoder", encoder_folder, "--slide-level", mil)
    status, out, _ = run(*command)
    assert status == 0
    (path,) = tmp_path.glob("out/*/slide_features_top-*/0.h5")
    first, second = (f"{p:.3g}" for p in read_slide_level(path).probabilities)
    assert f"top, 512, class probabilities {first} {second} -> {path}" in out[-1]
    with h5py.File(path, "r+") as file:
        values = file["features"][0]
        del file["features"], file["probabilities"]
        file["features"] = values
    assert "finished before by an older version (without class probabilities" in run(*command)[1][-1]
