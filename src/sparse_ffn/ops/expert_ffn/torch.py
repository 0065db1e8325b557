"""Expert FFN by sorting the slots and one matrix product an expert: sparse arithmetic without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.ops.expert_ffn.by_products import ByProducts, with_void
from sparse_ffn.ops.segments import Segments, row_dots, segment_mm, segment_outer, segment_sum, unsort


class _Sorted:
    """Rows are sorted by expert."""

    def __init__(self, order: Tensor, offsets: Tensor, shape: tuple[int, int]) -> None:
        self.order, self.token, self.shape = order, order // shape[1], shape
        self.segments = Segments(offsets)

    def of_tokens(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.token)

    def of_slots(self, per_slot: Tensor) -> Tensor:
        return per_slot.flatten(0, 1).index_select(0, self.order)

    def of_experts(self, bias: Tensor) -> Tensor:
        n_void = self.order.shape[0] - self.segments.offsets[-1:]
        counts = torch.cat((self.segments.offsets.diff(), n_void))
        return with_void(bias).repeat_interleave(counts, 0, output_size=self.order.shape[0])

    def up(self, rows: Tensor, matrices: Tensor) -> Tensor:
        return segment_mm(rows, matrices.transpose(1, 2), self.segments)

    def down(self, h: Tensor, values: Tensor, gate: Tensor) -> Tensor:
        return self._summed(segment_mm(h * self._gates(gate).to(h.dtype), values, self.segments))

    def up_backward(
        self, grads: list[Tensor], x: Tensor, matrices: list[Tensor], needs: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        dx = segment_mm(grads[0], matrices[0], self.segments)
        for grad, matrix in zip(grads[1:], matrices[1:], strict=True):
            dx += segment_mm(grad, matrix, self.segments)
        dx = self._summed(dx)
        if not needs:
            return dx, [None] * len(grads)
        rows = self.of_tokens(x)
        return dx, [segment_outer(grad, rows, self.segments) for grad in grads]

    def down_backward(
        self, grad: Tensor, h: Tensor, values: Tensor, gate: Tensor, needs: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        grad, weight = self.of_tokens(grad), self._gates(gate).to(h.dtype)
        dh = segment_mm(grad, values.transpose(1, 2), self.segments)
        dgate = self.segments.clear(row_dots(dh, h, gate.dtype))
        # grad times gate, and not h: a loss scale keeps gradients above fp16's smallest numbers
        dvalues = segment_outer(h, grad * weight, self.segments) if needs else None
        return dh * weight, dvalues, unsort(dgate, self.order).view(gate.shape)

    def sums(self, rows: Tensor) -> Tensor:
        return segment_sum(rows, self.segments)

    def _gates(self, gate: Tensor) -> Tensor:
        return gate.reshape(-1, 1).index_select(0, self.order)

    def _summed(self, rows: Tensor) -> Tensor:
        """Sums over a token's slots."""
        return unsort(rows, self.order).view(*self.shape, rows.shape[1]).sum(1)


_backend = ByProducts(_Sorted)
forward, inference, backward = _backend.forward, _backend.inference, _backend.backward
