"""What a backend of product-key top-k implements, in the module of its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Best(NamedTuple):
    """The k largest sums [T, H, k] and the indices of their values, int64."""

    best: Tensor
    selected: Tensor


class Backend(Protocol):
    """Shapes are those of ``sparse_ffn.ops.product_key_topk``."""

    def forward(self, scores: Tensor, k: int) -> Best:
        """The sums and their indices."""

    def backward(
        self, grad: Tensor, selected: Tensor, scores_size: Sequence[int], scores_stride: Sequence[int]
    ) -> Tensor:
        """Gradient of the scores in their strides. The scores are not kept: they are large."""
