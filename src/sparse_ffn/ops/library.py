"""The torch.library namespace ``sparse_ffn``: one place that defines ops, their fakes and their autograd."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("sparse_ffn", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an op that runs ``kernel`` on every device, and return its callable.

    Library.impl costs a third of torch.library.custom_op per call, hence the lower-level way.
    """
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sparse_ffn::{name}", fake, lib=_library)
    return getattr(torch.ops.sparse_ffn, name).default


def set_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """Give an op its backward formula, and return the callable that differentiates at the least cost.

    torch.library's own autograd spends time quadratic in the number of arguments on every call (50 microseconds at 13):
    eager code goes through an autograd.Function around the op instead. Tracing sees the op.
    """
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_library)

    def forward(ctx: Any, *args: Any) -> Any:  # not split in two: apply() would inspect the signature on every call
        with torch._C._AutoDispatchBelowAutograd():  # past the formula registered above: its node would be the second
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(op.name(), (torch.autograd.Function,), parts)

    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else function.apply(*args)

    return call


def refuse_double_backward(op: Any) -> Callable[..., Any]:
    """Make differentiating a backward op an error that says what to do; return the callable that costs least."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{op.name()} has no second derivative. For double backward compute with the reference: "
            "with sparse_ffn.backend('reference'): ..."
        )

    torch.library.register_autograd(op.name(), backward, setup_context=lambda ctx, inputs, output: None, lib=_library)

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():  # nothing is recorded: past the check of all arguments
            return op(*args)

    return call


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module of an op's folder that computes it on a backend, imported when it is first asked for.

    That keeps ``import sparse_ffn`` free of triton, which costs a second and is not everywhere.
    """
    return importlib.import_module(f"sparse_ffn.ops.{op}.{backend}")


def absent(like: Tensor) -> Tensor:
    """An empty tensor where an op has no result to give: op schemas know no optional outputs."""
    return like.new_empty(0)
