"""Weight files of the real architectures, filled by the rule of the oracle from key and shape alone."""

import importlib.util
import json

import torch
from conftest import shared
from encoder_fixtures import PREFIX
from safetensors.torch import save_file

BACKBONES = ["conch", "univ2", "virchow2", "h0mini", "phikon2"]
WRAPPED = {"virchow2": "model.", "h0mini": "model.", "phikon2": "model."}
BASE_FILES = {"phikon2": "model.safetensors"}


def oracle_rule():
    """`weights.py` beside the reference numbers: how to fill weights and draw images."""
    spec = importlib.util.spec_from_file_location("oracle_weights", shared("oracle/weights.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of(backbone):
    return json.loads(shared(f"oracle/{backbone}_keys.json").read_text())


def rule_key(backbone, key):
    """The key under which the rule draws an array of the vision file: the base repository's own."""
    if ".lora_" in key or key.startswith("decoder."):
        return key
    base = key.removeprefix(PREFIX + WRAPPED.get(backbone, "")).replace(".base_layer.", ".")
    return ("visual." if backbone == "conch" else "") + base


def arrays_by_rule(backbone):
    """The whole vision file."""
    det = oracle_rule().det
    return {
        key: torch.from_numpy(det(rule_key(backbone, key), shape, 0))
        for key, shape, _ in keys_of(backbone)["vision"]
    }


def is_own(key):
    """An array that is not the base's."""
    return ".lora_" in key or key.startswith("decoder.")


def fill_by_rule(backbone, folder):
    """The three files of a backbone: whole, adapters alone, and the image tower of the base."""
    tensors = arrays_by_rule(backbone)
    torch.save(tensors, folder / "whole.pth")
    torch.save({k: v for k, v in tensors.items() if is_own(k)}, folder / "alone.pth")
    base = {rule_key(backbone, k): v for k, v in tensors.items() if not is_own(k)}
    if backbone in BASE_FILES:
        save_file(base, folder / BASE_FILES[backbone])
    else:
        torch.save(base, folder / "pytorch_model.bin")
    return tensors
