"""What a backend of CVMM implements, in the module of its name."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Slots(NamedTuple):
    """The rows to compute, S of them: out[scatter[s]] += reduction[s] · x[gather[s]] @ weight[expert[s]].

    Without gather slot s reads row s, without scatter it writes row s, without reduction its factor is 1.
    """

    expert: Tensor
    gather: Tensor | None = None
    scatter: Tensor | None = None
    reduction: Tensor | None = None


class Gradients(NamedTuple):
    """The gradients of the trained operands; that of a transposed view is one too."""

    x: Tensor
    weight: Tensor | None
    reduction: Tensor | None


class Backend(Protocol):
    """Shapes are those of ``sparse_ffn.ops.cvmm``."""

    def forward(self, x: Tensor, weight: Tensor, slots: Slots, n_out: int) -> Tensor:
        """The output [n_out, L]."""

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, slots: Slots, needs_weight: bool) -> Gradients:
        """The gradients, for that of the output, of any strides; without ``needs_weight`` none of weight."""
