"""The examples run as they are written."""

import runpy
import shutil
from pathlib import Path

import h5py
import pandas as pd
import pytest
import torch
from cohort_fixtures import run_here
from conftest import shared
from PIL import Image
from safetensors.torch import load_file

from seal_extract import extract, load_encoder, load_omics
from seal_extract.features.export import export

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_one_slide(place, tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "01_one_slide.py"))["main"]
    main(str(place / "slides" / "a.svs"), str(place / "encoder"), str(tmp_path))
    printed = capsys.readouterr().out
    assert printed.startswith("Slide(a.svs: 3000 x 2400 px, 0.25 µm/px by openslide.mpp-x")
    assert "TissueMask(" in printed
    assert "PatchGrid(" in printed
    assert "features float32 (" in printed
    assert (tmp_path / "20x_224px_0px_overlap/features_untrained-demo/a.h5").exists()


def test_folder(place, tmp_path, capsys):
    shutil.copytree(place / "slides", tmp_path / "slides")
    Image.new("RGB", (300, 300)).save(tmp_path / "slides" / "no_mpp.png")
    main = runpy.run_path(str(EXAMPLES / "02_folder.py"))["main"]
    assert main(str(tmp_path / "slides"), str(place / "encoder"), str(tmp_path / "out")) == 1
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed["a"].startswith("done")
    assert printed["b"].startswith("done")
    assert printed["no_mpp"].startswith("failed")
    assert "--slide-mpp" in printed["no_mpp"]


def test_clam_style_mil(place, tmp_path, capsys):
    encoder = load_encoder(place / "encoder", device="cpu")
    for slide in ("a.svs", "b.svs"):
        extract(place / "slides" / slide, encoder, tmp_path / "out")
    assert all(e.state == "written" for e in export(tmp_path / "out", "clam", tmp_path / "clam"))
    (tmp_path / "labels.csv").write_text("slide,label\na,1\nb,0\n")
    main = runpy.run_path(str(EXAMPLES / "05_clam_style_mil.py"))["main"]
    saved = tmp_path / "mil.pt"
    last = main(
        str(tmp_path / "clam/features_untrained-demo"), str(tmp_path / "labels.csv"), str(saved), "100"
    )
    printed = capsys.readouterr().out.splitlines()
    first = float(printed[0].removeprefix("epoch 1: loss "))
    assert last < first / 2
    assert printed[-2].startswith("a: class 1, most attention at level-0 (")
    assert printed[-1].startswith("b: class 0, most attention at level-0 (")
    slide, out = place / "slides/a.svs", tmp_path / "out"
    done = run_here(slide, "-o", out, "--encoder", place / "encoder", "--slide-level", saved)
    assert done.returncode == 0, done.stderr
    (path,) = out.rglob("slide_features_*/a.h5")
    with h5py.File(path) as file:
        x, y = file["coords"][file["attention"][0].argmax()]
    assert printed[-2].endswith(f"({x}, {y})")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_without_arguments_an_example_says_how_it_is_run(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [path.name])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code not in (0, None)
    said = str(ended.value.code) + capsys.readouterr().err
    assert f"examples/{path.name} " in said or "usage: " in said


@pytest.mark.slow  # two minutes: a real section
@pytest.mark.filterwarnings("ignore:.*enlarged", "ignore:.*left out")
def test_seal_tiny_is_trained_to_the_same_weights_after_a_stop(tmp_path, monkeypatch):
    main = runpy.run_path(str(EXAMPLES / "06_seal_tiny.py"))["main"]
    her2st, others = shared("data", "her2st"), ["C2", "C4", "C5"]
    main(her2st, tmp_path / "tiny", others, steps=10)  # two epochs
    encoder = load_encoder(tmp_path / "tiny")
    assert (encoder.spec.name, len(encoder.genes or ())) == ("seal-tiny", 500)
    assert "Andersson et al." in (tmp_path / "tiny" / "README.md").read_text()
    assert load_omics(tmp_path / "tiny").genes == encoder.genes

    class StoppedError(Exception):
        pass

    def stop(*line):  # after the checkpoint of the first epoch
        raise StoppedError

    monkeypatch.setattr("builtins.print", stop)
    with pytest.raises(StoppedError):
        main(her2st, tmp_path / "again", others, steps=10)
    monkeypatch.undo()
    main(her2st, tmp_path / "again", others, steps=10)
    assert pd.read_csv(tmp_path / "again-pretraining/metrics.csv")["epoch"].tolist() == [1, 2]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("tiny-base", "again-base"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_are_short(path):
    most = {"06_seal_tiny.py": 300, "07_evaluation.py": 145}  # they have a method, or a cohort, of their own
    assert len(path.read_text().splitlines()) < most.get(path.name, 60)


@pytest.mark.slow  # three minutes
@pytest.mark.filterwarnings("ignore:.*enlarged", "ignore:.*left out")
def test_evaluation(tmp_path):
    her2st = shared("data", "her2st")
    found = runpy.run_path(str(EXAMPLES / "07_evaluation.py"))["main"](str(tmp_path), str(her2st))
    assert found["nuclei"][0] > 0.6
    assert found["coin"][0] < 0.5 < found["coin"][1]
    page = (tmp_path / "evaluation" / "evaluation.html").read_text()
    for heading in ("Slides and patients: coin", "HEST-Benchmark", "Expression by", "Classes of", "Scanners"):
        assert f"<h2>{heading}" in page


@pytest.mark.slow  # a minute each: a real section
@pytest.mark.filterwarnings("ignore:.*enlarged", "ignore:.*left out")
def test_gene_map_and_search(tmp_path):
    her2st = str(shared("data", "her2st"))
    main = runpy.run_path(str(EXAMPLES / "03_gene_map.py"))["main"]
    found = main(her2st, "C2", "EPCAM,IGLC2", "seal-tiny", str(tmp_path / "maps"))
    assert min(found.values()) > 0.4  # it has seen this section
    assert {p.name for p in (tmp_path / "maps").glob("*.png")} == {"C2_EPCAM.png", "C2_IGLC2.png"}
    main = runpy.run_path(str(EXAMPLES / "04_search_by_genes.py"))["main"]
    assert main(her2st, "C2", "EPCAM,CD24,KRT8", "seal-tiny", str(tmp_path / "found")) > 60
    assert (tmp_path / "found" / "contact_sheet.png").exists()
