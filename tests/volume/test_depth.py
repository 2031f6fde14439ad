"""Patches through depth: one plane is the 2D path bit for bit; more planes see what one does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_volume import GENES, PANEL, SIDE, section, write_encoder, write_volume
from train_fixtures import tiny_encoder

from seal_extract.errors import SealExtractError
from seal_extract.train.config import LoopOptions, LoraOptions, OmicsOptions, SealOptions
from seal_extract.train.loop import train
from seal_extract.train.pairs import Batches, make_pairs
from seal_extract.train.seal import OmicsModel, SealModel, new_omics
from seal_extract.volume.config import DepthOptions, VolumeConfig, VolumeData, read_volume_config
from seal_extract.volume.model import DepthAggregator, VolumeModel, load_volume_encoder
from seal_extract.volume.patches import depth_pairs, flat_pairs
from seal_extract.volume.train import train_volume
from seal_extract.volume.volume import open_volume


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    path, expression = write_volume(folder / "volume")
    return path, expression, write_encoder(folder / "encoder")


def config(world, out, **over):
    path, _, encoder = world
    values = {
        "name": "deep",
        "encoder": str(encoder),
        "out": str(out),
        "voi": VolumeData(str(path), sections=()),
        "genes": GENES,
        "smooth": False,
        "patch_px": SIDE,
        "batch_size": 12,
        "epochs": (0, 0, 6),
        "omics": OmicsOptions(hidden=(32, 16), epochs=1),
        "loop": LoopOptions(lr=4e-3, weight_decay=0.01),
    }
    return VolumeConfig(**(values | over))


def test_one_plane_is_the_2d_path_bit_for_bit(world, tmp_path):
    """Pixels, embeddings, and weights after training with adapters, augmentation and dropout."""
    path, expression, _ = world
    volume, spots = open_volume(path), section(path, 2, expression)
    flat = make_pairs([spots], PANEL, SIDE, 0.5)
    deep = depth_pairs([(volume, spots)], PANEL, 1, SIDE, 0.5)
    np.testing.assert_array_equal(deep.patches[:, 0], flat.patches)
    embedded = depth_pairs([(volume, spots)], PANEL, 1, SIDE, 0.5, encoder=tiny_encoder())
    ours = flat_pairs([spots], PANEL, SIDE, 0.5, encoder=tiny_encoder()).embeddings
    np.testing.assert_array_equal(embedded.embeddings, ours)
    whole = tiny_encoder().encode(torch.from_numpy(flat.patches)).numpy()
    np.testing.assert_allclose(ours[:, 0], whole, atol=1e-5)

    def trained(pairs, make):
        torch.manual_seed(0)
        encoder, sd = tiny_encoder(), torch.ones(GENES)
        omics = OmicsModel(new_omics(encoder.spec.dim, GENES, (16, 8)), sd)
        model = make(encoder, omics, sd, SealOptions(lora=LoraOptions()))
        train(model, Batches(pairs, 48), None, tmp_path / type(model).__name__, LoopOptions(epochs=1))
        return {name: value for name, value in model.state_dict().items() if "depth" not in name}

    two_d = trained(flat, SealModel)
    one_plane = trained(
        deep, lambda encoder, *rest: VolumeModel(encoder, DepthAggregator(32, DepthOptions(planes=1)), *rest)
    )
    assert two_d.keys() == one_plane.keys()
    assert all(torch.equal(two_d[name], one_plane[name]) for name in two_d)


def test_aggregation_begins_at_the_middle_plane_and_counts_depth():
    torch.manual_seed(0)
    depth = DepthAggregator(16, DepthOptions(planes=5, width=8, queries=3)).eval()
    planes = torch.randn(300, 5, 16)
    for embedding in depth(planes):
        assert torch.equal(embedding, planes[:, 2])
    for last in (depth.contrast, depth.reconstruction):
        torch.nn.init.normal_(last.weight)
    contrast, decoded = depth(planes)
    assert contrast.shape == decoded.shape == (300, 16)
    assert not torch.allclose(contrast, decoded)
    swapped = depth(planes[:, [1, 0, 2, 3, 4]])[1]
    assert (swapped - decoded).abs().max() > 1e-4  # positions in depth are told apart
    alone = torch.cat([depth.decoded_embedding(planes[i : i + 1]) for i in (0, 299)])
    assert torch.equal(alone, depth.decoded_embedding(planes)[[0, 299]])  # whatever else is in a batch


@pytest.mark.parametrize("hidden", [0, 64])
def test_predictions_get_the_mean_and_spread_of_the_training_spots(world, hidden):
    path, expression, _ = world
    torch.manual_seed(0)
    encoder, places = tiny_encoder(), [(open_volume(path), section(path, 2, expression))]
    pairs = depth_pairs(places, PANEL, 3, SIDE, 0.5, encoder=encoder)
    depth = DepthAggregator(encoder.spec.dim, DepthOptions())
    options = SealOptions(lora=None, alignment=0, reconstruction=0, decoder_hidden=hidden)
    model = VolumeModel(encoder, depth, None, torch.ones(GENES), options)
    model.stretch(Batches(pairs, 48).whole())
    with torch.no_grad():
        rows = depth.decoded_embedding(torch.from_numpy(pairs.embeddings))
        layers = [model.decoder.hidden, torch.nn.ReLU(), model.decoder.genes] if hidden else [model.decoder]
        predicted = torch.nn.Sequential(*layers)(rows).numpy()
    np.testing.assert_allclose(predicted.mean(0), pairs.expression.mean(0), rtol=1e-4)
    np.testing.assert_allclose(predicted.std(0), pairs.expression.std(0), rtol=1e-4)


def test_three_stages_are_resumed_and_end_in_a_folder_of_an_encoder(world, tmp_path):
    path, expression, _ = world
    other, elsewhere = write_volume(tmp_path / "other", planes=3, seed=1)
    spots = section(path, 2, expression)
    sections = {"": [spots], str(path): [spots, section(path, 4, expression)]}
    sections[str(other)] = [section(other, 1, elsewhere)]
    volumes = (VolumeData(str(other), sections=()),)
    voi = VolumeData(str(path), sections=(), validation=("P4",))
    options = config(world, tmp_path / "out", epochs=(1, 1, 2), batch_size=72, volumes=volumes, voi=voi)
    lines = []
    folder = train_volume(options, sections=sections, log=lines.append).path
    said = " ".join(lines)
    for words in ("2D pairs: Pairs(144", "other volumes: Pairs(144", "volume of interest: Pairs(144"):
        assert words in said
    assert "validation: Pairs(144 patches of 32 px, 8 genes, of P4)" in said
    assert "VORTEX" in (folder / "README.md").read_text()
    first = load_volume_encoder(folder)
    with pytest.raises(SealExtractError, match="holds a finished encoder"):
        train_volume(options, sections=sections)
    (folder / "config.json").unlink()  # as a run that was killed before it wrote the encoder
    (folder / "volume_of_interest" / "checkpoint.pt").unlink()
    train_volume(options, sections=sections)
    again = load_volume_encoder(folder)
    assert first.identity == again.identity
    assert first.identity["name"] == "deep-depth3"
    assert len(first.identity["weights"]) == 2
    (folder / "depth.safetensors").unlink()
    with pytest.raises(SealExtractError, match=r"cannot read .*depth.safetensors"):
        load_volume_encoder(folder)


def _without_a_gene(spots):
    return replace(spots, genes=("OTHER", *PANEL[1:]))


REFUSED = {
    "outside": (lambda spots: replace(spots, xy_l0=spots.xy_l0 + 5000), {}, "all 144 spots lie outside"),
    "no plane": (lambda spots: replace(spots, name="P9"), {}, "P9 lies outside .*whose sections are: P0, P1"),
    "other panel": (_without_a_gene, {}, "the sections have 7 genes in common, 8 are asked for"),
    "no stage": (lambda spots: spots, {"epochs": (0, 0, 0)}, "no stage is left; make one of them above 0"),
    "validation": (
        lambda spots: spots,
        {"validation": ("P1", "P2")},
        "validation is P1, P2; allowed: some of P1, P2, and not all",
    ),
    "no section": (lambda spots: spots, {"volumes": (VolumeData("other.json", ()),)}, "no section of other"),
    "few pairs": (lambda spots: spots, {"batch_size": 999}, "type batch_size = 64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_on_is_refused_in_one_line(world, tmp_path, case):
    path, expression, _ = world
    change, over, why = REFUSED[case]
    over = dict(over)
    voi = VolumeData(str(path), sections=(), validation=over.pop("validation", ()))
    sections = {str(path): [change(section(path, 1, expression)), section(path, 2, expression)]}
    with pytest.raises(SealExtractError, match=why) as caught:
        train_volume(config(world, tmp_path / "out", voi=voi, **over), sections=sections)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[depth]\nplanes = 4", "planes is 4; allowed: odd numbers"),
        ("[depth]\nwidth = 30", "width is 30; it has to be a multiple of heads, 4"),
        ("[seal.lora]\nr = 4", r"type \[lora\] in place of \[seal.lora\]"),
        ("[voi]\nspacing = 4", "there is no option 'spacing' in voi; did you mean spacing_um"),
    ],
)
def test_options_are_checked(tmp_path, text, why):
    head = 'name = "a"\nencoder = "b"\nout = "c"\n'
    voi = "" if "[voi]" in text else '[voi]\nvolume = "v.json"\nsections = []\n'
    (tmp_path / "config.toml").write_text(head + voi + text + "\n")
    with pytest.raises(SealExtractError, match=why):
        read_volume_config(tmp_path / "config.toml")
