"""Read the checkpoint of a model that pools by attention; every key is accounted for.

layout   layers on features [D]              attention networks
CLAM     attention_net.0                     attention_net.{2|3}.attention_{a.0,b.0,c}
AMLab    feature_extractor_part2.0, or none  attention_{V.0,U.0}, attention_{w|weights}
TRIDENT  pre_attention_layers.0              image_pooler.{attention_heads.{i}.0,gating_layers.{i}.0,
                                             branching_layers.{i},condensing_layer}, post_attention_layers.0
MIL-Lab  patch_embed.{0,3,...}               global_attn.attention_{a.0,b.0,c}
CHIEF    attention_net.0                     attention_net.3.attention_{a.0,b.0,c}
TANGLE   pre_attn.{0,4,...}                  attn.{i}.attention_{a.0,b.0,c}, proj_multihead

Networks without gate are ``attention_net.{2|3}.module.{0,2|3}``, ``attention.{0,2}``, those without
``gating_layers``, and ``global_attn.module.{0,3}``. TRIDENT's is what Patho-Bench trains, as
``slide_encoder.model...``; its layers around the attention and TANGLE's are GELU, all others' ReLU. Sizes are
the shapes' own: CLAM's small and big, and any other. CLAM's ``mil`` has ``fc.0`` on the features and no
attention network: see `TopInstance`.

CHIEF (Wang et al. 2024, doi 10.1038/s41586-024-07894-z) has CLAM's names, but sums the features themselves,
and its classifier needs the organ: there are no probabilities. TANGLE (Jaume et al. 2024, arXiv 2405.11618),
``wsi_embedder...``, has a LayerNorm behind each layer on the features and gives each of H heads every H-th of
their outputs. A checkpoint does not state the activation of its attention: it is the softmax of the paper.

The classifier of slides is read where its form is known: a layer ``classifier`` (MIL-Lab, AMLab),
``classifiers`` (CLAM), ``classification_head`` (Patho-Bench), ``classifiers.{class}`` of CLAM_MB, or AMLab's
``classifier.0`` under a sigmoid. Classifiers of another form, and those of patches, are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from seal_extract.encoders.checkpoint import SHOWN, check_tensors, read_tensors
from seal_extract.encoders.files import WeightFile, sha256_of
from seal_extract.encoders.locate import fetch_published, local_file
from seal_extract.encoders.slide_encoders import SlideEncoder
from seal_extract.errors import CheckpointError
from seal_extract.pooling.models import AttentionPooling, Gate, Linear, RowsAre, TopInstance

WRAPPERS = ("slide_encoder.", "model.", "wsi_embedder.")  # Patho-Bench, TRIDENT, Hugging Face; TANGLE


@dataclass(frozen=True)
class Names:
    """The names of the layers of a checkpoint, without ``.weight`` and ``.bias``.

    Attributes:
        layout: the tool that uses these names.
        embed: layers on the features, in order.
        gates: of each attention network its tanh, sigmoid or None, and score layer.
        beside: prefixes of further keys, which pooling does not need.
        rows_are: see `AttentionPooling`.
        activation: see `AttentionPooling`.
        condense: see `AttentionPooling`.
        after: see `AttentionPooling`.
        norms: see `AttentionPooling`.
        interleaved: each attention network has every H-th of the hidden features.
        sums_input: see `AttentionPooling`.
    """

    layout: str
    embed: tuple[str, ...]
    gates: tuple[tuple[str, str | None, str], ...]
    beside: tuple[str, ...]
    rows_are: RowsAre
    activation: str = "relu"
    condense: str | None = None
    after: str | None = None
    norms: tuple[str, ...] = ()
    interleaved: bool = False
    sums_input: bool = False


def read_model(path: Path) -> AttentionPooling | TopInstance:
    """Read a model; nothing is unpickled.

    Args:
        path: ``.pt``, ``.pth`` or ``.safetensors``: a state dict, or a dict that holds one as ``state_dict``.

    Raises:
        CheckpointError: the file has no weights, an unknown layout, or keys or shapes that do not fit.
    """
    tensors = _bare(read_tensors(path), path)
    names = _recognise(tensors)
    if names is None:
        shown = ", ".join(sorted(tensors)[:SHOWN])
        raise CheckpointError(
            f"{path} is not a known slide-level model ({len(tensors)} keys: {shown}, ...); allowed: "
            f"CLAM_SB, CLAM_MB, CLAM's mil, ABMIL as AMLab, TRIDENT, Patho-Bench and MIL-Lab save it, CHIEF, "
            f"TANGLE"
        )
    needed, classifier = _shapes(tensors, names)
    check_tensors(tensors, needed, names.beside, path, f"a model in {names.layout}'s layout")
    layers = {key[: -len(".weight")] for key in needed if key.endswith(".weight")}
    linear = {
        name: Linear(tensors[f"{name}.weight"].clone(), tensors[f"{name}.bias"].clone()) for name in layers
    }
    if names.interleaved:
        _put_heads_in_order(linear, names)
    gates = tuple(
        Gate(linear[tanh], linear[sigmoid] if sigmoid else None, linear[score])
        for tanh, sigmoid, score in names.gates
    )
    kind, sha256 = _kind(tensors, names, gates), sha256_of(path)[0]
    embed, heads = ([linear[name] for name in layers] for layers in (names.embed, classifier))
    if names.rows_are == "instance":
        return TopInstance(path, kind, names.layout, sha256, names.rows_are, embed[0], heads[0])
    return AttentionPooling(
        path,
        kind,
        names.layout,
        sha256,
        names.rows_are,
        tuple(embed),
        names.activation,
        gates,
        linear[names.condense] if names.condense else None,
        linear[names.after] if names.after else None,
        tuple(heads),
        tuple(linear[name] for name in names.norms),
        names.interleaved,
        names.sums_input,
    )


def _put_heads_in_order(linear: dict[str, Linear], names: Names) -> None:
    """Let each head have neighbouring outputs of the last layer on the features, in place of every H-th."""
    last = names.embed[-1]
    order = torch.arange(len(linear[last].bias)).reshape(-1, len(names.gates)).T.flatten()
    for name in (last, names.norms[-1]):
        linear[name] = Linear(linear[name].weight[order], linear[name].bias[order])
    if names.condense is not None:
        weight, bias = linear[names.condense]
        linear[names.condense] = Linear(weight[:, order].contiguous(), bias)


def read_named(row: SlideEncoder, file: str = "", offline: bool = False) -> AttentionPooling | TopInstance:
    """Read the model of a slide encoder that has a name, from the Hub, its cache or this disk.

    Args:
        row: of `SLIDE_ENCODERS`, with a layout.
        file: its weights on this disk; empty: from the Hub, at the row's commit and hash.
        offline: never use the network.

    Raises:
        CheckpointError: the file holds another model.
        HubError: the Hub does not deliver it.
    """
    if file:
        found = local_file(Path(file).expanduser(), row)
    else:
        found = fetch_published(row, row.layout.files, None, offline)
    weights, model = WeightFile.of(found), read_model(found.path)
    if (model.layout, model.dim) != (row.network, row.encoder_dim):
        raise CheckpointError(
            f"{found.path} holds {model.kind} in {model.layout}'s layout on {model.dim} columns; {row.name} "
            f"is in {row.network}'s layout on {row.encoder_dim}: give its own file"
        )
    return replace(model, made_for=row, weights=weights)


def _bare(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Remove the prefixes of wrapped models."""
    bare: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        name = re.sub(r"^attention_net\.module\.", "attention_net.", name)  # CLAM on several GPUs
        if name in bare:
            raise CheckpointError(f"{path} holds {name} twice, once as {key}; save one model alone")
        bare[name] = value
    return bare


