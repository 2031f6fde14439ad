"""Many slides in one stream: each as if it were alone, whatever its neighbours, and nothing left behind."""

import _thread
import gc
import os
import shutil
import signal
import threading
import time

import h5py
import numpy as np
import pytest
import torch
from cohort_fixtures import resident_mb
from PIL import Image
from slide_helpers import Checksums, Damage
from synthetic_slide import write_synthetic_slide

from seal_extract import ExtractOptions, extract, extract_cohort
from seal_extract.demo import untrained_encoder
from seal_extract.errors import DeviceError, EncoderError, ReadError, ResolutionError, SlideOpenError
from seal_extract.run import job, slide_process, writer
from seal_extract.run.extract import extract_many
from seal_extract.run.job import SlideJob
from seal_extract.run.status_table import read_status


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Slides of several sizes and kinds, one of them without tissue."""
    folder = tmp_path_factory.mktemp("slides")
    paths = [
        write_synthetic_slide(folder / "a.svs", (1500, 1100), mpp=0.5, downsamples=(1, 4)),
        write_synthetic_slide(
            folder / "b.svs", (2600, 2000), mpp=0.25, downsamples=(1, 4), seed=1, tile_px=240
        ),
        folder / "glass.png",
        write_synthetic_slide(folder / "c.svs", (1400, 1300), mpp=0.5, compression="jpeg2000", seed=2),
    ]
    Image.fromarray(np.full((900, 900, 3), 244, np.uint8)).save(paths[2])
    return paths


def run(paths, out, encoder=None, **options):
    """Features (or the error) of each slide by its name."""
    options = ExtractOptions(**options)
    results = list(extract_many(paths, [encoder or Checksums()], out, options=options))
    assert sorted(r.path for r in results) == sorted(paths)
    return {r.path.name: r.error or r.features[0] for r in results}


@pytest.fixture(scope="module")
def alone(slides, tmp_path_factory):
    """The features of each slide read by itself."""
    out = tmp_path_factory.mktemp("alone")
    return {path.name: extract(path, Checksums(), out) for path in slides if path.suffix == ".svs"}


# --- the numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "batch_size", "workers"), [([0, 1, 3], 5, 3), ([3, 0, 1], 64, 1), ([1, 3, 0], 1, 8)]
)
def test_a_slide_in_the_stream_is_as_if_alone(slides, alone, tmp_path, order, batch_size, workers):
    paths = [slides[i] for i in order]
    got = run(paths, tmp_path, batch_size=batch_size, workers=workers)
    for path in paths:
        np.testing.assert_array_equal(got[path.name].grid.xy_l0, alone[path.name].grid.xy_l0)
        np.testing.assert_array_equal(got[path.name].features, alone[path.name].features)
    assert len({tuple(f.features[0]) for f in got.values()}) == len(paths)


def test_embeddings_of_a_real_tower_are_bitwise_the_same_in_any_company(slides, tmp_path):
    encoder = untrained_encoder()
    paths = [slides[0], slides[3]]
    want = {p.name: extract(p, encoder, tmp_path / "alone", options=ExtractOptions(workers=1)) for p in paths}
    for i, (order, batch_size) in enumerate([(paths, 7), (paths[::-1], 16)]):
        got = run(order, tmp_path / str(i), encoder, batch_size=batch_size)
        for path in paths:
            np.testing.assert_array_equal(got[path.name].features, want[path.name].features)


def test_a_slide_without_tissue_has_no_rows_and_its_neighbours_all_theirs(slides, tmp_path):
    """A plain image says no µm/px."""
    with pytest.warns(UserWarning, match="0.25 µm/px by openslide.mpp-x, against --slide-mpp 0.5"):
        got = run(slides, tmp_path, slide_mpp=0.5)
    assert len(got["glass.png"].features) == 0
    assert got["glass.png"].features.shape[1] == 4
    for name in ("a.svs", "b.svs", "c.svs"):
        assert len(got[name].features) == len(got[name].grid) > 0


def test_slides_of_different_patch_sizes_share_a_stream(slides, tmp_path):
    paths, sizes = [slides[0], slides[3], slides[1]], (256, 100, 256)
    for path, size in zip(paths, sizes, strict=True):
        with h5py.File(tmp_path / f"{path.stem}.h5", "w") as file:
            file["coords"] = np.array([[0, 0], [512, 256], [300, 700]])
            file["coords"].attrs.update(patch_level=0, patch_size=size)
    with pytest.warns(UserWarning, match="was trained on"):
        together = run(paths, tmp_path / "out", coords=tmp_path, batch_size=2)
    for path, size in zip(paths, sizes, strict=True):
        assert together[path.name].grid.patch_px == size
        with pytest.warns(UserWarning, match="was trained on"):
            alone = extract(path, Checksums(), tmp_path / "alone", options=ExtractOptions(coords=tmp_path))
        np.testing.assert_array_equal(together[path.name].features, alone.features)


# --- bad slides among good ones ---------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
def test_bad_slides_yield_their_errors_and_the_others_are_right(slides, alone, tmp_path, place):
    tiles = Damage(slides[0], tmp_path / "tile.svs")
    for n in range(len(tiles.counts)):
        if n % 3:
            tiles.overwrite(n, bytes(tiles.counts[n]))
    (tmp_path / "text.svs").write_text("not a slide")
    bad = [tiles.write(), tmp_path / "text.svs", slides[2], tmp_path / "missing.svs"]
    good = [slides[0], slides[1]]
    got = run([*good[:place], *bad, *good[place:]], tmp_path / "out", batch_size=3)
    assert isinstance(got["tile.svs"], ReadError)
    assert "tile.svs" in str(got["tile.svs"])
    assert isinstance(got["text.svs"], SlideOpenError)
    assert isinstance(got["glass.png"], ResolutionError)
    assert isinstance(got["missing.svs"], SlideOpenError)
    for path in good:
        np.testing.assert_array_equal(got[path.name].features, alone[path.name].features)
    written = {p.name for p in (tmp_path / "out").rglob("features_*/*")}
    assert written == {f"{path.stem}.h5" for path in good}


def test_an_embedding_that_is_no_number_names_slide_and_place(slides, alone, tmp_path):
    class Sick(Checksums):
        def compute(self, images):
            embeddings = super().compute(images)
            sick = torch.from_numpy(alone["a.svs"].features[3])
            embeddings[(embeddings == sick).all(1)] = torch.nan
            return embeddings

    got = run([slides[0], slides[1]], tmp_path, Sick())
    x, y = alone["a.svs"].grid.xy_l0[3]
    assert isinstance(got["a.svs"], EncoderError)
    assert f"patch at level-0 ({x}, {y})" in str(got["a.svs"])
    assert str(slides[0]) in str(got["a.svs"])
    np.testing.assert_array_equal(got["b.svs"].features, alone["b.svs"].features)
    assert {p.name for p in tmp_path.rglob("features_*/*")} == {"b.h5"}


# --- ahead of the encoder ---------------------------------------------------------------------


@pytest.mark.parametrize("first_fails", [False, True])
def test_slides_are_planned_at_the_same_time_and_read_in_their_order(
    slides, tmp_path, monkeypatch, first_fails
):
    """The tissue of the first is found only after that of the second."""
    find, is_second_planned, begun = job.find_tissue_and_grid, threading.Event(), []

    def plan(slide, options):
        if slide.path == slides[0]:
            assert is_second_planned.wait(60)
            if first_fails:
                raise ReadError("no tissue")
        found = find(slide, options)
        if slide.path == slides[1]:
            is_second_planned.set()
        return found

    monkeypatch.setattr(slide_process, "find_tissue_and_grid", plan)
    options = ExtractOptions(plan_timeout_s=0, workers=8)
    run = extract_many(
        [slides[i] for i in (0, 1, 3)],
        [Checksums()],
        tmp_path,
        options=options,
        progress=lambda slide, *_: begun.append(slide),
    )
    failed = [result.path for result in run if result.error is not None]
    assert failed == slides[:1] * first_fails
    assert list(dict.fromkeys(begun)) == [slides[i] for i in (0, 1, 3)][first_fails:]


def test_a_picture_holds_up_no_embedding_and_its_own_slides_result(slides, tmp_path, monkeypatch):
    """Each is drawn only when the rows of all slides are written."""
    draw, written, all_written, paths = writer.draw_overlay, set(), threading.Event(), [slides[0], slides[3]]

    def draw_late(*args, **how):
        assert all_written.wait(60)
        draw(*args, **how)

    def note(slide, done, total):
        if done == total:
            written.add(slide)
        if written == set(paths):
            all_written.set()

    monkeypatch.setattr(writer, "draw_overlay", draw_late)
    for result in extract_many(paths, Checksums(), tmp_path, progress=note):
        assert result.error is None
        assert (tmp_path / f"overlays/20x_224px_0px_overlap/{result.name}.jpg").exists()


# --- nothing is left --------------------------------------------------------------------------


@pytest.fixture
def no_threads_left():
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10  # a thread that has done its work may still be on its way out
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


@pytest.mark.usefixtures("no_threads_left")
@pytest.mark.parametrize("picture_s", [0, 0.2])
def test_a_stream_closed_early_leaves_nothing_half_written(slides, tmp_path, monkeypatch, picture_s):
    draw = writer.draw_overlay
    monkeypatch.setattr(writer, "draw_overlay", lambda *a, **k: time.sleep(picture_s) or draw(*a, **k))
    stream = extract_many(
        [slides[i] for i in (0, 1, 3)], [Checksums()], tmp_path, options=ExtractOptions(batch_size=2)
    )
    first = next(stream)
    assert first.error is None
    stream.close()
    assert not list(tmp_path.rglob("*.part"))
    assert first.features[0].path.exists()
    with pytest.raises(StopIteration):
        next(stream)


@pytest.fixture
def ctrl_c_interrupts():
    """As in a terminal; a shell starts what runs in its background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("no_threads_left", "ctrl_c_interrupts")
