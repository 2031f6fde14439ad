"""What must not load, must not be encoded, and what is said instead: one line, and what to do."""

import json
import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
from encoder_fixtures import (
    PREFIX,
    SEAL_TINY_CONCH,
    SEAL_TINY_VIT,
    TINY_CONCH,
    adapters,
    add_tiny_rows,
    as_batch,
    base_file,
    noise_patches,
    save,
    seal_file,
    untrained_encoder,
)
from PIL import Image
from safetensors.torch import save_file

from seal_extract.encoders import load_encoder
from seal_extract.encoders.checkpoint import looks_like
from seal_extract.errors import CheckpointError, OutputError, UsageError

BLOCK = f"{PREFIX}trunk.blocks.1"


@pytest.fixture(autouse=True)
def _tiny_rows(monkeypatch):
    add_tiny_rows(monkeypatch)


def refuse(path, *words, name="seal-tiny-conch"):
    """The checkpoint is refused, in one line that holds these words and the file's name."""
    with pytest.raises(CheckpointError) as caught:
        load_encoder(name, checkpoint=path, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for word in (os.path.basename(path), *words):
        assert word in message, message


def changed(path, change):
    tensors = seal_file(SEAL_TINY_CONCH)
    change(tensors)
    return save(tensors, path / "a.pth")


# --- names and shapes ---------------------------------------------------------------------------------------


def test_missing_key(tmp_path):
    path = changed(tmp_path, lambda t: t.pop(f"{BLOCK}.attn.qkv.base_layer.bias"))
    refuse(path, "1 missing", f"{BLOCK}.attn.qkv.bias")


def test_a_forgotten_adapter(tmp_path):
    path = changed(tmp_path, lambda t: t.pop(f"{BLOCK}.mlp.fc2.lora_B.default.weight"))
    refuse(path, "1 half pairs", "mlp.fc2: lora_A [4, 128]")


def test_a_decoder_cut_off(tmp_path):
    refuse(changed(tmp_path, lambda t: t.pop("decoder.decoder.3.bias")), "1 missing (decoder.decoder.3.bias)")


def test_foreign_key(tmp_path):
    refuse(changed(tmp_path, lambda t: t.update(nonsense=torch.zeros(1))), "1 unexpected (nonsense)")


def test_nothing_but_foreign_keys(tmp_path):
    path = save({f"nonsense.{i}": torch.zeros(1) for i in range(9)}, tmp_path / "a.pth")
    refuse(path, "missing", "9 unexpected (nonsense.0, nonsense.1, nonsense.2, ...)")


def test_wrong_shape(tmp_path):
    path = changed(tmp_path, lambda t: t.update({f"{PREFIX}trunk.norm.weight": torch.ones(33)}))
    refuse(path, "1 of another shape", "trunk.norm.weight [33], not [32]")


def test_wrong_rank_of_an_adapter(tmp_path):
    key = f"{BLOCK}.attn.proj.lora_A.default.weight"
    refuse(
        changed(tmp_path, lambda t: t.update({key: torch.ones(8, 32)})),
        "two ranks in a pair",
        "lora_A [8, 32], lora_B [32, 4]",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_wrong_dtype(tmp_path, dtype):
    key = f"{PREFIX}trunk.norm.weight"
    refuse(
        changed(tmp_path, lambda t: t.update({key: torch.ones(32, dtype=dtype)})),
        "1 not plain float32",
        str(dtype)[6:],
    )


def test_sparse_weights(tmp_path):
    key = f"{BLOCK}.norm1.weight"
    path = changed(tmp_path, lambda t: t.update({key: torch.ones(32).to_sparse()}))
    refuse(path, "1 not plain float32", "sparse")


def test_weights_without_numbers(tmp_path):
    key = f"{BLOCK}.norm1.weight"
    path = changed(tmp_path, lambda t: t.update({key: torch.ones(32, device="meta")}))
    refuse(path, "1 not plain float32", "float32 on meta")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(tmp_path, value):
    path = changed(tmp_path, lambda t: t[f"{PREFIX}trunk.norm.bias"][5].fill_(value))
    refuse(path, "1 with NaN or infinite numbers", "trunk.norm.bias", "fetch the file again")


def test_everything_wrong_is_in_one_line(tmp_path):
    def break_it(tensors):
        tensors.pop(f"{PREFIX}trunk.cls_token")
        tensors[f"{PREFIX}trunk.norm.weight"] = torch.ones(2)
        tensors[f"{PREFIX}trunk.norm.bias"] = torch.ones(32).half()
        tensors["foreign"] = torch.ones(1)

    refuse(
        changed(tmp_path, break_it), "1 missing", "1 unexpected", "1 of another shape", "1 not plain float32"
    )


def test_prefixes_are_taken_off_at_the_front_only(tmp_path):
    def put_inside(tensors):
        for key in list(tensors):
            tensors[key.replace("trunk.", "module.trunk.", 1)] = tensors.pop(key)

    refuse(changed(tmp_path, put_inside), "missing", "unexpected", f"{PREFIX}module.trunk.")


def test_a_prefix_on_some_keys_only(tmp_path):
    key = f"{PREFIX}trunk.cls_token"
    path = changed(tmp_path, lambda t: t.update({f"module.{key}": t.pop(key)}))
    refuse(path, f"1 missing ({key})", f"1 unexpected (module.{key})")


# --- another encoder's file ---------------------------------------------------------------------------------


def test_the_file_of_another_encoder(tmp_path):
    refuse(save(seal_file(SEAL_TINY_VIT), tmp_path / "vit.pth"), "missing", "unexpected", "another shape")


def test_adapters_of_another_encoder(tmp_path):
    refuse(
        save(adapters(SEAL_TINY_VIT), tmp_path / "vit.pth"),
        "4 adapters on layers that the tower does not have",
    )


def test_adapters_beside_another_base(tmp_path):
    path = save(adapters(SEAL_TINY_CONCH), tmp_path / "a.pth")
    save(base_file(replace(TINY_CONCH, dim=24)), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin is not a weight file of tiny-conch.*another shape"
    ):
        load_encoder("seal-tiny-conch", checkpoint=path, device="cpu")


def patch_embedding(key, *shape):
    return {key: torch.empty(shape, device="meta")}


def adapter_only(dim, block):
    lora = {f"{PREFIX}blocks.{block}.attn.qkv.lora_A.default.weight": torch.empty(8, 4, device="meta")}
    return lora | {"decoder.decoder.0.weight": torch.empty(512, dim, device="meta")}


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        (patch_embedding("visual.trunk.patch_embed.proj.weight", 768, 3, 16, 16), "conch"),
        (patch_embedding("patch_embed.proj.weight", 1536, 3, 14, 14), "univ2"),
        (patch_embedding("patch_embed.proj.weight", 1280, 3, 14, 14), "virchow2"),
        (patch_embedding("patch_embed.proj.weight", 768, 3, 14, 14), "h0mini"),
        (patch_embedding("patch_embed.proj.weight", 1024, 3, 16, 16), "uni"),
        (patch_embedding("embeddings.patch_embeddings.projection.weight", 1024, 3, 16, 16), "phikon2"),
        (
            patch_embedding(f"{PREFIX}patch_embed.proj.weight", 1536, 3, 14, 14) | adapter_only(1536, 23),
            "seal-univ2",
        ),
        (adapter_only(512, 11), "seal-conch"),
        (adapter_only(1536, 23), "seal-univ2"),
        (adapter_only(2560, 31), "seal-virchow2"),
        (adapter_only(1536, 11), "seal-h0mini"),
        (adapter_only(1024, 23), "seal-phikon2"),
        (adapter_only(7, 23), None),
        (patch_embedding("stem.weight", 64, 3, 7, 7), None),
    ],
)
def test_a_file_is_recognised(tensors, name):
    assert looks_like(tensors) == name


