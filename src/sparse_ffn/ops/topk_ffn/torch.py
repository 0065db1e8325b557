"""Top-k FFN that keeps only (index, activation) for the backward pass and gathers values where that is cheaper.

Weights in another dtype than x are cast in each pass, and no copy is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.ops.activations import hidden
from sparse_ffn.ops.autocast import cast
from sparse_ffn.ops.select import eager_stable_topk
from sparse_ffn.ops.topk_ffn import by_products
from sparse_ffn.ops.topk_ffn.backend import Gradients, Saved
from sparse_ffn.ops.topk_ffn.reference import rank
from sparse_ffn.ops.units import Units
from sparse_ffn.ops.weighted_bag import torch as bag

# T tokens, K selected units, F hidden units, D d_model, O d_out


def forward(
    x: Tensor, units: Units, k: int, dropout_mask: Tensor | None, activation: str, norm_aware: bool, rank_by: str
) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs."""
    keys, values, gate_keys, key_bias = units.to(x.dtype)
    up_TF = F.linear(x, keys, key_bias)
    glu_gate_TF = None if gate_keys is None else F.linear(x, gate_keys)
    h_TF = hidden(activation, up_TF, glu_gate_TF, dropout_mask)
    ranked_TF = h_TF
    if rank_by == "gate" and glu_gate_TF is not None:
        ranked_TF = hidden(activation, glu_gate_TF, None, dropout_mask)
    index = eager_stable_topk(rank(ranked_TF, values, norm_aware), k)
    glu_gate_TK = None if glu_gate_TF is None else glu_gate_TF.gather(1, index)
    saved = Saved(index.to(torch.int32), up_TF.gather(1, index), glu_gate_TK)
    return bag.forward(values, index, h_TF.gather(1, index)), saved


def inference(
    x: Tensor, units: Units, k: int, dropout_mask: Tensor | None, activation: str, norm_aware: bool, rank_by: str
) -> Tensor:
    """The output."""
    return forward(x, units, k, dropout_mask, activation, norm_aware, rank_by)[0]


def backward(
    grad: Tensor,
    x: Tensor,
    units: Units,
    dropout_mask: Tensor | None,
    saved: Saved,
    needs_units: bool,
    activation: str,
) -> Gradients:
    """The gradients."""
    of = _Products(saved.selected, units.keys.shape[0])
    return by_products.backward(of, grad, x, units, dropout_mask, saved, needs_units, activation)


class _Products:
    """Dense products; values are gathered where that is cheaper."""

    def __init__(self, index: Tensor, n_units: int) -> None:
        self.index, self.n_units = index.long(), n_units

    def down_backward(self, grad: Tensor, values: Tensor, h: Tensor, needs: bool) -> tuple[Tensor | None, Tensor]:
        dvalues, dh = bag.backward(grad, values.to(grad.dtype), self.index, h, needs)
        return cast(dvalues, values.dtype), dh

    def up_backward(self, dup: Tensor, keys: Tensor, x: Tensor, needs: bool) -> tuple[Tensor, Tensor | None]:
        dup_TF = by_products.matrix(dup, self.index, self.n_units)
        return dup_TF @ keys.to(x.dtype), (dup_TF.t() @ x).to(keys.dtype) if needs else None

    def sums(self, dup: Tensor, bias: Tensor) -> Tensor:
        return by_products.matrix(dup, self.index, self.n_units).sum(0).to(bias.dtype)
