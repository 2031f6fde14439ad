"""The command line as a user types it: one line per slide, one line per error, the exit status of each."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import one_line, shared
from PIL import Image

from seal_extract import read_features
from seal_extract.demo import demo_slide
from seal_extract.run.status_table import read_status

# --- what works -------------------------------------------------------------------------------


def test_a_slide_gives_one_closing_line_and_its_files(place, run, tmp_path):
    status, out, err = run(place / "slides/a.svs", "-o", tmp_path, "--encoder", place / "encoder")
    assert (status, err) == (0, [])
    (line,) = out
    assert re.fullmatch(
        r"a.svs: \d+ patches by untrained-demo, 0.25 µm/px by openslide.mpp-x, openslide [\d.]+ "
        r"\(JPEG tiles\), [\d.]+ s, [\d.e+]+ patches/s; [\d.]+% of the tissue under no patch -> "
        r".*features_untrained-demo/a.h5",
        line,
    )
    with h5py.File(line.split("-> ")[1]) as file:
        assert file["features"].shape[1] == 192


def test_a_folder_is_resumed_without_loading_the_weights(place, run, tmp_path, monkeypatch):
    command = (place / "slides", "-o", tmp_path, "--encoder", place / "encoder")
    assert run(*command)[0] == 0

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("seal_extract.encoders.build.read_tensors", refuse)
    status, out, _ = run(*command)
    assert status == 0
    assert [line.split(" -> ")[0].split(": ")[0] for line in out[:-1]] == ["a.svs", "b.svs"]
    assert all("finished before" in line for line in out[:-1])
    assert out[-1].startswith("2 of 2 slides done")


def test_the_dry_run_touches_no_encoder_and_writes_nothing(place, run, tmp_path):
    status, out, err = run(place / "slides/a.svs", "--dry-run", "-o", tmp_path / "out", "--mpp", "20x")
    assert (status, err) == (0, [])
    assert out[0].split()[:3] == ["slide", "px", "µm/px"]
    assert re.search(
        r"a.svs +3000 x 2400 +0.25 +openslide.mpp-x +level 0, 448 px +224 px at 0.5 +448 px .*mm² +\d+$",
        out[1],
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [False, True], ids=["bundled", "own"])
def test_the_demo_embeds_maps_and_searches_a_slide(place, run, tmp_path, monkeypatch, own):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    slide = place / "slides/a.svs" if own else demo_slide()
    status, out, err = run("demo", tmp_path, *(["--slide", slide] if own else []))
    assert (status, err) == (0, [])
    pictures = [Path(line.split()[-1]) for line in out[-3:]]
    assert [p.parent.name for p in pictures] == ["20x_224px_0px_overlap", "genes", "search"]
    for picture in pictures:
        with Image.open(picture) as image:
            assert np.asarray(image.convert("L")).std() > 20  # something is on it
    assert sum(line.startswith("$ seal-extract ") for line in out) == 3


def test_help_names_every_option_and_version_answers(run):
    status, out, _ = run("--help")
    assert status == 0
    options = {"--mpp", "--slide-mpp", "--coords", "--roi", "--dry-run", "--overwrite", "--offline"}
    assert options <= set(" ".join(out).split())
    status, out, _ = run("--version")
    assert (status, out[0].split()[0]) == (0, "seal-extract")


# --- bad input: what is said, and the exit status ----------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "seal-conhc"], r"there is no encoder 'seal-conhc'; did you mean seal-conch"),
        (["--encoder", "conch", "--device", "cuda:99"], r"device is cuda:99, but this machine has \d+ CUDA"),
        (["--encoder", "conch", "--device", "gpu"], r"device is 'gpu'; allowed: cpu, cuda"),
        (["--dry-run", "--patch-px", "0"], r"--patch-px is 0; allowed: 1 or more"),
        (["--dry-run", "--mpp", "900"], r"--mpp is 900 µm/px; allowed: 0.05 to 20"),
        (["--dry-run", "--min-tissue", "2"], r"--min-tissue is 2; allowed: 0 to 1"),
        (["--dry-run", "--overlap-px", "224"], r"--overlap-px is 224; allowed: 0 to 223"),
        (["--dry-run", "--batch-size", "0"], r"--batch-size is 0; allowed: 1 or more"),
    ],
)
def test_usage_errors_exit_with_2(place, run, words, message):
    status, out, err = run(place / "slides/a.svs", *words)
    if words[:1] == ["--dry-run"]:
        out = out[1:]  # the table's head
    one_line((status, out, err), 2, message)


@pytest.mark.parametrize("words", [["--mpp", "half"], ["--mpp", "0"], ["--no-such-option"]])
def test_words_that_cannot_be_parsed_exit_with_2(place, run, words):
    status, out, err = run(place / "slides/a.svs", *words)
    assert (status, out) == (2, [])
    assert err[-1].startswith("seal-extract: error:")


def test_precision_has_one_name_and_takes_the_short_one(place, run, tmp_path):
    words = (place / "slides/a.svs", "-o", tmp_path, "--encoder", place / "encoder", "--precision")
    assert run(*words, "bf16")[0] == 0
    (features,) = map(read_features, tmp_path.rglob("features_*/a.h5"))
    assert features.provenance["encoder"]["precision"] == "bfloat16"
    _, out, _ = run(*words, "bfloat16")
    assert "finished before" in out[0]
    _, _, err = run(*words, "int4")
    assert err[-1].endswith("precision is 'int4'; allowed: float32, tf32, bfloat16, float16")


@pytest.mark.parametrize("command", ["", "bench", "evaluate", "spots"])
def test_every_command_with_a_precision_takes_both_names(run, command):
    _, out, _ = run(*command.split(), "--help")
    text = "\n".join(out)
    assert "--precision {float32,tf32,bfloat16,float16}" in text
    assert not re.search("fp32|bf16|fp16", text)
    slide = [] if command in ("bench", "") else ["no"]
    needed = {"evaluate": ["--encoder", "x", "--sections", "no"], "": ["no.svs"]}.get(command, slide)
    for name in ("fp16", "float16"):
        _, _, err = run(*command.split(), *needed, "--precision", name, "--device", "tpu")
        assert err
        assert "precision" not in err[-1]


def test_an_empty_folder_exits_with_2(place, run, tmp_path):
    one_line(run(tmp_path, "--dry-run"), 2, "holds no slide; allowed: .avs .bif .czi .dcm")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["verfy", "out"], "verify"),
        (["serach", "out", "--patch", "a:1,2"], "search"),
        (["Gene", "out", "--genes", "EPCAM"], "genes"),
        (["-q", "verify", "out"], "verify"),
    ],
)
def test_a_mistyped_command_is_named_and_nothing_is_touched(place, run, tmp_path, monkeypatch, words, meant):
    monkeypatch.chdir(tmp_path)
    assert run(place / "slides/a.svs", "-o", "out", "--encoder", place / "encoder")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    one_line(
        run(*words), 2, f"no file '{words[-2] if words[0] == '-q' else words[0]}'.* seal-extract {meant}$"
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_slide_may_be_called_like_a_command(place, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "verfy").mkdir()
    shutil.copy(place / "slides/a.svs", tmp_path / "verfy")
    assert run("verfy", "--dry-run")[0] == 0


def test_results_are_never_slides_wherever_they_lie(place, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "slides", tmp_path / "slides")
    for out in ("slides", "slides/out"):
        command = ("slides", "-o", out, "--encoder", place / "encoder")
        assert run(*command)[0] == 0
        (tmp_path / out / "20x_224px_0px_overlap" / "map.png").touch()
        status, lines, err = run(*command, "--slide-mpp", "0.25", "--overwrite", "--verbose")
        assert (status, err) == (0, [])
        assert f"{out}/overlays: ignored, made by seal-extract" in lines
        assert set(read_status(f"{out}/status.csv")) == {"", "a", "b"}
    before = (tmp_path / "slides/out/status.csv").read_bytes()
    for results in ("slides/out", "slides/out/overlays"):
        one_line(run(results, "-o", "slides/out"), 2, "holds results of seal-extract and no slide; type: ")
    one_line(run("slides/out/overlays/a.jpg", "--dry-run"), 2, "was made by seal-extract and is no slide")
    one_line(run("slides/out/*/*.jpg", "--dry-run"), 2, "holds no slide")
    assert (tmp_path / "slides/out/status.csv").read_bytes() == before


def test_two_slides_of_one_name_are_kept_apart(place, run, tmp_path):
    for site in ("x", "y"):
        (tmp_path / site).mkdir()
        (tmp_path / site / "a.svs").write_bytes((place / "slides/a.svs").read_bytes())
    status, _, _ = run(tmp_path, "-o", tmp_path / "out", "--encoder", place / "encoder")
    assert status == 0
    assert sorted(p.name for p in (tmp_path / "out").rglob("features_*/*")) == ["x__a.h5", "y__a.h5"]
    assert sorted(read_status(tmp_path / "out/status.csv")) == ["x__a", "y__a"]


def test_the_table_and_the_log_say_what_became_of_each_slide(place, run, tmp_path):
    messages = bad_slides(tmp_path)
    (tmp_path / "notes.txt").touch()
    shutil.copy(place / "slides/a.svs", tmp_path / "good.svs")
    log, missing = tmp_path / "log.jsonl", tmp_path / "missing.svs"
    command = (tmp_path, missing, "-o", tmp_path / "out", "--encoder", place / "encoder", "--log-json", log)
    status, out, err = run(*command)
    assert status == 1
    assert out[0] == "1 files ignored (1 x .txt is no slide); --verbose lists them"
    assert [line.split(":")[0] for line in out[1:-1]] == ["good.svs"]
    assert all(line.startswith("seal-extract: FAILED") for line in err[:-1])
    assert all(any(message in line for line in err) for message in messages)
    assert err[-1] == f"seal-extract: {len(messages)} of 6 slides failed"
    assert not list(tmp_path.rglob("*.part"))
    rows = read_status(tmp_path / "out/status.csv")
    assert {name: row.status for name, row in rows.items() if name} == {
        "good": "done",
        **dict.fromkeys(("missing", "text", "empty", "no_mpp", "grey"), "failed"),
    }
    assert rows["good"].patches > 0
    assert "it is text" in rows["text"].reason
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["event"] for e in events].count("failed") == 5
    assert events[0]["event"] == "start"
    end = {"event": "end", "done": 1, "failed": 5}
    assert events[-1] | {"time": 0, "seconds": 0} == end | {"time": 0, "seconds": 0}

    (tmp_path / "text.svs").unlink()
    shutil.copy(place / "slides/b.svs", tmp_path / "text.svs")
    status, out, err = run(*command, "--retry-failed")
    assert [line.split(":")[0] for line in out if "patches" in line] == ["text.svs"]
    assert out[-1].startswith("1 of 5 slides done")
    assert len(err) == 5
    assert err[-1] == "seal-extract: 4 of 5 slides failed"
    assert read_status(tmp_path / "out/status.csv")["good"].status == "done"


def bad_slides(folder):
    rng = np.random.default_rng(0)
    (folder / "text.svs").write_text("not a slide")
    (folder / "empty.svs").touch()
    Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(folder / "no_mpp.png")
    Image.fromarray(rng.integers(0, 256, (300, 300), dtype=np.uint8)).save(folder / "grey.png")
    return ["missing.svs does not exist", "it is text", "is empty", "--slide-mpp", "mode L"]


@pytest.mark.parametrize(
    ("file", "words", "message"),
    [
        ("broken.svs", [], "no reader opens it"),
        ("unreadable.svs", [], r"at level-0 \(0, 0\)"),
        ("boxes.tiff", [], "352.8 µm/px, which cannot be true"),
        (
            "boxes.tiff",
            ["--slide-mpp", "0.25"],
            "a patch is 448 level-0 px wide and the slide only 300 x 250",
        ),
        ("openslide-python_boxes_0.dcm", [], "a patch is 224 level-0 px wide and the slide only 16 x 16"),
        ("test3-DAPI-2-387.ndpi", [], "not a brightfield slide"),
        ("CMU-1-Small-Region.svs", ["--mpp", "0.25"], "--allow-upsampling"),
    ],
)
def test_real_bad_slides_are_one_line(place, run, tmp_path, file, words, message):
    path = shared("data/wsi", file)
    one_line(run(path, *words, "-o", tmp_path / "out", "--encoder", place / "encoder"), 1, message)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["status.csv"]


def test_output_that_cannot_be_written_is_one_line(place, run, tmp_path):
    (tmp_path / "file").touch()
    result = run(place / "slides/a.svs", "-o", tmp_path / "file/out", "--encoder", place / "encoder")
    one_line(result, 1, "a part of the path is a file; choose another -o")


def test_checkpoints_that_cannot_be_used_are_one_line(place, run, tmp_path):
    text = tmp_path / "seal_conch_vision.pth"
    text.write_text("no")
    for words, message in [
        (["--encoder", "seal-conch", "--checkpoint", tmp_path / "no.pth"], r"no\.pth"),
        (["--encoder", "seal-conch", "--checkpoint", text], r"seal_conch_vision\.pth"),
        (["--encoder", tmp_path], r"config\.json"),
    ]:
        one_line(run(place / "slides/a.svs", "-o", tmp_path / "out", *words), 1, message)


def test_an_unexpected_error_is_one_line_and_debug_shows_where(place, run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr("seal_extract.run.writer.draw_overlay", fail)
    command = (place / "slides/a.svs", "-o", tmp_path, "--encoder", place / "encoder")
    one_line(run(*command), 1, "unexpected ZeroDivisionError: by chance; --debug shows where")
    assert any(line.endswith(", in fail") for line in run(*command, "--debug")[2])


def test_ctrl_c_is_one_line(place, run, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("seal_extract.run.slide_process.open_with_grid", interrupt)
    command = (place / "slides/a.svs", "-o", tmp_path, "--encoder", place / "encoder")
    one_line(
        run(*command), 130, "Interrupted. Finished slides are kept; run the same command again to continue."
    )


def test_the_installed_command_answers():
    done = subprocess.run(
        [sys.executable, "-m", "seal_extract.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("seal-extract ")
