"""The bench: every figure is there, they agree with each other, nothing is left behind; nothing is timed."""

import json
import tempfile
from contextlib import closing

import numpy as np
import openslide
import pytest
import torch
from conftest import one_line
from PIL import Image

from seal_extract import find_tissue, make_grid
from seal_extract.bench import AT_ONCE, BenchOptions, bench
from seal_extract.bench.encoding import Pass, WholeRun
from seal_extract.bench.large_slide import TILES, write_large_slide
from seal_extract.bench.measure import Ratio, Stage, Timing, covered, kernel_seconds, take_turns
from seal_extract.bench.reading import take_sample
from seal_extract.demo import demo_slide, untrained_encoder
from seal_extract.encoders import find_spec
from seal_extract.errors import UsageError
from seal_extract.patches.reader import open_patch_reader
from seal_extract.run.options import ExtractOptions
from seal_extract.slides.slide import open_slide

ALL_STAGES = {"planning", "read", "decode", "resample", "reading", "forward", "write", "whole"}
FEW = ("--patches", "12", "--repeats", "1", "--workers", "2", "--quiet")


@pytest.fixture(scope="session")
def slide(place):
    return place / "slides" / "a.svs"


@pytest.fixture(scope="module")
def picture(slide, tmp_path_factory):
    """The same specimen as a PNG, which Pillow reads."""
    path = tmp_path_factory.mktemp("bench") / "a.png"
    with open_slide(slide) as opened:
        Image.fromarray(opened.read_region((0, 0), 0, opened.size_l0)).save(path, compress_level=1)
    return path


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path_factory, monkeypatch):
    """No file, and no other number of threads."""
    folder, threads = tmp_path_factory.mktemp("temporary"), torch.get_num_threads()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []
    assert torch.get_num_threads() == threads


def figures(run, *words):
    status, out, err = run("bench", *words, "--json")
    assert (status, err) == (0, [])
    return json.loads("\n".join(out))


# --- the figures --------------------------------------------------------------------------------------


def test_without_arguments_a_large_slide_and_an_untrained_encoder_are_made(run):
    status, out, err = run("bench", "--size-px", "2400", *FEW)
    assert (status, err) == (0, [])
    assert "Slide(large.svs: 2400 x 2400 px" in out[0]
    assert out[0].endswith(", which repeats the bundled slide; JPEG tiles")
    assert "Encoder(untrained-demo" in out[2]
    assert "UNTRAINED: random weights" in out[2]


@pytest.mark.parametrize("tiles", TILES)
def test_the_large_slide_repeats_the_bundled_one(tmp_path, tiles):
    path = write_large_slide(tmp_path / "large.svs", (5000, 6001), tiles)
    width, height = (2160, 2880) if tiles.endswith("240") else (2048, 2816)
    with openslide.OpenSlide(path) as large, openslide.OpenSlide(demo_slide()) as demo:
        assert large.properties["openslide.vendor"] == "aperio"
        assert float(large.properties["openslide.mpp-x"]) == 0.25
        assert large.level_dimensions == ((5000, 6001), (1250, 1500), (312, 375))
        first, again, own, reduced = (
            np.asarray(slide.read_region(xy, level, (500, 600)).convert("RGB")).astype(int)
            for slide, xy, level in (
                (large, (800, 900), 0),
                (large, (800 + width, 900 + height), 0),
                (demo, (800, 900), 0),
                (large, (0, 0), 1),
            )
        )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - own).mean() == 0 if tiles == "rgb-240" else 0 < np.abs(first - own).mean() < 10
    whole = reduced[225:375, 200:325].mean(axis=(0, 1))
    assert np.abs(whole - own.mean(axis=(0, 1))).max() < 2
    with open_slide(path) as slide:
        grid = make_grid(slide, find_tissue(slide))
        reader = open_patch_reader(slide, grid, torch.device("cpu"))
        assert reader.name == "JPEG tiles"  # the same pixels as OpenSlide's
        reader.close()