# --- the layouts ------------------------------------------------------------------------------------


def _recognise(keys: Collection[str]) -> Names | None:
    found = (layout(keys) for layout in (_chief, _clam, _trident, _mil_lab, _tangle, _amlab, _mil))
    return next((names for names in found if names is not None), None)


def _clam(keys: Collection[str]) -> Names | None:
    indices = [m[1] for key in keys if (m := re.match(r"attention_net\.([1-9]\d*)\.", key))]
    if not indices:
        return None
    beside = ("classifiers.", "classifier.", "instance_classifiers.", "instance_loss_fn.")
    gate = _gate(keys, f"attention_net.{min(indices)}")
    return Names("CLAM", ("attention_net.0",), (gate,), beside, "class")


def _chief(keys: Collection[str]) -> Names | None:
    names = _clam(keys) if _any(keys, "text_to_vision.") else None
    beside = ("att_head.", "text_to_vision.", "organ_embedding")
    return names and replace(names, layout="CHIEF", beside=(*names.beside, *beside), sums_input=True)


def _tangle(keys: Collection[str]) -> Names | None:
    if not _any(keys, "pre_attn.") or not _any(keys, "attn."):
        return None
    last = max(int(m[1]) for key in keys if (m := re.match(r"pre_attn\.(\d+)\.", key)))
    places = range(0, last, 4)  # layer, LayerNorm, GELU, dropout
    heads = max((int(m[1]) for key in keys if (m := re.match(r"attn\.(\d+)\.", key))), default=-1) + 1
    return Names(
        "TANGLE",
        tuple(f"pre_attn.{i}" for i in places),
        tuple(_gate(keys, f"attn.{i}") for i in range(heads)) or (_gate(keys, "attn"),),
        ("rna_embedder.", "rna_reconstruction.", "mean_projector."),
        "head",
        "gelu",
        "proj_multihead" if heads else None,
        norms=tuple(f"pre_attn.{i + 1}" for i in places),
        interleaved=heads > 0,
    )


