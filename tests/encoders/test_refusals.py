"""What must not load, must not be encoded, and what is said instead: one line, and what to do."""

import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import timm
import torch
from encoder_fixtures import (
    PREFIX,
    SEAL_TINY_CONCH,
    SEAL_TINY_VIT,
    TINY_CONCH,
    TINY_VIT,
    adapters,
    as_batch,
    as_published,
    base_file,
    noise_patches,
    refuse,
    save,
    seal_file,
    shapes_of,
    untrained_encoder,
)
from PIL import Image
from safetensors.torch import save_file

from seal_extract.encoders import load_encoder
from seal_extract.encoders.recognise import looks_like
from seal_extract.encoders.registry import ROWS
from seal_extract.errors import UsageError

pytestmark = pytest.mark.usefixtures("tiny_rows")

BLOCK = f"{PREFIX}trunk.blocks.1"
NORM = f"{PREFIX}trunk.norm"


# --- tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{BLOCK}.attn.qkv.base_layer.bias": None}, ["1 missing", f"{BLOCK}.attn.qkv.bias"]),
        ({"decoder.decoder.3.bias": None}, ["1 missing (decoder.decoder.3.bias)"]),
        ({"nonsense": torch.zeros(1)}, ["1 unexpected (nonsense)"]),
        ({f"{NORM}.weight": torch.ones(33)}, ["1 of another shape", "trunk.norm.weight [33], not [32]"]),
        ({f"{NORM}.weight": torch.ones(32).half()}, ["1 not plain float32", "float16"]),
        ({f"{NORM}.weight": torch.ones(32).double()}, ["1 not plain float32", "float64"]),
        ({f"{NORM}.weight": torch.ones(32).int()}, ["1 not plain float32", "int32"]),
        ({f"{NORM}.weight": torch.ones(32).to_sparse()}, ["1 not plain float32", "sparse"]),
        ({f"{NORM}.weight": torch.ones(32, device="meta")}, ["1 not plain float32", "float32 on meta"]),
        (
            {f"{NORM}.bias": torch.tensor([0.0] * 31 + [float("nan")])},
            ["1 with NaN or infinite numbers", "trunk.norm.bias", "fetch the file again"],
        ),
        ({f"{NORM}.bias": torch.tensor([0.0] * 31 + [float("inf")])}, ["1 with NaN or infinite numbers"]),
        ({f"{NORM}.bias": torch.tensor([0.0] * 31 + [-float("inf")])}, ["1 with NaN or infinite numbers"]),
        (
            {
                f"{PREFIX}trunk.cls_token": None,
                f"{NORM}.weight": torch.ones(2),
                f"{NORM}.bias": torch.ones(32).half(),
                "foreign": torch.ones(1),
            },
            ["1 missing", "1 unexpected", "1 of another shape", "1 not plain float32"],
        ),
    ],
)
def test_tensors_that_are_not_those_of_the_encoder(tmp_path, changes, words):
    tensors = {**seal_file(SEAL_TINY_CONCH), **changes}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    refuse(save(tensors, tmp_path / "a.pth"), *words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {f"nonsense.{i}": torch.zeros(1) for i in range(9)},
            ["missing", "9 unexpected (nonsense.0, nonsense.1, nonsense.2, ...)"],
        ),
        (seal_file(SEAL_TINY_VIT), ["missing", "unexpected", "another shape"]),
        (adapters(SEAL_TINY_VIT), ["4 adapters on layers that the tower does not have"]),
        (base_file(TINY_VIT), ["missing", "it looks like tiny-vit"]),
        (dict(list(base_file(TINY_VIT).items())[2:]), ["it looks like tiny-vit"]),
        (
            {"fc_mu.weight": torch.zeros(2, 2), "flows.0.u": torch.zeros(2)},
            ["expression half of a SEAL checkpoint: give the vision file"],
        ),
    ],
    ids=["nonsense", "another encoder", "its adapters", "a base", "a base cut short", "omics"],
)
def test_the_file_of_another_encoder(tmp_path, tensors, words):
    refuse(save(tensors, tmp_path / "a.pth"), *words)


def test_adapters_beside_another_base(tmp_path):
    save(base_file(replace(TINY_CONCH, dim=24)), tmp_path / "pytorch_model.bin")
    words = ("pytorch_model.bin is not a weight file of tiny-conch", "another shape")
    refuse(save(adapters(SEAL_TINY_CONCH), tmp_path / "a.pth"), *words)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_a_base_is_recognised_by_its_row(row):
    """Rows that share names and shapes of all tensors are named together."""
    if row.published.lora is not None or not timm.is_model(row.architecture.timm):
        return
    held = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(row).items()}
    named = looks_like({row.published.prefix + key: value for key, value in as_published(row, held).items()})
    alike = (row.published.prefix, row.published.layer_names, shapes_of(row))
    assert row.name in named
    for other in map(ROWS.get, named):
        assert (other.published.prefix, other.published.layer_names, shapes_of(other)) == alike


def test_nothing_is_recognised_in_a_file_of_nothing_known():
    assert looks_like({"stem.weight": torch.empty(64, 3, 7, 7, device="meta")}) == ()


