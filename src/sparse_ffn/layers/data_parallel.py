"""What layers ask of DistributedDataParallel: whether it reduces the gradient of a parameter."""

from __future__ import annotations

import torch
from torch import Tensor


def check_no_ddp(values: Tensor) -> None:
    """Raise if DDP runs the calling code and waits for a dense gradient of these values.

    Raises:
        RuntimeError: it does.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not values.requires_grad:
        return
    ddp = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)  # private, None outside
    if ddp is not None and not getattr(values, "_ddp_ignored", False):
        raise RuntimeError(
            "sparse_grad=True under DistributedDataParallel, which reduces dense gradients only: take sparse_grad=False"
        )
