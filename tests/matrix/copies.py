"""Construction on the meta device, copies, pickles and files."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from pathlib import Path

import safetensors.torch
import torch

import sparse_ffn as sf

from .feature import feature
from .layers import LAYERS, D, assert_near, build, loss, step, tokens


def _used(name: str) -> sf.SparseFFN:
    """A layer that has just been through a training forward: it holds a loss with its graph."""
    layer = build(name)
    loss(layer, layer(tokens(5)))
    return layer


def _assert_twin(twin: sf.SparseFFN, layer: sf.SparseFFN) -> None:
    """The same function and the same parameters, in memory of its own, without the last forward's loss."""
    assert sf.aux_loss(twin) == 0
    own = {p.data_ptr() for p in layer.parameters()}
    assert not own & {p.data_ptr() for p in twin.parameters()}
    assert_near(step(twin, tokens(9)), step(layer, tokens(9)), 0)


@feature("meta device")
def meta(name: str) -> None:
    """Built on meta, emptied and reset it is a layer; weights can be assigned too; meta tensors go through."""
    with torch.device("meta"):
        layer = LAYERS[name]()
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    with sf.backend("auto"):  # a backend for meta tensors
        assert layer(torch.empty(3, D, device="meta")).shape == (3, layer.d_out)
    layer.load_state_dict(build(name).state_dict(), assign=True)
    assert torch.equal(layer.eval()(tokens(4)), build(name).eval()(tokens(4)))
    layer = LAYERS[name](device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(float("nan"))
    layer.reset_parameters()
    assert all(t.isfinite().all() for t in (layer(tokens(4)), *layer.state_dict().values()))


@feature("`copy.deepcopy`")
def deepcopy(name: str) -> None:
    """After a training forward, which holds a graph: the same layer, without the loss of that forward."""
    layer = _used(name)
    _assert_twin(copy.deepcopy(layer), layer)


@feature("`pickle`, `torch.save` of a module")
def pickled(name: str) -> None:
    """As above."""
    layer, buffer = _used(name), io.BytesIO()
    _assert_twin(pickle.loads(pickle.dumps(layer)), layer)
    torch.save(layer, buffer)
    buffer.seek(0)
    _assert_twin(torch.load(buffer, weights_only=False), layer)


@feature("`torch.load(weights_only=True)`")
def weights_only(name: str) -> None:
    """A saved state dict fills another layer, strictly; also when mapped from the file and assigned."""
    layer = _used(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.pt")
        torch.save(layer.state_dict(), path)
        for mapped in (False, True):
            twin = build(name)
            twin.reset_parameters()
            twin.load_state_dict(torch.load(path, weights_only=True, mmap=mapped), strict=True, assign=mapped)
            _assert_twin(twin, layer)


@feature("safetensors")
def safe(name: str) -> None:
    """`save_model` and `load_model`, strictly."""
    layer, twin = _used(name), build(name)
    twin.reset_parameters()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "layer.safetensors"))
        safetensors.torch.save_model(layer, path)
        assert safetensors.torch.load_model(twin, path, strict=True) == (set(), [])
    _assert_twin(twin, layer)


FEATURES = (meta, deepcopy, pickled, weights_only, safe)