def _mil_lab(keys: Collection[str]) -> Names | None:
    if not _any(keys, "global_attn."):
        return None
    embed = {int(m[1]) for key in keys if (m := re.match(r"patch_embed\.(\d+)\.", key))}
    beside = ("classifier.", "instance_classifiers.", "instance_loss_fn.")
    names = tuple(f"patch_embed.{i}" for i in range(0, max(embed, default=0) + 1, 3))  # layer, ReLU, dropout
    return Names("MIL-Lab", names, (_gate(keys, "global_attn"),), beside, "head")


def _gate(keys: Collection[str], prefix: str) -> tuple[str, str | None, str]:
    """The layers of an attention network in the names of CLAM."""
    plain = sorted({m[1] for key in keys if (m := re.match(re.escape(prefix) + r"\.module\.(\d+)\.", key))})
    if plain:
        return f"{prefix}.module.0", None, f"{prefix}.module.{plain[-1]}"
    return f"{prefix}.attention_a.0", f"{prefix}.attention_b.0", f"{prefix}.attention_c"


def _trident(keys: Collection[str]) -> Names | None:
    if not _any(keys, "image_pooler."):
        return None
    heads = {int(m[1]) for key in keys if (m := re.match(r"image_pooler\.[a-z]+_\w+\.(\d+)\.", key))}
    gated = _any(keys, "image_pooler.gating_layers.")
    gates = tuple(
        (
            f"image_pooler.attention_heads.{i}.0",
            f"image_pooler.gating_layers.{i}.0" if gated else None,
            f"image_pooler.branching_layers.{i}",
        )
        for i in range(max(heads, default=0) + 1)
    )
    return Names(
        "TRIDENT",
        ("pre_attention_layers.0",),
        gates,
        ("classification_head.", "loss."),
        "head",
        "gelu",
        "image_pooler.condensing_layer" if len(gates) > 1 else None,
        "post_attention_layers.0",
    )


def _amlab(keys: Collection[str]) -> Names | None:
    part2 = "feature_extractor_part2"
    embed = (f"{part2}.0",) if _any(keys, f"{part2}.") else ()
    if _any(keys, "attention_V."):
        score = "attention_weights" if _any(keys, "attention_weights.") else "attention_w"
        return Names("AMLab", embed, (("attention_V.0", "attention_U.0", score),), ("classifier.",), "branch")
    if _any(keys, "attention.0.") and _any(keys, "attention.2."):
        return Names("AMLab", embed, (("attention.0", None, "attention.2"),), ("classifier.",), "branch")
    return None


