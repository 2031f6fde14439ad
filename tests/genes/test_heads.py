"""Projection heads: image and expression are compared behind those of both halves, features lie before."""

import csv
import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from cohort_fixtures import assert_refused, link_cohort
from cohort_fixtures import run_here as run

from seal_extract import load_encoder
from seal_extract.encoders.folder import write
from seal_extract.encoders.heads import new_head
from seal_extract.errors import CheckpointError
from seal_extract.features.store import list_features
from seal_extract.genes.omics import load_omics
from seal_extract.run.cohort import extract_cohort

RNG = np.random.default_rng


def with_heads(folder, image, expression):
    """The bundled encoder with heads of these kinds on its two halves."""
    encoder, omics = load_encoder("seal-tiny", device="cpu"), load_omics("seal-tiny")
    torch.manual_seed(3)
    omics.projection_head = new_head(expression, omics.dim)
    head = new_head(image, encoder.spec.dim)
    halves = encoder.decoder, encoder.genes, omics.state_dict()
    write(folder, replace(encoder.spec, name=folder.name), encoder.tower, [], *halves, head=head)
    return folder


@pytest.fixture(scope="module")
def place(drawn_slides, tmp_path_factory):
    """Finished runs by an encoder with both heads, and by one whose image half alone has one."""
    place = tmp_path_factory.mktemp("heads")
    link_cohort(place / "slides", drawn_slides, 2)
    for name, kinds in {"both": ("mlp", "linear"), "image": ("linear", "none")}.items():
        encoder = load_encoder(with_heads(place / name, *kinds), device="cpu")
        extract_cohort(place / "slides", encoder, place / f"out_{name}")
    genes = load_omics("seal-tiny").genes
    counts = RNG(0).poisson(3, len(genes))
    rows = "".join(f"{g},{c}\n" for g, c in zip(genes, counts, strict=True))
    (place / "profile.csv").write_text("gene,count\n" + rows)
    return place, counts


def test_both_halves_keep_their_heads_bit_by_bit(place):
    folder = place[0] / "both"
    encoder, omics = load_encoder(folder, device="cpu"), load_omics(folder)
    encoder.save_pretrained(folder.parent / "again")
    again = load_encoder(folder.parent / "again", device="cpu")
    rows = RNG(1).normal(size=(3, encoder.spec.dim)).astype(np.float32)
    assert torch.equal(again.project(rows), encoder.project(rows))
    expression = np.log1p(RNG(2).poisson(3, (2, omics.n_genes))).astype(np.float32)
    plain, projected = omics.encode(expression), omics.encode(expression, project=True)
    w, b = (omics.state_dict()[f"projection_head.{x}"] for x in ("weight", "bias"))
    torch.testing.assert_close(projected, plain @ w.T + b)
    assert torch.equal(plain, load_omics("seal-tiny").encode(expression))


def test_features_are_those_of_the_backbone(place):
    folder = place[0]
    (first, *_), bare = list_features(folder / "out_both")[0], load_encoder("seal-tiny", device="cpu")
    encoder = load_encoder(folder / "both", device="cpu")
    patches = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    assert torch.equal(encoder.encode(patches), bare.encode(patches))
    assert first.dim == bare.spec.dim
    assert first.provenance["encoder"]["projection_head"] is True


def test_a_profile_is_compared_behind_both_heads(place, tmp_path):
    folder, counts = place
    done = run("search", folder / "out_both", "--profile", folder / "profile.csv", "-k", 5, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    encoder, omics = load_encoder(folder / "both", device="cpu"), load_omics(folder / "both")
    row = np.log1p(counts[None] * (1e4 / counts.sum())).astype(np.float32)
    query = omics.encode(row, project=True)[0].double()
    scores = []
    for slide in list_features(folder / "out_both")[0]:
        with h5py.File(slide.path) as file:
            images = encoder.project(file["features"][()]).double()
        cosine = images @ query / (images.norm(dim=1) * query.norm())
        scores += [(float(c), slide.path.stem, i) for i, c in enumerate(cosine)]
    with (tmp_path / "found.csv").open(newline="") as file:
        found = [(float(r["score"]), r["slide"], int(r["row"])) for r in csv.DictReader(file)]
    expected = sorted(scores, reverse=True)[: len(found)]
    assert len(found) == min(5, len(scores))
    assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert {f[1:] for f in found} == {e[1:] for e in expected}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["out_image"], "the image half of image has a projection head and the expression half of image has"),
        (["out_both", "--omics", "image/omics.safetensors"], "the image half of both has a projection head"),
        (["out_image", "--omics", "both/omics.safetensors", "--encoder", "both"], "the encoder that made"),
        (["out_both", "--index", "build"], "--index build holds embeddings before the projection head"),
    ],
)
def test_what_cannot_be_compared(place, tmp_path, words, answer):
    folder, _ = place
    words = [w if w.startswith("--") or w == "build" else folder / w for w in words]
    assert_refused(answer, "search", *words, "--profile", folder / "profile.csv", "-o", tmp_path)


@pytest.mark.parametrize(
    "shapes", [{"0.weight": [3, 3]}, {"weight": "x"}, [1], {"7.weight": [32, 32], "7.bias": [32]}, 3]
)
def test_a_config_whose_head_is_none_is_refused(tmp_path, shapes):
    folder = with_heads(tmp_path / "x", "linear", "linear")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projection": shapes}))
    with pytest.raises(CheckpointError, match="does not describe an encoder"):
        load_encoder(folder, device="cpu")
