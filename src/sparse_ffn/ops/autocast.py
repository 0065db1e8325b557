"""Autocast for the ops: as for nn.Linear, matrix operands take the autocast dtype and float64 stays float64.

Weights in another dtype than the products' (fp32 masters) are cast before the op, so that autograd keeps the copy; but
not for the GPU kernels, which cast inside of the op, in either pass, keep no copy, and give gradients in the weights'
own dtype; nor in the CPU core for few tokens, whose products in fp32 take less time than a copy of all weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor

from sparse_ffn.ops.library import at_most


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


FEW_USES = 8
"""Of a weight in a call, on average: 12 bytes are moved to make its copy, and a use is two operations."""


def product_dtype(backend: str, weight: Tensor, uses: int, dtype: torch.dtype) -> torch.dtype:
    """Autocast's, or that of ``weight`` [F, ...] where ``uses``, the rows that are read, each time counted, are few."""
    few = backend == "cpu" and weight.dtype == torch.float32 and at_most(uses, FEW_USES * weight.shape[0])
    return weight.dtype if few else dtype


def casts_inside(backend: str) -> bool:
    """Whether a backend's ops take weights in any dtype and cast them themselves."""
    return backend in ("triton", "cuda")
