"""bfloat16 autocast where a processor has no instructions for it: torch's products take many times those of fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_ffn.ops.products import slow_dtypes

_aten = torch.ops.aten
PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default)


class Rounded(TorchDispatchMode):
    """Multiplies the operands, which are rounded to bfloat16, in fp32, and rounds the result once.

    That is what the instructions do, too: but for the order of sums it is the same number. For forward and backward.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or not all(_rounded(t) for t in args if isinstance(t, Tensor)):
            return func(*args, **kwargs)
        return func(*(t.float() if isinstance(t, Tensor) else t for t in args), **kwargs).bfloat16()


def _rounded(t: Tensor) -> bool:
    return t.dtype == torch.bfloat16 and t.device.type == "cpu"


def products(device: torch.device) -> AbstractContextManager[Any]:
    """For all that this device computes inside: ``Rounded`` if it is a processor that needs it."""
    return Rounded() if device.type == "cpu" and torch.bfloat16 in slow_dtypes() else nullcontext()
