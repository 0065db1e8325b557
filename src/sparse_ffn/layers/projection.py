"""Projection: an nn.Linear of a layer, which knows how the layer initialises it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_ffn import ops
from sparse_ffn.module import normal_
from sparse_ffn.ops.autocast import autocast_dtype
from sparse_ffn.ops.products import linear


class Projection(nn.Linear):
    """A linear map whose weight is normal with std c/sqrt(input width), and whose bias starts at zero.

    One that stands before or after a layer's two matrices has c = 1, whatever the layer's: these alone make its output
    that of c², as deep pre-LN transformers want it (arXiv 2310.10837, section 5).

    The usual loop over a model that was made on meta resets each module by itself, the layer's linear maps after the
    layer: ``nn.Linear``'s own initialisation would have the last word.
    """

    def __init__(self, d_in: int, d_out: int, init_scale: float = 1.0, *, bias: bool = False, **factory: Any) -> None:
        self.init_scale = init_scale
        super().__init__(d_in, d_out, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""
        rows = x.reshape(-1, x.shape[-1])
        y = linear(rows.to(autocast_dtype(rows)), self.weight, self.bias)
        return y.view(*x.shape[:-1], len(self.weight))  # torch finds no -1 for zero tokens

    def reset_parameters(self) -> None:
        """Initialise."""
        normal_(self.weight, self.init_scale / math.sqrt(self.in_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Query(Projection):
    """A projection that multiplies in fp32 at least and gives that: what is ranked by it is not rounded to 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""
        if is_traceable_wrapper_subclass(self.weight):  # quantised or distributed: it has products of its own
            return super().forward(x)
        y = ops.wide_product(x.reshape(1, -1, x.shape[-1]), self.weight.unsqueeze(0))[0]
        y = y.view(*x.shape[:-1], len(self.weight))
        return y if self.bias is None else y + self.bias