def test_the_message_names_the_encoder_that_it_looks_like(tmp_path):
    path = save({"patch_embed.proj.weight": torch.zeros(1536, 3, 14, 14)}, tmp_path / "a.pth")
    refuse(path, "it looks like univ2")


def test_the_expression_half(tmp_path):
    path = save({"fc_mu.weight": torch.zeros(2, 2), "flows.0.u": torch.zeros(2)}, tmp_path / "omics.pth")
    refuse(path, "expression half of a SEAL checkpoint: give the vision file")


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
    content = {**seal_file(SEAL_TINY_CONCH), "bomb": Bomb(mark)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"bomb": Bomb(mark)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    refuse(path, "could run code, so nothing was loaded", "state dict or safetensors")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # it would have
    assert mark.exists()


def test_the_object_is_named(tmp_path):
    refuse(save({"bomb": Bomb(tmp_path / "ran")}, tmp_path / "a.pth"), "holds the object", "mkdir")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_torch_file(tmp_path, keep):
    path = save(seal_file(SEAL_TINY_CONCH), tmp_path / "a.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refuse(path, "damaged, cut short", f"({path.stat().st_size:,} bytes)", "fetch it again")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_safetensors(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_file(seal_file(SEAL_TINY_CONCH), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refuse(path, "damaged, cut short", "fetch it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a weight file"),
        (b"hello, I am a text file, and a long one at that", "is not a weight file; allowed: .pth or .bin"),
        (b"<html>Sign in</html>", "is not a weight file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "git-lfs pointer, not the weights; type: git lfs",
        ),
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


def test_missing_path(tmp_path):
    refuse(tmp_path / "none.pth", "cannot read", "No such file", "give the path of a file")


def test_a_folder_as_checkpoint(tmp_path):
    refuse(tmp_path, "is a folder without a weight file of seal-tiny-conch", "seal_tiny-conch_vision.pth")


# --- folders of our own format ------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    untrained_encoder(TINY_CONCH).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def refuse_folder(path, *words):
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, device="cpu")
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_folder_without_config(tmp_path):
    refuse_folder(tmp_path, "has no config.json", "config.json and model.safetensors")


def test_a_folder_without_weights(own):
    (own / "model.safetensors").unlink()
    refuse_folder(own, "model.safetensors", "No such file")


def test_no_such_folder(tmp_path):
    refuse_folder(tmp_path / "none", "there is no folder", "config.json and model.safetensors")
    refuse_folder("./none", "there is no folder ./none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "timm"}, "config of another tool"),
        (
            {"format_version": 2},
            "format version 2, this package reads 1; bring your clone",
        ),
        ({"dim": None}, "does not describe an encoder"),
        ({"name": "../../etc"}, "not a plain word"),
        ({"name": 7}, "name is 7, not a text"),
        ({"precision": "int8"}, "precision is 'int8'; allowed"),
        ({"input": {}}, "'resize_px' is missing"),
        ({"mean": [1, 2]}, "three numbers each"),
    ],
)
def test_a_config_that_does_not_fit(own, change, words):
    config = json.loads((own / "config.json").read_text(encoding="utf-8"))
    (own / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    refuse_folder(own, words)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_config_that_is_no_json_object(own, text):
    (own / "config.json").write_text(text)
    refuse_folder(own, "config.json", "allowed: a folder or repository")


def test_weights_of_another_architecture_in_a_folder(own):
    save_file(tensors={"trunk.cls_token": torch.zeros(1)}, filename=own / "model.safetensors")
    refuse_folder(own, "model.safetensors is not a weight file of tiny-conch", "missing")


def test_saving_into_a_file(tmp_path):
    (tmp_path / "own").write_text("taken")
    with pytest.raises(UsageError, match="is a file; give a folder"):
        untrained_encoder(TINY_CONCH).save_pretrained(tmp_path / "own")


def test_saving_where_one_may_not(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seal_extract.encoders.folder.write_weights", full)
    with pytest.raises(OutputError, match="the disk is full"):
        untrained_encoder(TINY_CONCH).save_pretrained(tmp_path / "own")
    assert list((tmp_path / "own").iterdir()) == []


# --- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"precision": "int8"}, "precision is 'int8'; allowed: float32, bfloat16, float16"),
        ({"device": "gpu"}, "device is 'gpu'; allowed: cpu, cuda"),
        ({"device": "cuda:99"}, "device is cuda:99, but this machine has"),
        ({"checkpoint": "a.pth", "revision": "main"}, "leave one out"),
    ],
)
def test_arguments_that_cannot_be_meant(kwargs, words):
    with pytest.raises(UsageError, match=words):
        load_encoder("seal-tiny-conch", **kwargs)


