"""The loop: stops, goes on, gives back the best; a whole run to a folder that loads; options and refusals."""

import csv
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO

import h5py
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from encoder_fixtures import local_hub, needs_hub_1
from hub_server import GOOD_TOKEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from PIL import Image
from section_files import write_study
from train_fixtures import GENES, TINY, pairs, tiny_encoder

from seal_extract import load_encoder, load_omics
from seal_extract.cli import main
from seal_extract.errors import OutputError, UsageError
from seal_extract.train import loop
from seal_extract.train.config import LoopOptions, LoraOptions, SealOptions, read_config
from seal_extract.train.loop import CHECKPOINT, TrainingError, train
from seal_extract.train.pairs import Batches
from seal_extract.train.run import run
from seal_extract.train.seal import OmicsModel, SealModel, new_omics

SD = torch.ones(GENES)
OPTIONS = LoopOptions(epochs=4, lr=1e-3, seed=5)


def model():
    torch.manual_seed(0)
    omics = OmicsModel(new_omics(32, GENES, (32, 16)), SD)
    return SealModel(tiny_encoder(), omics, SD, SealOptions(lora=LoraOptions(), decoder_hidden=16))


def state(trained):
    return {k: v.clone() for k, v in trained.state_dict().items()}


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    whole, parted = model(), model()
    batches = Batches(pairs(24), 8)
    train(whole, batches, None, tmp_path / "whole", OPTIONS)

    class Stopped(Exception):
        pass

    def stop(row):
        if row["epoch"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train(parted, batches, None, tmp_path / "parted", OPTIONS, on_epoch=stop)
    again = model()
    rows = train(again, batches, None, tmp_path / "parted", OPTIONS)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    for (name, one), other in zip(state(whole).items(), state(again).values(), strict=True):
        assert torch.equal(one, other), name


def test_what_it_leaves_behind(tmp_path):
    rows = train(model(), Batches(pairs(24), 8), Batches(pairs(8, seed=1), 8), tmp_path, OPTIONS)
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(r["loss"]) for r in table] == pytest.approx([r["loss"] for r in rows])
    assert {"reconstruction", "alignment", "prediction", "validation", "lr"} <= table[0].keys()
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.size[0] > 300
    assert not list(tmp_path.glob(".*.part"))


def test_the_best_epoch_is_given_back_and_patience_ends_it(tmp_path):
    trained = model()
    options = structs.replace(OPTIONS, epochs=40, lr=0.05, patience=3)
    validation = Batches(pairs(8, seed=1), 8)
    rows = train(trained, Batches(pairs(24), 8), validation, tmp_path, options)
    losses = [row["validation"] for row in rows]
    assert len(rows) == losses.index(min(losses)) + 4 < 40
    trained.eval()
    with torch.no_grad():
        again = sum(v.item() for v in trained(next(validation.whole())).values())
    assert again == pytest.approx(min(losses), rel=1e-4)


def test_validation_embeds_a_section_in_parts_and_contrasts_it_whole():
    trained, sizes = model().eval(), []
    trained.encoder.tower.norm.register_forward_hook(lambda _, given, out: sizes.append(len(out)))
    (batch,) = Batches(pairs(150), 8).whole()
    whole = trained(batch)  # with gradients it is one forward pass
    with torch.no_grad():
        parts = trained(batch)
    assert sizes == [150, 64, 64, 22]
    for name, value in whole.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_a_checkpoint_keeps_the_scale_of_float16_gradients(tmp_path):
    """Accelerate scales on a GPU only; a stand-in for its scaler is enough for the file."""

    def new_run(scale):
        run = loop._Run(model(), Batches(pairs(16), 8), tmp_path, OPTIONS, {})
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return run

    first, again = new_run(1024.0), new_run(2.0)
    first.rows, first.best = [{"epoch": 1, "lr": 1.0, "loss": 1.0, "seconds": 0.0}], {}
    first.save()
    again.resume()
    assert again.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()
    assert again.accelerator.scaler.get_scale() == 1024.0


def test_batches_gathered_into_one_step(tmp_path):
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, batch, seed=None):
            return {"a": (self.w - batch.expression.mean()).square().mean()}

    ends = []
    for size, accumulate in ((8, 2), (16, 1)):
        one = Sum()
        options = LoopOptions(epochs=2, lr=0.1, accumulate=accumulate, weight_decay=0, clip=1e9)
        train(one, Batches(pairs(16), size), None, tmp_path / str(size), options)
        ends.append(one.w.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(tmp_path):
    class Breaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))
            self.calls = 0

        def forward(self, batch, seed=None):
            self.calls += 1
            return {"a": self.w.sum() * (float("nan") if self.calls > 3 else 1)}

    with pytest.raises(TrainingError, match=r"epoch 2, batch 2 is nan; checkpoint\.pt of epoch 1 is kept"):
        train(Breaks(), Batches(pairs(16), 8), None, tmp_path, OPTIONS)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["trained"]["w"].isfinite().all()


