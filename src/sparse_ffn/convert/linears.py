"""Linear maps in the wild: which modules are one, and which way round their weight lies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.convert.probe import HOOKS, close, probe_copy, probe_input, run


@dataclass(frozen=True)
class Linear:
    """A module that computes W x + b.

    T is ``nn.Linear``, or anything that proved to compute the same: GPT-2's Conv1D keeps its weight transposed.
    """

    module: nn.Module
    name: str
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """[out, in]: a view of the module's parameter."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().t() if self.transposed else weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """[out], if there is one."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def n_in(self) -> int:
        """Input width."""
        return self.weight.shape[1]

    @property
    def n_out(self) -> int:
        """Output width."""
        return self.weight.shape[0]

    @property
    def trainable(self) -> tuple[bool, bool]:
        """Whether weight and bias want gradients."""
        bias = getattr(self.module, "bias", None)
        return bool(self.module.weight.requires_grad), bias is not None and bool(bias.requires_grad)


def as_linear(name: str, module: nn.Module) -> Linear | None:
    """The module as a linear map, None if it is none. Decided by running it, unless it is an ``nn.Linear``."""
    parameters = dict(module.named_parameters(recurse=False))
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or set(parameters) - {"weight", "bias"}:
        return None
    if isinstance(module, nn.Embedding) or next(module.children(), None) is not None:
        return None
    if type(module) is nn.Linear:
        return Linear(module, name, transposed=False)
    for transposed in (False, True):
        n_out, n_in = weight.shape[::-1] if transposed else weight.shape
        if bias is not None and bias.shape != (n_out,):
            continue
        try:
            copied = probe_copy(module)
            x = probe_input(n_in)
            y = run(copied, (x,)).outputs
        except Exception:  # whatever it is, it does not map such an input
            continue
        found = Linear(copied, name, transposed)
        if len(y) == 1 and close(y[0], F.linear(x, found.weight, found.bias)):
            return Linear(module, name, transposed)
    return None


def hooks(module: nn.Module) -> str | None:
    """What would be lost if the module, or one inside it, went away: hooks, or parameters of a special kind."""
    for inner in module.modules():
        for kind in HOOKS:
            if getattr(inner, kind, None):
                return f"{type(inner).__name__} has {kind.strip('_').replace('_', ' ')}"
        if "forward" in inner.__dict__:
            return f"forward of {type(inner).__name__} is patched"
        for name, parameter in inner.named_parameters(recurse=False):
            if type(parameter) is not nn.Parameter:  # quantised or sharded: its numbers are not at hand
                return f"{name} of {type(inner).__name__} is a {type(parameter).__name__}"
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return f"{name} of {type(inner).__name__} has gradient hooks"
    return None
