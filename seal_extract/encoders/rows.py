"""One row of data per named encoder. No code asks for an encoder by its name; a new encoder is a new row."""

from __future__ import annotations

from dataclasses import replace

from seal_extract.encoders.spec import Architecture, Decoder, EncoderSpec, InputRule, Lora, Published

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# in front of the tower's keys in a SEAL file: the attribute of the authors' model, then PEFT's own names
_PEFT = "encoder.base_model.model."
# two independent public programs load the files of this commit by these hashes
_SEAL_COMMIT = "c20762e7a04551e21e62c083a9c443bdbc48cb89"


def _seal(
    base: EncoderSpec,
    *,
    wrapped: bool = False,
    ignored: tuple[str, ...] = (),
    also_called: tuple[str, ...] = (),
    sha256: str | None = None,
) -> EncoderSpec:
    """The SEAL row on ``base``: adapters on the Linear layers that the file names, and an expression decoder.

    Args:
        base: the encoder that was finetuned.
        wrapped: the authors' code keeps the tower under one more name.
        ignored: keys of the base's file that the embedding does not need.
        also_called: further names of the base in file names.
        sha256: of the vision file at `_SEAL_COMMIT`; None for a file that was not there yet.
    """
    prefix = _PEFT + ("model." if wrapped else "")
    names = (base.name, *also_called)
    return replace(
        base,
        name=f"seal-{base.name}",
        patch_px=224,
        mpp=0.5,
        also_mpp=(),
        mpp_basis="stated",
        licence="CC-BY-NC-ND-4.0",
        source="MahmoodLab/SEAL",
        paper="arXiv 2602.14177",
        published=Published(
            files=tuple(f for n in names for f in (f"seal_{n}_vision.pth", f"{n}-seal-vision.pth")),
            prefix=prefix,
            other_prefixes=(_PEFT + "encoder.",) if wrapped else (),
            layer_names=base.published.layer_names if base.published else "timm",
            ignored=tuple(prefix + key for key in ignored),
            base=base.name,
            lora=Lora(),
            decoder=Decoder(),
            settings="config.yaml",
            gated=True,
            commit=_SEAL_COMMIT if sha256 else None,
            sha256={f"seal_{base.name}_vision.pth": sha256} if sha256 else {},
        ),
    )


# the contrastive projection and the captioning head of CONCH; the embedding stops before them
_CONCH_UNUSED = ("proj_contrast", "attn_pool_caption.", "ln_caption.")

CONCH = EncoderSpec(
    name="conch",
    dim=512,
    patch_px=448,
    mpp=0.5,
    mpp_basis="convention",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    precision="float32",
    licence="CC-BY-NC-ND-4.0",
    source="MahmoodLab/conch",
    architecture=Architecture("vit_base_patch16_224", {"img_size": 448, "dynamic_img_size": True}),
    pooling="conch",
    # as SEAL feeds it; at 448 px this is also what its authors' own transform gives
    input=InputRule(multiple_of=16),
    paper="doi 10.1038/s41591-024-02856-4",
    published=Published(
        files=("pytorch_model.bin",),
        prefix="visual.",
        ignored=(*(f"visual.{key}" for key in _CONCH_UNUSED), "text.", "logit_scale"),
        gated=True,
        commit="f9ca9f877171a28ade80228fb195ac5d79003357",
        sha256={"pytorch_model.bin": "40a9644b9ba0e83a74576e0a5e5f7313599fa9c9cdaf3c20f8a3e271b0e9ae7c"},
    ),
)

UNIV2 = EncoderSpec(
    name="univ2",
    dim=1536,
    patch_px=224,
    mpp=0.5,
    mpp_basis="magnification",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    precision="bfloat16",
    licence="CC-BY-NC-ND-4.0",
    source="MahmoodLab/UNI2-h",
    architecture=Architecture(
        "vit_giant_patch14_224",
        {
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "silu",
            "reg_tokens": 8,
            "dynamic_img_size": True,
        },
    ),
    pooling="cls",
    input=InputRule(multiple_of=14, resize_px=224, filter="bilinear"),
    paper="doi 10.1038/s41591-024-02857-3",
    published=Published(
        files=("pytorch_model.bin",),
        gated=True,
        commit="d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
        sha256={"pytorch_model.bin": "6e077eda234bebc595868d918d3458d9dd32a050199b0ff04443b2f46a0a3b1e"},
    ),
)

