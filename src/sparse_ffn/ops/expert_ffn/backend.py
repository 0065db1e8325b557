"""What a backend of expert FFN implements, in the module of its name."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from sparse_ffn.ops.units import Units


class Saved(NamedTuple):
    """What a forward pass keeps for the backward pass, for S = T·K slots."""

    order: Tensor
    """int32 [S]: the slots sorted by their experts, stably."""
    offsets: Tensor
    """int32 [E + 1]: where each expert's slots begin in that order."""
    up: Tensor
    """[S, G], keys x + key_bias, in an order of the backend's own. ReLU may keep its result instead."""
    glu_gate: Tensor | None
    """[S, G], gate_keys x, in the same order."""


class Gradients(NamedTuple):
    """The gradients of the trained operands."""

    x: Tensor
    experts: Units | None
    gate: Tensor


class Backend(Protocol):
    """Shapes are those of ``sparse_ffn.ops.expert_ffn``."""

    def forward(
        self, x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
    ) -> tuple[Tensor, Saved]:
        """The output [T, O], and what the backward pass needs."""

    def inference(
        self, x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
    ) -> Tensor:
        """The output, nothing kept."""

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        experts: Units,
        gate: Tensor,
        dropout_mask: Tensor | None,
        saved: Saved,
        needs_experts: bool,
        activation: str,
    ) -> Gradients:
        """The gradients, for that of the output, of any strides; without ``needs_experts`` none of the experts'."""
