"""What upload and encoder ask of a GPU, counted on tensors that claim to lie on one and hold nothing."""

from collections import Counter
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from seal_extract.demo import untrained_encoder
from seal_extract.encoders import find_spec, list_encoders, transform
from seal_extract.encoders import precision as precision_module
from seal_extract.encoders.encoder import Encoder
from seal_extract.encoders.tower import embed, empty_tower
from seal_extract.patches import resample
from seal_extract.patches.stream import _Upload
from seal_extract.patches.taps import taps
from seal_extract.run.embed import GpuEmbedder

ROWS = [row.name for row in list_encoders() if not row.name.startswith("seal-")]
WAITS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "equal",
    "unique_consecutive",
}
VIEWS = {"view", "expand", "permute", "transpose", "slice", "select", "split", "unbind", "unsqueeze", "t"}
FREE = {"dropout", "device", "chunk", "reshape", "flatten"} | VIEWS


class Commands(TorchDispatchMode):
    """Counts what a GPU is told to do, by name; FREE tells it nothing."""

    def __init__(self):
        super().__init__()
        self.names, self.moved, self.blocking, self.bytes = Counter(), Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[-1].split(".")[0]
        if name in ("to", "_to_copy", "copy_"):
            pair = args[0], args[1] if name == "copy_" else result
            if len({one.device for one in pair}) > 1:
                self.moved[func.name()] += 1
                self.blocking += not (kwargs or {}).get(
                    "non_blocking", name == "copy_" and args[2:] == (True,)
                )
            elif pair[0].dtype == pair[1].dtype:
                return result
        if name not in FREE:
            self.names[name] += 1
            tensors = tree_iter((args, kwargs, result))
            self.bytes += sum(
                one.numel() * one.element_size() for one in tensors if isinstance(one, torch.Tensor)
            )
        return result


class IndexedWithoutDriver(TorchFunctionMode):
    """Slices by operators: the brackets of a tensor on a GPU ask the driver for the device first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        index, dim = index if isinstance(index, tuple) else (index,), 0
        for i, one in enumerate(index):
            if one is Ellipsis:
                dim = tensor.ndim - (len(index) - 1 - i)
            elif isinstance(one, int):
                tensor = tensor.select(dim, one)
            else:
                stop = tensor.shape[dim] if one.stop is None else one.stop
                tensor = torch.ops.aten.slice(tensor, dim, one.start or 0, stop)
                dim += 1
        return tensor


@contextmanager
def on_fake_gpu(name, precision, monkeypatch):
    """An encoder whose tensors claim to be on a GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(transform, "kernels_run_on", lambda device: False)  # Triton's cannot be faked
    tower = empty_tower(find_spec(name))
    with FakeTensorMode(), IndexedWithoutDriver():
        held = {}
        for tensor in (*tower.parameters(), *tower.buffers()):
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            fake = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
            held[id(tensor)] = fake
        encoder = Encoder(find_spec(name), deepcopy(tower, held), (), torch.float32)
        encoder.mean, encoder.std = (torch.empty(3, 1, 1, device="cuda") for _ in range(2))
        encoder.set_precision(precision)
        yield encoder


@pytest.mark.parametrize(("precision", "inside"), [("float32", "ieee"), ("tf32", "tf32")])
def test_float32_is_true_float32_and_tf32_is_asked_for(precision, inside, monkeypatch):
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before, seen = [one.fp32_precision for one in backends], []
    with on_fake_gpu("h0mini", precision, monkeypatch) as encoder:
        encoder.tower.norm.register_forward_hook(
            lambda *_: seen.extend(one.fp32_precision for one in backends)
        )
        encoder.encode_unchecked(torch.empty(4, 3, 224, 224, dtype=torch.uint8, device="cuda"))
        assert encoder.identity["precision"] == precision
    assert seen == [inside] * 2
    assert [one.fp32_precision for one in backends] == before


def test_a_gpu_holds_matrices_once_in_the_precision_that_is_used(monkeypatch):
    moves = []
    monkeypatch.setattr(precision_module, "move_matrices", lambda tower, device: moves.append(device.type))
    with on_fake_gpu("h0mini", "float16", monkeypatch) as encoder:
        patches = torch.empty(2, 3, 224, 224, dtype=torch.uint8, device="cuda")
        for _ in range(2):
            encoder.encode_unchecked(patches)
        low = encoder._copy.held[1].blocks[0].attn.qkv.weight
        assert (low.device.type, low.dtype, moves) == ("cuda", torch.float16, ["cpu"])
        encoder(torch.empty(2, 3, 224, 224, device="cuda"))
        assert (encoder._copy.held, moves) == (None, ["cpu", "cuda"])


