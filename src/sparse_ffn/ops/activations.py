"""The activations by name, each with its derivative (custom ops run below autograd and need it written out)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its vector-Jacobian product ``backward(grad, z)``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _squared_relu(z: Tensor) -> Tensor:
    return torch.relu(z).square()


_aten = torch.ops.aten
ACTIVATIONS = {
    "relu": Activation(torch.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0)),
    "gelu": Activation(F.gelu, lambda grad, z: _aten.gelu_backward(grad, z)),
    "gelu_tanh": Activation(_gelu_tanh, lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh")),
    "silu": Activation(F.silu, lambda grad, z: _aten.silu_backward(grad, z)),
    "identity": Activation(lambda z: z, lambda grad, z: grad),
    "squared_relu": Activation(_squared_relu, lambda grad, z: grad * (2 * torch.relu(z))),
}


def activate(name: str, z: Tensor) -> Tensor:
    """The activation ``name`` of z, differentiable."""
    return ACTIVATIONS[name].forward(z)


def hidden(name: str, z: Tensor, up: Tensor | None, scale: Tensor | None) -> Tensor:
    """Hidden activations: act(z), times the ungated half of a GLU, times dropout's multiplier."""
    h = activate(name, z)
    if up is not None:
        h = h * up
    return h if scale is None else h * scale


def hidden_backward(
    name: str, grad: Tensor, z: Tensor, up: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``hidden`` with respect to z and up."""
    if scale is not None:
        grad = grad * scale
    if up is None:
        return ACTIVATIONS[name].backward(grad, z), None
    return ACTIVATIONS[name].backward(grad * up, z), grad * activate(name, z)
