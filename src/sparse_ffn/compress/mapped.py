"""Mapped experts: a model's experts as pages of a file, of which the kernel reads what a token's experts need."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_changeable, check_flag, check_type
from sparse_ffn.compress.stacks import check_here, stacks_of_moe
from sparse_ffn.compress.statistics import route
from sparse_ffn.layers.moe import MoE
from sparse_ffn.ops import under_transforms

STACKS = ("keys", "gate_keys", "values")
"""What is mapped, with all tensors below these names, as stored rows have them. Biases and routers are always read."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""Those of safetensors that stacks can have."""


@torch.inference_mode(False)  # a tensor that is made in it never trains
def map_experts_(model: nn.Module, path: str | os.PathLike[str], *, prefetch: bool = True) -> None:
    """Let the experts of a model's MoE layers be pages of a file, so that the model may be larger than memory.

    The outputs are those of the loaded model. The file is not changed: what is written to a mapped parameter goes to
    memory of the process. On Linux and macOS the kernel is told that rows are read at random, so that it does not read
    other experts ahead. Saving the model, copying it and converting its dtype read everything.

    Args:
        model: the ``keys``, ``gate_keys`` and ``values`` of its ``MoE`` layers are replaced, in place; they may be on
            meta. All else stays, other mixtures too.
        path: a file of safetensors, or one of ``torch.save(model.state_dict(), path)``, with these names; or what
            ``save_pretrained`` wrote: the folder, or the index (``*.index.json``) of several files.
        prefetch: in evaluation, before the layer computes, route its tokens and ask the kernel for all their experts at
            once, so that reading them overlaps. Waits for the router, where torch.compile breaks its graph. A model
            that has run compiled asks from ``torch.compiler.reset()`` on.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: the model has no ``MoE``; a stack is not in the file, has another shape or dtype or more tensors
            there, is on another device than the CPU and meta, or is neither a plain parameter nor rows of
            ``quantize_experts_``: parametrised, pruned by a mask, adapted by peft, offloaded, held by accelerate or
            distributed. Nothing was changed then.
        OSError: a file cannot be read.
    """
    check_changeable("model", model)
    check_type("path", path, (str, os.PathLike), "a path")
    prefetch = check_flag("prefetch", prefetch)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("the model has no MoE layer: only the experts of MoE and its named forms are mapped")
    check_here(model, [(name, layer, stacks_of_moe(layer)) for name, layer in layers])
    for prefix, layer in layers:
        for stack in stacks_of_moe(layer):
            stack.check_whole(f"{prefix}.{stack.name}" if prefix else stack.name, "map the experts first")
    stored = {name: tensor for file in _files(Path(path)) for name, tensor in _read(file).items()}
    mapped = [
        (owner, attribute, _checked(name, getattr(owner, attribute), stored, path))
        for prefix, layer in layers
        for owner, attribute, name in _stacks(layer, prefix)
    ]
    _check_none_else(layers, stored, path)
    made: dict[Tensor, Tensor] = {}  # tied stacks stay tied
    for owner, attribute, tensor in mapped:
        old = getattr(owner, attribute)
        if old not in made:
            is_parameter = isinstance(old, nn.Parameter)
            made[old] = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
        setattr(owner, attribute, made[old])
        _advise(tensor, "MADV_RANDOM")
    for _, layer in layers:
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _prefetch]:
            del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]  # of an earlier call
        if prefetch:
            layer.register_forward_pre_hook(_prefetch, with_kwargs=True)


