"""Which backend computes an op: what there is, what is chosen and why, and how to force one.

``reference`` is the contract: plain differentiable torch, dense arithmetic, any device, any order of derivative.
``torch`` is sparse arithmetic out of torch's own matrix products; it runs on every device and needs no compiler.
On a GPU it waits for the device once in each pass of a MoE layer, to learn where each expert's rows begin.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT_VARIABLE = "SPARSE_FFN_BACKEND"
BACKENDS = {
    "reference": "plain differentiable torch, dense arithmetic (double backward, vmap, every device)",
    "torch": "sparse arithmetic with torch's matrix products, no compiler needed",
}
_AUTOMATIC = "torch"

_forced: str | None = None


def _checked(name: str, origin: str) -> str | None:
    if name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(f"{origin} is {name!r}; allowed are 'auto', {', '.join(map(repr, BACKENDS))}")
    return name


_environment = os.environ.get(ENVIRONMENT_VARIABLE, "auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute with one backend inside a ``with`` block, in the whole process.

    Wins over the environment variable ``SPARSE_FFN_BACKEND``. A backward pass uses the backend of its forward pass.

    Args:
        name: ``"auto"``, ``"reference"`` or ``"torch"``.

    Raises:
        ValueError: the name is none of these.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "backend name") or "auto"
    try:
        yield
    finally:
        _forced = previous


def choose() -> str:
    """The name of the backend that an op called now would use."""
    name = _environment if _forced is None else _forced
    if name == "auto":
        return _AUTOMATIC
    return _checked(name, f"environment variable {ENVIRONMENT_VARIABLE}") or _AUTOMATIC


def explain() -> str:
    """One sentence: which backend ``choose`` takes and why."""
    if _forced not in (None, "auto"):
        return f"{choose()} (forced by sparse_ffn.backend)"
    if _forced is None and _environment != "auto":
        return f"{choose()} (forced by {ENVIRONMENT_VARIABLE})"
    return f"{choose()} (automatic: {BACKENDS[choose()]})"
