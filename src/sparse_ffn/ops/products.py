"""Dense products by torch on a CPU: of 16-bit matrices in fp32, where the processor has no instructions for them."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_ffn.backends import cpu
from sparse_ffn.ops.autocast import without_autocast
from sparse_ffn.ops.library import at_most

WORTH = 6
"""Products per element from which widened copies pay: with few rows, copying the weights takes longer than it saves."""
FEW_USES = 8
"""Of a weight in a call, on average: to copy it moves at least 6 bytes, and a use is two operations."""


def product_dtype(backend: str, weight: Tensor, uses: int, dtype: torch.dtype) -> torch.dtype:
    """That of products under autocast: its dtype, or in the CPU core that of fp32 weights [F, ...] without a copy.

    Where 16 bits gain nothing, and where ``uses``, the rows of them that are read, each time counted, are few.
    """
    if backend != "cpu" or weight.dtype != torch.float32 or dtype == torch.float32:
        return dtype
    slow = not torch.compiler.is_compiling() and dtype in slow_dtypes()
    return weight.dtype if slow or at_most(uses, FEW_USES * weight.shape[0]) else dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product of a [..., M, K] and b [..., K, N] as torch multiplies it: [..., M, N]."""
    if _widens(a, b):
        return torch.matmul(a.float(), b.float()).to(a.dtype)
    if a.numel() // max(a.shape[-1], 1) * b.shape[-1] * a.itemsize < cpu.HUGE_PAGE:
        return torch.matmul(a, b)
    out = cpu.empty(*a.shape[:-1], b.shape[-1], dtype=a.dtype)
    return torch.matmul(a, b, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As F.linear, with all its derivatives and on every device: x [M, K], weight [N, K], bias [N] -> [M, N]."""
    if x.dtype == torch.float32 or is_traceable_wrapper_subclass(weight) or not _widens(x, weight.mT):
        return F.linear(x, weight, bias)
    with without_autocast(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _widens(a: Tensor, b: Tensor) -> bool:
    if a.device.type != "cpu" or torch.compiler.is_compiling() or a.dtype not in slow_dtypes():
        return False  # compilers have products of their own
    (m, k), n = a.shape[-2:], b.shape[-1]
    # where rows of b lie in one piece torch takes many times as long, from one row of a on
    return b.stride(-1) == 1 or bool(m * n * k >= WORTH * (m * k + k * n + m * n))


@functools.cache
def slow_dtypes() -> tuple[torch.dtype, ...]:
    """16-bit dtypes that torch multiplies without instructions for them."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()  # unknown here
    if supported("amx_tile"):
        return ()  # such processors have AVX512-FP16 too, which torch has no question for
    return (torch.float16,) if supported("avx512_bf16") else (torch.bfloat16, torch.float16)


def supported(instructions: str) -> bool:
    """Whether the processor has ``"avx512_bf16"`` or ``"amx_tile"``, and torch uses it."""
    return bool(getattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)())
