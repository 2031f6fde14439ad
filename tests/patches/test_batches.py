"""Batches: patches in the grid's order, for any number of threads and any batch size."""

import threading
import time

import numpy as np
import pytest
import torch
from slide_helpers import grid_at, grid_of_level, read

from seal_extract.errors import ReadError
from seal_extract.patches import stream as stream_module
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.regions import ROWS_AT_ONCE, HostPixels, RegionReader
from seal_extract.patches.resample import Resampling
from seal_extract.patches.stream import stream_batches
from seal_extract.slides.slide import open_slide

CPU = torch.device("cpu")


def every_patch(slide, patch_px, patch_size_l0):
    w, h = slide.size_l0
    xs, ys = range(0, w - patch_size_l0 + 1, patch_size_l0), range(0, h - patch_size_l0 + 1, patch_size_l0)
    edges = [(w - patch_size_l0, h - patch_size_l0), (w - patch_size_l0, 0), (0, h - patch_size_l0)]
    return grid_at(slide, [*((x, y) for y in ys for x in xs), *edges], patch_px, patch_size_l0)


def reader_of(slide, side=64):
    return open_patch_reader(slide, every_patch(slide, side, side), CPU)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("workers", [1, 4])
def test_order_does_not_depend_on_threads_or_batch_size(drawn, batch_size, workers):
    slide = drawn(700, 500)
    reader = open_patch_reader(slide, every_patch(slide, 32, 64), CPU)
    got = list(stream_batches([reader], batch_size, workers=workers))
    assert [len(b.row) for b in got[:-1]] == [batch_size] * (len(got) - 1)
    assert torch.cat([b.row for b in got]).tolist() == list(range(len(reader.grid)))
    np.testing.assert_array_equal(torch.cat([b.patches for b in got]).permute(0, 2, 3, 1), read(reader))


