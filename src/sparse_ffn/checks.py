"""Argument checks whose messages name the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparse_ffn.libraries import DTYPES


def check_positive(name: str, value: int, at_most: int | None = None, limit: str = "") -> None:
    """Raise unless value is an int >= 1 and at most ``at_most`` (named ``limit`` in the message)."""
    _check_int(name, value)
    if value < 1 or (at_most is not None and value > at_most):
        upper = "" if at_most is None else f" and at most {limit} = {at_most}"
        raise ValueError(f"{name} must be at least 1{upper}, got {value}")


def check_count(name: str, value: int) -> None:
    """Raise unless value is an int >= 0."""
    _check_int(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")


def check_rate(name: str, value: float, inclusive: bool = False) -> None:
    """Raise unless 0 <= value < 1 (<= 1 if inclusive)."""
    if not isinstance(value, (int, float)) or not (0 <= value < 1 or (inclusive and value == 1)):
        raise ValueError(f"{name} must be in [0, 1{']' if inclusive else ')'}, got {value!r}")


def check_finite(name: str, value: float, positive: bool = False) -> None:
    """Raise unless value is a finite number >= 0 (> 0 if positive)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf or (positive and value == 0):
        raise ValueError(f"{name} must be finite and {'>' if positive else '>='} 0, got {value!r}")


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise unless value is one of the allowed words."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_places(x: Tensor, parameters: Iterable[Tensor | None]) -> None:
    """Raise ValueError unless all are where x is: kernels trust pointers, and loaders leave parameters on meta."""
    for parameter in parameters:
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"x is on {x.device}, but a parameter of the layer is on {parameter.device}")


def misfit(parts: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> ValueError:
    """The error for tensors that do not fit each other: names those that have not the shape they were made with."""
    wrong = (
        f"{name} must have shape {list(shape)}, got {list(tensor.shape)}"
        for name, (tensor, shape) in parts.items()
        if tensor is not None and tensor.shape != shape
    )
    return ValueError("; ".join(wrong))


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise unless dtype is None or one that parameters can have."""
    allowed = (*DTYPES, torch.float64)
    if dtype is not None and dtype not in allowed:
        raise TypeError(f"dtype must be one of {', '.join(map(str, allowed))} or None, got {dtype!r}")
