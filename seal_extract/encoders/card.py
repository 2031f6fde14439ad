"""The model card beside an encoder in this package's own format: what it is, whose, and made from what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# of the identifiers that the Hub knows, those that pathology encoders and timm's models carry
_HUB_LICENCES = {
    *("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0"),
}


def model_card(config: Mapping[str, Any]) -> str:
    """README.md for a folder with this config.json, as the Hub shows it.

    Args:
        config: what `folder.write` writes.
    """
    from huggingface_hub import ModelCardData  # slow to import, and every encoder's config passes by here

    head = ModelCardData(
        license=_hub_licence(config["licence"]),
        library_name="seal_extract",
        pipeline_tag="image-feature-extraction",
        tags=["pathology", "histology", "whole-slide-image"],
        base_model=config["source"] or None,
    ).to_yaml()
    return f"---\n{head}\n---\n{_facts(config)}{_training(config)}{_origin(config)}{_usage(config)}"


def _hub_licence(licence: str) -> str:
    return licence.lower() if licence.lower() in _HUB_LICENCES else "other"


def _facts(config: Mapping[str, Any]) -> str:
    mpp = "not stated" if config["mpp"] is None else f"{config['mpp']:g} µm/px"
    rows = {
        "embedding": f"{config['dim']} numbers per patch",
        "trained on patches of": f"{config['patch_px']} px, {mpp}",
        "architecture": f"timm {config['architecture']['timm']}, {config['pooling']} pooling",
        "recommended precision": config["precision"],
        "expression decoder": _decoder(config),
        "licence of the weights": config["licence"],
        "source": f"https://huggingface.co/{config['source']}" if config["source"] else "",
        "paper": config["paper"],
    }
    table = "".join(f"| {what} | {value} |\n" for what, value in rows.items() if value)
    return f"\n# {config['name']}\n\nA patch encoder for histology.\n\n| | |\n|---|---|\n{table}"


def _decoder(config: Mapping[str, Any]) -> str:
    if config["decoder"] is None:
        return ""
    named = "named in config.json" if config["genes"] else "their names are not known"
    return f"{config['decoder']['genes']} genes, {named}"


def _training(config: Mapping[str, Any]) -> str:
    summary = config.get("training", {}).get("summary")
    return f"\n{summary.strip()}\n" if summary else ""


def _origin(config: Mapping[str, Any]) -> str:
    if not config["made_from"]:
        return ""
    rows = "".join(f"| {o['file']} | {_where(o)} | `{o['sha256']}` |\n" for o in config["made_from"])
    return f"\n## Made from\n\n| file | source | sha256 |\n|---|---|---|\n{rows}"


def _where(origin: Mapping[str, Any]) -> str:
    return f"{origin['source']} at {origin['revision']}" if origin.get("revision") else "a local file"


def _usage(config: Mapping[str, Any]) -> str:
    predict = "encoder.predict_expression(embeddings)  # float32 (B, genes)\n" if config["decoder"] else ""
    return (
        "\n## Use\n\n```python\nfrom seal_extract import load_encoder\n\n"
        'encoder = load_encoder("folder or Hub repository of this card")\n'
        f"embeddings = encoder.encode(patches)  # uint8 (B, 3, H, W) to float32 (B, {config['dim']})\n"
        f"{predict}```\n"
    )