@pytest.mark.parametrize("after", [1, 3, 6])
def test_ctrl_c_leaves_nothing_half_written(slides, tmp_path, after):
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == after:
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        for _ in extract_many(
            [slides[i] for i in (0, 1, 3)],
            [Checksums()],
            tmp_path,
            options=ExtractOptions(batch_size=2),
            progress=interrupt,
        ):
            pass
        time.sleep(10)  # the interrupt is there by now
    gc.collect()
    assert not list(tmp_path.rglob("*.part"))


def test_slides_that_fail_faster_than_they_are_drawn_do_not_pile_up(slides, tmp_path, monkeypatch):
    """Each would be open, with all its memory, until its turn to be drawn."""
    draw_on, opened = threading.Event(), []
    draw, open_slide = writer.draw_overlay, SlideJob.open
    monkeypatch.setattr(writer, "draw_overlay", lambda *a, **k: draw_on.wait(10) and draw(*a, **k))
    monkeypatch.setattr(SlideJob, "open", lambda job: opened.append(job) or open_slide(job))
    damage = Damage(slides[0], tmp_path / "bad.svs")
    bad = damage.overwrite(3, bytes(damage.counts[3])).write()
    paths = [shutil.copy(bad, tmp_path / f"{i:02}.svs") for i in range(30)]
    thread = threading.Thread(target=run, args=(paths, tmp_path / "out"))
    thread.start()
    while not opened:
        time.sleep(0.1)
    time.sleep(2)
    waiting = len(opened)
    draw_on.set()
    thread.join()
    assert 0 < waiting < 15
    assert len(opened) == 30


