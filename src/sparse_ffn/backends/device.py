"""The device of a call: kernels are launched on the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def on_device(function: F) -> F:
    """Make the device of the first argument current inside; nothing where that is the CPU."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return function(first, *rest)

    return wrapped  # type: ignore[return-value]