UNI = EncoderSpec(
    name="uni",
    dim=1024,
    patch_px=224,
    mpp=0.5,
    mpp_basis="magnification",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    precision="float32",
    licence="CC-BY-NC-ND-4.0",
    source="MahmoodLab/UNI",
    architecture=Architecture(
        "vit_large_patch16_224", {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True}
    ),
    pooling="cls",
    # torchvision's Resize(224) in its authors' example: bilinear by default
    input=InputRule(multiple_of=16, resize_px=224, filter="bilinear"),
    paper="doi 10.1038/s41591-024-02857-3",
    published=Published(
        files=("pytorch_model.bin",),
        gated=True,
        commit="b55a5ec6cade1a39edfe6534189a9b8ca7a022f0",
        sha256={"pytorch_model.bin": "56ef09b44a25dc5c7eedc55551b3d47bcd17659a7a33837cf9abc9ec4e2ffb40"},
    ),
)

VIRCHOW2 = EncoderSpec(
    name="virchow2",
    dim=2560,
    patch_px=224,
    mpp=0.5,
    mpp_basis="stated",
    also_mpp=(0.25, 1.0, 2.0),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    precision="float16",
    licence="CC-BY-NC-ND-4.0",
    source="paige-ai/Virchow2",
    architecture=Architecture(
        "vit_huge_patch14_224",
        {
            "img_size": 224,
            "init_values": 1e-5,
            "reg_tokens": 4,
            "mlp_ratio": 5.3375,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "silu",
        },
    ),
    pooling="cls+mean",
    input=InputRule(multiple_of=14, resize_px=224),
    paper="arXiv 2408.00738",
    published=Published(
        files=("model.safetensors", "pytorch_model.bin"),
        gated=True,
        commit="3158645804b69e3f3bc4439d4116edddf0840a72",
        sha256={"model.safetensors": "8d6cea947eb2418c3b0dff48cfb9b238e47744ab0dfca21b2b0637b140769b4b"},
    ),
)

H0MINI = EncoderSpec(
    name="h0mini",
    dim=1536,
    patch_px=224,
    mpp=0.5,
    mpp_basis="magnification",
    mean=(0.707223, 0.578729, 0.703617),
    std=(0.211883, 0.230117, 0.177517),
    precision="float32",
    licence="CC-BY-NC-ND-4.0",
    source="bioptimus/H0-mini",
    architecture=Architecture(
        "vit_base_patch14_reg4_dinov2",
        {"img_size": 224, "mlp_ratio": 5.33334, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"},
    ),
    pooling="cls+mean",
    input=InputRule(multiple_of=14, resize_px=224),
    paper="arXiv 2501.16239",
    published=Published(
        files=("model.safetensors", "pytorch_model.bin"),
        settings="config.json",
        gated=True,
        commit="5b5cc0505d19ae558270045eb0df8c34df4d9609",
        sha256={"model.safetensors": "5e4de45a6527a8160f7c21fe3105c987757efe30ce581e1f2cf5809476069ade"},
    ),
)

PHIKON2 = EncoderSpec(
    name="phikon2",
    dim=1024,
    patch_px=224,
    mpp=0.5,
    mpp_basis="stated",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    precision="float32",
    licence="Owkin non-commercial licence",
    source="owkin/phikon-v2",
    # Dinov2Model of transformers, which resamples positions without antialiasing
    architecture=Architecture(
        "vit_large_patch16_224",
        {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
        antialias=False,
    ),
    pooling="cls",
    # as SEAL feeds it
    input=InputRule(multiple_of=16),
    paper="arXiv 2409.09173",
    published=Published(
        files=("model.safetensors",),
        layer_names="transformers",
        ignored=("embeddings.mask_token",),
        commit="2ae989a9c40cffaa27f0a6cb29cc94d1d6f9a5fd",
        sha256={"model.safetensors": "261ae680fa699b3b951597fd57aa19c02ef735805acb104b93af69b36d928569"},
    ),
)

ROWS: dict[str, EncoderSpec] = {
    row.name: row
    for row in (
        _seal(
            CONCH,
            ignored=_CONCH_UNUSED,
            sha256="0f7c1386ff79062ccf6ceadaffbbca27f2f239eb738876e8adefe2991f0f968e",
        ),
        _seal(UNIV2, sha256="e7ae736968c355ae02e565ee828f1ed6bd9ffe01b7dbc5a9166b3a55d746bd49"),
        _seal(VIRCHOW2, wrapped=True),
        _seal(H0MINI, wrapped=True),
        _seal(PHIKON2, wrapped=True, ignored=("embeddings.mask_token",), also_called=("phikonv2",)),
        CONCH,
        UNIV2,
        VIRCHOW2,
        H0MINI,
        PHIKON2,
        UNI,
    )
}
ALIASES = {"phikonv2": "phikon2", "seal-phikonv2": "seal-phikon2"}
