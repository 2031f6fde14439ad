"""Slide-level embeddings: the mean, and the attention of CLAM and ABMIL models, as plain torch has it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from feature_fixtures import CONSUMER_OF, short_of
from mil_models import DIM, MODELS, model_of, rows_of, save, write_features
from safetensors.torch import save_file
from torch import nn

from seal_extract.errors import CheckpointError, OutputError, UsageError
from seal_extract.features.export import export
from seal_extract.features.layouts import LAYOUTS, layout_of_grid
from seal_extract.features.store import read_features, read_provenance
from seal_extract.pooling import open_pooling, pool_slide, read_slide_level

FEATURES = "features_untrained-demo"


# --- the same numbers as a plain forward pass ---------------------------------------------------------


@pytest.mark.parametrize("n", [1, 50, 9001])
@pytest.mark.parametrize("kind", MODELS)
def test_attention_equals_the_model_on_the_whole_bag(tmp_path, kind, n):
    model = model_of(kind)
    dim = MODELS[kind][1].get("dim", DIM)
    x = rows_of(n, dim) * 3
    pooling = open_pooling(save(model, tmp_path / "m.pt"))
    got = pool_slide(write_features(tmp_path, x), pooling, tmp_path / "s.h5")
    with torch.inference_mode():
        single, _ = model.pooled(torch.from_numpy(x))
        want, scores = model.double().pooled(torch.from_numpy(x).double())
    assert pooling.kind == kind.split()[0]
    assert got.features.dtype == got.scores.dtype == got.attention.dtype == np.float32
    assert got.features.shape == want.shape  # of CLAM_MB an embedding for each class
    np.testing.assert_allclose(got.features, want, rtol=1e-6, atol=1e-6)
    if n < 100:  # beyond, a sum in float32 is farther than that from the true one
        np.testing.assert_allclose(got.features, single, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.scores, scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.attention, scores.softmax(1), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(got.attention.sum(1, dtype=np.float64), 1, atol=1e-6)
    probabilities = model.probabilities(want)
    assert (got.probabilities is None) == (probabilities is None)
    if probabilities is not None:
        np.testing.assert_allclose(got.probabilities, probabilities.detach(), rtol=1e-5, atol=1e-7)


def test_scores_far_apart_neither_overflow_nor_vanish(tmp_path):
    model = model_of("CLAM_SB small")
    with torch.no_grad():
        model.attention_net[-1].attention_c.weight *= 4000
    x = rows_of(9001)
    x[-1] *= 30  # the highest comes last, after pieces that counted until then
    with torch.inference_mode():
        double, scores = model.double().pooled(torch.from_numpy(x).double())
    assert float(scores.max() - scores.min()) > 1000
    got = pool_slide(
        write_features(tmp_path, x), open_pooling(save(model.float(), tmp_path / "m.pt")), tmp_path / "s"
    )
    assert np.isfinite(got.features).all()
    np.testing.assert_allclose(got.features, double, rtol=1e-3, atol=1e-3)


def test_the_mean_is_the_mean_even_of_large_numbers(tmp_path):
    x = rows_of(30_000) + np.float32(1000)
    got = pool_slide(write_features(tmp_path, x), open_pooling("mean"), tmp_path / "s.h5")
    np.testing.assert_allclose(got.features, x.mean(0, dtype=np.float64), rtol=6e-8)
    assert got.attention is None
    assert got.scores is None


def test_safetensors_hold_the_same_model(tmp_path):
    model = model_of("CLAM_SB small")
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    features = write_features(tmp_path, rows_of(20))
    one = pool_slide(features, open_pooling(tmp_path / "m.safetensors"), tmp_path / "1.h5")
    other = pool_slide(features, open_pooling(save(model, tmp_path / "m.pt")), tmp_path / "2.h5")
    np.testing.assert_array_equal(one.features, other.features)


def test_a_model_trained_on_several_gpus_or_inside_another_is_recognised(tmp_path):
    model = model_of("CLAM_SB with dropout")
    plain = open_pooling(save(model, tmp_path / "m.pt"))
    for old, new in (("attention_net.", "attention_net.module."), ("", "model."), ("", "module.")):
        state = {
            new + key.removeprefix(old): value for key, value in model.state_dict().items() if old in key
        }
        torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
        assert open_pooling(tmp_path / "wrapped.pth").hidden_dim == plain.hidden_dim == 512


def test_float16_features_of_stamp_are_pooled(tmp_path):
    x = rows_of(30)
    got = pool_slide(write_features(tmp_path, x, layout="stamp"), open_pooling("mean"), tmp_path / "s.h5")
    np.testing.assert_allclose(got.features, x.astype(np.float16).mean(0, dtype=np.float64), rtol=1e-6)


# --- the file -----------------------------------------------------------------------------------------


def test_the_file_holds_one_row_with_coordinates_and_attention_beside(tmp_path):
    features = write_features(tmp_path, rows_of(30))
    pooling = open_pooling(save(model_of("CLAM_SB small"), tmp_path / "m.pt"))
    made = pool_slide(features, pooling, tmp_path / "s.h5")
    with h5py.File(made.path) as file, h5py.File(features.path) as patches:
        assert file["features"].shape == (1, 512)
        assert set(file["features"].attrs) == {"name", "savetodir", "rows"}
        np.testing.assert_array_equal(file["coords"], patches["coords"])
        assert {**file["coords"].attrs}.keys() == {**patches["coords"].attrs}.keys()
        assert file["attention"].shape == file["attention_scores"].shape == (1, 30)
    back = read_slide_level(made.path)
    np.testing.assert_array_equal(back.features, made.features)
    np.testing.assert_array_equal(back.grid.xy_l0, features.grid.xy_l0)
    said = back.provenance
    assert (said["pooling"]["kind"], len(said["pooling"]["sha256"])) == ("CLAM_SB", 64)
    assert said["patch_features"]["path"] == features.path.name
    assert repr(back) == "SlideLevel(s.h5: 512, CLAM_SB of 30 patches)"


def test_what_the_same_request_wrote_is_returned_and_other_requests_are_refused(tmp_path):
    features = write_features(tmp_path, rows_of(30))
    mean, path = open_pooling("mean"), tmp_path / "s.h5"
    first = pool_slide(features, mean, path)
    written = path.read_bytes()
    assert not first.finished_before
    assert pool_slide(features, mean, path).finished_before
    assert path.read_bytes() == written
    other = open_pooling(save(model_of("ABMIL"), tmp_path / "m.pt"))
    with pytest.raises(
        OutputError, match=r"another request \(pooling kind mean, now ABMIL\); move .*--overwrite"
    ):
        pool_slide(features, other, path)
    assert pool_slide(features, other, path, overwrite=True).features.shape == (500,)
    (tmp_path / "note.h5").write_text("mine")
    with pytest.raises(OutputError, match="not ours"):
        pool_slide(features, mean, tmp_path / "note.h5")


def test_patches_that_could_not_be_read_are_left_out(tmp_path):
    x = rows_of(30)
    x[[3, 29]] = 0
    features = write_features(tmp_path, x, unreadable=(3, 29))
    read = np.delete(x, [3, 29], 0)
    got = pool_slide(features, open_pooling("mean"), tmp_path / "mean.h5")
    np.testing.assert_allclose(got.features, read.mean(0, dtype=np.float64), atol=1e-7)
    model = model_of("CLAM_MB small")
    got = pool_slide(features, open_pooling(save(model, tmp_path / "m.pt")), tmp_path / "clam.h5")
    with torch.inference_mode():
        want, _ = model.pooled(torch.from_numpy(read))
    np.testing.assert_allclose(got.features, want, atol=1e-6)
    assert np.flatnonzero(np.isnan(got.scores[0])).tolist() == [3, 29]
    assert (got.attention[:, [3, 29]] == 0).all()


def test_a_file_with_fewer_rows_than_patches_is_refused(tmp_path):
    features = write_features(tmp_path, rows_of(30))
    with h5py.File(features.path, "r+") as file:
        attrs = dict(file["features"].attrs)
        del file["features"]
        file.create_dataset("features", data=rows_of(29)).attrs.update(attrs)
    for asked in ("mean", save(model_of("ABMIL"), tmp_path / "m.pt")):
        with pytest.raises(OutputError, match="29 rows for 30 patches; encode that slide again"):
            pool_slide(features, open_pooling(asked), tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()


def test_a_slide_without_patches_has_no_embedding(tmp_path):
    features = write_features(tmp_path, rows_of(0))
    with pytest.raises(UsageError, match=r"a.h5 has no patches, so that there is nothing to pool"):
        pool_slide(features, open_pooling("mean"), tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slide_level_files_are_not_mistaken_for_features(tmp_path, layout):
    features = write_features(tmp_path / "run", rows_of(30), layout=layout)
    place = layout_of_grid(layout, tmp_path / "run", features.grid)
    path = place.slide_level("a", "mean-tiny")
    pool_slide(features, open_pooling("mean"), path)
    assert path.parent.name == "slide_features_mean-tiny"
    assert read_provenance(path) is None
    with pytest.raises(OutputError, match="not a slide-level file"):
        read_slide_level(features.path)
    assert short_of(tmp_path / "run", CONSUMER_OF[layout]) == []
    if layout != "stamp":
        (done,) = export(tmp_path / "run", "flat" if layout != "flat" else "trident", tmp_path / "other")
        assert done.state == "written"


# --- checkpoints that are refused -----------------------------------------------------------------------


def refused(state, tmp_path, message):
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message):
        open_pooling(tmp_path / "m.pt")


WRAPPED = re.escape("slide_encoder.model."), re.escape("wsi_embedder.")


@pytest.mark.parametrize("kind", MODELS)
def test_one_key_too_few_too_many_or_of_another_shape_is_refused(tmp_path, kind):
    state = model_of(kind).state_dict()
    beside = ("class", "instance", "att_head", "text_to_vision", "organ_embedding", "rna_embedder")
    needed = [key for key in state if not key.startswith(beside)]
    for key in needed:
        left = {k: v for k, v in state.items() if k != key}
        name = re.escape(key).removeprefix(WRAPPED[0]).removeprefix(WRAPPED[1])
        refused(left, tmp_path, rf"1 missing \({name}\)")
        if state[key].shape[0] > 1:
            refused(state | {key: state[key][:-1]}, tmp_path, "of another shape")
    refused(state | {"extra.weight": torch.zeros(2)}, tmp_path, r"1 unexpected \(extra.weight\)")


def test_a_layer_that_is_missing_altogether_is_not_guessed_around(tmp_path):
    for kind, layer in (
        ("ABMIL of MIL-Lab", "patch_embed.0."),
        ("CLAM_SB small", "attention_net.0."),
        ("CLAM_SB small", "attention_net.2.attention_b."),
        ("ABMIL of TRIDENT", "slide_encoder.model.image_pooler.gating_layers.2."),
        ("ABMIL of TRIDENT", "slide_encoder.model.image_pooler.condensing_layer."),
    ):
        state = model_of(kind).state_dict()
        left = {k: v for k, v in state.items() if not k.startswith(layer)}
        assert len(left) == len(state) - 2
        refused(left, tmp_path, "2 missing")


def test_files_that_hold_another_model_are_refused(tmp_path):
    clam, abmil = model_of("CLAM_SB small").state_dict(), model_of("ABMIL gated").state_dict()
    renamed = {key.replace("attention_net.2.attention_b.0.weight", "rho.weight"): clam[key] for key in clam}
    nan = torch.full_like(clam["attention_net.0.weight"], torch.nan)
    both = r"1 missing \(attention_net.2.attention_b.0.weight\); 1 unexpected \(rho.weight\)"
    of_images = {"feature_extractor_part1.0.weight": torch.zeros(20, 1, 5, 5)}
    refused(renamed, tmp_path, both)
    refused(abmil | of_images, tmp_path, "1 unexpected")
    refused({"head.weight": torch.zeros(2)}, tmp_path, "not a known slide-level model .1 keys: head.weight")
    refused(abmil | {"classifier": nn.Linear(2, 2)}, tmp_path, "could run code, so nothing was loaded")
    refused(clam | {"attention_net.0.weight": nan}, tmp_path, "NaN or infinite")


def test_classifiers_may_be_absent(tmp_path):
    state = {k: v for k, v in model_of("CLAM_MB small").state_dict().items() if k.startswith("attention_net")}
    torch.save(state, tmp_path / "m.pt")
    assert open_pooling(tmp_path / "m.pt").kind == "CLAM_MB"


def test_features_of_another_width_are_refused_with_both_numbers(tmp_path):
    pooling = open_pooling(save(model_of("CLAM_SB of 512"), tmp_path / "m.pt"))
    with pytest.raises(UsageError, match="m takes features of 512 columns, those of tiny have 24"):
        pool_slide(write_features(tmp_path, rows_of(9)), pooling, tmp_path / "s.h5")


def test_scores_that_are_not_finite_are_refused(tmp_path):
    pooling = open_pooling(save(model_of("ABMIL"), tmp_path / "m.pt"))
    x = rows_of(9)
    x[4] = np.inf
    with pytest.raises(CheckpointError, match="scores that are not finite"):
        pool_slide(write_features(tmp_path, x), pooling, tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()


def test_what_is_neither_the_mean_nor_a_file_is_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"max is not a file; allowed: mean, feather.*tangle=FILE, or the checkpoint"
    ):
        open_pooling("max")
    with pytest.raises(UsageError, match="rename the file"):
        open_pooling(save(model_of("ABMIL"), tmp_path / "mean.pt"))


# --- the command line -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clam(tmp_path_factory):
    """A CLAM_MB of the width of the tests' encoder."""
    return save(model_of("CLAM_MB small", dim=192), tmp_path_factory.mktemp("clam") / "tumour.pt")


