"""Encoders without touching this code: any model of timm, and rows that installed packages bring."""

import re
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import timm
import torch
from encoder_fixtures import TINY_VIT, as_batch, load, local_hub, noise_patches, refuse, save, tower_tensors
from hub_server import Repo
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from seal_extract import plugins
from seal_extract.encoders import find_spec, list_encoders, load_encoder, registry
from seal_extract.encoders.request import EncoderRequest
from seal_extract.encoders.tower import timm_spec
from seal_extract.errors import MissingOnHubError, NetworkError, UsageError

pytestmark = pytest.mark.skipif(
    not timm.is_model("test_vit"), reason=f"timm {timm.__version__} has no small models for tests"
)
MODELS = [
    "test_vit.r160_in1k",
    "test_resnet.r160_in1k",
    "test_convnext.r160_in1k",
    "test_efficientnet.r160_in1k",
    "test_nfnet.r160_in1k",
]


SLOW = [
    "convnext_tiny",
    "densenet121",
    "maxvit_tiny_tf_224",
    "resnet18",
    "swin_tiny_patch4_window7_224",
    "vit_base_patch14_dinov2",
]


def made(name, seed=0):
    """A model of timm with its classes, its weights drawn."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and value.ndim == 1:
            value.normal_(1.0 if key.endswith("weight") else 0.0, 0.1)
    return model


def file_of(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in made(name).state_dict().items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


# --- models of timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_timm_as_timm_itself_runs_it(name, tmp_path):
    encoder = load(f"timm:{name}", file_of(name, tmp_path))
    theirs = made(name)
    theirs.reset_classifier(0)
    prepare = create_transform(**resolve_data_config(model=theirs))
    for side in (160, 224, 100):
        images = [Image.fromarray(p) for p in noise_patches(2, side)]
        tensors = torch.stack([prepare(image) for image in images])
        ours = torch.stack([encoder.transform(image) for image in images])
        torch.testing.assert_close(ours, tensors, rtol=0, atol=1e-6)
        with torch.inference_mode():
            expected = theirs(tensors)
        got = encoder(ours)
        assert got.shape == (2, encoder.embedding_dim)
        assert (got - expected).norm() / expected.norm() < 1e-6
    patches = noise_patches(2, 224)
    by_pil = encoder(torch.stack([encoder.transform(Image.fromarray(p)) for p in patches]))
    assert (encoder.encode(as_batch(patches)) - by_pil).norm() / by_pil.norm() < 1e-3


def test_its_row():
    row = timm_spec("timm:test_resnet")
    assert (row.name, row.source, row.dim) == (
        "timm-test_resnet.r160_in1k",
        "timm/test_resnet.r160_in1k",
        timm.create_model("test_resnet", num_classes=0).num_features,
    )
    assert (row.mpp, row.patch_px, row.pooling) == (None, 160, "own")
    assert str(row.input) == "resized to 168 px, bilinear, middle square of 160 px"
    assert "160 px, float32" in repr(row)  # and no µm/px, for timm states none


@pytest.mark.parametrize(
    "name",
    [
        "eva02_tiny_patch14_224",
        "mobilenetv3_small_100",
        "deit_tiny_distilled_patch16_224",
        "xcit_nano_12_p8_224",
        *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW),
    ],
)
def test_families_whose_constants_no_file_holds(name, tmp_path):
    """Window tables, rotary embeddings and the like are made, not left without memory."""
    spec = timm_spec(f"timm:{name}")
    path = file_of(name, tmp_path)
    encoder = load(f"timm:{name}", path)
    path.unlink()
    assert not [k for k, v in (*encoder.named_parameters(), *encoder.named_buffers()) if v.is_meta]
    if spec.patch_px <= 224:
        assert encoder.encode(as_batch(noise_patches(1, 224))).shape == (1, spec.dim)


def test_round_trip_with_batch_norms(tmp_path):
    encoder = load("timm:test_resnet", file_of("test_resnet", tmp_path / "a"))
    encoder.save_pretrained(tmp_path / "own")
    again = load_encoder(tmp_path / "own", device="cpu")
    patches = as_batch(noise_patches(2, 160))
    assert torch.equal(again.encode(patches), encoder.encode(patches))
    assert again.spec == replace(encoder.spec, published=None)
    assert again.description["trained_mpp"] is None
    assert "µm/px" not in (tmp_path / "own" / "README.md").read_text(encoding="utf-8")


def test_an_adapter_on_a_model_of_timm(tmp_path):
    from test_adapter import halves, write

    tensors = halves({"blocks.0.attn.qkv": (192, 64)})
    adapter = write(tmp_path / "a", tensors, target_modules=["qkv"])
    path = file_of("test_vit", tmp_path)
    plain, merged = load("timm:test_vit", path), load("timm:test_vit", path, adapter=adapter)
    assert merged.spec.name == "timm-test_vit.r160_in1k+a"
    patches = as_batch(noise_patches(1, 160))
    assert not torch.equal(merged.encode(patches), plain.encode(patches))


def test_its_weights_from_the_hub_offline_and_by_the_older_name(tmp_path, monkeypatch):
    content = file_of("test_vit", tmp_path / "made").read_bytes()
    old = save(made("test_vit").state_dict(), tmp_path / "old.bin").read_bytes()
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        hub.repos["timm/test_vit.r160_in1k"] = repo = Repo({"model.safetensors": content})
        words = r"offline.*hf download timm/test_vit.r160_in1k model.safetensors"
        with pytest.raises(NetworkError, match=words):
            load("timm:test_vit", offline=True)
        encoder = load("timm:test_vit")
        assert encoder.weights[0].revision == repo.commit
        hub.asked.clear()
        assert load("timm:test_vit", offline=True).identity == encoder.identity
        request = EncoderRequest("timm:test_vit", device="cpu", offline=True)
        assert request.spec == encoder.spec
        assert request.identity_if_unchanged(encoder.description["weights"]) == encoder.identity
        assert hub.asked == []
        repo.files = {"pytorch_model.bin": old}
        assert load("timm:test_vit").weights[0].file == "pytorch_model.bin"
        repo.files = {"README.md": b""}
        with pytest.raises(MissingOnHubError, match=r"no file model.safetensors or pytorch_model.bin"):
            load("timm:test_vit", revision=repo.commit)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnet19", "has no model 'resnet19'"),
        ("timm:test_vi", "has no model 'test_vi'; did you mean test_vit"),
        ("timm:resnet18.nope", "no such weights; allowed: resnet18.a1_in1k"),
        ("timm:../etc/passwd", "has no model"),
        ("timm:hf-hub:lab/x", "has no model"),
        ("timm:", "has no model ''"),
        ("timm:test_vit_relpos", "nobody says where the weights of timm-test_vit_relpos.*checkpoint="),
    ],
)
def test_models_that_timm_does_not_have(name, words):
    with pytest.raises(UsageError, match=words):
        load_encoder(name, device="cpu")


def test_names_of_a_models_first_authors(tmp_path):
    """DINOv2's own files have a mask token and other names for the registers; timm converts them."""
    theirs = made("test_vit3").state_dict()
    path = save(theirs | {"mask_token": torch.zeros(1, 96)}, tmp_path / "a.pth")
    filled = load("timm:test_vit3", path).tower.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in filled.items())


