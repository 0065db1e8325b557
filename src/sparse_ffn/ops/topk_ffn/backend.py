"""What a backend of top-k FFN implements, in the module of its name."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from sparse_ffn.ops.units import Units


class Saved(NamedTuple):
    """What a forward pass keeps for the backward pass: of the selected units, in one order."""

    selected: Tensor
    """int32 [T, K]; of the CPU core, whose order is ascending, a bit for each unit, int32 [T, ceil(F / 32)]."""
    up: Tensor
    """[T, K], keys x + key_bias."""
    glu_gate: Tensor | None
    """[T, K], gate_keys x."""


class Gradients(NamedTuple):
    """The gradients of the trained operands."""

    x: Tensor
    units: Units | None


class Backend(Protocol):
    """Shapes are those of ``sparse_ffn.ops.topk_ffn``."""

    def forward(
        self,
        x: Tensor,
        units: Units,
        k: int,
        dropout_mask: Tensor | None,
        activation: str,
        norm_aware: bool,
        rank_by: str,
    ) -> tuple[Tensor, Saved]:
        """The output [T, O], and what the backward pass needs."""

    def inference(
        self,
        x: Tensor,
        units: Units,
        k: int,
        dropout_mask: Tensor | None,
        activation: str,
        norm_aware: bool,
        rank_by: str,
    ) -> Tensor:
        """The output, nothing kept."""

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        units: Units,
        dropout_mask: Tensor | None,
        saved: Saved,
        needs_units: bool,
        activation: str,
    ) -> Gradients:
        """The gradients, for that of the output, of any strides; without ``needs_units`` none of the units'."""