def test_a_resume_with_other_options_is_refused_and_changes_nothing(tmp_path):
    batches = Batches(pairs(16), 8)
    train(model(), batches, None, tmp_path, OPTIONS)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(UsageError, match=r"made with lr = 0\.001, not 0\.01"):
        train(model(), batches, None, tmp_path, structs.replace(OPTIONS, lr=0.01))
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    (tmp_path / CHECKPOINT).write_text("not a checkpoint")
    with pytest.raises(UsageError, match="no checkpoint of this package"):
        train(model(), batches, None, tmp_path, OPTIONS)


@pytest.fixture
def new_process():
    """Accelerate keeps the first precision of a process; before and after there is none."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("short", "full"), [("no", "float32"), ("bf16", "bfloat16")])
def test_a_checkpoint_of_an_older_version_names_the_precision_short(tmp_path, short, full, new_process):
    batches = Batches(pairs(16), 8)
    options = structs.replace(OPTIONS, epochs=1, precision=full)
    train(model(), batches, None, tmp_path, options)
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert f'"precision": "{full}"' in saved["identity"]
    saved["identity"] = saved["identity"].replace(f'"precision": "{full}"', f'"precision": "{short}"')
    torch.save(saved, tmp_path / CHECKPOINT)
    assert len(train(model(), batches, None, tmp_path, options)) == 1


# --- a whole run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two sections in tables, with expression that goes by the colour, and an encoder to finetune."""
    place = tmp_path_factory.mktemp("study")

    def counts(rng, colour):
        return rng.poisson(1 + np.outer(colour / 40, np.arange(1, 8)).ravel()[:20])

    write_study(place / "study", ("A1", "B1"), 200, [f"G{i}" for i in range(20)], counts)
    base = tiny_encoder()
    base.projection = torch.nn.Linear(32, 32)  # which no encoder that is made of it keeps
    base.save_pretrained(place / "base")
    return place


CONFIG = """
name = "ours"
encoder = "{place}/base"
out = "{out}"
method = "{method}"
batch_size = 12
licence = "CC-BY-4.0"

[data]
genes = 10
patch_px = 32
mpp = 1.0
validation = ["B1"]
[[data.sections]]
kind = "st-tables"
folder = "{place}/study"
names = ["A1", "B1"]

[omics]
hidden = [32, 16]
epochs = 2

[loop]
epochs = 3
patience = 2
"""


def write_config(study, out, method="seal", change=("", "")):
    text = CONFIG.format(place=study, out=out, method=method)
    assert change[0] in text
    path = out.with_suffix(".toml")
    path.write_text(text.replace(*change) if change[0] else text)
    return path


@pytest.fixture(scope="module")
def trained(study, tmp_path_factory):
    return run(read_config(write_config(study, tmp_path_factory.mktemp("trained") / "out")))


@pytest.mark.parametrize(
    "method", ["seal", "multiscale", "clip", "regression", "probe", "stnet", "bleep", "pathomclip"]
)
def test_a_configuration_becomes_an_encoder(study, tmp_path, capsys, method):
    out = tmp_path / "out"
    assert main(["train", str(write_config(study, out, method))]) == 0
    said = capsys.readouterr().out
    assert "--encoder" in said
    assert ("validation, mean of the nearest spots: r " in said) == (method == "bleep")
    encoder = load_encoder(out)
    assert (encoder.spec.name, encoder.spec.licence, encoder.projection) == ("ours", "CC-BY-4.0", None)
    patches = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    embedded = encoder.encode(patches)
    assert embedded.shape == (3, TINY.dim)
    assert torch.equal(embedded, tiny_encoder().encode(patches)) == (method == "probe")
    if method in ("seal", "regression", "probe", "stnet"):
        assert set(encoder.genes) <= {f"G{i}" for i in range(20)}
        assert encoder.predict_expression(embedded).shape == (3, 10)
    if method in ("seal", "multiscale", "clip", "pathomclip"):
        omics = load_omics(out)
        assert (omics.name, omics.dim, omics.n_genes, omics.hidden) == ("ours", 32, 10, (32, 16))
        assert omics.encode(np.ones((2, 10), np.float32)).shape == (2, 32)
    assert ("baseline" in json.loads((out / "config.json").read_text())["training"]["config"]) == (
        method in ("stnet", "bleep", "pathomclip")
    )
    card = (out / "README.md").read_text()
    assert f"by `{method}` on 36 pairs" in card
    assert str(study) not in card + (out / "config.json").read_text()
    assert (out / "stage_2" / "curves.png").is_file()


