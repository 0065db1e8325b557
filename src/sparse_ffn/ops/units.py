"""Hidden units as one operand: everything that a two-layer FFN, or a stack of them, is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Units(NamedTuple):
    """A row for each hidden unit: h = act(keys x + key_bias), or with gate_keys act(gate_keys x) · (keys x + key_bias).

    Of one FFN the shapes are [F, D], of E experts [E, G, D]; values have d_out columns and key_bias none. In the words
    of gated FFNs keys are up_proj.weight, gate_keys gate_proj.weight, and values down_proj.weight transposed.
    """

    keys: Tensor
    values: Tensor
    gate_keys: Tensor | None = None
    key_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Units:
        """The same units in another dtype."""
        if all(t is None or t.dtype == dtype for t in self):
            return self
        return Units._make([None if t is None else t.to(dtype) for t in self])