def test_batches_cross_slide_borders(drawn):
    slides = [drawn(320, 256), drawn(64, 64), drawn(256, 192)]
    readers = [*map(reader_of, slides)]
    got = list(stream_batches(readers, 16))
    counts = [len(d.grid) for d in readers]
    assert [len(b.row) for b in got] == [16] * (sum(counts) // 16) + [sum(counts) % 16]
    assert torch.cat([b.slide for b in got]).tolist() == [i for i, n in enumerate(counts) for _ in range(n)]
    assert torch.cat([b.row for b in got]).tolist() == [row for n in counts for row in range(n)]
    first = got[0]
    for patch, s, row in zip(first.patches, first.slide.tolist(), first.row.tolist(), strict=True):
        x, y = readers[s].grid.xy_l0[row]
        np.testing.assert_array_equal(patch.permute(1, 2, 0), slides[s].pixels[y : y + 64, x : x + 64])


@pytest.mark.parametrize("batch_size", [5, 16, 100])
def test_patches_read_in_place_are_those_read_alone(slide_of, batch_size):
    """Jobs fill the memory of a batch; it is whole although slides end within batches."""
    with open_slide(slide_of("420")) as slide:
        grids = [grid_of_level(slide, 0, [(x, 64 * i) for x in range(0, 1280, 64)], 64) for i in range(3)]
        want = np.concatenate([read(open_patch_reader(slide, grid, CPU)) for grid in grids])
        readers = [open_patch_reader(slide, grid, CPU) for grid in grids]
        got = list(stream_batches(readers, batch_size, workers=3))
    np.testing.assert_array_equal(torch.cat([b.patches for b in got]).permute(0, 2, 3, 1), want)
    assert all(b.patches.data_ptr() % 2 for b in got)


def test_another_patch_size_begins_a_new_batch(drawn):
    readers = [reader_of(drawn(256, 256)), reader_of(drawn(200, 200), side=40)]
    assert {tuple(x.patches.shape[2:]) for x in stream_batches(readers, 1000)} == {(64, 64), (40, 40)}


def test_slides_without_patches_are_passed_over(drawn):
    slide = drawn(256, 256)
    readers = [open_patch_reader(slide, grid_at(slide, [], 64, 64), CPU), reader_of(drawn(128, 128))]
    (batch,) = stream_batches(readers, 64)
    assert set(batch.slide.tolist()) == {1}
    assert list(stream_batches(readers[:1], 64)) == []


def test_no_more_is_read_ahead_than_the_memory_set_aside(drawn, monkeypatch):
    monkeypatch.setattr(stream_module, "READ_AHEAD_BYTES", 3 * ROWS_AT_ONCE * 32 * 32 * 3)
    reader, seen = reader_of(drawn(640, 640), side=32), []

    def black(rows, out):
        seen.append(rows)
        return HostPixels(torch.zeros(len(rows), 3, 32, 32, dtype=torch.uint8))

    reader.read = black
    stream = stream_batches([reader], ROWS_AT_ONCE, workers=1)
    for i in range(5):
        next(stream)
        time.sleep(0.02)
        assert len(seen) <= i + 1 + 3
    stream.close()


def test_a_region_that_cannot_be_read_stops_the_stream_and_its_threads(drawn):
    slide = drawn(640, 640)
    whole = slide.read_region

    def read_region(xy_l0, level, size_px):
        if xy_l0 == (320, 320):
            raise ReadError("the file is damaged at level-0 (320, 320)")
        return whole(xy_l0, level, size_px)

    slide.read_region = read_region
    before = threading.active_count()
    seen = 0
    with pytest.raises(ReadError, match=r"\(320, 320\)"):
        for batch in stream_batches([reader_of(slide, side=32)], 8):
            seen += len(batch.row)
    assert seen == (10 * 20 + 10) // 8 * 8
    assert threading.active_count() == before


def test_a_region_of_another_size_is_an_error_not_a_patch(drawn):
    slide = drawn(128, 128)
    slide.read_region = lambda xy_l0, level, size_px: np.zeros((10, 10, 3), np.uint8)
    with pytest.raises(ReadError, match=r"gave 10 x 10 px instead of 32 x 32 at level-0 \(0, 0\)"):
        list(stream_batches([reader_of(slide, side=32)], 8))


def test_what_is_resampled_on_a_gpu_goes_there_once_a_batch(drawn, monkeypatch):
    """Jobs of two slides fill the memory of a batch; a slide that fails in it does not spoil the others."""
    uploads, whole = [], stream_module._Upload.__call__

    def upload(self, to_patches, pixels):
        uploads.append((len(pixels), pixels.shape[-1]))
        return whole(self, to_patches, pixels)

    monkeypatch.setattr(stream_module._Upload, "__call__", upload)
    slides, late = [drawn(700, 500), drawn(320, 256), drawn(500, 700)], Resampling(32, early=False)
    grids = [every_patch(slide, 32, 64) for slide in slides]
    want = [read(open_patch_reader(*pair, CPU)) for pair in zip(slides, grids, strict=True)]
    pairs = list(zip(slides, grids, strict=True))
    got = list(stream_batches([RegionReader(*pair, late) for pair in pairs], 40, workers=3))
    np.testing.assert_array_equal(
        torch.cat([b.patches for b in got]).permute(0, 2, 3, 1), np.concatenate(want)
    )
    assert uploads == [(len(batch), 64) for batch in got]

    readers = [RegionReader(*pair, late) for pair in pairs]
    readers[1].read = lambda rows, out: raised(ReadError("gone"))
    failed = []
    got = list(stream_batches(readers, 40, on_failure=lambda slide, _: failed.append(slide)))
    assert failed == [1]
    np.testing.assert_array_equal(
        torch.cat([b.patches for b in got]).permute(0, 2, 3, 1), np.concatenate([want[0], want[2]])
    )


def failing_upload(reader, error, times):
    """A reader that fills no memory of a batch, and raises ``error`` so many times at the upload."""
    read, whole, left = reader.read, reader.to_patches, [error] * times
    reader.read = lambda rows, out=None: read(rows)
    reader.to_patches = lambda pixels: whole(pixels) if not left else raised(left.pop())
    return reader


def raised(error):
    raise error


def test_an_upload_without_memory_is_tried_again_as_long_as_room_can_be_made(drawn):
    slide, no_memory = drawn(700, 500), torch.OutOfMemoryError("CUDA out of memory")
    want = torch.cat([batch.patches for batch in stream_batches([reader_of(slide)], 16)])
    asked = []
    reader = failing_upload(reader_of(slide), no_memory, 3)
    got = list(stream_batches([reader], 16, make_room=lambda: asked.append(1) or True))
    np.testing.assert_array_equal(torch.cat([batch.patches for batch in got]), want)
    assert len(asked) == 3
    with pytest.raises(torch.OutOfMemoryError):
        list(stream_batches([failing_upload(reader_of(slide), no_memory, 1)], 16))


def test_a_gpu_that_has_stopped_ends_the_stream_and_fails_no_slide(drawn):
    failed, lost = [], RuntimeError("CUDA error: an illegal memory access was encountered")
    readers = [failing_upload(reader_of(drawn(320, 256)), lost, 1), reader_of(drawn(256, 192))]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(stream_batches(readers, 16, on_failure=lambda *_: failed.append(1)))
    assert not failed
