"""One encoder: its embeddings against the CPU's in every precision, and a whole run over large slides."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import tifffile
import torch
from card import Card, Found, Row
from torch import Tensor

from seal_extract.bench import BenchOptions, bench
from seal_extract.bench.encoding import flops_per_patch, record_passes
from seal_extract.bench.large_slide import write_large_slide
from seal_extract.bench.measure import kernel_seconds, memory_mb, reset_peak
from seal_extract.demo import demo_slide, untrained_encoder
from seal_extract.encoders import Encoder, find_spec
from seal_extract.encoders.spec import PRECISIONS, EncoderSpec
from seal_extract.run.embed import open_embedder
from seal_extract.run.extract import extract_many
from seal_extract.run.options import ExtractOptions

PATCH_PX = 224
SLIDES = 5
COMPARED = 8  # patches whose embeddings are held against the CPU's


# --- the slides ---------------------------------------------------------------------------------------


def slides_of(card: Card) -> list[Path]:
    """Large slides, written by the first section that needs them; all names are of one file."""
    paths = [card.folder / f"slide_{i}.svs" for i in range(SLIDES)]
    if not paths[-1].exists():
        side = card.size(40_000, 1800)
        write_large_slide(paths[0], (side, side))
        for path in paths[1:]:
            os.link(paths[0], path)
    return paths


def reading(card: Card) -> Found:
    """Everything before the encoder, measured on one slide."""
    began = perf_counter()
    first, *_ = slides_of(card)
    note = f"written in {perf_counter() - began:.1f} s, under {SLIDES} names"
    rows = [("slide", f"{first.stat().st_size / 1e6:,.0f} MB", note)]
    figures: dict[str, object] = {}
    for mode in ("off",) if card.rehearsal else ("off", "on"):
        yield figures, rows
        run, options = ExtractOptions(gpu_decode=mode), BenchOptions(patches=card.size(4096, 4), repeats=1)
        figures[mode] = found = bench([first], None, run=run, device=card.device, options=options).to_json()
        rows.append((f"--gpu-decode {mode}", "", f"patches are read as {found['decoder']}"))
        for name, stage in found["stages"].items():
            rate = stage["patches_per_s"]
            figure = "-" if rate is None else f"{rate:,.0f}"
            rows.append((f"{name}, patches/s", figure, f"{stage['threads']} threads: {stage['does']}"))
    yield figures, rows


# --- an encoder ---------------------------------------------------------------------------------------


def encoder(card: Card, name: str) -> Found:
    """Every precision against float32 on the CPU, then the whole run in the one that is the default."""
    made = untrained_encoder(_shallow(find_spec(name)) if card.rehearsal else find_spec(name))
    patches = _patches()
    with all_threads():
        expected = made.encode(patches[:COMPARED])
    flops = flops_per_patch(made, patches[:1])
    made.to(card.device)
    figures: dict[str, object] = {"flops_per_patch": flops}
    rows: list[Row] = []
    for precision in PRECISIONS:
        if precision == "tf32" and card.rehearsal:
            continue
        made.set_precision(precision)
        figures[precision] = found = _forward(card, made, patches, expected, flops)
        note = (
            f"patches/s, {found['tflops_per_s']:.0f} TFLOP/s, {found['matrix_share']:.0%} of the card's; "
            f"error to the CPU {found['error']:.1e}; {found['gpu_mb']:,.0f} MB{found['warnings']}"
        )
        rows.append((f"{name}, {precision}", f"{found['patches_per_s']:,.0f}", note))
        yield figures, rows
    default = made.spec.precision_for("cuda")
    made.set_precision(default)
    figures["whole"] = whole = _whole(card, made, figures[default])
    note = (
        f"patches/s over {whole['slides']} slides, {whole['patches']} patches; kernels busy "
        f"{whole['kernels_busy']:.0%}, forward passes {whole['encoder_busy']:.0%}, "
        f"{whole['matrix_share']:.0%} of the card's matrix rate; {whole['gpu_mb']:,.0f} MB on it, "
        f"{whole['host_mb']:,.0f} MB on the host"
    )
    rows.append((f"{name}, whole, {default}", f"{whole['patches_per_s']:,.0f}", note))
    yield figures, rows


def _shallow(spec: EncoderSpec) -> EncoderSpec:
    """The same architecture with one block."""
    kwargs = {**spec.architecture.kwargs, "depth": 1}
    return replace(spec, architecture=replace(spec.architecture, kwargs=kwargs))


def _patches() -> Tensor:
    """Uint8 [B, 3, S, S] at random places of the bundled slide's tissue."""
    tissue = tifffile.imread(demo_slide(), key=0)[1650:2850, 750:1450]
    spots = (
        np.random.default_rng(0).integers(0, np.array(tissue.shape[:2]) - PATCH_PX, (COMPARED, 2)).tolist()
    )
    cut = np.stack([tissue[y : y + PATCH_PX, x : x + PATCH_PX] for y, x in spots])
    return torch.from_numpy(cut).permute(0, 3, 1, 2).contiguous()