def test_weights_of_another_model(tmp_path):
    words = ("not a weight file of timm-test_resnet", "missing", "unexpected")
    refuse(file_of("test_vit", tmp_path), *words, name="timm:test_resnet")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("norm.weight", torch.full((64,), float("nan")), "1 with NaN"),
        ("norm.weight", torch.ones(64).half(), "1 not plain float32"),
        ("norm.weight", torch.ones(65), "[65], not [64]"),
        ("foreign", torch.ones(1), "1 unexpected (foreign)"),
        ("header.weight", torch.ones(1), "1 unexpected (header.weight)"),
    ],
)
def test_weights_are_held_like_all_others(tmp_path, key, value, words):
    path = save(made("test_vit").state_dict() | {key: value}, tmp_path / "a.pth")
    refuse(path, words, name="timm:test_vit")


# --- rows of plugins ----------------------------------------------------------------------------------------

OURS = replace(TINY_VIT, name="ours", source="lab/ours")
OTHER = replace(TINY_VIT, name="other", source="", published=None)


def both():
    return (OURS, OTHER)


def broken():
    raise ImportError("No module named\n'theirs'")


def leaving():
    raise SystemExit(3)


TAKEN = (replace(OURS, name="conch"), OTHER)
BUNDLED = replace(OURS, name="seal-tiny")
NONSENSE = [OURS, 7]
BAD_NAME = replace(OURS, name="../ours")


