"""CVMM, the contract: every row times every matrix, and the row's own product picked out."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.ops.cvmm.backend import Slots


def cvmm(x: Tensor, weight: Tensor, slots: Slots, n_out: int) -> Tensor:
    """out[scatter[s]] += reduction[s] · x[gather[s]] @ weight[expert[s]]; shapes as in ``sparse_ffn.ops.cvmm``."""
    expert, gather, scatter, reduction = slots
    rows_SM = x if gather is None else x.index_select(0, gather)
    rows_SM = torch.where((expert == weight.shape[0]).unsqueeze(1), 0, rows_SM)  # a void slot reads nothing, not NaN
    products_SEL = torch.einsum("sm,eml->sel", rows_SM, weight)
    void_S1L = products_SEL.new_zeros(expert.shape[0], 1, weight.shape[2])  # torch 2.9's F.pad refuses L = 0
    every_SEL = torch.cat((products_SEL, void_S1L), 1)
    y_SL = every_SEL.gather(1, expert.view(-1, 1, 1).expand(-1, 1, weight.shape[2])).squeeze(1)
    if reduction is not None:
        y_SL = y_SL * reduction.masked_fill(expert == weight.shape[0], 0).to(y_SL.dtype).unsqueeze(1)
    return y_SL if scatter is None else y_SL.new_zeros(n_out, weight.shape[2]).index_add(0, scatter, y_SL)
