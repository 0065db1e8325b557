"""How tensors must lie in memory for kernels that take strides."""

from __future__ import annotations

from torch import Tensor


def contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor in row-major order, copied only if it is not."""
    return None if x is None else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """The matrix with unit stride inside its rows, copied only if it has not; rows themselves may be strided."""
    if x.is_contiguous() or (x.ndim == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]):
        return x
    return x.contiguous()
