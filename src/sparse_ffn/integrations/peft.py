"""Hugging Face peft: LoRA on the experts and on the router inside the same layer. peft itself is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sparse_ffn.checks import check_module


@contextmanager
def inner_first(model: nn.Module) -> Iterator[None]:
    """Make peft reach parameters of a module and of a module inside it: an MoE layer's experts and its router.

    peft wraps the module that holds a target parameter and then looks for modules inside by names that no longer lead
    there. Inside this context it meets inner modules before outer ones. Needed around ``get_peft_model`` and
    ``PeftModel.from_pretrained``, and only where ``target_parameters`` names both. peft's ``merge_and_unload`` then
    merges the outer adapters in a first call and the inner ones in a second.

    Args:
        model: what is given to peft.

    Raises:
        TypeError: the model is no module.
    """
    check_module("model", model)

    def named_modules(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        yield from reversed(list(type(model).named_modules(model, *args, **kwargs)))

    object.__setattr__(model, "named_modules", named_modules)
    try:
        yield
    finally:
        object.__delattr__(model, "named_modules")
