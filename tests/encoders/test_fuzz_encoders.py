"""Mutated config.json, adapter_config.json and config.yaml: each loads or ends in one line, in bounded time.

Run as a program, ``python tests/test_fuzz_encoders.py FIRST COUNT``, it prints what became of each copy.
"""

import copy
import faulthandler
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import run_file
from encoder_fixtures import SEAL_H0, TINY_H0, TINY_VIT, base_file, save, seal_file, untrained_encoder
from mutations import peak_bytes
from safetensors.torch import save_file

from seal_extract.encoders import load_encoder
from seal_extract.encoders.registry import ROWS
from seal_extract.errors import CheckpointError, SealExtractError
from seal_extract.genes.decoder import load_decoder
from seal_extract.genes.omics import load_omics

HANG_S = 60
MOST_S, MOST_BYTES = 30, 3 * 2**30  # of one copy; of the whole process
NASTY = (
    *(None, True, False, 0, -1, 1, 1.5, 10**6, 10**30, -(10**30), float("inf"), float("nan"), 1e-320, 7),
    *("", "x", "../../x", "/dev/zero", "\x1b[31m", "a" * 10_000, "\ud800", "cls", "own", "conch", "resnet18"),
    *(
        "vit_giant_patch14_224",
        "(.*)*(.*)*(.*)*(.*)*!",
        "(a|a)*b",
        "(((",
        "[[a]",
        "a{9999999}",
        "fc1",
        "(?i)qkv",
    ),
    *([], {}, [[]], {"a": {}}, [1, 2, 3], [0, 0, 0], {"x": 10**9}, ["(.*)*!"], {"(.*)*(.*)*(.*)*!": 4}),
    *({"weight": [24, 24], "bias": [24]}, {"hidden": 10**12, "genes": 10**12}, {"hidden": 6, "genes": -1}),
)
ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": r".*\.(qkv|fc1)",
    "rank_pattern": {r"blocks\.0\..*qkv": 4},
    "alpha_pattern": {"fc1": 2.0},
    "bias": "none",
    "use_rslora": False,
}
YAML = """encoder: tiny-h0mini
out_dim: 48
lora: {r: 4, lora_alpha: 8, lora_dropout: 0.1}
"""
TIMM = {
    "architecture": TINY_H0.architecture.timm,
    "pretrained_cfg": {"interpolation": "bicubic", "crop_pct": 1.0, "input_size": [3, 28, 28]},
}


def places(value, path=()):
    """The way to everything in a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*path, key))


def mutated(value, rng):
    """A JSON value with one to three of its parts replaced, taken away or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        *way, last = rng.choice([p for p in places(value) if p] or [("x",)])
        parent = value
        for key in way:
            parent = parent[key]
        if rng.random() < 0.1 and isinstance(parent, dict):
            parent.pop(last, None)
        elif rng.random() < 0.1 and isinstance(parent, dict):
            parent["another"] = copy.deepcopy(rng.choice(NASTY))
        else:
            parent[last] = copy.deepcopy(rng.choice(NASTY))
    return value


def garbled(text, rng):
    """Bytes of a text with some of them replaced, cut off, or nested without end."""
    data = bytearray(text.encode())
    kind = rng.random()
    if kind < 0.1:
        return b"[" * 100_000
    if kind < 0.2:
        return b'{"a":' * 50_000
    if kind < 0.3:
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def make(folder):
    """The four kinds of files: where each lies, its text or value, and how it is loaded."""
    for row in (TINY_VIT, TINY_H0, SEAL_H0):
        ROWS[row.name] = row
    encoder = untrained_encoder(TINY_VIT)
    encoder.projection = torch.nn.Linear(24, 24)
    encoder.save_pretrained(folder / "own")
    base = save(base_file(TINY_VIT), folder / "base" / "pytorch_model.bin")
    shapes = {"attn.qkv": (72, 24), "mlp.fc1": (96, 24)}
    tensors = {}
    for layer, (rows, columns) in shapes.items():
        tensors[f"base_model.model.blocks.0.{layer}.lora_A.weight"] = torch.ones(4, columns)
        tensors[f"base_model.model.blocks.0.{layer}.lora_B.weight"] = torch.ones(rows, 4)
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    seal = save(seal_file(SEAL_H0), folder / "seal" / "a.pth")
    bare = save(base_file(TINY_H0), folder / "h0" / "pytorch_model.bin")
    own = json.loads((folder / "own" / "config.json").read_text())
    return [
        (folder / "own/config.json", own, lambda: load_encoder(folder / "own", device="cpu")),
        (
            folder / "adapter/adapter_config.json",
            ADAPTER,
            lambda: load_encoder("tiny-vit", checkpoint=base, adapter=folder / "adapter", device="cpu"),
        ),
        (
            folder / "seal/config.yaml",
            YAML,
            lambda: load_encoder(SEAL_H0.name, checkpoint=seal, device="cpu"),
        ),
        (folder / "h0/config.json", TIMM, lambda: load_encoder(TINY_H0.name, checkpoint=bare, device="cpu")),
    ]