@pytest.mark.parametrize(("size", "tiles"), [((15, 100), "420-256"), ((100, 100), "411-256")])
def test_a_large_slide_that_cannot_be_made_is_refused(tmp_path, size, tiles):
    with pytest.raises(UsageError, match="allowed: "):
        write_large_slide(tmp_path / "large.svs", size, tiles)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def report(slide):
    encoder = untrained_encoder()
    options = BenchOptions(patches=12, repeats=1, against_openslide=True)
    found = bench([slide], encoder, run=ExtractOptions(workers=2), options=options)
    assert "encode_unchecked" not in vars(encoder)
    return found


def test_every_figure_is_there_and_they_agree(report):
    found = json.loads(json.dumps(report.to_json()))
    stages, whole, rival = found["stages"], found["whole"], found["against_openslide"]
    assert set(stages) == ALL_STAGES
    for stage in stages.values():
        assert stage["patches_per_s"] == pytest.approx(stage["patches"] / stage["seconds"])
        assert stage["seconds_min"] <= stage["seconds"] <= stage["seconds_max"]
    assert {stages[name]["patches"] for name in ALL_STAGES - {"resample", "planning"}} == {12}
    assert stages["planning"]["patches"] == found["slides"][0]["patches_in_grid"]
    assert stages["resample"]["patches"] >= 12
    assert not found["synthetic"]
    assert found["decoder"] == "JPEG tiles"
    assert 12 == found["slides"][0]["patches"] < found["slides"][0]["patches_in_grid"]
    assert found["limits"] in AT_ONCE
    slowest = stages[AT_ONCE[found["limits"]]]["patches_per_s"]
    assert slowest == min(stages[name]["patches_per_s"] for name in AT_ONCE.values() if name in stages)
    assert found["read_ratio_vs_openslide"] == rival["patches_per_s"]["median"] > 0
    assert rival["headline"] == "patches_per_s"
    assert rival["other"]["patches"] == 12
    assert found["against_one_thread"]["patches_per_s"]["median"] > 0
    assert found["whole_vs_forward"] == whole["whole_vs_forward"] > 0
    assert 0 < found["encoder_busy"] == whole["encoder_busy"] <= 1
    assert 0 < whole["encoder_busy_cpu"] <= 1
    assert whole["kernels_busy"] is None  # of a GPU alone
    assert 0 <= whole["startup_s"] < stages["whole"]["seconds_max"]
    assert not whole["with_tissue"]
    assert whole["flops_per_patch"] == pytest.approx(2.5e9, rel=0.02)  # ViT-Ti at 224 px
    assert min(whole[f"{what}_tflops_per_s"] for what in ("forward", "matrix")) > 0
    assert whole["matrix_share"] > 0
    assert found["whole_vs_forward_cpu"] == whole["whole_vs_forward_cpu"] > 0
    assert found["encoder"]["untrained"]
    assert found["encoder"]["name"] == "untrained-demo"
    assert found["options"]["patch_px"] == 224
    assert {"seal-extract", "torch", "python"} <= set(found["versions"])
    assert found["machine"]["cores"] > 0


def test_the_table_begins_with_ratios_and_ends_with_the_machine(report):
    lines = report.lines()
    assert [line.split()[0] for line in lines[:3]] == ["slide", "patches", "encoder"]
    assert lines[4].split() == ["ratio", "median", "min", "max"]
    head = next(i for i, line in enumerate(lines) if line.startswith("stage"))
    assert head > 4
    assert lines[head].split() == ["stage", "patches/s", "patches/CPU-s", "s", "CPU-s", "threads", "what"]
    assert {line.split()[0] for line in lines[head + 1 : head + 9]} == ALL_STAGES
    assert any(line.startswith("limits ") for line in lines)
    assert lines[-1].startswith("machine ")
    assert "seal-extract " in lines[-1]


def test_one_thread_is_judged_by_cpu_time_and_compared_with_no_other(slide, run):
    words = (slide, "--against", "openslide", *FEW, "--workers", "1", "--reading-only")
    found = figures(run, *words)
    rival = found["against_openslide"]
    assert rival["headline"] == "patches_per_cpu_s"
    assert found["read_ratio_vs_openslide"] == rival["patches_per_cpu_s"]["median"]
    assert found["against_one_thread"] is None
    assert set(found["stages"]) == {"planning", "read", "decode", "resample", "reading"}
    assert found["whole"] is found["encoder"] is found["encoder_busy"] is None