SQUARE = [[680, 530], [720, 530], [720, 570], [680, 570], [680, 530]]  # of glass
ROI = json.dumps({"type": "Polygon", "coordinates": [SQUARE]})


def files_of(out, name):
    (folder,) = out.glob(f"*/slide_features_{name}-untrained-demo")
    return sorted(folder.glob("*.h5"))


def test_every_slide_gets_a_file_for_each_pooling(run, drawn_slides, encoder_folder, clam, tmp_path):
    command = (*drawn_slides, "-o", tmp_path, "--encoder", encoder_folder, "--slide-level", f"mean,{clam}")
    status, out, err = run(*command)
    assert (status, err) == (0, [])
    told = [line for line in out if "slide level" in line]
    assert [line.split(" probabilities ")[0].split(" -> ")[0] for line in told] == [
        f"{i}.svs: slide level by {how}" for i in range(3) for how in ("mean, 192", "tumour, 3 x 512, class")
    ]
    for path in files_of(tmp_path, "tumour"):
        made, patches = (
            read_slide_level(path),
            read_features(tmp_path / path.parents[1].name / FEATURES / path.name),
        )
        model = model_of("CLAM_MB small", dim=192)
        with torch.inference_mode():
            want, _ = model.pooled(torch.from_numpy(patches.features))
        np.testing.assert_allclose(made.features, want, atol=1e-6)
        percents = " ".join(f"{p:.3g}" for p in made.probabilities)
        assert any(f"class probabilities {percents} -> {path}" in line for line in told)
    assert len(files_of(tmp_path, "tumour")) == len(files_of(tmp_path, "mean")) == 3


