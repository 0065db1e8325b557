"""FusedPath: router and experts in one op, where the router is no more than that op computes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.checks import check_places
from sparse_ffn.layers.routed import Routed
from sparse_ffn.layers.rows.base import ExpertRows
from sparse_ffn.module import is_plain, tensors_of
from sparse_ffn.routing.balance import NEED_LOGITS
from sparse_ffn.routing.base import FusedRouting, Router
from sparse_ffn.routing.routers import (
    SigmoidRouter,
    SinkhornRouter,
    SoftmaxRouter,
    SoftmaxTopKRouter,
    UnweightedRouter,
)


class FusedPath(Routed):
    """Experts with a router, and the call that computes both at once."""

    expert_size: int

    def _fused(self, x_TD: Tensor, mask_T: Tensor | None, units: ops.Units, n_sequences: int | None) -> Tensor | None:
        """The output, with all that a forward leaves behind, if ``ops.routed_ffn`` computes this call; else None."""
        if isinstance(units.values, ExpertRows):
            return None
        if self._split is not None:
            if not self._split.alone:
                return None
            units = self._split.units(units)
        if self.training and (
            self.aux == "inject" or self._pooled() or any(name in NEED_LOGITS for name in self.balance)
        ):
            return None
        router = self.router
        gate_function = _gate_function(router)
        if gate_function is None:
            return None
        weight, bias = tensors_of(router, "weight", "bias")
        if not ops.routed_ffn_available(x_TD, weight, bias, units):
            return None
        check_places(x_TD, (weight, bias))
        self._check_router(units, weight, bias)
        gates_needed = self.null_experts and self.null_kind != "zero"  # inference does not return them
        if not self.training and not torch.is_grad_enabled() and not ops.under_transforms() and not gates_needed:
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
        if bias is not None and self.training:
            router.count(index_TK, mask_T)
        loss = self._balance_loss(FusedRouting(softmax_BE, index_TK, gate_TK), mask_T, n_sequences)
        self._keep(loss, index_TK, mask_T, (y_TO,))  # the loss's backward pass reaches its node
        return self._add_null(y_TO, x_TD, index_TK, gate_TK)


def _gate_function(router: Router) -> str | None:
    """The router's gate, if it now is a linear map, a top-k and a gate that ``ops.routed_ffn`` knows; else None.

    By exact type: a subclass may do more. With hooks on it a router must be called.
    """
    kind = type(router)
    if kind is SigmoidRouter or (kind is SinkhornRouter and not router.training):
        gate = "sigmoid"
    elif kind is SoftmaxRouter:
        gate = "softmax"
    elif kind is SoftmaxTopKRouter:
        gate = "softmax_topk"
    elif kind is UnweightedRouter:
        gate = "unweighted"
    else:
        return None
    drops = router.training and router.expert_dropout > 0
    return gate if not drops and is_plain(router) else None