# --- files that are no weights ------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_runs_code_does_not_run(tmp_path, kind):
    mark, path = tmp_path / "ran", tmp_path / "a.pth"
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"bomb": Bomb(mark)}))
    else:
        torch.save({"bomb": Bomb(mark)}, path, _use_new_zipfile_serialization=kind == "zip")
    named = "mkdir" if kind != "bare pickle" else "something that is not a tensor"
    refuse(path, named, "could run code, so nothing was loaded", "state dict or safetensors")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # it would have
    assert mark.exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_short(tmp_path, name, keep):
    path = tmp_path / name
    (save if name == "a.pth" else save_file)(seal_file(SEAL_TINY_CONCH), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refuse(path, "damaged, cut short", f"({path.stat().st_size:,} bytes)", "fetch it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a weight file"),
        (b"hello, I am a text file, and a long one at that", "is not a weight file; allowed: .pth or .bin"),
        (b"<html>Sign in</html>", "is not a weight file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer, not the weights"),
        (b"\x80\x04", "damaged, cut short"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all", "damaged, cut short"),
    ],
)
def test_not_a_weight_file(tmp_path, content, words):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    refuse(path, words)


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse(tmp_path / "a.pth", "damaged, cut short")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds an empty dict"),
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
        ({"a": "text"}, "holds a str under 'a'"),
        ({3: torch.zeros(1)}, "under 3"),
        ({"model": {"a": torch.zeros(1)}}, "holds a dict under 'model'"),
    ],
)
def test_not_a_dict_of_tensors(tmp_path, content, words):
    refuse(save(content, tmp_path / "a.pth"), words)


def test_a_missing_path(tmp_path):
    refuse(tmp_path / "none.pth", "cannot read", "No such file", "give the path of a file")


# --- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"precision": "int8"}, "precision is 'int8'; allowed: float32, tf32, bfloat16, float16"),
        ({"device": "gpu"}, "device is 'gpu'; allowed: cpu, cuda"),
        ({"device": "cuda:99"}, "device is cuda:99, but this machine has"),
        ({"checkpoint": "a.pth", "revision": "main"}, "leave one out"),
    ],
)
def test_arguments_that_cannot_be_meant(kwargs, words):
    with pytest.raises(UsageError, match=words):
        load_encoder("seal-tiny-conch", **kwargs)


def test_a_file_in_place_of_a_name(tmp_path, monkeypatch):
    save(seal_file(SEAL_TINY_CONCH), tmp_path / "a.pth")
    monkeypatch.chdir(tmp_path)
    for asked in ("a.pth", tmp_path / "a.pth"):
        with pytest.raises(
            UsageError, match="is a file; give the encoder's name and this file as checkpoint"
        ):
            load_encoder(asked)


# --- patches ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conch():
    return untrained_encoder(TINY_CONCH)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 4, 32, 32), torch.uint8, r"uint8 \[2, 4, 32, 32\].*drop the alpha channel: patches\[:, :3\]"),
        ((2, 1, 32, 32), torch.uint8, r"uint8 \[2, 1, 32, 32\]; allowed: uint8 \[B, 3, H, W\], RGB"),
        ((2, 3, 32, 32), torch.float32, r"float32 \[2, 3, 32, 32\]; allowed: uint8"),
        ((2, 3, 32, 32), torch.uint16, r"uint16 \[2, 3, 32, 32\]; allowed: uint8"),
        ((3, 32, 32), torch.uint8, r"uint8 \[3, 32, 32\]; allowed: uint8 \[B, 3, H, W\]"),
        ((2, 32, 32, 3), torch.uint8, r"uint8 \[2, 32, 32, 3\]; allowed"),
        ((2, 3, 0, 32), torch.uint8, r"uint8 \[2, 3, 0, 32\]; allowed"),
    ],
)
def test_patches_that_cannot_be_encoded(conch, shape, dtype, words):
    with pytest.raises(UsageError, match=rf"tiny-conch got patches {words}"):
        conch.encode(torch.zeros(shape, dtype=dtype))


def test_an_array_in_place_of_a_tensor_is_told(conch):
    with pytest.raises(UsageError, match=r"tiny-conch got a ndarray; give a tensor: torch.from_numpy"):
        conch.encode(noise_patches(1, 32))


def test_sides_that_the_tower_cannot_cut(conch):
    words = r"tiny-conch got patches of 250 x 250 px; allowed: sides that are a multiple of 16, as 256 x 256"
    with pytest.raises(UsageError, match=words):
        conch.encode(as_batch(noise_patches(1, 250)))
    with pytest.raises(UsageError, match=words):
        conch(torch.zeros(1, 3, 250, 250))


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "La", "RGBa"])
def test_images_that_cannot_become_8_bit_rgb(conch, mode):
    with pytest.raises(UsageError, match=f"mode {mode}; allowed: 8 bits"):
        conch.transform(Image.new(mode, (32, 32)))


def test_something_that_is_no_image(conch):
    with pytest.raises(UsageError, match="got ndarray; give a PIL image"):
        conch.transform(noise_patches(1, 32)[0])
