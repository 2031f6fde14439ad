"""Compressed tiles to pixels: our kernels, nvImageCodec, torchvision and the CPU, and how they differ."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import simplejpeg
import tifffile
import torch
from card import Card, Found, Row
from torch import Tensor

from seal_extract.bench.large_slide import abbreviated_jpeg
from seal_extract.bench.measure import each, reading_threads
from seal_extract.demo import demo_slide

Decode = Callable[[list[bytes]], object]
Contender = Callable[[Card], tuple[Decode, Callable[[object], Tensor]]]  # the latter: to uint8 [T, h, w, 3]
BATCHES = (64, 256, 1024)
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
KINDS = {  # colours as `abbreviated_jpeg` names them, and the transform of the Adobe marker
    "4:2:0": ("420", None),
    "4:2:2": ("422", None),
    "4:4:4": ("444", None),
    "4:2:0, APP14 1": ("420", 1),
    "RGB, APP14 0": ("rgb", 0),
}
JPEG2000 = ", JPEG 2000"  # at the end of the names of those that decode it


def decoding(card: Card) -> Found:
    """Tiles per second by contender, kind and batch; differences of each from the CPU."""
    tiles = {kind: [_jpeg(tile, *how) for tile in _tiles(card)] for kind, how in KINDS.items()}
    jpeg2000 = {"RGB": [_jpeg2000(tile) for tile in _tiles(card)]}
    figures: dict[str, object] = {}
    rows: list[Row] = []
    for name, contender in CONTENDERS.items():
        try:
            decode, as_pixels = contender(card)
            kinds = jpeg2000 if name.endswith(JPEG2000) else tiles
            figures[name] = _measure(card, kinds, decode, as_pixels)
        except Exception as exc:  # of a library that is not there, or does not know this card
            why = f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
            figures[name] = {"skipped": why}
            rows.append((f"decode, {name}", "-", why[:100]))
        else:
            rows += _rows(name, figures[name])
        yield figures, rows


def _tiles(card: Card) -> list[np.ndarray]:
    """Different tiles of the bundled slide, at twice its size."""
    side, count = card.size(256, 16), card.size(256, 3)
    whole = cv2.resize(tifffile.imread(demo_slide(), key=0)[1650:2850, 750:1450], None, fx=2, fy=2)
    spots = np.random.default_rng(0).integers(0, np.array(whole.shape[:2]) - side, (count, 2))
    return [np.ascontiguousarray(whole[y : y + side, x : x + side]) for y, x in spots.tolist()]


def _jpeg(tile: np.ndarray, colours: str, transform: int | None) -> bytes:
    """A complete stream."""
    tables, stream = abbreviated_jpeg(tile, colours)
    adobe = b"" if transform is None else ADOBE + bytes([transform])
    return tables[:2] + adobe + tables[2:-2] + stream[2:]


def _jpeg2000(tile: np.ndarray) -> bytes:
    return imagecodecs.jpeg2k_encode(tile, level=38, codecformat="j2k", reversible=False, mct=True)


def _measure(card: Card, tiles: dict, decode: Decode, as_pixels: Callable[[object], Tensor]) -> dict:
    found: dict[str, dict[str, float]] = {}
    for kind, streams in tiles.items():
        got = as_pixels(decode(streams)).cpu().numpy().astype(int)
        apart = np.abs(got - np.stack([_on_cpu(stream) for stream in streams]))
        found[kind] = {"max": int(apart.max()), "mean": float(apart.mean())}
        for batch in BATCHES if kind == "4:2:0" else BATCHES[1:2]:
            batch = card.size(batch, 4)
            several = [streams[i % len(streams)] for i in range(batch)]
            found[kind][f"tiles_per_s_{batch}"] = batch / card.seconds(lambda: decode(several))  # noqa: B023
    return found


def _rows(name: str, figures: dict) -> list[Row]:
    rows = []
    for kind, found in figures.items():
        rates = {key.split("_")[-1]: rate for key, rate in found.items() if key.startswith("tiles")}
        listed = ", ".join(f"{rate:,.0f}" for rate in rates.values())
        apart = f"max {found['max']}, mean {found['mean']:.3f} from the CPU's pixels"
        note = f"tiles/s in batches of {', '.join(rates)}; {apart}"
        rows.append((f"decode, {name}, {kind}", listed, note))
    return rows


# --- contenders ---------------------------------------------------------------------------------------


def _on_cpu(stream: bytes) -> np.ndarray:
    return (simplejpeg.decode_jpeg if stream[:2] == b"\xff\xd8" else imagecodecs.jpeg2k_decode)(stream)


def cpu(card: Card):
    threads = os.cpu_count() or 1

    def decode(streams):
        with reading_threads(threads) as pool:
            each(pool, _on_cpu, streams)
        return streams

    return decode, lambda streams: torch.from_numpy(np.stack([_on_cpu(s) for s in streams]))


def our_kernels(card: Card):
    from seal_extract.patches.jpeg import JpegDecoder, header_bytes, read_frame

    decoders: dict[bytes, JpegDecoder] = {}

    def decode(streams):
        cut = header_bytes(streams[0])
        header = streams[0][:cut]
        if header not in decoders:
            decoders[header] = JpegDecoder(read_frame(header), card.device)
        data = [stream[cut:-2] for stream in streams]
        counts = np.array([len(d) for d in data])
        words = counts // 4 + 3
        first, at = np.cumsum(counts) - counts, np.cumsum(words) - words
        places = torch.from_numpy(np.stack([first, counts, at], 1).astype(np.int32))
        raw = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)
        if card.device.type == "cuda":
            raw, places = (t.pin_memory().to(card.device, non_blocking=True) for t in (raw, places))
        return decoders[header].decode(raw, places, int(words.sum()))

    def as_pixels(decoded):
        pixels, odd = decoded
        assert not odd.any(), "sound tiles were taken for damaged ones"
        return pixels

    return decode, as_pixels


def by_torchvision(card: Card):
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(streams):
        buffers = [torch.frombuffer(bytearray(stream), dtype=torch.uint8) for stream in streams]
        if card.device.type == "cpu":
            return [decode_jpeg(buffer, mode=ImageReadMode.RGB) for buffer in buffers]
        return decode_jpeg(buffers, mode=ImageReadMode.RGB, device=card.device)

    return decode, lambda images: torch.stack(images).permute(0, 2, 3, 1)


def by_nvimagecodec(kind: str) -> Contender:
    def contender(card: Card):
        _preload()
        from nvidia import nvimgcodec as codec

        own = codec.Backend(getattr(codec.BackendKind, "CPU_ONLY" if card.rehearsal else kind))
        device_id = codec.NVIMGCODEC_DEVICE_CPU_ONLY if card.rehearsal else 0
        decoder = codec.Decoder(device_id=device_id, backends=[own], options=":fancy_upsampling=1")

        def decode(streams):
            images = decoder.decode([codec.CodeStream(stream) for stream in streams])
            if failed := sum(image is None for image in images):
                raise RuntimeError(f"{failed} of {len(images)} tiles were not decoded")
            return images

        def as_pixels(images):
            if card.rehearsal:
                return torch.from_numpy(np.stack([np.asarray(image) for image in images]))
            return torch.stack([torch.from_dlpack(image) for image in images])

        return decode, as_pixels

    return contender


def _preload() -> None:
    """Load nvJPEG out of the carried wheels: a library that is loaded already is found by its name."""
    for place in map(Path, sys.path):
        for library in sorted(place.glob("nvidia/*/lib/libnvjpeg*.so*")):
            with suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


CONTENDERS: dict[str, Contender] = {
    "CPU on all cores": cpu,
    "own kernels": our_kernels,
    "nvImageCodec by CUDA": by_nvimagecodec("GPU_ONLY"),
    "nvImageCodec by CPU and CUDA": by_nvimagecodec("HYBRID_CPU_GPU"),
    "nvImageCodec by hardware": by_nvimagecodec("HW_GPU_ONLY"),
    "torchvision": by_torchvision,
    "CPU on all cores" + JPEG2000: cpu,
    "nvImageCodec by CUDA" + JPEG2000: by_nvimagecodec("GPU_ONLY"),
}
