"""The activations by name, each with its derivative (custom ops run below autograd and need it written out)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
GIVE_ZEROS = ("relu", "squared_relu")
SKIP_TOKENS = 8
"""Up to so many the rows of hidden units that are zero are left out: the more tokens, the fewer are zero for all."""


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
    "square": Activation(torch.square, lambda grad, z: 2 * (grad * z)),
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


def hidden(name: str, up: Tensor, glu_gate: Tensor | None, scale: Tensor | None) -> Tensor:
    """Hidden units by torch's own activation: act(up), of a GLU act(glu_gate) · up, times dropout's multiplier."""
    return _hidden(ACTIVATIONS[name].forward, up, glu_gate, scale)


def hidden_anywhere(name: str, up: Tensor, glu_gate: Tensor | None, scale: Tensor | None) -> Tensor:
    """The same by ``activate``."""
    return _hidden(partial(activate, name), up, glu_gate, scale)


_INTO: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": _aten.gelu_,
    "gelu_tanh": partial(_aten.gelu_, approximate="tanh"),
    "silu": _aten.silu_,
    "identity": lambda z: z,
    "square": torch.square_,
    "squared_relu": lambda z: torch.relu_(z).square_(),
}


def hidden_into(name: str, up: Tensor, glu_gate: Tensor | None, scale: Tensor | None) -> Tensor:
    """Its values in the memory of up and glu_gate, where no gradient is wanted: these need no more than a bound."""
    z = up if glu_gate is None else glu_gate
    h = _INTO[name](z.clamp_(min=-FAR) if name in SMOOTH else z)
    h = h if glu_gate is None else h.mul_(up)
    return h if scale is None else h.mul_(scale)


def _hidden(act: Callable[[Tensor], Tensor], up: Tensor, glu_gate: Tensor | None, scale: Tensor | None) -> Tensor:
    h = act(up) if glu_gate is None else act(glu_gate) * up
    return h if scale is None else h * scale


def hidden_backward(
    name: str, grad: Tensor, up: Tensor, glu_gate: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``hidden`` with respect to up and glu_gate."""
    act = ACTIVATIONS[name]
    if scale is not None:
        grad = grad * scale
    if glu_gate is None:
        return act.backward(grad, up), None
    active = act.forward(glu_gate.clamp(min=-FAR) if name in SMOOTH else glu_gate)  # as ``activate``: 0 at -infinity
    return grad * active, act.backward(grad * up, glu_gate)
