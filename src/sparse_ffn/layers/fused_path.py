"""FusedPath: the router in one op, and where possible in one with the experts, if it is no more than that computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.checks import check_places
from sparse_ffn.layers.routed import Routed
from sparse_ffn.layers.rows.base import ExpertRows, rows_ffn
from sparse_ffn.layers.rows.offloaded import OffloadedRows
from sparse_ffn.layers.rows.quantized import codes_of
from sparse_ffn.layers.units import UnitsFFN
from sparse_ffn.module import is_plain, tensors_of
from sparse_ffn.routing.balance import NEED_LOGITS
from sparse_ffn.routing.base import AnyRouting, FusedRouting, Router, Routing
from sparse_ffn.routing.routers import (
    SigmoidRouter,
    SinkhornRouter,
    SoftmaxRouter,
    SoftmaxTopKRouter,
    UnweightedRouter,
)

Gate = tuple[str, Tensor, Tensor | None]
"""The gate function, and the router's weight and selection bias."""
GATES: dict[type, str] = {
    SigmoidRouter: "sigmoid",
    SoftmaxRouter: "softmax",
    SoftmaxTopKRouter: "softmax_topk",
    UnweightedRouter: "unweighted",
    SinkhornRouter: "sigmoid",  # in evaluation: training ranks by other scores
}