def _mil(keys: Collection[str]) -> Names | None:
    if not _any(keys, "fc.0.") or not (_any(keys, "classifier.") or _any(keys, "classifiers.")):
        return None
    return Names("CLAM", ("fc.0",), (), (), "instance")


def _any(keys: Collection[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _kind(tensors: Mapping[str, Tensor], names: Names, gates: tuple[Gate, ...]) -> str:
    """CLAM_MB has an attention per class; CLAM_SB differs from ABMIL by the classifiers of its instances."""
    if names.rows_are == "instance":
        return "MIL_fc_mc" if _any(tensors, "classifiers.") else "MIL_fc"
    if names.layout in ("CHIEF", "TANGLE"):
        return names.layout
    if names.layout == "CLAM":
        return "CLAM_MB" if len(gates[0].score.bias) > 1 else "CLAM_SB"
    return "CLAM_SB" if _any(tensors, "instance_classifiers.") else "ABMIL"


# --- shapes -----------------------------------------------------------------------------------------


def _shapes(
    tensors: Mapping[str, Tensor], names: Names
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Name and shape of every tensor needed, sizes being those of the outputs; the classifier's layers."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, inputs: int | None, outputs: int | None = None) -> int:
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        there = [*weight.shape] if weight is not None and weight.ndim == 2 else [0, 0]
        if outputs is None:
            outputs = there[0] or (len(bias) if bias is not None and bias.ndim == 1 else 0)
        inputs = there[1] if inputs is None else inputs
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)
        return outputs

    rows, width = 0, None  # the width of the features is known from the first layer alone
    for layer, norm in zip_longest(names.embed, names.norms):
        width = add(layer, width)
        if norm is not None:
            shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    if names.interleaved:
        width = (width or 0) // len(names.gates)
    for tanh, sigmoid, score in names.gates:
        inner = add(tanh, width)
        width = width if width is not None else shapes[f"{tanh}.weight"][1]
        if sigmoid is not None:
            add(sigmoid, width, inner)
        rows += add(score, inner, 1 if names.condense or names.after else None)
    if names.condense is not None:
        add(names.condense, len(names.gates) * (width or 0), width)
    elif names.rows_are == "head":
        width = rows * (width or 0)
    if names.after is not None:
        width = add(names.after, width)
    classifier = _classifier(tensors, names, rows)
    for layer in classifier:
        outputs = add(layer, width, 1 if len(classifier) > 1 else None)
        if names.rows_are == "instance":  # CLAM's mil has one class for two classes, one for more
            add(layer, width, 2 if layer == "classifier" else max(3, outputs))
    return shapes, classifier


def _classifier(tensors: Mapping[str, Tensor], names: Names, rows: int) -> tuple[str, ...]:
    """The layers of the classifier of slides; none where there is none, or its form is not known."""
    if names.sums_input:  # it takes the organ too
        return ()
    if names.rows_are == "instance":
        return ("classifiers" if _any(tensors, "classifiers.") else "classifier",)
    pattern = r"((?:classifiers?|classification_head)(?:\.\d+)?)\.(?:weight|bias)"
    found = {
        m[1]: value.shape[:1].numel() for key, value in tensors.items() if (m := re.fullmatch(pattern, key))
    }
    if names.rows_are == "class" and rows > 1:
        each = tuple(f"classifiers.{c}" for c in range(rows))
        return each if found.keys() == {*each} else ()
    if len(found) != 1 or (names.rows_are == "branch" and rows > 1):
        return ()
    ((layer, outputs),) = found.items()
    sigmoid = names.layout == "AMLab" and layer == "classifier.0" and outputs == 1
    return (layer,) if sigmoid or ("." not in layer and outputs > 1) else ()
