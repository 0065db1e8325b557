"""QuantizedRows: rows as codes of 4 or 8 bits with a scale for each group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.layers.rows.base import ExpertRows
from sparse_ffn.module import tensors_of
from sparse_ffn.ops.units import Units


class QuantizedRows(ExpertRows):
    """Rows [E, G, C] as codes: number = scale · (code - zero point), in groups along C. Names as torchao's.

    Buffers: ``qdata`` int8 [E, G, C], or uint8 [E, G, C/2] of two 4-bit codes a byte (column 2j low), ``scale``
    [E, G, groups] and, where asymmetric, ``zero_point`` uint8 [E, G, groups]. ``.to(dtype)`` changes the scales' dtype,
    which is the dtype of the numbers, and no code.

    Args:
        codes: what ``sparse_ffn.quantize_experts_`` made of a stack.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, codes: ops.Codes) -> None:
        super().__init__()
        for name, tensor in codes._asdict().items():
            self.register_buffer(name, tensor)

    @property
    def codes(self) -> ops.Codes:
        """The buffers as the ops take them."""
        return ops.Codes(*tensors_of(self, "qdata", "scale", "zero_point"))

    @property
    def shape(self) -> torch.Size:
        """(E, G, C)."""
        *rows, width = self.qdata.shape  # dynamo of torch 2.9 cannot read a property of a NamedTuple
        return torch.Size((*rows, 2 * width if self.qdata.dtype == torch.uint8 else width))

    @property
    def dtype(self) -> torch.dtype:
        """The scales'."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.qdata.device

    def dense(self, experts: int | slice | Tensor | None = None) -> Tensor:
        """The numbers that the codes stand for, [E, G, C], or those of some experts."""
        return (self.codes if experts is None else self.codes.of(experts)).dense()

    def up(self, x: Tensor, expert: Tensor, token: Tensor | None) -> Tensor:
        """See ``ExpertRows``."""
        return ops.quantized_cvmm(x, self.codes, expert, down=False, gather=token)

    def down(self, h: Tensor, expert: Tensor, token: Tensor | None, gate: Tensor | None, tokens: int) -> Tensor:
        """See ``ExpertRows``."""
        return ops.quantized_cvmm(
            h, self.codes, expert, down=True, scatter=token, reduction=gate, n_out=None if token is None else tokens
        )

    def extra_repr(self) -> str:
        """The shape and what a number is stored in."""
        group = self.shape[-1] // max(self.scale.shape[-1], 1)
        kind = "symmetric" if self.zero_point is None else "asymmetric"
        return f"{list(self.shape)}, bits={self.codes.bits}, group_size={group}, {kind}, dtype={self.dtype}"


def codes_of(units: Units) -> Units | None:
    """The units with the codes of their rows in the place of all matrices; None if one is not quantised."""
    keys: Any = units.keys
    values: Any = units.values
    gate_keys: Any = units.gate_keys
    if not all(rows is None or type(rows) is QuantizedRows for rows in (keys, values, gate_keys)):
        return None
    return Units(keys.codes, values.codes, None if gate_keys is None else gate_keys.codes, units.key_bias)
