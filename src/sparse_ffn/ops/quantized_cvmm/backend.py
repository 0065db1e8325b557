"""What a backend of the product with quantised rows implements, in the module of its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from sparse_ffn.ops.codes import Codes
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.segments import add_rows, row_dots


class Gradients(NamedTuple):
    """The gradients of what is trained: codes have none."""

    x: Tensor
    reduction: Tensor | None


class Backend(Protocol):
    """Shapes are those of ``sparse_ffn.ops.quantized_cvmm``."""

    def forward(self, x: Tensor, codes: Codes, slots: Slots, down: bool, n_out: int) -> Tensor:
        """The output [n_out, L]."""

    def backward(self, grad: Tensor, x: Tensor, codes: Codes, slots: Slots, down: bool) -> Gradients:
        """The gradients, for that of the output, of any strides."""


def backward_of(
    forward: Callable[..., Tensor], grad: Tensor, x: Tensor, codes: Codes, slots: Slots, down: bool
) -> Gradients:
    """The gradients by a backend's forward: that of x is a product with the same rows, the other way."""
    expert, gather, scatter, reduction = slots
    if reduction is None:
        return Gradients(forward(grad, codes, Slots(expert, scatter, gather), not down, x.shape[0]), None)
    dx_SM = forward(grad, codes, Slots(expert, scatter), not down, expert.shape[0])
    x_SM = x if gather is None else x.index_select(0, gather)
    void = expert == codes.shape[0]  # 0 times what they have may be NaN
    dreduction = row_dots(dx_SM, x_SM, reduction.dtype).squeeze(1).masked_fill_(void, 0)
    dx_SM = dx_SM * reduction.to(dx_SM.dtype).masked_fill(void, 0).unsqueeze(1)
    return Gradients(dx_SM if gather is None else add_rows(x.shape[0], gather, dx_SM), dreduction)