@contextmanager
def all_threads() -> Iterator[None]:
    """Let torch compute with every core of the host."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _forward(card: Card, made: Encoder, patches: Tensor, expected: Tensor, flops: float) -> dict:
    """As a run does it: in batches of one shape, by the `Embedder`."""
    if not card.rehearsal:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with closing(open_embedder(made, PATCH_PX)) as embedder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch = patches.to(card.device).repeat(-(-embedder.batch_size // len(patches)), 1, 1, 1)[
            : embedder.batch_size
        ]
        got = torch.from_numpy(embedder.submit(batch)()[:COMPARED])
        passes = card.size(6, 1)
        seconds = card.seconds(lambda: [embedder.submit(batch) for _ in range(passes)][-1](), 3)
    rate = passes * len(batch) / seconds
    error = (got - expected[: len(got)]).norm(dim=1) / expected[: len(got)].norm(dim=1)
    matrices = card.matrix_rate(made.precision, made.tf32)
    return {
        "batch": len(batch),
        "patches_per_s": rate,
        "tflops_per_s": rate * flops / 1e12,
        "matrix_tflops_per_s": matrices / 1e12,
        "matrix_share": rate * flops / matrices,
        "error": float(error.max()),
        "gpu_mb": _gpu_mb(card),
        "warnings": "".join(f"; {warning.message}" for warning in caught),
    }


def _gpu_mb(card: Card) -> float:
    return 0.0 if card.rehearsal else torch.cuda.max_memory_allocated() / 1e6


def _whole(card: Card, made: Encoder, alone: dict) -> dict:
    """As many of the slides as the time allows; then one more, by torch's profiler."""
    paths = slides_of(card)
    probe, _ = _extract(card, made, paths[:1])  # warms up too
    each_s = probe["seconds"]
    slides = max(1, min(card.size(SLIDES, 2), int(card.left_s / each_s) - 1))
    if not card.rehearsal:
        torch.cuda.reset_peak_memory_stats()
    reset_peak()
    found, passes = _extract(card, made, paths[:slides])
    kernels_s = kernel_seconds(lambda: _extract(card, made, paths[:1]), card.device)
    of_one = found["seconds"] / slides
    return found | {
        "slides": slides,
        "matrix_share": alone["matrix_share"] * found["patches_per_s"] / alone["patches_per_s"],
        "kernels_busy": min(1.0, kernels_s / of_one),
        "encoder_busy": sum(p.end_s - p.start_s for p in passes) / found["seconds"],
        "first_pass_s": passes[0].start_s,
        "pass_s": median(p.end_s - p.start_s for p in passes),
        "gpu_mb": _gpu_mb(card),
        "host_mb": memory_mb("VmHWM") or 0.0,
    }


def _extract(card: Card, made: Encoder, slides: list[Path]) -> tuple[dict, list]:
    out = card.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    began = perf_counter()
    with record_passes(made) as passes, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = list(extract_many(slides, made, out, options=ExtractOptions()))
    seconds = perf_counter() - began
    for result in results:
        if result.error is not None:
            raise result.error
    patches = sum(len(result.features[0].grid) for result in results)
    return {"patches": patches, "seconds": seconds, "patches_per_s": patches / seconds}, passes