@pytest.fixture
def install(monkeypatch):
    """Entry points of this module, as if a package had them."""

    def entries(**values):
        found = [EntryPoint(n, f"{__name__}:{v}", registry.GROUP) for n, v in values.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: found)
        registry.plugin_rows.cache_clear()

    yield entries
    monkeypatch.undo()
    registry.plugin_rows.cache_clear()


@pytest.mark.parametrize(("value", "names"), [("OURS", ["ours"]), ("both", ["ours", "other"])])
def test_a_plugin_brings_rows(install, value, names):
    install(a=value)
    assert [row.name for row in list_encoders()][-len(names) :] == names
    assert find_spec("ours") is OURS
    assert EncoderRequest("ours").spec is OURS


def test_its_encoder_loads_like_any_other(install, tmp_path, monkeypatch):
    install(a="both")
    save(tower_tensors(TINY_VIT), tmp_path / "a.pth")
    encoder = load("ours", tmp_path / "a.pth")
    save_file(tower_tensors(TINY_VIT), tmp_path / "model.safetensors")
    second = load("other", tmp_path / "model.safetensors")  # a row that says nothing of its file
    patches = as_batch(noise_patches(1, 28))
    assert torch.equal(encoder.encode(patches), second.encode(patches))
    with pytest.raises(
        UsageError, match="nobody says where the weights of other are; give them as checkpoint="
    ):
        load_encoder("other", device="cpu")
    with pytest.raises(UsageError, match="did you mean ours"):
        find_spec("our")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("broken", r"plugin a of unknown package \(.*:broken\): it is left out: ImportError: No module"),
        ("nothing", "it is left out: AttributeError"),
        ("leaving", "it is left out: SystemExit: 3"),
        ("MODELS", "a str in it is left out: allowed: EncoderSpec"),
        ("NONSENSE", "a int in it is left out"),
        ("PREFIX", "it is left out"),
        ("TAKEN", "its encoder conch is left out: the name is taken"),
        ("BUNDLED", "its encoder seal-tiny is left out: the name is taken"),
        ("BAD_NAME", r"its encoder '../ours' is left out: allowed: letters"),
    ],
)
def test_a_plugin_that_fails_leaves_the_others(install, value, words):
    install(a=value, b="OTHER")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [row.name for row in list_encoders()]
    messages = [str(w.message) for w in caught]
    assert "other" in names
    assert "\n" not in "".join(messages)
    assert any(re.search(words, m) for m in messages), messages
    assert find_spec("conch").source == "MahmoodLab/conch"


def test_no_row_of_ours_can_be_replaced_nor_another_plugins(install):
    install(a="OURS", b="NONSENSE")
    with pytest.warns(RuntimeWarning, match="the name is taken"), pytest.warns(RuntimeWarning, match="a int"):
        assert find_spec("ours") is OURS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list_encoders()  # asked once, warned once


def test_a_plugin_that_is_really_installed(tmp_path):
    """As pip would leave it: a module and its metadata on the path; listing imports no torch."""
    info = tmp_path / "lab_rows-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-rows\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[seal_extract.encoders]\nlab = lab_rows:ROW\n")
    (tmp_path / "lab_rows.py").write_text(
        "from dataclasses import replace\n"
        "from seal_extract.encoders import find_spec\n"
        "ROW = replace(find_spec('conch'), name='lab-conch', source='lab/conch')\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from seal_extract.encoders import list_encoders\n"
        "print([s.name for s in list_encoders()][-1], [m for m in ('torch', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "lab-conch []", done.stderr
