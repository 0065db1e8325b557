"""Many processes in one: torch's LocalTensorMode runs an exchange for up to 64 simulated ranks, all at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import sparse_ffn as sf
from sparse_ffn.parallel import ExpertParallel

D_MODEL, TOKENS = 8, 6


class Simulated(NamedTuple):
    """What a simulation of all ranks found."""

    error: float
    """Largest difference from one process, of outputs and of the router's gradient."""
    seconds: float


def available() -> bool:
    """Whether this version of torch simulates ranks."""
    return find_spec("torch.distributed._local_tensor") is not None


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A default process group in which this process is rank 0, and nobody else is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def layer(ranks: int) -> sf.MoE:
    """Two experts for each rank."""
    torch.manual_seed(0)
    return sf.SigmaMoE(D_MODEL, 2 * ranks, 4, 2, dtype=torch.float64)


def simulate(exchange: str, ranks: int) -> Simulated:
    """A forward and backward pass on all ranks, within ``fake_group(ranks)``, against one process."""
    from torch.distributed._local_tensor import LocalTensorMode

    x = torch.randn(TOKENS, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    start = time.perf_counter()
    with LocalTensorMode(ranks):
        split = layer(ranks)
        parallelize_module(split, mesh, ExpertParallel(exchange=exchange))
        found = [part.reconcile() for part in _step(split, x)]  # type: ignore[attr-defined] # the same on all ranks
    seconds = time.perf_counter() - start
    errors = [(a - b).abs().max() for a, b in zip(found, _step(layer(ranks), x), strict=True)]
    return Simulated(torch.stack(errors).max().item(), seconds)  # NaN if any is


def _step(net: sf.MoE, x: Tensor) -> list[Tensor]:
    y: Any = net(x)
    y.square().sum().backward()
    grad = net.router.weight.grad
    assert grad is not None
    return [y.detach(), grad]
