"""The torch.library namespace ``sparse_ffn``, and what the calling code is inside of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

library = torch.library.Library("sparse_ffn", "DEF")  # type: ignore[no-untyped-call]


def define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], vmap: Callable[..., Any] | None = None
) -> Any:
    """Define an op that runs ``kernel`` on every device, and return its callable.

    Library.impl costs a third of torch.library.custom_op per call, hence the lower-level way.
    """
    name = schema.partition("(")[0]
    library.define(schema)  # type: ignore[no-untyped-call]
    library.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sparse_ffn::{name}", fake, lib=library)
    if vmap is not None:
        torch.library.register_vmap(f"sparse_ffn::{name}", vmap, lib=library)
    return getattr(torch.ops.sparse_ffn, name).default


def under_transforms() -> bool:
    """Whether torch.func or forward-mode AD transforms the calling code: a derivative may then be wanted unseen."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def at_most(n: int, limit: int) -> bool:
    """Whether a size is as small as that; an exported or traced program is not tied to its being so."""
    if not torch.compiler.is_compiling():
        return torch._C._get_tracing_state() is None and n <= limit
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # here: it imports sympy

    return statically_known_true(n <= limit)


def in_backward() -> bool:
    """Whether a backward pass runs the calling code, which then computes a forward again (activation checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