def test_a_finished_run_is_pooled_later_without_encoding_again(
    run, drawn_slides, encoder_folder, clam, tmp_path, monkeypatch
):
    command = (drawn_slides[0], "-o", tmp_path, "--encoder", encoder_folder)
    assert run(*command)[0] == 0
    monkeypatch.setattr("seal_extract.encoders.build.read_tensors", None)  # no encoder can be loaded
    status, out, _ = run(*command, "--slide-level", "mean", "--slide-level", clam)
    assert status == 0
    assert ["finished before" in line for line in out] == [True, False, False]
    before = [path.read_bytes() for path in files_of(tmp_path, "tumour")]
    status, out, _ = run(*command, "--slide-level", "mean", "--slide-level", clam)
    assert (status, [line.count("finished before") for line in out]) == (0, [1, 1, 1])
    assert [path.read_bytes() for path in files_of(tmp_path, "tumour")] == before


def test_a_slide_that_cannot_be_pooled_stops_no_other(run, drawn_slides, encoder_folder, tmp_path):
    command = (*drawn_slides, "-o", tmp_path, "--encoder", encoder_folder, "--slide-level", "mean")
    assert run(*command)[0] == 0
    files_of(tmp_path, "mean")[1].write_text("not a file of ours")
    files_of(tmp_path, "mean")[2].unlink()
    log = tmp_path / "log.jsonl"
    status, out, err = run(*command, "--log-json", log)
    assert status == 1
    assert "FAILED 1.svs: slide level by mean: " in err[0]
    assert "1 of 3 slide-level files failed" in err[-1]
    assert sum("slide level by mean, 192" in line for line in out) == 2
    assert len(files_of(tmp_path, "mean")) == 3
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("slide level failed") == 1
    assert events.count("slide level") == 2


