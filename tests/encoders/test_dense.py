"""Dense output: tokens are those that the embedding is made of, and attention is that which makes it."""

import numpy as np
import pytest
import torch
from encoder_fixtures import (
    TINY_CONCH,
    TINY_PHIKON,
    TINY_VIRCHOW,
    TINY_VIT,
    as_batch,
    noise_patches,
    untrained_encoder,
)
from timm.models.vision_transformer import VisionTransformer

from seal_extract.demo import untrained_encoder as untrained_model
from seal_extract.encoders.dense import pack, token_grid, unpack
from seal_extract.encoders.tower import timm_spec
from seal_extract.encoders.transform import fit
from seal_extract.errors import UsageError

VITS = (TINY_VIT, TINY_VIRCHOW, TINY_CONCH, TINY_PHIKON)


def trunk_of(encoder):
    return getattr(encoder.tower, "trunk", encoder.tower)


def normalised(encoder, patches):
    return (patches.float().div(255) - encoder.mean) / encoder.std


@pytest.mark.skipif(not hasattr(VisionTransformer, "forward_intermediates"), reason="of timm 1")
@pytest.mark.parametrize("spec", VITS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("px", [28, 64])
def test_tokens_are_those_of_timm_in_reading_order_without_prefix(spec, px):
    encoder = untrained_encoder(spec)
    side = spec.input.side_px or px - px % spec.input.multiple_of
    patches = as_batch(noise_patches(3, side))
    tokens, trunk = encoder.encode_tokens(patches), trunk_of(encoder)
    last = trunk.forward_intermediates(
        normalised(encoder, patches), indices=1, norm=True, intermediates_only=True
    )[-1]
    np.testing.assert_array_equal(tokens, last.permute(0, 2, 3, 1))
    assert token_grid(encoder.tower, spec, side, side) == tuple(tokens.shape[1:])
    assert token_grid(encoder.tower, spec, side, 2 * side)[:2] == (tokens.shape[1], 2 * tokens.shape[2])


def test_their_mean_is_that_of_the_embedding_and_four_registers_are_not_in_it():
    encoder = untrained_encoder(TINY_VIRCHOW)
    patches = as_batch(noise_patches(3, 40))
    tokens = encoder.encode_tokens(patches)
    assert trunk_of(encoder).num_prefix_tokens == 5
    assert tokens.shape == (3, 2, 2, 24)
    assert torch.equal(tokens.flatten(1, 2).mean(1), encoder.encode(patches)[:, 24:])


@pytest.mark.parametrize(
    ("name", "pick"),
    [("resnet18", lambda f: f.permute(0, 2, 3, 1)), ("swin_tiny_patch4_window7_224", lambda f: f)],
)
def test_a_feature_map_where_there_are_no_tokens(name, pick):
    encoder = untrained_model(timm_spec(f"timm:{name}"))
    patches = as_batch(noise_patches(2, 224))
    images = (fit(patches, encoder.spec.input).float().div(255) - encoder.mean) / encoder.std
    tokens = encoder.encode_tokens(patches)
    assert tokens.shape[1:] == token_grid(encoder.tower, encoder.spec, 224, 224) == (7, 7, encoder.spec.dim)
    assert torch.equal(tokens, pick(encoder.tower.forward_features(images)))


@pytest.mark.parametrize("spec", VITS, ids=lambda spec: spec.name)
def test_both_from_one_pass_and_back_from_one_row(spec):
    encoder = untrained_encoder(spec)
    patches = as_batch(noise_patches(3, spec.input.side_px or 64))
    rows = encoder.encode_unchecked(patches, encoder.compute_packed)
    grid = token_grid(encoder.tower, spec, *patches.shape[2:])
    features, tokens = unpack(rows.numpy(), spec.dim, grid)
    np.testing.assert_array_equal(features, encoder.encode(patches))
    np.testing.assert_array_equal(tokens, encoder.encode_tokens(patches).half())


def test_no_patches_give_no_tokens():
    encoder, none = untrained_encoder(TINY_VIRCHOW), torch.zeros(0, 3, 100, 100, dtype=torch.uint8)
    assert encoder.spec.input.side_px is not None  # so that patches are resized
    grid = encoder.token_grid(100)
    assert encoder.encode_tokens(none).shape == (0, *grid)
    assert encoder.attention_maps(none).shape[2:] == grid[:2]


def test_every_bit_of_a_token_survives():
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(2, 8, 8, 512)
    embeddings = torch.arange(6.0).reshape(2, 3)
    tokens = torch.from_numpy(bits.astype(np.float32))
    features, back = unpack(pack(embeddings, tokens).numpy(), 3, (8, 8, 512))
    np.testing.assert_array_equal(features, embeddings)
    np.testing.assert_array_equal(back, bits)


# --- attention ----------------------------------------------------------------------------------------------


def textbook_attention(trunk, images):
    """The softmax of q k of the class token in the last block."""
    given = []
    hook = trunk.blocks[-1].attn.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    trunk.forward_features(images)
    hook.remove()
    attn = trunk.blocks[-1].attn
    qkv = attn.qkv(given[0]).unflatten(2, (3, attn.num_heads, -1)).double()  # [B, N, 3, heads, d]
    q, k = qkv[:, 0, 0], qkv[:, :, 1]
    score = torch.einsum("bhd,bnhd->bhn", q, k) / q.shape[-1] ** 0.5
    return score.softmax(-1)


@pytest.mark.parametrize("spec", [TINY_VIT, TINY_VIRCHOW, TINY_PHIKON], ids=lambda spec: spec.name)
def test_a_map_is_the_attention_of_the_class_token_in_the_last_block(spec):
    encoder = untrained_encoder(spec)
    patches = as_batch(noise_patches(3, spec.input.side_px or 64))
    before = encoder.encode(patches)
    maps, trunk = encoder.attention_maps(patches), trunk_of(encoder)
    every = textbook_attention(trunk, normalised(encoder, patches))
    expected = every[:, :, trunk.num_prefix_tokens :]
    np.testing.assert_allclose(maps.flatten(2), expected, atol=1e-6)
    assert maps.shape[2:] == encoder.encode_tokens(patches).shape[1:3]
    assert torch.equal(encoder.encode(patches), before)
    assert trunk.blocks[-1].attn.fused_attn
    assert not trunk.blocks[-1].attn.attn_drop._forward_hooks


def test_a_pooler_attends_by_its_first_query():
    encoder = untrained_encoder(TINY_CONCH)
    patches = as_batch(noise_patches(2, 64))
    maps, pooler = encoder.attention_maps(patches), encoder.tower.attn_pool_contrast
    tokens = encoder.tower.trunk.forward_features(normalised(encoder, patches))
    assert maps.shape == (2, 8, 4, 4)
    cls = 1 - maps.sum((2, 3))  # what is left for the class token
    weights = torch.cat([cls[..., None], maps.flatten(2)], 2)  # [B, heads, N]
    values = (pooler.ln_k(tokens) @ pooler.attn.v_proj_weight.T).unflatten(2, (8, -1))  # [B, N, heads, d]
    mixed = torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1) + pooler.attn.in_proj_bias.chunk(3)[2]
    assert torch.allclose(pooler.attn.out_proj(mixed), pooler(tokens), atol=1e-5)


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "resnet18",
            "timm-resnet18.a1_in1k has no attention maps; allowed: vision transformers with a class",
        ),
        (
            "xcit_nano_12_p16_224",
            "has no (attention maps|grid of tokens)",
        ),  # its class token attends behind all blocks
    ],
)
def test_towers_without_attention_are_refused_in_one_line(name, words):
    encoder = untrained_model(timm_spec(f"timm:{name}"))
    with pytest.raises(UsageError, match=words) as refused:
        encoder.attention_maps(as_batch(noise_patches(1, 224)))
    assert "\n" not in str(refused.value)


def test_towers_without_a_grid_are_refused_in_one_line():
    encoder = untrained_encoder(TINY_VIT)
    patches = as_batch(noise_patches(1, 28))
    encoder.tower.forward_features = lambda images: torch.zeros(1, 7, 24)  # 2 of them patch tokens, not 4
    with pytest.raises(
        UsageError, match=r"gives .*no grid of tokens .*allowed: vision transformers, Swin, CNNs$"
    ):
        encoder.encode_tokens(patches)
    encoder.tower = torch.nn.Linear(1, 1)
    for method in (encoder.encode_tokens, encoder.attention_maps):
        with pytest.raises(UsageError, match="tiny-vit has no grid of tokens; allowed: vision transformers"):
            method(patches)


@pytest.mark.parametrize("method", ["encode_tokens", "attention_maps"])
def test_patches_that_are_none_are_refused_as_by_encode(method):
    encoder = untrained_encoder(TINY_CONCH)
    for patches, words in (
        (torch.zeros(1, 3, 64, 64), "allowed: uint8"),
        (torch.zeros(1, 3, 60, 60, dtype=torch.uint8), "sides that are a multiple of 16"),
    ):
        with pytest.raises(UsageError, match=words):
            getattr(encoder, method)(patches)
