"""Projection: an nn.Linear of a layer, which knows how the layer initialises it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from sparse_ffn.module import normal_


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

    def reset_parameters(self) -> None:
        """Initialise."""
        normal_(self.weight, self.init_scale / math.sqrt(self.in_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
