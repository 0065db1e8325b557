"""Which backend computes an op: what there is, what is chosen and why, and how to force one.

``reference`` is the contract: plain differentiable torch, dense arithmetic, any device, any order of derivative.
``torch`` is sparse arithmetic out of torch's own matrix products; it runs on every device and needs no compiler.
On a GPU it waits for the device once in each pass of a MoE layer, to learn where each expert's rows begin.
``cpu`` is the native core, built from csrc/ when the package is installed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparse_ffn import native

ENVIRONMENT_VARIABLE = "SPARSE_FFN_BACKEND"
BACKENDS = {
    "reference": "plain differentiable torch, dense arithmetic (double backward, vmap, every device)",
    "torch": "sparse arithmetic with torch's matrix products, no compiler needed",
    "cpu": "native core for CPU tensors of fp32, bf16 and fp16",
}

_forced: str | None = None
_environment = os.environ.get(ENVIRONMENT_VARIABLE, "auto")


class SparseFFNWarning(UserWarning):
    """A warning of this library."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute with one backend inside a ``with`` block, in the whole process.

    Wins over the environment variable ``SPARSE_FFN_BACKEND``. A backward pass uses the backend of its forward pass.

    Args:
        name: ``"auto"``, ``"reference"``, ``"torch"`` or ``"cpu"``.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: at the next op, if the backend cannot compute it.
    """
    global _forced
    _check(name, "backend name")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def choose(x: Tensor) -> str:
    """The name of the backend for an op on x (its device, and its dtype after autocast)."""
    name = _environment if _forced is None else _forced
    if name == "auto":
        if native.PROBLEM is not None and x.device.type == "cpu":
            _warn_once()
        return "torch" if unavailable("cpu", x.device, x.dtype) else "cpu"
    _check(name, f"environment variable {ENVIRONMENT_VARIABLE}")
    reason = unavailable(name, x.device, x.dtype)
    if reason:
        raise RuntimeError(f"backend {name!r} is forced, but {reason}")
    return name


def unavailable(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot compute on this device in this dtype, or None if it can."""
    if name != "cpu":
        return None
    if device.type != "cpu":
        return f"it computes on the CPU, not on {device.type}"
    if native.PROBLEM is not None:
        return f"the native core is missing: {native.PROBLEM}"
    return None if dtype in native.DTYPES else f"it has no {str(dtype).removeprefix('torch.')}"


def explain(device: torch.device | str = "cpu") -> str:
    """One sentence: which backend computes on this device and why."""
    device = torch.device(device)
    if _forced not in (None, "auto"):
        return f"{_forced} (forced by sparse_ffn.backend)"
    if _forced is None and _environment != "auto":
        return f"{_environment} (forced by {ENVIRONMENT_VARIABLE})"
    reason = unavailable("cpu", device)
    if reason:
        return f"torch (automatic: {BACKENDS['torch']}; not cpu: {reason})"
    return f"cpu (automatic: {BACKENDS['cpu']}, here with {native.instruction_set()}; torch for fp64)"


def _check(name: str, origin: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{origin} is {name!r}; allowed are 'auto', {', '.join(map(repr, BACKENDS))}")


_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"the native CPU core is missing ({native.PROBLEM}); computing with torch instead, more slowly. Install a "
            "C++ compiler and reinstall: pip install --force-reinstall --no-deps sparse-ffn. To silence this, set "
            f"{ENVIRONMENT_VARIABLE}=torch.",
            SparseFFNWarning,
            stacklevel=2,
        )
