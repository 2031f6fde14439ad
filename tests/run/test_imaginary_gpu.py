"""How far the host keeps up with a GPU: an encoder that takes a stated time a patch, and none of the CPU.

The shares depend on the cores and on what else they do, so they are printed and not held:
``pytest -m slow -s tests/run/test_imaginary_gpu.py``
"""

import time

import pytest
from slide_helpers import ImaginaryGpu

from seal_extract.bench import BenchOptions, bench
from seal_extract.bench.large_slide import write_large_slide
from seal_extract.run import extract as extract_module
from seal_extract.run.extract import extract_many
from seal_extract.run.options import ExtractOptions

SLIDES, SIDE_PX = 5, 20_000
BATCH = 256


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return [write_large_slide(folder / f"{i}.svs", (SIDE_PX, SIDE_PX - 256 * i)) for i in range(SLIDES)]


class Queue:
    """An imaginary GPU that is given whole batches without waiting, as `GpuEmbedder` gives them."""

    batch_size = BATCH

    def __init__(self, gpu):
        self.submit = gpu.queue

    def make_room(self):
        return False

    def close(self):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1100, 8000])
def test_five_slides_with_their_pictures(slides, tmp_path, rate, monkeypatch):
    gpu, began = ImaginaryGpu(rate), time.perf_counter()
    monkeypatch.setattr(extract_module, "open_embedder", lambda *_, **options: Queue(gpu))
    results = list(extract_many(slides, gpu, tmp_path, options=ExtractOptions(batch_size=BATCH)))
    patches, seconds = sum(len(r.features[0].grid) for r in results), time.perf_counter() - began
    pictures = list(tmp_path.glob("overlays/*/*.jpg"))
    print(f"{rate} patches/s: busy {gpu.busy:.1%}, {patches} patches in {seconds:.1f} s")
    assert len(pictures) == len(results) == SLIDES
    assert 0 < gpu.busy <= 1


@pytest.mark.slow
def test_the_bench_names_reading_beside_a_fast_gpu(slides):
    report = bench(
        slides[:1], ImaginaryGpu(8000), run=ExtractOptions(batch_size=BATCH), options=BenchOptions(repeats=1)
    )
    print(*report.lines(), sep="\n")
    assert report.limits == "reading"


def test_the_bench_names_the_encoder_beside_a_slow_one(place):
    slow = ImaginaryGpu(5)
    report = bench([place / "slides" / "a.svs"], slow, options=BenchOptions(patches=8, repeats=1))
    assert report.limits == "encoder"
    assert 0 < slow.busy <= 1