def test_a_checkpoint_is_checked_before_any_slide_is_read(run, drawn_slides, encoder_folder, tmp_path):
    command = (drawn_slides[0], "-o", tmp_path / "out", "--encoder", encoder_folder, "--slide-level")
    narrow = save(model_of("CLAM_SB small"), tmp_path / "narrow.pt")
    other = tmp_path / "other.pt"
    torch.save({"head.weight": torch.zeros(2)}, other)
    wide, twin = tmp_path / "one/narrow.pt", tmp_path / "twin/narrow.pt"
    for path in (wide, twin):
        path.parent.mkdir()
        save(model_of("CLAM_SB small", dim=192), path)
    for asked, status, message in (
        (narrow, 2, "narrow takes features of 24 columns, those of untrained-demo have 192"),
        (other, 1, "not a known slide-level model"),
        ("max", 2, "max is not a file"),
        (f"mean,{twin},{twin.parent / 'copy.pt'}", 2, "is not a file"),
        (f"{wide},{twin}", 2, "files of one name (narrow, narrow)"),
    ):
        got, out, err = run(*command, asked)
        assert (got, out, len(err)) == (status, [], 1)
        assert message in err[0]
    assert not (tmp_path / "out").exists()


def test_a_slide_without_patches_is_passed_over_with_the_reason(run, drawn_slides, encoder_folder, tmp_path):
    (tmp_path / "roi.geojson").write_text(ROI)
    command = (drawn_slides[0], "-o", tmp_path, "--encoder", encoder_folder, "--slide-level", "mean")
    status, out, _ = run(*command, "--roi", tmp_path / "roi.geojson")
    assert status == 0
    assert out[1] == "0.svs: slide level by mean, no patches to pool"
    assert not list(tmp_path.glob("*/slide_features_*"))


