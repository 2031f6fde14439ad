"""``--tokens``: the tokens of each patch in a file beside the features, which stay as they are."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from conftest import one_line
from feature_fixtures import files_in
from synthetic_slide import write_synthetic_slide
from test_embed import StubCuda, noise

from seal_extract import ExtractOptions, extract, read_features
from seal_extract.demo import untrained_encoder
from seal_extract.encoders.dense import unpack
from seal_extract.encoders.tower import timm_spec
from seal_extract.errors import EncoderError, OutputError, UsageError
from seal_extract.features.store import list_features
from seal_extract.features.verify import verify
from seal_extract.run.embed import GpuEmbedder
from seal_extract.run.extract import extract_many

FOLDER = "20x_224px_0px_overlap"
WITH = ExtractOptions(tokens=True)


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    return write_synthetic_slide(tmp_path_factory.mktemp("svs") / "small.svs", (4000, 3000), mpp=0.25)


@pytest.fixture(scope="module")
def made(svs, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return extract(svs, encoder, out, options=WITH), out


def tokens_in(out, encoder, slide="small"):
    return out / FOLDER / f"tokens_{encoder.spec.name}" / f"{slide}.h5"


def read_tokens(path):
    with h5py.File(path) as file:
        return file["tokens"][()], file["coords"][()]


def test_tokens_lie_beside_features_that_are_the_same_as_without(made, svs, encoder, tmp_path):
    result, out = made
    plain = extract(svs, encoder, tmp_path)
    np.testing.assert_array_equal(result.features, plain.features)
    assert result.provenance["request"] == plain.provenance["request"]
    path = tokens_in(out, encoder)
    assert set(files_in(out)) - set(files_in(tmp_path)) == {str(path.relative_to(out))}
    tokens, coords = read_tokens(path)
    assert tokens.dtype == np.float16
    assert tokens.shape == (len(result.grid), *encoder.token_grid(224))
    np.testing.assert_array_equal(coords, result.grid.xy_l0)
    assert [features.path for features in list_features(out)[0]] == [result.path]  # tokens are no features
    assert verify(out, "trident") == verify(tmp_path, "trident") == ()


def test_they_are_those_of_encode_tokens(made, svs, encoder):
    _, out = made
    import openslide
    from PIL import Image

    tokens, coords = read_tokens(tokens_in(out, encoder))
    with openslide.OpenSlide(svs) as slide:
        regions = [slide.read_region(xy, 0, (448, 448)).convert("RGB") for xy in coords[:4].tolist()]
    images = [np.asarray(region.resize((224, 224), Image.Resampling.BICUBIC)) for region in regions]
    want = encoder.encode_tokens(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(tokens[:4], want, atol=0.05)
    assert np.abs(tokens[:4] - want).mean() < 2e-3


def test_a_chunk_holds_whole_patches_and_has_a_checksum(made, encoder):
    with h5py.File(tokens_in(made[1], encoder)) as file:
        assert file["tokens"].chunks == (3, *encoder.token_grid(224))  # 75 kB each
        assert file["tokens"].fletcher32


# --- resuming -----------------------------------------------------------------------------------------------


def test_what_is_finished_is_finished_and_tokens_alone_are_added(made, svs, encoder, tmp_path):
    first = extract(svs, encoder, tmp_path)
    before = first.path.read_bytes()
    again = extract(svs, encoder, tmp_path, options=WITH)  # features are there, tokens are not
    assert again.path == first.path
    assert first.path.read_bytes() == before
    path = tokens_in(tmp_path, encoder)
    np.testing.assert_array_equal(read_tokens(path)[0], read_tokens(tokens_in(made[1], encoder))[0])
    state = os.stat(path).st_mtime_ns
    for options in (WITH, ExtractOptions()):
        (result,) = extract_many([svs], encoder, tmp_path, options=options)
        assert result.finished_before
    path.unlink()
    (result,) = extract_many([svs], encoder, tmp_path, options=WITH)
    assert not result.finished_before
    assert os.stat(path).st_mtime_ns > state


def test_tokens_of_another_request_are_refused_until_overwrite(svs, encoder, tmp_path):
    extract(svs, encoder, tmp_path, options=replace(WITH, min_tissue=0.9))
    features = tmp_path / FOLDER / f"features_{encoder.spec.name}" / "small.h5"
    features.unlink()
    (tmp_path / FOLDER / "patches" / "small_patches.h5").unlink()
    with pytest.raises(OutputError, match=r"tokens_.*exists, made with another request; type --overwrite"):
        extract(svs, encoder, tmp_path, options=WITH)
    assert not features.exists()
    result = extract(svs, encoder, tmp_path, options=replace(WITH, overwrite=True))
    assert len(read_tokens(tokens_in(tmp_path, encoder))[0]) == len(result.grid)


RUN = """
import sys
from seal_extract import ExtractOptions, load_encoder
from seal_extract.run.extract import extract_many
folder, out, *slides = sys.argv[1:]
list(extract_many(slides, load_encoder(folder, device="cpu"), out, options=ExtractOptions(tokens=True)))
"""


def half_written(out):
    return list(out.rglob("tokens_*/.seal-extract.*.part"))


@pytest.mark.slow
def test_a_killed_run_goes_on(svs, encoder_folder, encoder, tmp_path):
    slides = [svs, write_synthetic_slide(tmp_path / "large.svs", (6000, 4500), mpp=0.25)]
    out, one = tmp_path / "out", tokens_in(tmp_path / "out", encoder)
    running = subprocess.Popen([sys.executable, "-c", RUN, encoder_folder, out, *slides])
    ended = time.monotonic() + 120
    while not (one.exists() and half_written(out)) and time.monotonic() < ended and running.poll() is None:
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert one.exists()
    assert len(half_written(out)) == 1
    before = one.read_bytes()
    results = list(extract_many(slides, encoder, out, options=WITH))
    assert [result.error for result in results] == [None, None]
    assert [result.finished_before for result in sorted(results, key=lambda r: r.name)] == [False, True]
    assert one.read_bytes() == before
    assert not half_written(out)
    large = read_features(out / FOLDER / f"features_{encoder.spec.name}" / "large.h5")
    assert len(read_tokens(tokens_in(out, encoder, "large"))[0]) == len(large.grid) > 50


# --- on a GPU, and layouts ----------------------------------------------------------------------------------


def test_a_recorded_pass_gives_both_in_batches_of_one_shape(encoder):
    patches, cuda = noise(21, 224), StubCuda()
    embedder = GpuEmbedder(encoder, 8, cuda, tokens=True)
    rows = np.concatenate([embedder.submit(part)() for part in torch.split(patches, [8, 8, 5])])
    features, tokens = unpack(rows, encoder.spec.dim, encoder.token_grid(224))
    np.testing.assert_allclose(features, encoder.encode(patches), atol=1e-5)
    np.testing.assert_allclose(tokens, encoder.encode_tokens(patches), atol=4e-3, rtol=1e-3)
    assert cuda.replays == 3


@pytest.mark.parametrize(("layout", "consumer"), [("clam", "clam"), ("stamp", "stamp"), ("flat", "mil-lab")])
def test_other_layouts(layout, consumer, svs, encoder, tmp_path):
    result = extract(svs, encoder, tmp_path, options=replace(WITH, layout=layout))
    path = tmp_path / f"tokens_{encoder.spec.name}" / "small.h5"
    assert len(read_tokens(path)[0]) == len(result.grid)
    before = verify(tmp_path, consumer)
    assert [p for p in before if not p.is_warning] == []
    with h5py.File(path, "r+") as file:
        file["tokens"][1, 0, 0, 0] = np.nan
    (problem,) = set(verify(tmp_path, consumer)) - set(before)
    assert str(problem).startswith(f"{path}: 1 of {len(result.grid)} rows hold NaN or infinity; encode the ")


# --- what is told and refused -------------------------------------------------------------------------------


def test_the_size_is_told_before(run, svs):
    status, (head, line), _ = run(svs, "--dry-run", "--tokens", "--encoder", "uni,conch")
    assert (status, head.split()[-2:]) == (0, ["patches", "tokens"])
    patches = int(re.search(r"mm² +(\d+)", line)[1])
    size = patches * 14 * 14 * (1024 + 768) * 2
    assert line.endswith(f"{size / 1e9:.3g} GB")
    assert "tokens" not in run(svs, "--dry-run")[1][0]


def test_an_encoder_without_a_grid_is_refused_before_any_slide(svs, tmp_path):
    encoder = untrained_encoder()
    encoder.tower = torch.nn.Linear(1, 1)
    with pytest.raises(UsageError, match="has no grid of tokens; allowed: vision transformers, Swin, CNNs"):
        extract(svs, encoder, tmp_path, options=WITH)
    assert files_in(tmp_path) == []


def test_a_token_beyond_float16_fails_the_slide(svs, tmp_path):
    encoder = untrained_encoder(replace(timm_spec("timm:resnet18"), name="large"))
    forward = encoder.tower.forward_features
    encoder.tower.forward_features = lambda images: forward(images) + 1e6
    with pytest.raises(EncoderError, match="in float32 gave NaN or infinity as a token in float16 for the"):
        extract(svs, encoder, tmp_path, options=WITH)
    assert not list(tmp_path.rglob("*large/*"))


def test_ready_cut_patches_have_none(run, tmp_path):
    (tmp_path / "a").mkdir()
    one_line(run(tmp_path / "a", "--patches", "--tokens"), 2, "--tokens does not apply to patches that are")
