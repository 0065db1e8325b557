"""CVMM, the contract: every row times every matrix, and the row's own product picked out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.ops.cvmm.backend import Slots


def cvmm(x: Tensor, weight: Tensor, slots: Slots, n_out: int) -> Tensor:
    """out[scatter[s]] += reduction[s] · x[gather[s]] @ weight[expert[s]]; shapes as in ``sparse_ffn.ops.cvmm``."""
    expert, gather, scatter, reduction = slots
    rows_SM = x if gather is None else x.index_select(0, gather)
    every_SEL = F.pad(torch.einsum("sm,eml->sel", rows_SM, weight), (0, 0, 0, 1))  # and zeros, which void slots pick
    y_SL = every_SEL.gather(1, expert.view(-1, 1, 1).expand(-1, 1, weight.shape[2])).squeeze(1)
    if reduction is not None:
        y_SL = y_SL * reduction.masked_fill(expert == weight.shape[0], 0).to(y_SL.dtype).unsqueeze(1)
    return y_SL if scatter is None else y_SL.new_zeros(n_out, weight.shape[2]).index_add(0, scatter, y_SL)