def content(value, rng):
    if isinstance(value, str):
        import yaml

        if rng.random() < 0.6:
            changed = mutated(yaml.safe_load(value), rng)
            return json.dumps(changed).encode()  # YAML too
        return garbled(value, rng)
    if rng.random() < 0.8:
        return json.dumps(mutated(value, rng)).encode()
    return garbled(json.dumps(value, indent=1), rng)


def main(first, count):
    with tempfile.TemporaryDirectory() as name:
        kinds = make(Path(name))
        for seed in range(first, first + count):
            rng = random.Random(seed)
            path, value, load = kinds[seed % len(kinds)]
            path.write_bytes(content(value, rng))
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            began, text = time.monotonic(), ""
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    encoder = load()
                    encoder.transform, encoder.identity, str(encoder)
                    encoder.encode(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
                kind = "loaded"
            except SealExtractError as exc:
                kind, text = type(exc).__name__, str(exc)
            except BaseException as exc:
                kind, text = f"raised {type(exc).__name__}", " ".join(str(exc).split())[:300]
            faulthandler.cancel_dump_traceback_later()
            told = {"seed": seed, "file": path.name, "kind": kind, "text": text}
            print(json.dumps(told | {"s": time.monotonic() - began, "peak": peak_bytes()}), flush=True)
            path.write_text(value if isinstance(value, str) else json.dumps(value))


def run_copies(first, count):
    done = run_file(__file__, str(first), str(count))
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {told[-1:]}: {done.stderr[-4000:]}"
    assert len(told) == count
    kinds = Counter(line["kind"] for line in told)
    assert {"loaded", "CheckpointError"} <= kinds.keys(), kinds
    for line in told:
        assert not line["kind"].startswith("raised"), line
        assert "\n" not in line["text"], line
        assert len(line["text"]) < 2000, line
        assert line["text"].isprintable(), line
        assert line["s"] < MOST_S, line
        assert line["peak"] < MOST_BYTES, line


def test_eighty_mutated_configs_load_or_end_in_one_line():
    run_copies(0, 80)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 500))
def test_mutated_configs_load_or_end_in_one_line(first):
    """2,000 of them."""
    run_copies(first, 500)


# --- what was found, as a few bytes each --------------------------------------------------------------------


@pytest.fixture
def kinds(tmp_path, monkeypatch):
    """Folder and loader of each kind of file, by its name."""
    for row in (TINY_VIT, TINY_H0, SEAL_H0):
        monkeypatch.setitem(ROWS, row.name, row)
    return {str(path.relative_to(tmp_path)): (path, value, load) for path, value, load in make(tmp_path)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 1_000_000}, "has depth 1000000; allowed: at most 128"),
        ({"img_size": 10**6}, "has img_size 1000000; allowed: at most 4096"),
        ({"embed_dim": float("nan")}, "has embed_dim nan; allowed: at most"),
        ({"num_heads": True}, "has num_heads True; allowed: at most"),
    ],
)
def test_a_tower_of_no_sensible_size(kinds, change, words):
    path, value, load = kinds["own/config.json"]
    value["architecture"]["kwargs"] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(SealExtractError, match=words):
        load()


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*!"},
        {"alpha_pattern": {"(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*!": 2.0}},
        {"rank_pattern": {"(.|.|.|.|.|.|.)*(.|.|.|.|.|.|.)*!": 2}},
    ],
)
def test_patterns_that_do_not_come_to_an_end(kinds, change, monkeypatch):
    monkeypatch.setattr("seal_extract.encoders.lora.SECONDS", 2)
    path, value, load = kinds["adapter/adapter_config.json"]
    path.write_text(json.dumps(value | change))
    with pytest.raises(CheckpointError, match="its patterns take more than 2 s"):
        load()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of POSIX")
@pytest.mark.parametrize("file", ["own/config.json", "adapter/adapter_config.json", "seal/config.yaml"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(kinds, file):
    path, _, load = kinds[file]
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    if file == "seal/config.yaml":
        assert load().spec.published.lora.r is None  # as if it were not there
    else:
        with pytest.raises(CheckpointError):
            load()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of POSIX")
def test_a_pipe_or_a_device_given_as_weights(kinds, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    weights = kinds["own/config.json"][0].with_name("model.safetensors")
    weights.unlink()
    os.mkfifo(weights)
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        for load in (load_encoder, load_omics, load_decoder):
            with pytest.raises(CheckpointError, match="is a pipe or device; give the path of a file"):
                load(SEAL_H0.name, checkpoint=path)
    with pytest.raises(CheckpointError, match="is a pipe or device; give the path of a file"):
        load_encoder(weights.parent, device="cpu")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
