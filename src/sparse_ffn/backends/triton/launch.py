"""What every launch of a kernel needs: a one-dimensional grid, sizes, and dtypes that tl.dot accepts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

OF_TOKENS = ("S", "T", "n_blocks", "n_tiles", "n_parts", "n_rows")
"""What grows with the number of tokens. Kernels are not compiled anew for such a number that is a multiple of 16, or 1:
it makes no access wider, and batches of every length would make a run stand still for seconds now and then. Not so the
router's ``length``: without what is known of it two of its kernels spill."""


def launch(kernel: Any, grid: int, *arguments: Any, **meta: Any) -> None:
    """Run a kernel on ``grid`` programs; none on an empty grid.

    Products and sums fuse: Triton's own default for that changes between its versions, and results should not.
    """
    if grid:
        kernel[(grid,)](*arguments, **meta, enable_fp_fusion=True)


def cdiv(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def rows(x: Tensor) -> Tensor:
    """The matrix with unit stride inside its rows, copied only if it has not; rows themselves may be strided."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def matrices(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A stack of matrices for products in ``dtype``, copied only if it has another or strides beyond 2^24.

    A product would read each matrix once for every tile of its rows, so a cast before costs less than one inside of it.
    """
    x = x.to(dtype)
    return x if max(x.stride()[1:]) < 1 << 24 else x.contiguous()


def precision(x: Tensor) -> str:
    """How tl.dot may round fp32 operands: as torch's own switch for matrix products says."""
    if x.dtype != torch.float32:
        return "ieee"  # 16-bit operands are exact in either
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and _has_tf32(x.device) else "ieee"


@functools.cache
def _has_tf32(device: torch.device) -> bool:
    """Whether Triton rounds products of fp32 to tf32 there: of AMD's cards for one architecture only."""
    if device.type != "cuda" or torch.version.hip is None:
        return True
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")
