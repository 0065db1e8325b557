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


FAR = 1000.0
"""From here on each smooth activation is ReLU to the last bit, in value and derivative, in every dtype."""
SMOOTH = ("gelu", "gelu_tanh", "silu")


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _squared_relu(z: Tensor) -> Tensor:
    return torch.relu(z).square()


def _near(z: Tensor) -> Tensor:
    return z.clamp(-FAR, FAR)


_aten = torch.ops.aten
ACTIVATIONS = {
    "relu": Activation(torch.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0)),
    "gelu": Activation(F.gelu, lambda grad, z: _aten.gelu_backward(grad, _near(z))),
    "gelu_tanh": Activation(_gelu_tanh, lambda grad, z: _aten.gelu_backward(grad, _near(z), approximate="tanh")),
    "silu": Activation(F.silu, lambda grad, z: _aten.silu_backward(grad, _near(z))),
    "identity": Activation(lambda z: z, lambda grad, z: grad),
    "squared_relu": Activation(_squared_relu, lambda grad, z: _aten.threshold_backward(2 * (grad * z), z, 0)),
}


def activate(name: str, z: Tensor) -> Tensor:
    """The activation ``name`` of z, with value and derivative right at any z.

    torch's own formulas meet infinity times zero: in the derivative of ``gelu_tanh`` beyond 1e19, in fp32 and 16 bits;
    at an infinite z in all smooth ones, which are 0 at -infinity here.
    """
    act = ACTIVATIONS[name].forward
    if name not in SMOOTH:
        return act(z)
    far = z.abs() > FAR
    return torch.where(far, torch.relu(z), act(z.masked_fill(far, 0)))


def hidden(name: str, z: Tensor, up: Tensor | None, scale: Tensor | None) -> Tensor:
    """Hidden units: act(z) by torch's own function, times the ungated half of a GLU, times dropout's multiplier."""
    return scaled(ACTIVATIONS[name].forward(z), up, scale)


def scaled(h: Tensor, up: Tensor | None, scale: Tensor | None) -> Tensor:
    """The activations h, times the ungated half of a GLU, times dropout's multiplier."""
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
    return ACTIVATIONS[name].backward(grad * up, z), grad * ACTIVATIONS[name].forward(z)
