"""Sums over a process group whose gradient is right when gradients are averaged over its processes (DDP, FSDP)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, distributed

from sparse_ffn.checks import plain, shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Sync: TypeAlias = "bool | ProcessGroup"
"""Whether to pool over processes: over those of a group, True for the default one."""


def check_sync(name: str, value: Any) -> Sync:
    """The value, if it is True, False or a process group."""
    sync = plain(value)
    if not isinstance(sync, bool) and not (distributed.is_available() and isinstance(sync, distributed.ProcessGroup)):
        raise TypeError(f"{name} must be True, False or a torch.distributed.ProcessGroup, got {shown(value)}")
    return sync


def check_group(name: str, sync: Sync) -> None:
    """Raise unless the group of a layer's argument exists.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if sync is True and not running():
        raise RuntimeError(f"{name}=True needs torch.distributed.init_process_group() before the first forward")


def running() -> bool:
    """Whether there is a default process group."""
    return distributed.is_available() and distributed.is_initialized()


def all_reduce_sum(x: Tensor, sync: Sync) -> Tensor:
    """Sum of x over a process group, True for the default one.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    check_group("sync_balance", sync)
    total: Tensor = _AllReduceSum.apply(x, None if sync is True else sync)  # type: ignore[no-untyped-call]
    return total


def summed(counts: list[Tensor], sync: Sync) -> list[Tensor]:
    """Counts [N] of any lengths summed over a group's processes, in one collective."""
    if not counts:
        return []
    return list(torch.split(all_reduce_sum(torch.cat(counts), sync), [len(count) for count in counts]))


class SharedGroup:
    """A process group inside of what is copied: the copy has the same one. It cannot go into a file."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("sync_balance is a process group, which cannot be pickled: set it to False before")


class _AllReduceSum(torch.autograd.Function):
    """Every process holds the same loss of the pooled sums, and reaches it through its own share only.

    Averaging over W processes would leave 1/W of the gradient, hence the factor W in backward.
    """

    @staticmethod
    def forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ProcessGroup | None], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * distributed.get_world_size(ctx.group), None