def test_fewer_patches_than_asked_are_said(slide, run):
    status, out, _ = run("bench", slide, *FEW, "--patches", "100000", "--reading-only")
    assert status == 0
    assert "(100000 asked)" in out[1]


@pytest.mark.parametrize(
    ("words", "decoder"),
    [
        (["--resample", "area", "--patch-px", "256"], "JPEG tiles"),
        (["--fast-decode", "--patch-px", "256"], "JPEG tiles at 1/2"),
    ],
)
def test_what_decoding_does_by_itself_is_not_counted_as_resampling(slide, run, words, decoder):
    found = figures(run, slide, *FEW, *words, "--reading-only")
    assert found["decoder"] == decoder
    assert found["stages"]["resample"]["seconds"] is None
    assert "nothing left to do" in found["stages"]["resample"]["does"]


def test_reading_is_part_of_decoding_where_the_reader_does_both(picture, run):
    found = figures(run, picture, "--slide-mpp", "0.25", *FEW, "--reading-only")
    assert found["decoder"].startswith("regions: ")
    assert found["stages"]["read"]["seconds"] is None
    assert "part of decode" in found["stages"]["read"]["does"]
    assert found["stages"]["resample"]["seconds"] > 0
    assert found["limits"] in {"planning", "reading"}


def test_several_slides_are_one_whole_which_finds_the_tissue_if_all_patches_are_asked(place, run):
    slides = sorted((place / "slides").iterdir())
    found = figures(run, *slides, *FEW, "--patches", "100000", "--patch-px", "448")
    counts = [s["patches"] for s in found["slides"]]
    assert counts == [s["patches_in_grid"] for s in found["slides"]]
    assert found["stages"]["whole"]["patches"] == sum(counts)
    assert found["stages"]["reading"]["patches"] == counts[0]
    assert found["whole"]["slides"] == 2
    assert found["whole"]["with_tissue"]


def test_json_goes_to_a_file(slide, run, tmp_path):
    file = tmp_path / "figures.json"
    status, out, _ = run("bench", slide, *FEW, "--reading-only", "--json", file)
    assert (status, out) == (0, [f"figures -> {file}"])
    assert json.loads(file.read_text())["decoder"] == "JPEG tiles"


def test_the_architecture_of_an_encoder_is_measured_without_its_weights(slide, run):
    words = (slide, *FEW, "--patches", "4", "--untrained")
    found = figures(run, *words, "timm:vit_tiny_patch16_224")["encoder"]
    assert found["name"].startswith("untrained-timm-vit_tiny_patch16_224")
    assert (found["dim"], found["untrained"]) == (192, True)
    one_line(run("bench", *words, "univ3"), 2, "did you mean uni")
    one_line(run("bench", *words, "uni", "--encoder", "seal-tiny"), 2, "give one of them")


def test_untrained_embeddings_differ_from_patch_to_patch(slide):
    """Also behind LayerScale, which a random weight of zero would make a multiplication by zero."""
    encoder = untrained_encoder(find_spec("h0mini"))
    assert all(float(weight.std()) > 0 for weight in encoder.tower.state_dict().values())
    with (
        take_sample(slide, 2, torch.device("cpu"), ExtractOptions()) as sample,
        closing(sample.open_reader()) as reader,
    ):
        a, b = encoder.encode(reader.read(range(2)).pixels)
    assert 0.05 < (a - b).norm() / a.norm() < 2


# --- what the figures are made of ---------------------------------------------------------------------


def test_the_sample_is_the_middle_of_the_grid(slide):
    options = ExtractOptions(patch_px=64)
    with take_sample(slide, 10**9, torch.device("cpu"), options) as everything:
        xy_l0 = everything.grid.xy_l0
        assert everything.is_whole
    with take_sample(slide, 5, torch.device("cpu"), options) as few:
        first = (len(xy_l0) - 5) // 2
        np.testing.assert_array_equal(few.grid.xy_l0, xy_l0[first : first + 5])
        assert few.in_grid == len(xy_l0)


