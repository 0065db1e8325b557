"""MoE modules of transformers that compute their experts themselves, whatever experts implementation is chosen."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import nn

from sparse_ffn.backends.warning import SparseFFNWarning

MOE = re.compile(r"(Experts|Mo[eE](Block|Layer)?|SparseMLP)$")
"""What transformers calls its classes of experts and of the blocks that hold them."""


def dispatches(module: nn.Module) -> bool:
    """Whether these are experts that ask for the implementation: transformers tells such ones how their weights lie."""
    return hasattr(module, "is_transposed")


def bypassing(model: nn.Module, *, submodels: bool = True) -> list[str]:
    """Classes of MoE modules within which nothing asks for an experts implementation.

    Args:
        model: any.
        submodels: look into the models within too.
    """
    return sorted({type(m).__name__ for m in _moe_modules(model, submodels) if not any(map(dispatches, m.modules()))})


def _moe_modules(module: nn.Module, submodels: bool) -> Iterator[nn.Module]:
    """The outermost ones."""
    for child in module.children():
        if MOE.search(type(child).__name__) or dispatches(child):
            yield child
        elif submodels or not isinstance(child, transformers.PreTrainedModel):
            yield from _moe_modules(child, submodels)


def watch(implementation: str) -> None:
    """Warn from now on where that implementation is chosen for a model that would not ask for it."""

    def made(model: Any) -> None:
        if getattr(model.config, "_experts_implementation", None) == implementation:
            _warn(model, bypassing(model, submodels=False), implementation)  # those have warned themselves

    def told(model: Any, experts_implementation: str | dict[str, str]) -> None:
        asked = experts_implementation
        if implementation in (asked.values() if isinstance(asked, dict) else (asked,)):
            _warn(model, bypassing(model), implementation)

    _call_after("post_init", made)
    _call_after("set_experts_implementation", told)


def _warn(model: Any, classes: list[str], implementation: str) -> None:
    if classes:
        warnings.warn(
            f"in {type(model).__name__} {', '.join(classes)} never asks transformers for an experts implementation: it "
            f"computes as before, and not by {implementation!r}",
            SparseFFNWarning,
            stacklevel=4,
        )


def _call_after(name: str, action: Callable[..., None]) -> None:
    """Let a method of all transformers' models do something more at its end, once."""
    method = getattr(transformers.PreTrainedModel, name)
    if hasattr(method, "before_sparse_ffn"):
        return

    @functools.wraps(method)
    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        action(self, *args, **kwargs)
        return result

    extended.before_sparse_ffn = method  # type: ignore[attr-defined]
    setattr(transformers.PreTrainedModel, name, extended)
