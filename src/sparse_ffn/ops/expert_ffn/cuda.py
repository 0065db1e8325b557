"""Expert FFN out of two CVMM calls, as in the paper: up, activation, and down with the gates as reduction weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.ops.cvmm import cuda as cvmm
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.expert_ffn.by_products import ByProducts, with_void
from sparse_ffn.ops.weighted_bag.cuda import segment_sums


class _Cvmm:
    """Rows are in the slots' own order; the kernels gather those of x and add up those of a token."""

    def __init__(self, order: Tensor, offsets: Tensor, shape: tuple[int, int]) -> None:
        self.order, self.offsets = order, offsets
        self.token = torch.arange(order.shape[0], device=order.device) // shape[1]
        position = torch.arange(order.shape[0], device=order.device, dtype=order.dtype)
        of_sorted = torch.searchsorted(offsets[1:].contiguous(), position, right=True)  # does not wait for the device
        self.expert = torch.empty_like(of_sorted).index_copy_(0, order.long(), of_sorted)

    def of_tokens(self, x: Tensor) -> Tensor:
        return x

    def of_slots(self, per_slot: Tensor) -> Tensor:
        return per_slot.flatten(0, 1)

    def of_experts(self, bias: Tensor) -> Tensor:
        return with_void(bias).index_select(0, self.expert)

    def up(self, rows: Tensor, matrices: Tensor) -> Tensor:
        slots = Slots(self.expert, gather=self.token)
        return cvmm.forward(rows, matrices.transpose(1, 2), slots, self.expert.shape[0])

    def down(self, h: Tensor, values: Tensor, gate: Tensor) -> Tensor:
        slots = Slots(self.expert, scatter=self.token, reduction=gate.reshape(-1))
        return cvmm.forward(h, values, slots, gate.shape[0])

    def up_backward(
        self, grads: list[Tensor], x: Tensor, matrices: list[Tensor], needs: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        slots = Slots(self.expert, gather=self.token)
        found = [
            cvmm.backward(grad, x, matrix.transpose(1, 2), slots, needs)
            for grad, matrix in zip(grads, matrices, strict=True)
        ]
        dx = found[0].x if len(found) == 1 else found[0].x + found[1].x
        return dx, [None if dweight is None else dweight.transpose(1, 2).contiguous() for _, dweight, _ in found]

    def down_backward(
        self, grad: Tensor, h: Tensor, values: Tensor, gate: Tensor, needs: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        slots = Slots(self.expert, scatter=self.token, reduction=gate.reshape(-1))
        dh, dvalues, dgate = cvmm.backward(grad, h, values, slots, needs)
        assert dgate is not None
        return dh, dvalues, dgate.view(gate.shape)

    def sums(self, rows: Tensor) -> Tensor:
        return segment_sums(rows, self.order, self.offsets)


_backend = ByProducts(_Cvmm)
forward, inference, backward = _backend.forward, _backend.inference, _backend.backward