@pytest.mark.usefixtures("no_threads_left")
def test_an_encoder_that_breaks_stops_the_run_and_leaves_nothing(slides, tmp_path):
    class Broken(Checksums):
        def compute(self, images):
            raise RuntimeError("broken")

    results = []
    with pytest.raises(RuntimeError, match="broken"):
        for result in extract_many([slides[i] for i in (0, 1, 3)], [Broken()], tmp_path):
            results.append(result)
    assert not results  # no slide is to blame
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("features_*/*.h5"))


@pytest.mark.usefixtures("no_threads_left")
def test_a_gpu_that_stops_ends_the_run_in_one_line_that_names_the_slide(slides, tmp_path):
    class Stops(Checksums):
        def compute(self, images):
            time.sleep(0.2)  # until the slide before is written
            if (super().compute(images) == first_of_b).all(1).any():
                raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be")
            return super().compute(images)

    first_of_b = torch.from_numpy(extract(slides[1], Checksums(), tmp_path / "b").features[0])
    words = (
        f"the GPU stopped when {slides[1]} was embedded .CUDA error: device-side assert.*same command again"
    )
    with pytest.raises(DeviceError, match=words):
        extract_cohort(
            [slides[i] for i in (0, 1, 3)], Stops(), tmp_path / "out", options=ExtractOptions(batch_size=4)
        )
    rows = read_status(tmp_path / "out" / "status.csv")
    assert {name: row.status for name, row in rows.items()} == {"a": "done"}
    assert {path.name for path in tmp_path.rglob("out/**/features_*/*")} == {"a.h5"}


def open_files():
    gc.collect()
    return sorted(
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux shows a process's open files")
def test_thirty_slides_leave_no_file_open_and_memory_as_it_was(tmp_path, slides):
    small = write_synthetic_slide(tmp_path / "s.svs", (700, 600), mpp=0.5, downsamples=(1,))
    damage = Damage(small, tmp_path / "bad.svs")
    bad = damage.overwrite(3, bytes(damage.counts[3])).write()
    paths = [shutil.copy(bad if i % 5 == 4 else small, tmp_path / f"{i:02}.svs") for i in range(34)]
    run(paths[:4], tmp_path / "out")
    before, files = resident_mb(), open_files()
    got = run(paths[4:], tmp_path / "out")
    assert sum(isinstance(f, ReadError) for f in got.values()) == 6
    assert [f for f in open_files() if f not in files] == []
    assert resident_mb() - before < 200
    list(extract_many(slides[:1], [Checksums()], tmp_path / "closed")).clear()
    stream = extract_many(paths, [Checksums()], tmp_path / "closed")
    next(stream)
    stream.close()
    assert [f for f in open_files() if f not in files] == []


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"resample": "area"}, {"fast_decode": True}, {"batch_size": 7}])
def test_a_gpu_gives_the_cpus_features(slides, tmp_path, options):
    encoder = untrained_encoder()
    want = run(slides[:2], tmp_path / "cpu", encoder, **options)
    got = run(slides[:2], tmp_path / "cuda", encoder.to("cuda"), **options)
    for name, features in want.items():
        np.testing.assert_allclose(got[name].features, features.features, atol=2e-2)
        assert np.abs(got[name].features - features.features).mean() < 2e-3
