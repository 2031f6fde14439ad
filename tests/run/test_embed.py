"""How an encoder is kept busy: threads on a CPU; on a GPU, for which a stub stands, batches of one shape."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from slide_helpers import Checksums

from seal_extract.demo import untrained_encoder
from seal_extract.run import embed as embed_module
from seal_extract.run.embed import CpuEmbedder, Cuda, GpuEmbedder, open_embedder

CAPTURE_FAILED = "CUDA error: operation not permitted when stream is capturing"


class StubCuda:
    """Does at once what a GPU queues; a recorded pass leaves its result where the next one will write."""

    def __init__(self, error=None):
        self.error, self.replays = error, 0

    def record(self, work):
        result = work().clone()
        if self.error is not None:
            raise self.error

        def replay():
            self.replays += 1
            return result.copy_(work())

        return replay

    def host_memory(self, rows, columns):
        return torch.empty(rows, columns)

    def mark(self):
        return lambda: None

    def release(self):
        pass


class Small(Checksums):
    """Runs out of memory above so many rows."""

    def __init__(self, most):
        super().__init__()
        self.most, self.tried = most, []

    def compute(self, images):
        self.tried.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().compute(images)


def noise(rows, side=8):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (rows, 3, side, side), dtype=np.uint8))


def embed(embedder, patches, *sizes):
    """The embeddings of patches in batches of some sizes, all submitted before the first is read."""
    pending = [embedder.submit(part) for part in torch.split(patches, list(sizes))]
    return np.concatenate([wait() for wait in pending])


@pytest.mark.parametrize("sizes", [(16, 16, 5), (16, 1, 16, 4), (37,)])
def test_every_pass_on_a_gpu_has_one_shape_and_is_recorded_once(sizes):
    encoder, cuda = Small(16), StubCuda()
    got = embed(GpuEmbedder(encoder, 16, cuda), noise(37), *sizes)
    np.testing.assert_array_equal(got, Checksums().compute(noise(37)).numpy())
    assert set(encoder.tried) == {16}
    assert len(encoder.tried) == 1 + cuda.replays  # the stub computes once more where it records


def test_another_patch_size_is_recorded_anew():
    cuda = StubCuda()
    embedder = GpuEmbedder(Checksums(), 4, cuda)
    for side in (8, 12, 8):
        want = Checksums().compute(noise(3, side)).numpy()
        np.testing.assert_array_equal(embedder.submit(noise(3, side))(), want)
    assert cuda.replays == 3


@pytest.mark.parametrize("most", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("rows", [1, 7, 64, 130])
def test_a_batch_too_large_for_the_memory_is_halved_and_that_is_remembered(rows, most):
    encoder = Small(most)
    embedder = GpuEmbedder(encoder, 64, StubCuda())
    want = Checksums().compute(noise(rows)).numpy()
    np.testing.assert_array_equal(embedder.submit(noise(rows))(), want)
    failed = len([n for n in encoder.tried if n > most])
    encoder.tried.clear()
    np.testing.assert_array_equal(embedder.submit(noise(rows))(), want)
    assert not [n for n in encoder.tried if n > most]
    assert failed <= 6  # 64, 32, 16, 8, 4, 2


def test_one_patch_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        GpuEmbedder(Small(0), 8, StubCuda()).submit(noise(4))


def test_a_pass_that_cannot_be_recorded_is_computed_plainly_in_the_same_shape_and_that_is_said_once():
    encoder, cuda = Small(16), StubCuda(RuntimeError(CAPTURE_FAILED))
    embedder = GpuEmbedder(encoder, 16, cuda)
    with pytest.warns(
        UserWarning, match="checksums runs without a CUDA graph, more slowly: CUDA error"
    ) as said:
        got = embed(embedder, noise(37), 16, 16, 5)
    np.testing.assert_array_equal(got, Checksums().compute(noise(37)).numpy())
    assert (set(encoder.tried), cuda.replays, len(said)) == ({16}, 0, 1)


def test_a_gpu_that_has_stopped_is_not_tried_again():
    encoder = Small(16)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        GpuEmbedder(encoder, 16, StubCuda(RuntimeError("CUDA error: an illegal memory access"))).submit(
            noise(4)
        )
    assert encoder.tried == [16]


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 50])
def test_rows_come_back_in_order_from_any_number_of_threads(rows):
    want = Checksums().compute(noise(rows)).numpy()
    for threads in (1, 5):
        forward = CpuEmbedder(Checksums(), threads=threads)
        pending = [forward.submit(noise(rows)) for _ in range(4)]
        for wait in pending:
            np.testing.assert_array_equal(wait(), want)
        forward.close()


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_a_replayed_pass_gives_the_bits_of_a_plain_one_wherever_a_patch_lies(precision):
    encoder = untrained_encoder().to("cuda")
    encoder.set_precision(precision)
    patches = noise(70, 224).to("cuda")
    embedder = open_embedder(encoder, 224, batch_size=32)
    got = embed(embedder, patches, 32, 32, 6)
    np.testing.assert_array_equal(embed(embedder, patches, 5, 32, 33), got)
    plain = torch.cat([encoder.encode_unchecked(part) for part in (patches[:32], patches[32:64])]).cpu()
    np.testing.assert_array_equal(got[:64], plain.numpy())


@pytest.mark.gpu
def test_a_graph_is_recorded_while_another_thread_uses_the_gpu():
    from threading import Event, Thread

    stop, device = Event(), torch.device("cuda")

    def disturb():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not stop.is_set():
                torch.randint(0, 255, (8, 3, 300, 300), dtype=torch.uint8).pin_memory().to(
                    device
                ).float().sum()

    thread = Thread(target=disturb)
    thread.start()
    encoder = untrained_encoder().to(device)
    try:
        for _ in range(5):
            embedder = GpuEmbedder(encoder, 8, Cuda(device))
            assert np.isfinite(embedder.submit(noise(8, 224).to(device))()).all()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("precision", "flag", "seconds", "errors"),
    [
        ("float32", "avx512_bf16", 0, {"bfloat16": 0.003}),
        ("float32", "amx_bf16", 0, {"bfloat16": 0.003}),
        ("float32", "avx512_f", 0, {"bfloat16": 0.003}),
        ("float32", "avx512_bf16", 600, {"bfloat16": 0.003}),
        ("float32", "avx512_bf16", 0, {}),
        ("bfloat16", "avx512_bf16", 0, {"bfloat16": 0.003}),
    ],
)
def test_a_long_run_is_told_of_bfloat16_where_the_cpu_has_it(monkeypatch, precision, flag, seconds, errors):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    monkeypatch.setattr(embed_module, "ADVISED_S", seconds)
    encoder = Checksums("ours")
    encoder.spec = replace(encoder.spec, errors=errors, errors_basis="random weights")
    encoder.set_precision(precision)
    embedder = CpuEmbedder(encoder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        embedder.close()
    expected = precision == "float32" and "bf16" in flag and not seconds and bool(errors)
    assert len(caught) == expected
    for warning in caught:
        assert "--precision bfloat16, which moves an embedding by up to 0.3%" in str(warning.message)