@pytest.mark.gpu
def test_matrices_wait_on_the_host_and_come_back_as_the_same_parameters():
    encoder = untrained_encoder().to("cuda")
    encoder.set_precision("float16")
    weight, norm = encoder.tower.blocks[0].attn.qkv.weight, encoder.tower.norm.weight
    patches = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    exact = encoder(encoder.std.new_zeros(2, 3, 224, 224))
    encoder.encode(patches)
    assert (weight.device.type, norm.device.type) == ("cpu", "cuda")
    assert torch.equal(encoder(encoder.std.new_zeros(2, 3, 224, 224)), exact)
    assert weight is encoder.tower.blocks[0].attn.qkv.weight
    assert weight.device.type == "cuda"
    assert not weight.is_inference()


def told_for_a_batch(encoder):
    """What a batch of 256 patches makes the GPU do, once matrices and buffers are there."""

    class StubCuda:
        record = staticmethod(lambda work: work)
        host_memory = staticmethod(torch.empty)
        mark = staticmethod(lambda: None)

    embedder = GpuEmbedder(encoder, 256, StubCuda())
    side = encoder.spec.input.side_px or 224
    patches = torch.empty(256, 3, side, side, dtype=torch.uint8, device="cuda")
    embedder.submit(patches)
    with Commands() as told:
        embedder.submit(patches)
    return told


def test_regions_of_a_batch_are_brought_by_one_copy_that_nobody_waits_for(monkeypatch):
    """And resampled there together; in torch, because Triton's kernels, two a batch, cannot be faked."""
    waits = []
    stream = SimpleNamespace(wait_stream=waits.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda patches, of: waits.append(of))
    monkeypatch.setattr(resample, "kernels_run_on", lambda device: False)
    upload = _Upload(torch.device("cuda"))
    taps.cache_clear()
    with FakeTensorMode():
        regions = torch.empty(256, 512, 512, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        to_patches = resample.Resampling(224, early=False).on_device
        upload(to_patches, regions)  # which makes the filter's tables
        with Commands() as told:
            patches = upload(to_patches, regions)
    taps.cache_clear()
    assert (patches.device.type, list(patches.shape)) == ("cuda", [256, 3, 224, 224])
    assert waits == [stream] * 4
    assert told.moved == {"aten::_to_copy": 1}
    assert told.blocking == 0
    assert not told.names.keys() & WAITS
    assert told.names.total() <= 50
    assert told.bytes / 256e6 < 80


MB_A_PATCH = {"conch": 205, "univ2": 1300, "virchow2": 1420, "h0mini": 330, "phikon2": 600, "uni": 600}
MB_A_PATCH |= {"conch-v1.5": 2500, "omiclip": 700, "plip": 80}


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("name", MB_A_PATCH)
def test_a_batch_never_waits_its_attention_is_fused_and_its_commands_are_few(name, precision, monkeypatch):
    with on_fake_gpu(name, precision, monkeypatch) as encoder:
        told = told_for_a_batch(encoder)
    depth = len(getattr(encoder.tower, "trunk", encoder.tower).blocks)
    pooler = encoder.spec.pooling == "conch"
    assert not told.names.keys() & WAITS
    assert told.moved == {"aten::copy_": 1}  # the embeddings, to the host
    assert not told.blocking
    assert told.names["scaled_dot_product_attention"] == depth + pooler
    assert not told.names.keys() & {"softmax", "_softmax", "matmul", "bmm"}
    assert told.names.total() <= 15 * depth + 15
    # what LayerNorm gives is converted for the matrix behind it, and no matrix is
    assert told.names["to"] <= (2 * depth + 7 if precision == "float16" else 1)
    if precision == "float16":
        assert told.bytes / 256e6 < MB_A_PATCH[name]


@pytest.mark.parametrize("name", ROWS)
def test_every_tower_is_one_graph_that_no_value_of_a_pixel_changes(name):
    class Whole(nn.Module):
        def __init__(self, spec):
            super().__init__()
            self.tower, self.pooling = empty_tower(spec).to("meta"), spec.pooling

        def forward(self, images):
            return embed(self.tower, self.pooling, images)

    spec = find_spec(name)
    if not timm.is_model(spec.architecture.timm):
        pytest.skip("this timm has no such architecture")
    side = spec.input.side_px or 224
    exported = torch.export.export(Whole(spec), (torch.empty(8, 3, side, side, device="meta"),), strict=False)
    last = list(exported.graph.nodes)[-1]
    assert last.args[0][0].meta["val"].shape == (8, spec.dim)
