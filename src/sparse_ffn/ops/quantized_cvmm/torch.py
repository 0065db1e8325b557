"""CVMM by quantised rows with torch's products: the experts that have slots, made dense one at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.codes import Codes
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.quantized_cvmm.backend import Gradients, backward_of
from sparse_ffn.ops.segments import Segments, add_rows, unsort


def forward(x: Tensor, codes: Codes, slots: Slots, down: bool, n_out: int) -> Tensor:
    """The output."""
    expert, gather, scatter, reduction = slots
    n_experts, n_rows, n_columns = codes.shape
    order, offsets = sort_by_expert(expert, n_experts)
    rows_SM = x.index_select(0, order if gather is None else gather.index_select(0, order))
    y_SL = x.new_zeros(expert.shape[0], n_columns if down else n_rows)  # void slots keep 0
    for e, (a, b) in enumerate(pairwise(Segments(offsets).bounds)):
        if b > a:
            matrix = codes.of(e).dense()
            torch.mm(rows_SM[a:b], matrix if down else matrix.t(), out=y_SL[a:b])
    if reduction is not None:
        void = expert.index_select(0, order) == n_experts
        y_SL *= reduction.index_select(0, order).to(y_SL.dtype).masked_fill(void, 0).unsqueeze(1)
    y_SL = unsort(y_SL, order)  # a token's slots are added as they come, whatever the experts are called
    return y_SL if scatter is None else add_rows(n_out, scatter, y_SL)


def backward(grad: Tensor, x: Tensor, codes: Codes, slots: Slots, down: bool) -> Gradients:
    """The gradients."""
    return backward_of(forward, grad, x, codes, slots, down)
