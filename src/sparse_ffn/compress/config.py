"""ExpertQuantization: how the rows of experts are to be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_ffn.checks import check_choice, check_flag, check_positive, plain, shown

BITS = (4, 8)


@dataclass(frozen=True, kw_only=True)
class ExpertQuantization:
    """How ``quantize_experts_`` stores the rows of experts: weights alone are quantised, activations never.

    A row [C] is cut into groups of ``group_size`` columns with a scale each. Of a layer's ``keys`` and ``gate_keys`` C
    is d_model, of its ``values`` d_out.

    Args:
        bits: of a code, 4 or 8.
        group_size: columns of a group, an even number at 4 bits; None: one group a row; ``"auto"``: 32 at 4 bits, one
            group a row at 8.
        symmetric: True: no zero point; None: False at 4 bits, True at 8.
        scale: ``"max"``: from the group's largest weight; ``"mse"``: the range is cut, to 0.7 of it at least, where
            that makes the squared error smaller.
        values_bits: bits of ``values``; None for ``bits``. Their errors reach the output undamped, so 8 is worth it.

    Raises:
        ValueError: a value that is not allowed.
        TypeError: one of a wrong type.
    """

    bits: int = 4
    group_size: int | str | None = "auto"
    symmetric: bool | None = None
    scale: str = "mse"
    values_bits: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        self._set("bits", _check_bits("bits", self.bits))
        if self.values_bits is not None:
            self._set("values_bits", _check_bits("values_bits", self.values_bits))
        if isinstance(self.group_size, str):
            check_choice("group_size", self.group_size, ("auto",))
        elif self.group_size is not None:
            self._set("group_size", check_positive("group_size", self.group_size))
        if self.symmetric is not None:
            self._set("symmetric", check_flag("symmetric", self.symmetric))
        check_choice("scale", self.scale, ("max", "mse"))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def bits_of(self, values: bool) -> int:
        """The bits of a stack, of ``values`` or of another one."""
        return self.values_bits if values and self.values_bits is not None else self.bits

    def group_of(self, columns: int, bits: int) -> int:
        """Columns of a group, in rows of so many."""
        size = (32 if bits == 4 else None) if self.group_size == "auto" else self.group_size
        return columns if size is None else int(size)

    def symmetric_at(self, bits: int) -> bool:
        """Whether codes of so many bits have no zero point."""
        return bits == 8 if self.symmetric is None else self.symmetric


def _check_bits(name: str, value: Any) -> int:
    bits = plain(value)
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"{name} must be 4 or 8, got {shown(value)}")
    return bits
