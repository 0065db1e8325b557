"""What a backend of the route implements, in the module of its name."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Router(NamedTuple):
    """A linear router [R, D], its bias for the ranking alone, fp32 [R], and which tokens are real, bool [T]."""

    router_weight: Tensor
    router_bias: Tensor | None
    mask: Tensor | None


class Selected(NamedTuple):
    """The gates, fp32 [T, K], and the rows that they are of, int64 [T, K]."""

    gate: Tensor
    selected: Tensor


class Routed(NamedTuple):
    """What ``reference.route`` returns, gates first, and the scores, fp32 [T, R], which the backward pass needs."""

    gate: Tensor
    selected: Tensor
    sums: Tensor
    logits: Tensor


class Gradients(NamedTuple):
    """The gradients of the trained operands."""

    x: Tensor
    router_weight: Tensor


class Backend(Protocol):
    """Shapes are those of ``sparse_ffn.ops.route``."""

    def forward(self, x: Tensor, router: Router, k: int, gate_function: str, groups: int) -> Routed:
        """The results."""

    def inference(self, x: Tensor, router: Router, k: int, gate_function: str, groups: int) -> Selected:
        """The first two results, nothing kept."""

    def backward(
        self,
        grad: Tensor | None,
        grad_sums: Tensor | None,
        x: Tensor,
        router_weight: Tensor,
        mask: Tensor | None,
        gate: Tensor,
        selected: Tensor,
        logits: Tensor,
        gate_function: str,
    ) -> Gradients:
        """The gradients, for those of gate and sums, each of which may be absent."""
