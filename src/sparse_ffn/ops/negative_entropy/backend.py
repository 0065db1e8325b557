"""What a backend of the negative entropy implements, in the module of its name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """Shapes are those of ``sparse_ffn.ops.negative_entropy``."""

    def forward(self, sums: Tensor, count: int, weight: float) -> Tensor:
        """The loss."""

    def backward(self, grad: Tensor, sums: Tensor, count: int, weight: float) -> Tensor:
        """The gradient of the sums."""
