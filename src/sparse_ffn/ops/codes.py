"""Rows of numbers as codes of 4 or 8 bits: the operand of the ops that multiply by quantised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """Rows of C numbers, number = scale · (code - zero), with a scale for each group of C/n columns.

    The dtype of ``qdata`` says how many bits a code has. In C/2 bytes the low half of byte j is the code of column 2j.
    Without zero points the codes are signed: int8 as they are, 4 bits with 8 added. With them 8-bit codes, which begin
    at 0, are stored less 128.
    """

    qdata: Tensor
    """int8 [..., C], or uint8 [..., C/2]: two codes of 4 bits a byte."""
    scale: Tensor
    """[..., n], floating."""
    zero_point: Tensor | None = None
    """uint8 [..., n], at most 15 for codes of 4 bits."""

    @property
    def bits(self) -> int:
        return 4 if self.qdata.dtype == torch.uint8 else 8

    @property
    def shape(self) -> torch.Size:
        """That of the numbers."""
        *rows, width = self.qdata.shape
        return torch.Size((*rows, width * 8 // self.bits))

    def to(self, dtype: torch.dtype) -> Codes:
        """The same codes with scales of another dtype."""
        return self._replace(scale=self.scale.to(dtype))

    def of(self, experts: int | slice | Tensor) -> Codes:
        """The rows of some experts, by an index of the first dimension."""
        return self.each(lambda t: t[experts])

    def in_rows(self) -> Codes:
        """The same with unit stride inside all rows, copied only where it is not: halves of a stack stay views."""
        return self.each(lambda t: t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous())

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with each tensor changed."""
        zero_point = self.zero_point
        return Codes(change(self.qdata), change(self.scale), None if zero_point is None else change(zero_point))

    def dense(self) -> Tensor:
        """The numbers, in the dtype of the scales, rounded once."""
        code, zero = self.qdata, self.zero_point
        if self.bits == 4:
            code = torch.stack((code & 15, code >> 4), dim=-1).flatten(-2)
        wide = torch.promote_types(self.scale.dtype, torch.float32)
        scale = self.scale.to(wide).unsqueeze(-1)
        number = in_groups(code.to(wide), code.shape[-1] // max(self.scale.shape[-1], 1))
        if zero is not None:
            number = number - (zero.to(wide).unsqueeze(-1) - (0 if self.bits == 4 else 128))
        elif self.bits == 4:
            number = number - 8
        return (number * scale).flatten(-2).to(self.scale.dtype)


def in_groups(rows: Tensor, group: int) -> Tensor:
    """Rows [..., C] as [..., C / group, group]."""
    return rows.reshape(*rows.shape[:-1], -1, group)
