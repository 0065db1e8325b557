"""Null experts: a router's last rows, which stand for experts without hidden units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_ffn import ops
from sparse_ffn.checks import check_choice, check_count, check_rate, shown
from sparse_ffn.layers.balanced import Balanced
from sparse_ffn.layers.base import SparseFFN
from sparse_ffn.module import tensors_of
from sparse_ffn.routing.targets import Targets

# T tokens, D d_model, O d_out, E experts with hidden units, N null experts, K selected experts

KINDS = ("zero", "identity", "constant")


class NullExperts(Balanced, SparseFFN):
    """The part of a layer that adds its null experts' slots; for ``ops.expert_ffn`` those are void (MoE++, 2410.07348).

    They come behind the E others: an index e >= E selects null expert e - E.
    """

    null_kind: str
    null_share: float | None
    constants: nn.Parameter | None
    """One row [d_out] for each null expert of the kind ``"constant"``."""

    def _set_null(self, count: int, kind: str, share: float | None) -> None:
        self.null_experts = check_count("null_experts", count)
        check_choice("null_kind", kind, KINDS)
        if kind == "identity" and self.d_out != self.d_model:
            raise ValueError(f"null_kind = 'identity' adds x, so d_out = {self.d_out} must be d_model = {self.d_model}")
        self.null_kind, self.null_share = kind, share
        has_constants = self.null_experts and kind == "constant"
        self.constants = self._parameter(self.null_experts, self.d_out) if has_constants else None

    def _checked_share(self, share: float | None) -> float | None:
        if share is None:
            return None
        if not check_rate("null_share", share):
            raise ValueError(f"null_share must be in (0, 1), got {shown(share)}")
        if not self.null_experts:
            raise ValueError(f"null_share = {shown(share)} needs null experts, and null_experts = 0")
        return float(share)

    @property
    def _targets(self) -> Targets | None:
        """As ``Balanced``: shares that are not equal, of the null experts or among the others."""
        wished = self._wished
        if not self.null_experts and len(wished) == 1:
            return None
        every = self.n_experts + self.null_experts
        null = self.null_experts / every if self.null_share is None else self.null_share
        runs = [(experts, (1 - null) * share) for experts, share in wished]
        if self.null_experts:
            runs.append((self.null_experts, null / self.null_experts))
        return Targets(tuple(runs), self.null_experts)

    @property
    def _wished(self) -> tuple[tuple[int, float], ...]:
        """Of the experts with hidden units: runs of them, and the share of their slots wished on each."""
        return ((self.n_experts, 1 / self.n_experts),)

    def _check_null(self) -> None:
        """Raise if the constants do not fit the layer."""
        if self.null_experts and self.null_kind == "constant":
            (constants,) = tensors_of(self, "constants")
            if constants.shape != (self.null_experts, self.d_out):
                raise self._shape_error()

    def _add_null(self, y_TO: Tensor, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, n_experts: int) -> Tensor:
        """y + the sum over the token's null slots of gate · x, or of gate · ``constants[n]``; y itself for zeros.

        ``n_experts`` are those whose weights there are: the layer's, unless someone changed them.
        """
        if not self.null_experts or self.null_kind == "zero":
            return y_TO
        index_TK = index_TK - n_experts
        gate_TK = torch.where(index_TK >= 0, gate_TK, 0)
        if self.null_kind == "identity":
            return y_TO + (gate_TK.sum(1, keepdim=True) * x_TD).to(y_TO.dtype)
        (constants,) = tensors_of(self, "constants")
        if self._split is not None:
            constants = self._split.whole(constants)
        return y_TO + ops.weighted_bag(constants, index_TK.clamp(0, self.null_experts - 1), gate_TK)
