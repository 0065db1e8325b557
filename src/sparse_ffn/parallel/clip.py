"""clip_grad_norm_ for parameters on several meshes, of which torch's own takes one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sparse_ffn.checks import check_finite, check_flag, shown


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_group: ProcessGroup | None = None,
) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, for any mix of plain tensors and DTensors of any mesh.

    Plain gradients must be equal on all processes, as DDP leaves them. All processes call it.

    Args:
        parameters: with gradients.
        max_norm: the largest norm of all gradients together; infinity to clip nothing.
        norm_type: p of the p-norm, or infinity.
        error_if_nonfinite: raise where the norm is infinite or NaN.
        foreach: as torch's.
        pp_group: the stages of a pipeline, each with parameters of its own.

    Returns:
        The norm before clipping, the same on all processes.

    Raises:
        ValueError: a number outside its range.
        TypeError: an argument of a wrong type.
        RuntimeError: the norm is not finite, if asked.
    """
    max_norm = max_norm if max_norm == math.inf else check_finite("max_norm", max_norm)
    norm_type = norm_type if norm_type == math.inf else check_finite("norm_type", norm_type, positive=True)
    error_if_nonfinite = check_flag("error_if_nonfinite", error_if_nonfinite)
    foreach = None if foreach is None else check_flag("foreach", foreach)
    given = [parameters] if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable) else [*parameters]
    if not all(isinstance(p, Tensor) for p in given):
        raise TypeError(f"parameters must be a tensor or an iterable of tensors, got {shown(parameters)}")
    if pp_group is not None and not isinstance(pp_group, ProcessGroup):
        raise TypeError(f"pp_group must be a torch.distributed.ProcessGroup or None, got {shown(pp_group)}")
    grads = [_reduced(p.grad) for p in given if p.grad is not None]
    if not grads and pp_group is None:
        return torch.tensor(0.0)
    device = next((t.device for t in (*grads, *given)), torch.device("cpu"))  # where the stages reduce
    # gradients that lie over the same processes share the collectives
    groups: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = {}
    for grad in grads:
        mesh, part = (grad.device_mesh, grad.to_local()) if isinstance(grad, DTensor) else (None, grad)
        dims = () if mesh is None else tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate())  # type: ignore[attr-defined]
        groups.setdefault(None if mesh is None or not dims else (mesh, dims), []).append(part)
    dtypes = [grad.dtype for grad in grads]
    powers = torch.zeros((), device=device, dtype=torch.float64 if torch.float64 in dtypes else torch.float32)
    for place, parts in groups.items():
        local = torch.nn.utils.get_total_norm([p for p in parts if p.numel()], norm_type, False, foreach).to(powers)
        power = local if norm_type == math.inf else local**norm_type
        for dim in () if place is None else place[1]:
            assert place is not None
            _reduce(power, norm_type, place[0].get_group(dim))
        powers = torch.maximum(powers, power) if norm_type == math.inf else powers + power
    if pp_group is not None:
        _reduce(powers, norm_type, pp_group)
    norm = powers if norm_type == math.inf else powers ** (1 / norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"the norm of the gradients is {norm.item()}: pass error_if_nonfinite=False to go on")
    if max_norm == math.inf:  # infinity over infinity would be NaN
        return norm
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parts in groups.values():
        for part in parts:
            part.mul_(scale.to(part.device))
    return norm


def _reduce(power: Tensor, norm_type: float, group: ProcessGroup) -> None:
    distributed.all_reduce(
        power, distributed.ReduceOp.MAX if norm_type == math.inf else distributed.ReduceOp.SUM, group=group
    )


def _reduced(grad: Tensor) -> Tensor:
    """A gradient without partial sums, which have no norm yet."""
    if isinstance(grad, DTensor) and any(p.is_partial() for p in grad.placements):
        raise ValueError("parameters must have gradients that are reduced, got a DTensor of partial sums")
    return grad