def _stacks(layer: MoE, prefix: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Where each of the layer's large tensors is, and its name in the model's state dict."""
    start = f"{prefix}." if prefix else ""
    for module_name, module in layer.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{module_name}.{attribute}" if module_name else attribute
            if tensor is not None and name.partition(".")[0] in STACKS:
                yield module, attribute, start + name


def _check_none_else(layers: list[tuple[str, MoE]], stored: Iterable[str], path: Any) -> None:
    """Raise if the file has more of a stack than the model, such as the zero points of codes."""
    for prefix, layer in layers:
        start = f"{prefix}." if prefix else ""
        names = {name for _, _, name in _stacks(layer, prefix)}
        stacks = tuple(f"{start}{stack}." for stack in STACKS)
        if more := [name for name in stored if name.startswith(stacks) and name not in names]:
            raise ValueError(f"{path} has {', '.join(more)}, which the model has not: its experts are stored otherwise")


def _checked(name: str, old: Tensor, stored: dict[str, Tensor], path: Any) -> Tensor:
    new = stored.get(name)
    if new is None:
        raise ValueError(f"{name} is not in {path}")
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"{name} must have shape {list(old.shape)} and {old.dtype}, got {list(new.shape)} and {new.dtype} in {path}"
        )
    if old.device.type not in ("cpu", "meta"):
        raise ValueError(f"{name} is on {old.device}: experts are mapped on the CPU")
    return new


def _files(path: Path) -> Iterator[Path]:
    """The files with tensors: the path itself, or those of a folder or an index of ``save_pretrained``."""
    if path.is_dir():
        names = ("model.safetensors.index.json", "model.safetensors")
        inside = next((path / name for name in names if (path / name).exists()), None)
        if inside is None:
            raise ValueError(f"path = {str(path)!r} is a folder without {' and without '.join(names)}")
        path = inside
    if path.suffix != ".json":
        yield path
        return
    try:
        index = json.loads(path.read_text())
    except ValueError:
        index = None
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or any(Path(str(name)).name != name for name in shards.values()):
        raise ValueError(f"path = {str(path)!r} must have a weight_map, from names of tensors to files beside it")
    yield from (path.with_name(name) for name in dict.fromkeys(shards.values()))


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name, all of them parts of one mapping."""
    if zipfile.is_zipfile(path):
        try:
            stored = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        except UnpicklingError:
            raise ValueError(f"path = {str(path)!r} holds more than a state dict, such as a whole model") from None
        found = {n: t for n, t in stored.items() if isinstance(t, Tensor)} if isinstance(stored, dict) else {}
        if not found:  # a state dict may hold other things than tensors, too
            raise ValueError(f"path = {str(path)!r} holds no state dict")
        return found
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size) if size < 100_000_000 else b"")
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise ValueError(f"path = {str(path)!r} is neither of safetensors nor of torch.save")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    known = {n: about for n, about in header.items() if n != "__metadata__" and about.get("dtype") in DTYPES}
    for name, about in known.items():
        if (end := 8 + size + about["data_offsets"][1]) > len(memory):
            raise ValueError(f"path = {str(path)!r} ends at byte {len(memory)}, before {name} does, at {end}")
    return {name: _view(memory, 8 + size + about["data_offsets"][0], about) for name, about in known.items()}


def _view(memory: mmap.mmap, start: int, about: dict[str, Any]) -> Tensor:
    """A tensor of a file of safetensors."""
    dtype, shape = DTYPES[about["dtype"]], about["shape"]
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


@torch.no_grad()
def _prefetch(layer: MoE, args: Any, kwargs: Any) -> None:
    """Before a layer's forward: ask the kernel for the experts that it will select."""
    given = (*args, *kwargs.values())
    if under_transforms() or any(isinstance(x, Tensor) and x.is_meta for x in given):
        return  # no numbers, or those of several calls at once
    # is_exporting() is true for all that torch 2.9 compiles
    if layer.training or torch.compiler._is_exporting_flag:
        return  # a step reads all experts, and to route twice would draw and count twice; a program holds no advice
    _, index_TK, _, _ = route(layer, *args, **kwargs)
    experts = [e for e in set(index_TK.flatten().tolist()) if e < layer.n_experts]
    for owner, attribute, _ in _stacks(layer, ""):
        for e in experts:
            _advise(getattr(owner, attribute)[e], "MADV_WILLNEED")


def _advise(tensor: Tensor, advice: str) -> None:
    """Advise the kernel about a contiguous tensor's pages, where there is such advice."""
    number = getattr(mmap, advice, None) if sys.platform in ("linux", "darwin") else None
    if number is None or not tensor.numel() or tensor.device.type != "cpu":
        return
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise()(first, tensor.data_ptr() + tensor.numel() * tensor.element_size() - first, number)


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