def test_folder_with_arguments_for_something_else(own):
    with pytest.raises(UsageError, match="revision= names a revision on the Hub"):
        load_encoder(own, revision="main")
    with pytest.raises(UsageError, match="checkpoint= goes with the name of an encoder"):
        load_encoder(own, checkpoint="a.pth")


def test_a_file_in_place_of_a_name(tmp_path, monkeypatch):
    save(seal_file(SEAL_TINY_CONCH), tmp_path / "a.pth")
    monkeypatch.chdir(tmp_path)
    for asked in ("a.pth", tmp_path / "a.pth"):
        with pytest.raises(
            UsageError, match=r"is a file; give the encoder's name and this file as checkpoint="
        ):
            load_encoder(asked)


# --- patches ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conch():
    return untrained_encoder(TINY_CONCH)


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        (
            torch.zeros(2, 4, 32, 32, dtype=torch.uint8),
            r"uint8 \[2, 4, 32, 32\].*drop the alpha channel: patches\[:, :3\]",
        ),
        (
            torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
            r"uint8 \[2, 1, 32, 32\]; allowed: uint8 \[B, 3, H, W\], RGB",
        ),
        (torch.zeros(2, 3, 32, 32), r"float32 \[2, 3, 32, 32\]; allowed: uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint16), r"uint16 \[2, 3, 32, 32\]; allowed: uint8"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"uint8 \[3, 32, 32\]; allowed: uint8 \[B, 3, H, W\]"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"uint8 \[2, 32, 32, 3\]; allowed"),
    ],
)
def test_patches_that_cannot_be_encoded(conch, patches, words):
    with pytest.raises(UsageError, match=rf"tiny-conch got patches {words}"):
        conch.encode(patches)


def test_sides_that_the_tower_cannot_cut(conch):
    words = r"tiny-conch got patches of 250 x 250 px; allowed: sides that are a multiple of 16, as 256 x 256"
    with pytest.raises(UsageError, match=words):
        conch.encode(as_batch(noise_patches(1, 250)))
    with pytest.raises(UsageError, match=words):
        conch(torch.zeros(1, 3, 250, 250))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits(conch, mode):
    with pytest.raises(UsageError, match=f"mode {mode}; allowed: 8 bits"):
        conch.transform(Image.new(mode, (32, 32)))


def test_something_that_is_no_image(conch):
    with pytest.raises(UsageError, match=r"got ndarray; give a PIL image"):
        conch.transform(noise_patches(1, 32)[0])
