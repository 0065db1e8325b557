"""What a backend of CVMM implements, in the module of its name."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Gradients(NamedTuple):
    """The gradients of the trained operands; that of a transposed view is one too."""

    x: Tensor
    weight: Tensor
    reduction: Tensor | None


class Backend(Protocol):
    """Shapes are those of ``sparse_ffn.ops.cvmm``."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        expert: Tensor,
        gather: Tensor | None,
        scatter: Tensor | None,
        reduction: Tensor | None,
        n_out: int,
    ) -> Tensor:
        """The output [n_out, L]."""

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        expert: Tensor,
        gather: Tensor | None,
        scatter: Tensor | None,
        reduction: Tensor | None,
    ) -> Gradients:
        """The gradients, for that of the output, of any strides."""