def test_overwriting_features_makes_their_embedding_anew_or_deletes_it(
    run, drawn_slides, encoder_folder, tmp_path
):
    command = (drawn_slides[0], "-o", tmp_path, "--encoder", encoder_folder, "--slide-level", "mean")
    assert run(*command)[0] == 0
    (path,) = files_of(tmp_path, "mean")
    before = read_slide_level(path).features
    status, _, err = run(*command, "--resample", "area")
    assert (status, len(err)) == (1, 1)  # of the features; there is nothing new to pool
    np.testing.assert_array_equal(read_slide_level(path).features, before)
    assert run(*command, "--resample", "area", "--overwrite")[0] == 0
    assert (read_slide_level(path).features != before).any()
    (tmp_path / "roi.geojson").write_text(ROI)
    status, out, _ = run(*command, "--roi", tmp_path / "roi.geojson", "--overwrite")
    assert (status, out[1]) == (0, f"0.svs: slide level by mean, no patches to pool, deleted {path}")
    assert not path.exists()
    path.mkdir()  # which cannot be deleted as a file is
    status, _, err = run(*command, "--roi", tmp_path / "roi.geojson", "--overwrite")
    assert (status, len(err)) == (1, 2)
    assert f"FAILED 0.svs: slide level by mean: cannot write {path}: " in err[0]


def test_the_mean_needs_no_torch():
    code = "import sys, seal_extract.pooling as s; s.open_pooling('mean'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- large slides ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_200_000_patches_take_no_more_memory_than_20_000(tmp_path):
    path = save(model_of("CLAM_MB big with dropout", dim=1536), tmp_path / "m.pt")
    peaks = {}
    for n in (20_000, 200_000):
        rows = np.random.default_rng(0).standard_normal((n, 1536), np.float32)
        features = write_features(tmp_path / str(n), rows)
        del rows
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, path, features.path, tmp_path / f"{n}.h5"],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[n], seconds, read_s = map(float, done.stdout.split())
        print(
            f"{n} patches of 1536: {peaks[n]:.0f} MB above the imports, {seconds:.1f} s, "
            f"{read_s:.1f} s of them reading"
        )
    assert peaks[200_000] < peaks[20_000] + 60  # scores and attention are 12 bytes a patch and class
    made = read_slide_level(tmp_path / "200000.h5")
    with torch.inference_mode():
        model = model_of("CLAM_MB big with dropout", dim=1536)
        want, _ = model.pooled(torch.from_numpy(features.features))
    print(f"farthest from a plain forward in float32: {np.abs(made.features - want.numpy()).max():.1e}")
    np.testing.assert_allclose(made.features, want, atol=1e-5)


MEASURE = """
import re, sys, time
from pathlib import Path
from seal_extract.pooling import open_pooling, pool_slide
from seal_extract.features.store import read_features, read_pieces

def megabytes(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

pooling, features = open_pooling(sys.argv[1]), read_features(sys.argv[2])
start, before = time.perf_counter(), megabytes("VmRSS")
pool_slide(features, pooling, sys.argv[3])
seconds = time.perf_counter() - start
start = time.perf_counter()
for _ in read_pieces(features.path):
    pass
print(megabytes("VmHWM") - before, seconds, time.perf_counter() - start)
"""
