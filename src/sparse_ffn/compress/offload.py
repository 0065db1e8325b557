"""Offloaded experts: all of them in host memory, and on the device a cache of those that tokens used last."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.checks import called, check_changeable, check_device, check_flag, check_module, plain, shown
from sparse_ffn.compress.stacks import Stack, check_here, experts_of, tell, untaught
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.rows import OffloadedRows, QuantizedRows
from sparse_ffn.layers.rows.offloaded import ExpertCache
from sparse_ffn.ops import Codes


@torch.inference_mode(False)  # a tensor that is made in it never trains
@torch.no_grad()
def offload_experts_(model: nn.Module, *, cache: float, device: Any = "cuda", pin: bool = True) -> None:
    """Keep a model's experts in host memory, in place, and copy them to a GPU as tokens select them.

    Each layer has a cache on the device; the expert that was not used for longest makes place. A forward pass waits
    for the routing, copies what is missing on a stream of its own and computes. Where a call selects more experts than
    the cache holds, it computes them in waves, which are added in fp32. Move the rest of the model with
    ``.to(device)``, before or after: experts move nowhere with it. They compute in evaluation only and have no
    gradients; a compiled model breaks its graph there, and a CUDA graph cannot hold them. ``dequantize_experts_``
    makes parameters of them again, in host memory.

    Args:
        model: the stacks of its ``MoE`` layers, and with ``sparse_ffn.integrations.transformers`` imported those of
            transformers' models, become ``OffloadedRows``; rows of ``quantize_experts_`` stay codes.
        cache: experts of each layer (of a ``MixedMoE`` of each bank) on the device, an int; or their share, a float in
            (0, 1], rounded up.
        device: where the layers compute: a CUDA device, or ``"cpu"`` for trials.
        pin: put the experts into page-locked memory, from which the copies that ``prefetch`` begins overlap with
            computing.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: the model has no experts, the cache of a ``MoE`` would hold fewer than its k, the device is of
            another kind, or a layer's stacks are offloaded already, on meta, parametrised, adapted by peft, or
            distributed. Nothing was changed then.
        RuntimeError: there is no such device, or it has too little memory.
    """
    check_changeable("model", model)
    pin = check_flag("pin", pin)
    size, place = _check_cache(cache), _check_place(device)
    found = list(experts_of(model))
    if not found:
        raise ValueError(f"the model has no MoE layer{untaught(model)}")
    check_here(model, found)
    slots = [_slots(name, module, stacks[0].held.shape[0], size) for name, module, stacks in found]
    for name, _, stacks in found:
        for stack in stacks:
            _check(f"{name}.{stack.name}" if name else stack.name, stack)
    pinned: dict[int, Tensor] = {}  # tied stacks are pinned once

    def host(t: Tensor) -> Tensor:
        if id(t) not in pinned:
            pinned[id(t)] = _host(t.detach(), pin and place.type == "cuda")
        return pinned[id(t)]

    made = []
    for (_, _, stacks), n_slots in zip(found, slots, strict=True):
        hosts: dict[str, Tensor | Codes] = {}
        for stack in stacks:
            rows = stack.held
            hosts[stack.name] = rows.codes.each(host) if isinstance(rows, QuantizedRows) else host(rows)
        made.append((stacks, ExpertCache(hosts, n_slots, place)))
    for stacks, experts in made:
        for stack in stacks:
            transposed = stack.transposed and not isinstance(stack.held, QuantizedRows)  # whose rows are rows
            stack.store(OffloadedRows(experts, stack.name, transposed).train(stack.module.training))
    tell(model)


def offload_stats(model: nn.Module) -> dict[str, dict[str, int]]:
    """What the caches of a model's offloaded layers did so far.

    Returns:
        By the layer's name ``"hits"`` and ``"misses"``, experts that a call found in the cache or had to copy, each
        counted once a call; and ``"bytes"``, copied to the device, prefetched ones among them.

    Raises:
        TypeError: the model is no module.
    """
    check_module("model", model)
    found = {name: stacks[0].held for name, _, stacks in experts_of(model)}
    caches = {name: rows.cache for name, rows in found.items() if isinstance(rows, OffloadedRows)}
    return {name: {"hits": c.hits, "misses": c.misses, "bytes": c.bytes} for name, c in caches.items()}


def _check_cache(cache: Any) -> int | float:
    size = plain(cache)
    if isinstance(size, bool) or not isinstance(size, (int, float)):
        raise TypeError(f"cache must be a number of experts, an int, or a share of them, a float, got {shown(cache)}")
    if isinstance(size, float) and not 0 < size <= 1:
        raise ValueError(f"cache must be in (0, 1] as a share of the experts, got {shown(cache)}; a number is an int")
    if isinstance(size, int) and size < 1:
        raise ValueError(f"cache must be at least 1, got {shown(cache)}")
    return size


def _check_place(device: Any) -> torch.device:
    check_device(device)
    place = torch.get_default_device() if device is None else torch.device(device)
    if place.type not in ("cuda", "cpu"):
        raise ValueError(f"device must be a CUDA device or 'cpu', got {str(device)!r}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device = {str(device)!r}, but torch sees no CUDA device; 'cpu' is for trials without one")
    return place


def _slots(name: str, module: nn.Module, n_experts: int, cache: int | float) -> int:
    """Experts of a module on the device."""
    share = isinstance(cache, float)
    n = math.ceil(cache * n_experts - 1e-9) if share else min(int(cache), n_experts)
    k = module.k if isinstance(module, MoE) else 1  # others do not know it
    if n < min(k, n_experts):
        holds = f", {n} experts of {n_experts}," if share else ""
        raise ValueError(f"cache = {cache}{holds} is less than the k = {k} of {called(name)}")
    return n


def _check(where: str, stack: Stack) -> None:
    """Raise ValueError unless a stack can be offloaded."""
    rows = stack.held
    if isinstance(rows, OffloadedRows):
        raise ValueError(f"{where} are offloaded already: call dequantize_experts_ first, or load the model anew")
    stack.check_whole(where, "offload the experts of a model that is whole")
    if any(t.is_meta for t in (rows.stored() if isinstance(rows, QuantizedRows) else [rows])):
        raise ValueError(f"{where} is on meta: load the weights first")


def _host(t: Tensor, pin: bool) -> Tensor:
    """A tensor in host memory, page-locked if there is such memory."""
    t = t.cpu().contiguous()
    if not pin:
        return t
    try:
        return t.pin_memory()
    except RuntimeError as error:
        warnings.warn(
            f"no page-locked memory for {t.nbytes / 2**30:.1f} GiB of experts ({error}): copies from other memory do "
            "not overlap with computing. pin=False silences this.",
            SparseFFNWarning,
            stacklevel=3,
        )
        return t