@pytest.mark.parametrize(
    ("method", "kind", "layers"), [("seal", "mlp", ("0", "2")), ("multiscale", "linear", ("",))]
)
def test_both_halves_learn_projection_heads(study, tmp_path, method, kind, layers):
    change = ('name = "ours"', f'name = "ours"\nprojection = "{kind}"')
    run(read_config(write_config(study, tmp_path / "out", method, change)))
    encoder, omics = load_encoder(tmp_path / "out"), load_omics(tmp_path / "out")
    assert encoder.project(torch.ones(2, 32)).shape == (2, 32)
    assert omics.encode(np.ones((2, 10), np.float32), project=True).shape == (2, 32)
    for head in (encoder.projection, omics.projection_head):
        weights = {key: value for key, value in head.state_dict().items() if "weight" in key}
        assert tuple(key.rpartition(".")[0] for key in weights) == layers
        assert all(len(value) == 32 for value in weights.values())


def test_its_results_extract_as_any_encoder_s(study, trained, tmp_path):
    image = study / "study" / "images" / "A1.png"
    words = ["--slide-mpp", "1.0", "--mpp", "1", "--patch-px", "32", "--min-tissue", "0", "-q"]
    assert main([str(image), "-o", str(tmp_path), "--encoder", str(trained.path), *words]) == 0
    (features,) = tmp_path.rglob("features_ours/*.h5")
    with h5py.File(features) as file:
        assert file["features"].shape[1] == 32


@needs_hub_1
def test_to_the_hub_and_back_with_both_halves(trained, tmp_path, monkeypatch):
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        page = trained.push_to_hub("lab/ours")
        repo = hub.repos["lab/ours"]
        assert page == f"{hub.url}/lab/ours/commit/{repo.commit}"
        assert repo.private
        assert set(repo.files) == {"config.json", "model.safetensors", "omics.safetensors", "README.md"}
        encoder, omics = load_encoder("lab/ours", device="cpu"), load_omics("lab/ours")
    assert omics.genes == encoder.genes == trained.panel
    assert omics.name == "ours"


def test_a_finished_encoder_is_not_overwritten(study, trained):
    with pytest.raises(OutputError, match="holds a finished encoder"):
        run(read_config(write_config(study, trained.path)))


REFUSED_AT_ONCE = {  # by --check too, before a section is read
    ("epochs = 3", "epoch = 3"): "no option 'epoch' in loop; did you mean epochs? Allowed: epochs, lr",
    ("epochs = 3", 'epochs = "three"'): "loop.epochs is 'three'; it has to be int, got str",
    ("epochs = 3", "epochs = 0"): "loop.epochs is 0; it has to be int >= 1",
    ("[loop]", '[loop]\nprecision = "x"'): "precision is 'x'; allowed: float32, bfloat16, float16",
    ('name = "ours"', ""): "name is missing",
    ('name = "ours"', 'name = "a"\nprojection = "big"'): "projection is 'big'; allowed: linear, mlp, none",
    (
        'method = "seal"',
        'method = "bleep"\nprojection = "mlp"',
    ): "bleep has its own way to contrast; leave it",
    (
        'method = "seal"',
        'method = "bleep"\nbaseline.train = "some"',
    ): "baseline.train is 'some'; allowed: all, l",
    ('method = "seal"', 'method = "magic"'): "method is 'magic'; allowed: bleep, clip, multiscale",
    ('method = "seal"', 'method = "clip"\nseal = {}'): "'clip' fixes the options of [seal]; leave [seal] out",
    ('method = "seal"', 'checkpoint = "gone.bin"'): "checkpoint gone.bin does not exist; give the weight",
    ('encoder = "PLACE/base"', 'encoder = "konch"'): "no encoder 'konch'; did you mean conch",
    ('encoder = "PLACE/base"', 'encoder = "PLACE/bass"'): "bass; give one with",
    ('folder = "PLACE/study"', 'folder = "nowhere"'): "no folder nowhere for sections of kind",
    ('validation = ["B1"]', 'validation = ["B7"]'): "names B7, which is none of the sections A1, B1",
    ('validation = ["B1"]', 'validation = ["A1", "B1"]'): "leave some to train on",
    ('validation = ["B1"]', "validation = [1]"): "data.validation[0] is 1; it has to be str, got int",
    ('validation = ["B1"]', ""): "patience needs a validation section",
    ("genes = 10", 'panel = "no.txt"'): "cannot read the gene panel no.txt",
    ("hidden = [32, 16]", "hidden = [32]"): "omics.hidden is [32]; it has to be list of length 2, got 1",
    ("[loop]", "[multiscale]\npatch = 0\nregion = 0\n[loop]"): "one of them has to be above 0",
    ("batch_size = 12", "batch_size = -4"): "batch_size is -4; it has to be int >= 1",
    ("[loop]", "[loop]\nlr = nan"): "loop.lr is nan; it has to be float > 0",
    ("[loop]", "[loop]\nweight_decay = inf"): "loop.weight_decay is inf; it has to be float <= 1000000000",
    ("[loop]", "[loop]\nseed = 99999999999999999"): "it has to be int <= 70368744177663",
    ("[loop]", "[seal]\nlora = {r = 9999999}\n[loop]"): "seal.lora.r is 9999999; it has to be int <= 65536",
    ("[loop]", "[seal]\nlora = {q = 1}\n[loop]"): "no option 'q' in seal.lora; Allowed: blocks, r, alpha",
    ("[loop]", "[multiscale]\nstain = -1\n[loop]"): "multiscale.stain is -1; it has to be float >= 0",
    ("[loop]", "[loop]\nlr = 1" + "0" * 400): "loop.lr",
    ("batch_size = 12", "card = " + "[" * 5000): "is not TOML",
    ("batch_size = 12", 'card = "\\u0000"'): "holds the character \\u0000; leave it out",
}
REFUSED_LATER = {
    ('names = ["A1", "B1"]', 'names = ["A1", "B1", "Z9"]'): "has no counts/Z9.tsv",
    ("genes = 10", "genes = 30"): "20 genes in common, 30 are asked for; type genes = 20",
    ("batch_size = 12", "batch_size = 99"): "type batch_size = 36",
    ('method = "seal"', 'method = "probe"\nprojection = "linear"'): "no expression encoder is aligned",
}


