"""The backward pass of top-k FFN out of products with the [T, F] matrix of the selected units' numbers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sparse_ffn.ops.activations import hidden_anywhere, hidden_backward
from sparse_ffn.ops.topk_ffn.backend import Gradients, Saved
from sparse_ffn.ops.units import Units

# T tokens, K selected units, F hidden units, D d_model, O d_out


class Products(Protocol):
    """The matrix is one for each argument [T, K], and zero where a unit is not selected."""

    def down_backward(self, grad: Tensor, values: Tensor, h: Tensor, needs: bool) -> tuple[Tensor | None, Tensor]:
        """Gradients of values [F, O] and h [T, K] where the output is h @ values."""

    def up_backward(self, dup: Tensor, keys: Tensor, x: Tensor, needs: bool) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and keys [F, D] where up = x @ keys.T. Without ``needs`` those of matrices are None."""

    def sums(self, dup: Tensor, bias: Tensor) -> Tensor:
        """Gradient of a bias [F] that is part of up."""


def matrix(selected: Tensor, index: Tensor, n_units: int) -> Tensor:
    """The matrix [T, F] of the selected units' numbers [T, K], index int64 [T, K]."""
    return selected.new_zeros(selected.shape[0], n_units).scatter_(1, index, selected)


def backward(
    of: Products,
    grad: Tensor,
    x: Tensor,
    units: Units,
    dropout_mask: Tensor | None,
    saved: Saved,
    needs_units: bool,
    activation: str,
) -> Gradients:
    """The gradients."""
    index, up_TK, glu_gate_TK = saved
    scale_TK = None if dropout_mask is None else dropout_mask.gather(1, index.long()).to(up_TK.dtype)
    h_TK = hidden_anywhere(activation, up_TK, glu_gate_TK, scale_TK)
    dvalues, dh_TK = of.down_backward(grad, units.values, h_TK, needs_units)
    dup_TK, dglu_gate_TK = hidden_backward(activation, dh_TK, up_TK, glu_gate_TK, scale_TK)
    dx, dkeys = of.up_backward(dup_TK, units.keys, x, needs_units)
    dgate_keys = None
    if units.gate_keys is not None and dglu_gate_TK is not None:
        dx_too, dgate_keys = of.up_backward(dglu_gate_TK, units.gate_keys, x, needs_units)
        dx = dx + dx_too
    if dkeys is None or dvalues is None:
        return Gradients(dx, None)
    dkey_bias = None if units.key_bias is None else of.sums(dup_TK, units.key_bias)
    return Gradients(dx, Units(dkeys, dvalues, dgate_keys, dkey_bias))
