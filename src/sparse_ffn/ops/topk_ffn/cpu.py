"""Top-k FFN in the CPU core: select fused after the first product, then only the selected units are touched."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.backends.cpu import ACTIVATIONS
from sparse_ffn.ops.activations import hidden
from sparse_ffn.ops.products import linear
from sparse_ffn.ops.topk_ffn import by_products
from sparse_ffn.ops.topk_ffn.backend import Gradients, Saved
from sparse_ffn.ops.topk_ffn.reference import rank
from sparse_ffn.ops.units import Units
from sparse_ffn.ops.weighted_bag import cpu as bag

# T tokens, K selected units, F hidden units, D d_model, O d_out


def forward(
    x: Tensor, units: Units, k: int, dropout_mask: Tensor | None, activation: str, norm_aware: bool
) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs."""
    keys, values, gate_keys, key_bias = units
    up_TF = linear(x, keys, key_bias)
    if gate_keys is None and dropout_mask is None:
        norm_F = values.float().norm(dim=1) if norm_aware else None
        index, kept_TK = _select_activation(up_TF, k, activation, norm_F)
        return bag.forward(values, index, kept_TK), Saved(index.to(torch.int32), up_TF.gather(1, index), None)
    glu_gate_TF = None if gate_keys is None else linear(x, gate_keys)
    h_TF = hidden(activation, up_TF, glu_gate_TF, dropout_mask)
    index = _select(rank(h_TF, values, norm_aware), k)
    glu_gate_TK = None if glu_gate_TF is None else glu_gate_TF.gather(1, index)
    saved = Saved(index.to(torch.int32), up_TF.gather(1, index), glu_gate_TK)
    return bag.forward(values, index, h_TF.gather(1, index)), saved


def backward(
    grad: Tensor, x: Tensor, units: Units, dropout_mask: Tensor | None, saved: Saved, activation: str
) -> Gradients:
    """The gradients."""
    return by_products.backward(_Bags(saved.selected), grad, x, units, dropout_mask, saved, activation)


class _Bags:
    """Products row by row."""

    def __init__(self, index: Tensor) -> None:
        self.index = index.long()

    def both_gradients(self, grad: Tensor, values: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return bag.backward(grad, values, self.index, h)

    def gradients(self, dup: Tensor, keys: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return bag.forward(keys, self.index, dup), bag.values_backward(x, keys, self.index, dup)

    def sums(self, dup: Tensor, bias: Tensor) -> Tensor:
        total = torch.zeros(bias.shape[0], dtype=torch.float32, device="cpu")
        return total.index_add_(0, self.index.flatten(), dup.flatten().float()).to(bias.dtype)


def _select_activation(u: Tensor, k: int, activation: str, norm: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k units of the largest |act(u)| (times norm), int64 [T, K], and act(u) there."""
    index, kept = cpu.empty(u.shape[0], k, dtype=torch.int64), cpu.empty(u.shape[0], k, dtype=u.dtype)
    cpu.call("topk_activation", (u, norm, index, kept), ACTIVATIONS[activation])
    return index, kept


def _select(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, ties to the lower index."""
    scores = scores.float().contiguous()
    index = cpu.empty(scores.shape[0], k, dtype=torch.int64)
    cpu.call("topk", (scores, index, None))
    return index
