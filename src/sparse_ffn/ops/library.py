"""The torch.library namespace ``sparse_ffn``: one place that defines ops, their fakes and their autograd."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_library = torch.library.Library("sparse_ffn", "DEF")  # type: ignore[no-untyped-call]


def define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], vmap: Callable[..., Any] | None = None
) -> Any:
    """Define an op that runs ``kernel`` on every device, and return its callable.

    Library.impl costs a third of torch.library.custom_op per call, hence the lower-level way.
    """
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sparse_ffn::{name}", fake, lib=_library)
    if vmap is not None:
        torch.library.register_vmap(f"sparse_ffn::{name}", vmap, lib=_library)
    return getattr(torch.ops.sparse_ffn, name).default


def under_transforms() -> bool:
    """Whether torch.func or forward-mode AD transforms the calling code: a derivative may then be wanted unseen."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_backward() -> bool:
    """Whether a backward pass runs the calling code, which then computes a forward again (activation checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def set_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """Give an op its backward formula, and return the callable that differentiates at the least cost.

    torch.library's own autograd spends time quadratic in the number of arguments on every call (50 microseconds at 13):
    eager code goes through an autograd.Function around the op instead. Tracing sees the op. torch.func, which knows
    neither of the two, gets a function of its own.
    """
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_library)

    def forward(ctx: Any, *args: Any) -> Any:  # not split in two: apply() would inspect the signature on every call
        with torch._C._AutoDispatchBelowAutograd():  # past the formula registered above: its node would be the second
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    def refuse(ctx: Any, *tangents: Any) -> None:
        raise _underivable(op, "forward-mode derivative")

    shared = {"backward": staticmethod(backward), "jvp": staticmethod(refuse)}
    function: Any = type(op.name(), (torch.autograd.Function,), {"forward": staticmethod(forward), **shared})

    def one_by_one(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """vmap: a call for each member, which is a whole problem for a kernel."""
        columns = [
            arg.unbind(dim) if isinstance(dim, int) else (arg,) * info.batch_size
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        results = [transformed.apply(*row) for row in zip(*columns, strict=True)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    own = {"forward": op, "setup_context": setup_context, "vmap": one_by_one}
    transformed: Any = type(
        op.name(), (torch.autograd.Function,), {**{name: staticmethod(part) for name, part in own.items()}, **shared}
    )

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        return (transformed if torch._C._are_functorch_transforms_active() else function).apply(*args)

    return call


def refuse_double_backward(op: Any) -> Callable[..., Any]:
    """Make differentiating a backward op an error that says what to do; return the callable that costs least."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise _underivable(op, "second derivative")

    differentiable = set_autograd(op, backward, lambda ctx, inputs, output: None)

    def call(*args: Any) -> Any:
        if under_transforms():
            return differentiable(*args)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():  # nothing is recorded: past the check of all arguments
            return op(*args)

    return call


def _underivable(op: Any, what: str) -> RuntimeError:
    return RuntimeError(
        f"{op.name()} has no {what}. For double backward and forward mode compute with the reference: "
        "with sparse_ffn.backend('reference'): ..."
    )


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module of an op's folder that computes it on a backend, imported when it is first asked for.

    That keeps ``import sparse_ffn`` free of triton, which costs a second and is not everywhere.
    """
    return importlib.import_module(f"sparse_ffn.ops.{op}.{backend}")


def absent(like: Tensor) -> Tensor:
    """An empty tensor where an op has no result to give: op schemas know no optional outputs."""
    return like.new_empty(0)
