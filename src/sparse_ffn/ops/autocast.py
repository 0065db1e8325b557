"""Autocast for the ops: as for nn.Linear, matrix operands take the autocast dtype and float64 stays float64.

Weights in another dtype than the products' (fp32 masters) are cast before the op, so that autograd keeps the copy; but
not for the GPU kernels, which cast inside of the op, in either pass, keep no copy, and give gradients in the weights'
own dtype; nor always for the CPU core (``products.product_dtype``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor


def autocast_enabled(x: Tensor) -> bool:
    """Whether x's device is under autocast now; meta tensors never are."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which x's device is not under autocast."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x would run now."""
    if x.dtype != torch.float64 and autocast_enabled(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@overload
def cast(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def cast(x: None, dtype: torch.dtype) -> None: ...
@overload
def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x in another dtype, None staying None."""
    return None if x is None else x.to(dtype)


def casts_inside(backend: str) -> bool:
    """Whether a backend's ops take weights in any dtype and cast them themselves."""
    return backend in ("triton", "cuda")
