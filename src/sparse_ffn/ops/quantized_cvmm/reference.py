"""CVMM by quantised rows, the contract: the numbers, and CVMM."""

from __future__ import annotations

from torch import Tensor

from sparse_ffn.ops.codes import Codes
from sparse_ffn.ops.cvmm import reference
from sparse_ffn.ops.cvmm.backend import Slots


def quantized_cvmm(x: Tensor, codes: Codes, slots: Slots, down: bool, n_out: int) -> Tensor:
    """out[scatter[s]] += reduction[s] · x[gather[s]] @ W[expert[s]]; shapes as in ``sparse_ffn.ops.quantized_cvmm``."""
    rows = codes.dense()
    return reference.cvmm(x, rows if down else rows.mT, slots, n_out)