class FusedPath(Routed, UnitsFFN):
    """One stack of experts of one size behind a router, and the call that computes both at once."""

    expert_size: int

    def _fused(self, x_TD: Tensor, mask_T: Tensor | None, units: ops.Units, n_sequences: int | None) -> Tensor | None:
        """The output, with all that a forward leaves behind, if ``ops.routed_ffn`` computes this call; else None."""
        if isinstance(units.values, ExpertRows):
            return self._fused_codes(x_TD, mask_T, units)
        if self._split is not None:
            if not self._split.alone:
                return None
            units = self._split.units(units)
        if self.training and (self.aux == "inject" or self._needs_logits()):
            return None
        gate = self._gate_of(x_TD, units.values.shape[0], ops.routed_ffn_available, units)
        if gate is None:
            return None
        router, (gate_function, weight, bias) = self.router, gate
        if self._infers():
            y_TO, index_TK = ops.routed_ffn_inference(
                x_TD, weight, bias, units, router.k, gate_function, self.activation
            )
            self._keep(None, index_TK, mask_T, ())
            return y_TO
        y_TO, index_TK, gate_TK, softmax_BE = ops.routed_ffn(
            x_TD,
            weight,
            units,
            k=router.k,
            gate_function=gate_function,
            router_bias=bias,
            mask=mask_T,
            groups=n_sequences or 1,
            dropout_mask=self._dropout_mask(x_TD, x_TD.shape[0], router.k, self.expert_size),
            activation=self.activation,
        )
        if bias is not None and router.training:
            router.count(index_TK, mask_T)
        loss = self._balance_loss(FusedRouting(softmax_BE, index_TK, gate_TK), mask_T, n_sequences)
        self._keep(loss, index_TK, mask_T, (y_TO,))  # the loss's backward pass reaches its node
        return self._add_null(y_TO, x_TD, index_TK, gate_TK, units.values.shape[0])

    def _fused_codes(self, x_TD: Tensor, mask_T: Tensor | None, units: ops.Units) -> Tensor | None:
        """The same of quantised experts, where nothing asks for more than the output."""
        codes = codes_of(units)
        if codes is None or self._split is not None or not self._infers():
            return None
        gate = self._gate_of(x_TD, units.values.shape[0], ops.quantized_ffn_available, codes)
        if gate is None:
            return None
        gate_function, weight, bias = gate
        y_TO, index_TK = ops.quantized_ffn_inference(
            x_TD, weight, bias, codes, self.router.k, gate_function, self.activation
        )
        self._keep(None, index_TK, mask_T, ())
        return y_TO

    def _infers(self) -> bool:
        """Whether no gradient of this call and no gate of it is needed, which ops for inference do not return."""
        gates_needed = self.null_experts and self.null_kind != "zero"
        return not (self.training or torch.is_grad_enabled() or ops.under_transforms() or gates_needed)

    def _experts(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, units: ops.Units) -> Tensor:
        """The selected experts of each token, by the processes that hold them: [T, O]."""
        if self._split is None:
            return self._compute(x_TD, units, index_TK, gate_TK)
        return self._split.experts(self, x_TD, units, index_TK, gate_TK)  # type: ignore[no-any-return]

    def _compute(self, x_TD: Tensor, units: ops.Units, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """The same by this process, which holds these units."""
        mask = self._dropout_mask(x_TD, *index_TK.shape, self.expert_size)
        return rows_ffn(x_TD, units, index_TK, gate_TK, dropout_mask=mask, activation=self.activation)

    @torch.no_grad()
    def prefetch(self, x: Tensor, *, router_input: Tensor | None = None) -> None:
        """Begin to copy the experts that x selects onto the device, if ``offload_experts_`` has put them elsewhere.

        A guess is allowed: what the layer is called with need not be x, and then copies what is missing.

        Args:
            x: as ``forward``'s.
            router_input: as ``forward``'s.

        Raises:
            RuntimeError: the experts are not offloaded, or the layer is in training.
        """
        rows = self.values
        if not isinstance(rows, OffloadedRows):
            raise RuntimeError("prefetch is for offloaded experts, and offload_experts_ was not called on this layer")
        rows.check_mode()  # before the router counts
        rows.prefetch(self._routing_of(x, None, router_input).index_TK.clamp_max(self.n_experts))

    def _routing_of(self, x: Tensor, mask: Tensor | None, router_input: Tensor | None) -> Routing:
        """What the router decides on the arguments of ``forward``."""
        self._check_call(x, mask)
        seen_TR = self._selector_input(x, router_input).reshape(-1, self.d_router)
        return self._route(seen_TR, None if mask is None else mask.reshape(-1), self._units().values.shape[0])

    def _decide(self, x_TR: Tensor, mask_T: Tensor | None, n_experts: int, n_sequences: int | None) -> AnyRouting:
        """What the router decides, by ``ops.route`` if that computes it."""
        unfused = self._split is not None or (self.training and self._needs_logits())
        gate = None if unfused else self._gate_of(x_TR, n_experts, ops.route_available)
        if gate is None:
            return self._route(x_TR, mask_T, n_experts)
        router, (gate_function, weight, bias) = self.router, gate
        groups = (n_sequences or 1) if self.training else 0  # the sums are for balance losses
        index_TK, gate_TK, softmax_BE = ops.route(
            x_TR, weight, k=router.k, gate_function=gate_function, router_bias=bias, mask=mask_T, groups=groups
        )
        if bias is not None and router.training:
            router.count(index_TK, mask_T)
        return FusedRouting(softmax_BE, index_TK, gate_TK)

    def _gate_of(
        self, x_TR: Tensor, n_experts: int, available: Callable[..., bool], *experts: ops.Units
    ) -> Gate | None:
        """The router as an op takes it, if the op computes this input now; experts are those of one that has some."""
        gate_function = _gate_function(self.router)
        if gate_function is None:
            return None
        weight, bias = tensors_of(self.router, "weight", "bias")
        if not available(x_TR, weight, bias, *experts):
            return None
        check_places(x_TR, {"router.weight": weight, "router.bias": bias})
        self._check_router(n_experts, weight, bias)
        return gate_function, weight, bias

    def _needs_logits(self) -> bool:
        """Whether the balance loss of a training forward asks for the logits."""
        return self._pooled() or any(name in NEED_LOGITS for name in self.balance)


def _gate_function(router: Router) -> str | None:
    """The router's gate, if it now is a linear map, a top-k and a gate that our ops know; else None.

    By exact type: a subclass may do more. With hooks on it a router must be called.
    """
    kind = type(router)
    gate = GATES.get(kind)
    if gate is None or (router.training and (kind is SinkhornRouter or router.expert_dropout > 0)):
        return None
    return gate if is_plain(router) else None
