"""Whether a submodule is no more than its weights, so that a layer may read them instead of calling it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as globally
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(module: nn.Module, weight: str = "weight") -> bool:
    """Whether calling the module would do nothing that its own class does not do.

    False with hooks on it (pruning, FSDP, profilers), with a ``forward`` of its own (accelerate's offload), and for a
    weight that computes by itself (torchao's quantised tensors). The class is the caller's to check, exactly: a
    subclass may do more, and parametrisation, FSDP and LoRA change it.
    """
    hooked = (
        "forward" in module.__dict__
        or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or globally._global_forward_hooks or globally._global_forward_pre_hooks
        or globally._global_backward_hooks or globally._global_backward_pre_hooks
    )  # fmt: skip
    return not hooked and not is_traceable_wrapper_subclass(getattr(module, weight))
