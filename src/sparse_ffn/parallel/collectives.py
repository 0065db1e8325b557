"""The collectives that the layers need, with their gradients: the only file that knows torch's functional ones.

What ``send`` and ``gather`` return is on its way: ``arrived`` waits for it. Nothing else may touch it: kernels read
memory by its address, and that of an unfinished result is null. All others wait before they return.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh

# torch 2.13 gave these new names
_all_gather: Any = getattr(functional, "all_gather_single", functional.all_gather_tensor)
_all_gather_autograd: Any = getattr(functional, "all_gather_single_autograd", functional.all_gather_tensor_autograd)
_reduce_scatter: Any = getattr(functional, "reduce_scatter_single_autograd", functional.reduce_scatter_tensor_autograd)


def send(x: Tensor, received: list[int], sent: list[int], mesh: DeviceMesh) -> Tensor:
    """Rows to all processes of the mesh, ``sent[r]`` consecutive ones to process r, of which ``received[r]`` come."""
    call = functional.all_to_all_single_autograd if x.is_floating_point() else functional.all_to_all_single
    return call(x.contiguous(), received, sent, mesh.get_group())


def gather(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of all processes, as many of each, in their order."""
    rows: Tensor = (_all_gather_autograd if x.is_floating_point() else _all_gather)(x.contiguous(), 0, mesh.get_group())
    return rows


def arrived(x: Tensor) -> Tensor:
    """What ``send`` or ``gather`` returned, when it is there."""
    # in a graph torch 2.9's wait ends the path of gradients, with no more than a warning
    waiting = _Arrived.apply if torch.compiler.is_compiling() else functional.wait_tensor
    done: Tensor = waiting(x)  # type: ignore[no-untyped-call]
    return done


def all_to_all(x: Tensor, received: list[int], sent: list[int], mesh: DeviceMesh) -> Tensor:
    """As ``send``, and wait."""
    return arrived(send(x, received, sent, mesh))


def all_gather(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """As ``gather``, and wait."""
    return arrived(gather(x, mesh))


def reduce_scatter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's block of the rows, summed over all processes."""
    return arrived(_reduce_scatter(x.contiguous(), "sum", 0, mesh.get_group()))


def sum_forward(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the processes, whose gradient each of them has whole."""
    total: Tensor = _SumForward.apply(x, mesh)  # type: ignore[no-untyped-call]
    return total


def sum_backward(x: Tensor, mesh: DeviceMesh, factor: float = 1.0) -> Tensor:
    """The same tensor, whose gradient is the sum over the processes, times a factor: each has a part of it."""
    same: Tensor = _SumBackward.apply(x, mesh, factor)  # type: ignore[no-untyped-call]
    return same


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same tensor, with a gradient times a factor."""
    same: Tensor = x if factor == 1 else _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return same


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return arrived(functional.all_reduce(x.contiguous(), "sum", mesh.get_group()))


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        done: Tensor = functional.wait_tensor(x)  # type: ignore[no-untyped-call]
        return done

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return _summed(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, factor: float) -> Tensor:
        ctx.mesh, ctx.factor = mesh, factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad, ctx.mesh) * ctx.factor, None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