def test_decoding_alone_gives_the_regions_that_a_run_resamples(slide):
    with take_sample(slide, 6, torch.device("cpu"), ExtractOptions()) as sample:
        alone, run = sample.open_without_resampling(), sample.open_reader()
        regions = alone.read(range(6)).pixels
        assert regions.shape[-1] == sample.grid.read_px == 448
        assert torch.equal(run.to_patches(regions), run.read(range(6)).pixels)
        alone.close()
        run.close()


def test_a_run_is_divided_into_start_gaps_and_end():
    passes = [Pass(1.0, 3.0, 1.5), Pass(1.5, 4.0, 2.5), Pass(4.5, 5.0, 0.5)]
    run = WholeRun.of(Timing(6.0, 9.0), passes, at_once=2)
    assert run.startup_s == 1.0
    assert run.longest_gap_s == 0.5
    assert run.tail_s == 1.0
    assert run.busy == pytest.approx(5.0 / 12)
    assert run.busy_cpu == pytest.approx(4.5 / 12)
    assert run.pass_s == 2.0


def test_kernels_that_overlap_are_counted_once():
    assert covered([(4, 5), (0, 2), (1, 3), (1, 2)]) == 4
    assert covered([]) == 0


def test_the_profiler_gives_the_seconds_of_computing():
    matrix = torch.ones(300, 300)
    seconds = kernel_seconds(lambda: matrix @ matrix, torch.device("cpu"))
    assert 0 < seconds < 60


def test_medians_ratios_and_turns():
    stage = Stage.of("", 10, 1, (Timing(1.0, 2.0), Timing(5.0, 4.0), Timing(2.0, 3.0)))
    assert (stage.seconds, stage.cpu_seconds, stage.patches_per_s) == (2.0, 3.0, 5.0)
    assert Ratio.of([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == Ratio(3.0, 2.0, 4.0)
    order = []

    def note(name):
        order.append(name)
        return Timing(1.0, 1.0)

    take_turns({"a": lambda: note("a"), "b": lambda: note("b")}, 3, lambda _: None)
    assert order == ["a", "b", "b", "a", "a", "b"]


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patches", "0"], "--patches is 0; allowed: 1 or more"),
        (["--repeats", "0"], "--repeats is 0; allowed: 1 or more"),
        (["--workers", "0"], "--workers is 0; allowed: 1 or more"),
        (["--encoder", "seal-conhc"], "did you mean seal-conch"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--checkpoint", "a.pth"], "type --encoder NAME too"),
        (["--json", "other.svs"], "no name that ends in .json"),
    ],
)
def test_usage_errors_exit_with_2(slide, run, words, message):
    one_line(run("bench", slide, *words), 2, message)


def test_a_slide_is_not_written_over(run, slide):
    before = slide.stat().st_mtime_ns
    one_line(run("bench", "--json", slide), 2, "give slides before --json")
    assert slide.stat().st_mtime_ns == before


def test_two_slides_of_one_name_are_refused(slide):
    with pytest.raises(UsageError, match="have one name"):
        bench([slide, slide], None)


def test_slides_that_cannot_be_measured_are_one_line(run, tmp_path):
    (tmp_path / "text.svs").write_text("not a slide")
    one_line(run("bench", tmp_path / "text.svs", "--reading-only"), 1, "it is text")
    Image.fromarray(np.full((600, 600, 3), 240, np.uint8)).save(tmp_path / "glass.png")
    one_line(
        run("bench", tmp_path / "glass.png", "--slide-mpp", "0.5", "--reading-only"), 1, "no tissue was found"
    )


def test_openslide_is_no_rival_where_it_does_not_open_the_slide(picture, run):
    words = (picture, "--slide-mpp", "0.25", "--reading-only", *FEW)
    one_line(run("bench", *words, "--against", "openslide"), 2, "is read by pillow")
