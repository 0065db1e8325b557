"""What a backend of weighted bag implements, in the module of its name."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Gradients(NamedTuple):
    """The gradients of the trained operands."""

    values: Tensor | None
    weight: Tensor


class Backend(Protocol):
    """Shapes are those of ``sparse_ffn.ops.weighted_bag``."""

    def forward(self, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The bags [N, O], in the dtype of values."""

    def backward(self, grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, needs_values: bool) -> Gradients:
        """The gradients, for that of the bags, of any strides; without ``needs_values`` none of values."""

    def backward_rows(
        self, grad: Tensor, values: Tensor, index: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of values that were read [R], ascending, their gradients [R, O], and the gradient of weight."""
