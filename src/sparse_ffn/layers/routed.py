"""Routed: a layer whose router sends each token to some of its experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_ffn import ops
from sparse_ffn.checks import shown
from sparse_ffn.layers.balanced import Balanced
from sparse_ffn.layers.null_experts import NullExperts
from sparse_ffn.layers.rows.base import ExpertRows
from sparse_ffn.layers.rows.offloaded import OffloadedRows
from sparse_ffn.layers.units import UnitsFFN
from sparse_ffn.module import tensors_of
from sparse_ffn.routing.base import Router, Routing


class Routed(NullExperts, Balanced, UnitsFFN):
    """What the router sees and decides, and whether its tensors fit the experts'."""

    router: Router
    d_router: int
    """Width of what the router sees."""
    expert_size: int

    @property
    def k(self) -> int:
        """The router's ``k``: experts selected for a token, which may be set to any number up to all that it scores."""
        return self._own_router().k

    @k.setter
    def k(self, k: int) -> None:
        self._own_router().k = k

    def _own_router(self) -> Router:
        # LoRA wraps it, and the wrapper has none of its attributes
        return next(module for module in self.router.modules() if isinstance(module, Router))

    def reset_parameters(self) -> None:
        """As the units'; the constants of null experts start at zero."""
        super().reset_parameters()
        if self.constants is not None:
            nn.init.zeros_(self.constants)

    def _units(self) -> ops.Units:
        units = super()._units()
        if self.null_experts and self.null_kind == "constant":
            (constants,) = tensors_of(self, "constants")
            if constants.shape != (self.null_experts, self.d_out):
                raise self._shape_error()
        return units

    def _selector_input(self, x: Tensor, router_input: Tensor | None) -> Tensor:
        if router_input is None and self.d_router == self.d_model:
            return x
        if router_input is None:
            raise ValueError(
                f"router_input of width d_router = {self.d_router} must be given: this layer's router does not see x"
            )
        self._check_input("router_input", router_input, torch.float32)
        shape = (*x.shape[:-1], self.d_router)
        if router_input.shape != shape:
            raise ValueError(
                f"router_input must have shape {list(shape)}, d_router last, got {list(router_input.shape)}"
            )
        return router_input

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
        rows.prefetch(self._routing_of(x, None, router_input).index_TK.clamp_max(self.n_experts))

    def _routing_of(self, x: Tensor, mask: Tensor | None, router_input: Tensor | None) -> Routing:
        """What the router decides on the arguments of ``forward``."""
        self._check_call(x, mask)
        seen_TR = self._selector_input(x, router_input).reshape(-1, self.d_router)
        return self._route(seen_TR, None if mask is None else mask.reshape(-1), self._units())

    def _route(self, x_TR: Tensor, mask_T: Tensor | None, units: ops.Units) -> Routing:
        """What the router decides, or any module that stands in its place."""
        router = self.router
        if isinstance(router, Router) and type(router).forward is Router.forward:
            self._check_router(units, router.weight)
        routing: Routing = router(x_TR, mask_T) if self._split is None else self._split.route(router, x_TR, mask_T)
        if not isinstance(routing, Routing):
            raise TypeError(f"router must return a sparse_ffn.routing.Routing, got {shown(routing)}")
        n_scored, n_experts = routing.logits_TE.shape[1], units.values.shape[0] + self.null_experts
        if n_scored != n_experts:
            null = f" and there are {self.null_experts} null experts" if self.null_experts else ""
            raise ValueError(f"the router scored {n_scored} experts, values has {units.values.shape[0]}{null}")
        return routing

    def _check_router(self, units: ops.Units, weight: Tensor, bias: Tensor | None = None) -> None:
        experts = units.values.shape[0] + self.null_experts
        if weight.shape != (experts, self.d_router) or (bias is not None and bias.shape != (experts,)):
            raise self._shape_error()

    def _experts(self, x_TD: Tensor, units: ops.Units, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """The selected experts of each token, by the processes that hold them: [T, O]."""
        if self._split is None:
            return self._compute(x_TD, units, index_TK, gate_TK)
        return self._split.experts(self, x_TD, units, index_TK, gate_TK)  # type: ignore[no-any-return]

    def _compute(self, x_TD: Tensor, units: ops.Units, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """The same by this process, which holds these units."""
        mask = self._dropout_mask(x_TD, *index_TK.shape, self.expert_size)
        ffn = units.values.ffn if isinstance(units.values, ExpertRows) else ops.expert_ffn
        return ffn(x_TD, units, index_TK, gate_TK, dropout_mask=mask, activation=self.activation)
