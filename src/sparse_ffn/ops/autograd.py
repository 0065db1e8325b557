"""Autograd for the ops at the least cost a call: in eager code, in traced code, and inside torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_ffn.ops.library import library, under_transforms


def differentiable(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """Give an op its backward formula, and return the callable that differentiates.

    torch.library's own autograd spends time quadratic in the number of arguments on every call (50 microseconds at 13):
    eager code goes through an autograd.Function around the op instead. Tracing sees the op. torch.func, which knows
    neither of the two, gets a function of its own.
    """
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=library)

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
        if info.batch_size == 0:
            return _of_no_member(op, in_dims, args)
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
        if torch.is_grad_enabled() or under_transforms() or torch._C._get_tracing_state():
            return (transformed if torch._C._are_functorch_transforms_active() else function).apply(*args)
        with torch._C._AutoDispatchBelowAutograd():  # nothing is recorded: a third of a small op's time
            return op(*args)

    return call


def _of_no_member(op: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """What vmap over a dimension of 0 returns: nothing, in the shapes that the op's fake gives for one member."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    one = [
        arg.new_empty([*arg.shape[:dim], *arg.shape[dim + 1 :]] if isinstance(dim, int) else arg.shape, device="meta")
        if isinstance(arg, Tensor)
        else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    found = op(*one)
    if isinstance(found, Tensor):
        return found.new_empty(0, *found.shape, device=device), 0
    return tuple(t.new_empty(0, *t.shape, device=device) for t in found), (0,) * len(found)


def once_differentiable(op: Any) -> Callable[..., Any]:
    """Make differentiating a backward op an error that says what to do; return the callable that costs least."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise _underivable(op, "second derivative")

    refusing = differentiable(op, refuse, lambda ctx, inputs, output: None)

    def call(*args: Any) -> Any:
        if under_transforms():
            return refusing(*args)
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