@pytest.fixture(scope="module")
def unreadable(study, tmp_path_factory):
    """The study with tables that any attempt to read them would refuse first."""
    place = tmp_path_factory.mktemp("unreadable") / "place"
    shutil.copytree(study, place)
    for table in place.glob("study/counts/*"):
        table.write_text("broken")
    return place


@pytest.mark.parametrize("change", REFUSED_AT_ONCE)
def test_options_that_cannot_be_meant(unreadable, tmp_path, capsys, change):
    changed = tuple(text.replace("PLACE", str(unreadable)) for text in change)
    config = str(write_config(unreadable, tmp_path / "out", change=changed))
    for words in ([], ["--check"]):
        assert main(["train", *words, config]) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert REFUSED_AT_ONCE[change] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*are enlarged")
@pytest.mark.parametrize("change", REFUSED_LATER)
def test_options_that_do_not_fit_the_sections(study, tmp_path, change):
    config = read_config(write_config(study, tmp_path / "out", change=change))
    with pytest.raises(UsageError, match=REFUSED_LATER[change]):
        run(config)


def test_check_reads_the_options_and_no_more(unreadable, tmp_path, capsys):
    for short, full in {"no": "float32", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.items():
        change = ("[loop]", f'[loop]\nprecision = "{short}"')
        config = str(write_config(unreadable, tmp_path / "out", change=change))
        assert main(["train", "--check", config]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["batch_size"], said["loop"]["precision"]) == (12, full)
    assert not (tmp_path / "out").exists()
    program = "import sys; from seal_extract.cli import main; main(sys.argv[1:]); "
    program += "assert 'torch' not in sys.modules"  # which is slow to import
    subprocess.run([sys.executable, "-c", program, "train", "--check", config], check=True)


WORDS = ["-1", "0", "2.5", "1e400", "nan", "true", "[]", "[[1]]", "[{}]", "{}", "{a=1}", "1979-05-27"]
WORDS += ['""', '"x"', '"\\u0000"', '["\\u0000"]']
WORDS += ["1" + "0" * 400, "1" + "0" * 5000, "[" * 5000, f'"{"x" * 300}"']
SETTINGS = [line.partition(" = ")[0] for line in CONFIG.splitlines() if " = " in line]


@given(name=st.sampled_from(SETTINGS), value=st.sampled_from(WORDS), tail=st.binary(max_size=5))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_training_file_holds_is_taken_or_refused_in_one_line(tmp_path, name, value, tail):
    (tmp_path / "study").mkdir(exist_ok=True)
    lines = CONFIG.format(place=tmp_path, out="out", method="seal").splitlines()
    lines = [f"{name} = {value}" if line.startswith(f"{name} = ") else line for line in lines]
    (tmp_path / "config.toml").write_bytes("\n".join(lines).encode() + tail)
    told = StringIO()
    with redirect_stderr(told):
        status = main(["train", "--check", str(tmp_path / "config.toml")])
    assert "--debug shows where" not in told.getvalue()
    assert len(told.getvalue().splitlines()) == (status != 0)
