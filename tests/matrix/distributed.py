"""Two processes: DistributedDataParallel, FSDP2, shared memory. One spawn runs all of it, on every backend."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import sparse_ffn as sf
from sparse_ffn.layers import LatentMoE
from sparse_ffn.parallel import ExpertParallel, HiddenParallel, MemoryParallel, clip_grad_norm_, ddp_ignore

from .feature import EVERY_BACKEND, Case, feature
from .layers import ALL, BALANCED, FFNS, LAST, assert_near, build, loss, step, tokens

WORLD = 2
WITH_A_LOSS = tuple(name for name in BALANCED if name != "MoE")
SPLIT = tuple(name for name in FFNS if name not in LAST)


def _batch() -> Tensor:
    """A sequence batch for each process."""
    return tokens(WORLD, 24)


def _layer(name: str, **options: Any) -> sf.SparseFFN:
    return build(name, **({"balance_weight": 1.0, **options} if name in BALANCED else {}))


def _averaged(name: str) -> dict[str, Tensor]:
    """What one process finds as the mean of the processes' gradients."""
    layer = _layer(name)
    steps = [step(layer, x) for x in _batch()]
    return {key: sum(found[key] for found in steps) / WORLD for key, _ in layer.named_parameters()}


def _gradients(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A step on this process's part; the gradients as whole tensors."""
    loss(model, model(_batch()[dist.get_rank()])).backward()
    found = {key.removeprefix(prefix): p.grad for key, p in model.named_parameters()}
    assert all(g is not None for g in found.values()), [key for key, g in found.items() if g is None]
    return {key: whole(g) for key, g in found.items()}


def whole(g: Tensor) -> Tensor:
    """A gradient of all processes."""
    return g.full_tensor() if hasattr(g, "full_tensor") else g


@feature("`DistributedDataParallel`", processes=WORLD)
def data_parallel(name: str) -> None:
    """Gloo, without `find_unused_parameters`: three steps; gradients are the mean of those of one process."""
    model = DistributedDataParallel(_layer(name))
    assert_near(_gradients(model, "module."), _averaged(name))
    for _ in range(2):  # an unused parameter of the step before would raise here
        model.zero_grad()
        _gradients(model, "module.")


@feature("`DistributedDataParallel`, `sync_balance=True`", dict.fromkeys(EVERY_BACKEND, WITH_A_LOSS), processes=WORLD)
def synced_balance(name: str) -> None:
    """The balance gradient is that of one process with all tokens (S-BASE selects within each process's batch)."""
    model = DistributedDataParallel(_layer(name, sync_balance=True))
    found = _gradients(model, "module.")
    layer, parts = _layer(name), _batch()
    expected = _averaged(name)
    for x in parts:  # replace each process's own balance gradient by the pooled one
        layer(x)
        _add(expected, layer, -1 / WORLD)
    layer(parts.flatten(0, 1))
    _add(expected, layer, 1)
    assert_near(found, expected)


def _add(gradients: dict[str, Tensor], layer: sf.SparseFFN, factor: float) -> None:
    """Add factor times the gradient of the balance loss."""
    layer.zero_grad()
    sf.aux_loss(layer).backward()
    for key, p in layer.named_parameters():
        if p.grad is not None:
            gradients[key] = gradients[key] + factor * p.grad


@feature("FSDP2, `fully_shard`", processes=WORLD)
def fully_sharded(name: str) -> None:
    """Children sharded by themselves or with the layer: gradients are those of one process; an optimizer steps."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for children in (False, True):
        layer = _layer(name)
        for child in _children(layer) if children else ():
            fully_shard(child, mesh=mesh)
        fully_shard(layer, mesh=mesh)
        assert_near(_gradients(layer, ""), _averaged(name))
        torch.optim.AdamW(layer.parameters()).step()
        layer.zero_grad()
        _gradients(layer, "")


def _children(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules of a layer that are called."""
    for child in layer.children():
        yield from child if isinstance(child, nn.ModuleList) else (child,)


@feature("FSDP2, bf16 parameters", processes=WORLD)
def fully_sharded_bf16(name: str) -> None:
    """`MixedPrecisionPolicy(param_dtype=torch.bfloat16)`: finite gradients in fp32."""
    layer = fully_shard(
        _layer(name), mesh=init_device_mesh("cpu", (WORLD,)),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    )  # fmt: skip
    for g in _gradients(layer, "").values():
        assert g.dtype == torch.float32
        assert g.isfinite().all()


@feature("`sparse_ffn.parallel`, split over the processes", dict.fromkeys(EVERY_BACKEND, SPLIT), processes=WORLD)
def split_over_processes(name: str) -> None:
    """Experts, or hidden units, or value rows: gradients are those of one process; DDP wraps it; clipping agrees."""
    mesh, x = init_device_mesh("cpu", (WORLD,)), _batch()[dist.get_rank()]
    layer, alone = _layer(name), _layer(name)
    if name in ("DenseFFN", "TopKFFN"):  # all processes have the same tokens
        parallelize_module(layer, mesh, HiddenParallel())
        expected = step(alone, _batch()[0])
        found = step(layer, _batch()[0])
        assert_near({key: whole(g) for key, g in found.items()}, expected)
        return
    part = layer.moe if isinstance(layer, LatentMoE) else layer
    parallelize_module(part, mesh, MemoryParallel(shard="rows") if name == "ProductKeyMemory" else ExpertParallel())
    ddp_ignore(layer)
    model = DistributedDataParallel(layer)
    loss(model, model(x)).backward()
    assert_near({key: whole(p.grad) for key, p in layer.named_parameters()}, _averaged(name))
    norm = torch.nn.utils.get_total_norm(_averaged(name).values())
    torch.testing.assert_close(clip_grad_norm_(layer.parameters(), 1e9), norm, rtol=1e-4, atol=1e-6)


@feature("`share_memory`", processes=WORLD)
def shared_memory(name: str) -> None:
    """Parameters stay where they are when a process receives the layer: what one writes, the other reads."""
    layer = SHARED[name]
    assert all(p.is_shared() for p in layer.parameters())
    step(layer, _batch()[0])
    before = [p.detach().clone() for p in layer.parameters()]
    dist.barrier()
    if dist.get_rank() == 0:
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(1)
    dist.barrier()
    for p, old in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old + 1)


SHARED: dict[str, sf.SparseFFN] = {}
"""In a worker: the layers that its parent shares."""
FEATURES = (data_parallel, synced_balance, fully_sharded, fully_sharded_bf16, split_over_processes, shared_memory)
Problems = dict[str, str]


def run(cases: list[Case]) -> Problems:
    """Run the cases in two processes: name of the case -> tracebacks of what went wrong, or ""."""
    import processes

    shared = {name: build(name).share_memory() for name in ALL}
    results = processes.run(_worker, WORLD, [str(case) for case in cases], shared, timeout=1200)
    return {name: "\n".join(filter(None, (r[name] for r in results))) for name in results[0]}


def _worker(rank: int, names: list[str], shared: dict[str, sf.SparseFFN]) -> Problems:
    from .cases import CASES  # which imports this module

    SHARED.update(shared)
    return {str(case): _problem(case) for case in CASES if str(case) in names}


def _problem(case: Case) -> str:
    try:
        case.run()
    except Exception:  # where one process fails alone, the other finds a closed connection or waits for its timeout
        return traceback.format_exc()
    return ""
