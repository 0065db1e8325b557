"""The routers by name: how each weighs the experts that it selects.

T tokens, D d_model, E experts, K selected experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.checks import check_positive, shown
from sparse_ffn.options import Unpack
from sparse_ffn.routing.base import Router, RouterOptions
from sparse_ffn.routing.relu import ReLURouter
from sparse_ffn.routing.sinkhorn import sinkhorn_potential


class SigmoidRouter(Router):
    """σ-MoE: gates are sigmoids, no competition, no renormalisation (arXiv 2310.10837, section 5)."""

    def gate(self, logits_TE: Tensor, index_TK: Tensor, alive_TK: Tensor | None) -> Tensor:
        """σ(logit) of the selected experts."""
        return torch.sigmoid(logits_TE).gather(1, index_TK)


class UnweightedRouter(Router):
    """Every selected expert weighs 1 (Avg-K, MoEfication, exact conversion of dense FFNs)."""

    def gate(self, logits_TE: Tensor, index_TK: Tensor, alive_TK: Tensor | None) -> Tensor:
        """Ones. The zero-weighted logits keep the router in the graph: under DDP every parameter needs a gradient."""
        return 1 + 0 * logits_TE.gather(1, index_TK)


class SoftmaxRouter(Router):
    """Gates compete in a softmax over all experts, as in Switch (2101.03961)."""

    def gate(self, logits_TE: Tensor, index_TK: Tensor, alive_TK: Tensor | None) -> Tensor:
        """The selected experts' shares of the softmax."""
        return torch.softmax(logits_TE, dim=1).gather(1, index_TK)


class SoftmaxTopKRouter(Router):
    """Gates compete in a softmax over the selected experts.

    A softmax over all experts, divided by the sum over the selected ones, is the same function (arXiv 2310.10837,
    Eq. 23-25).
    """

    def gate(self, logits_TE: Tensor, index_TK: Tensor, alive_TK: Tensor | None) -> Tensor:
        """The softmax over the selected experts that live; zeros, never NaN, where none does."""
        logits_TK = logits_TE.gather(1, index_TK)
        if alive_TK is None:
            return torch.softmax(logits_TK, dim=1)
        # a finite fill: a row of -inf would make softmax NaN, in its gradient too
        masked_TK = logits_TK.masked_fill(~alive_TK, torch.finfo(logits_TK.dtype).min)
        return torch.softmax(masked_TK, dim=1) * alive_TK


class NoisyTopKRouter(SoftmaxTopKRouter):
    """Sparsely-gated MoE: logits + N(0, 1)·softplus(W4 x) in training, softmax over the selected (Eq. 13)."""

    def add_parameters(self) -> None:
        """``noise_weight`` [E, d_model]."""
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        """As ``Router``, and the noise weights."""
        return {**super()._tensors(), "noise_weight": (self.noise_weight, (self.n_experts, self.d_model))}

    def reset_parameters(self) -> None:
        """As ``Router``; the noise weights start at zero, where the noise has deviation ln 2."""
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)

    def perturb(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        """Noise, in training only."""
        if not self.training:
            if not torch.is_grad_enabled():
                return logits_TE
            unused = (0 * self.noise_weight.to(logits_TE.dtype)).sum()  # a zero gradient: DDP waits for one
            return logits_TE + unused
        deviation_TE = F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype)))
        return logits_TE + torch.randn_like(logits_TE) * deviation_TE


class SinkhornRouter(SigmoidRouter):
    """S-BASE: in training the selection is balanced over the batch by Sinkhorn; gates stay sigmoids.

    Args:
        n_iters: Sinkhorn iterations. They end on the update that balances the experts; three do not balance sharp
            logits, a few tens do. Evaluation selects by the plain logits.
    """

    def __init__(
        self, d_model: int, n_experts: int, k: int, *, n_iters: int = 3, **options: Unpack[RouterOptions]
    ) -> None:
        self.n_iters = n_iters
        super().__init__(d_model, n_experts, k, **options)

    @property
    def n_iters(self) -> int:
        """Sinkhorn iterations; may be set."""
        return self._n_iters

    @n_iters.setter
    def n_iters(self, n_iters: int) -> None:
        self._n_iters = check_positive("n_iters", n_iters)

    def rank(self, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        """Logits plus the experts' Sinkhorn potentials; a token's own potential would not change its ranking."""
        if not self.training:
            return logits_TE
        return logits_TE + sinkhorn_potential(logits_TE, self.n_iters, mask_T)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults."""
        return f"{super().extra_repr()}, n_iters={self.n_iters}"


ROUTERS: dict[str, type[Router]] = {
    "sigmoid": SigmoidRouter,
    "softmax": SoftmaxRouter,
    "softmax_topk": SoftmaxTopKRouter,
    "sinkhorn": SinkhornRouter,
    "noisy_topk": NoisyTopKRouter,
    "unweighted": UnweightedRouter,
    "relu": ReLURouter,
}
"""By the name that a layer's argument ``router`` takes."""


def make_router(
    router: str | Router | Callable[..., Router],
    d_model: int,
    d_router: int | None,
    n_experts: int,
    k: int,
    *,
    balance: tuple[str, ...],
    expert_dropout: float,
    **options: Any,
) -> Router:
    """The router that a layer's argument ``router`` stands for: a name, a router, or what makes one of the options."""
    if d_router is not None:
        width = check_positive("d_router", d_router)
    else:
        width = router.d_model if isinstance(router, Router) else d_model
    sizes, made = (width, n_experts, k), router
    if not isinstance(router, Router):
        named = isinstance(router, str) and router in ROUTERS
        if isinstance(router, nn.Module) or not (named or callable(router)):
            raise ValueError(
                f"router must be one of {', '.join(map(repr, ROUTERS))}, or a sparse_ffn.routing.Router, or a callable "
                f"that makes one, got {shown(router)}"
            )
        made = (ROUTERS[router] if isinstance(router, str) else router)(
            *sizes, expert_dropout=expert_dropout, selection_bias="bias" in balance, **options
        )
    elif expert_dropout:
        raise ValueError(f"expert_dropout = {expert_dropout!r}: give it to the router module instead")
    if not isinstance(made, Router):
        raise TypeError(f"router must make a sparse_ffn.routing.Router, but {shown(router)} made {shown(made)}")
    if (made.d_model, made.n_experts, made.k) != sizes:
        raise ValueError(
            f"router has (d_model, n_experts, k) = {(made.d_model, made.n_experts, made.k)}, the layer (d_router, "
            f"n_experts + null_experts, k) = {sizes}"
        )
    if ("bias" in balance) != (made.bias is not None):
        raise ValueError(f"balance = {balance!r} and a router with selection_bias={made.bias is not None} do not fit")
    if "l1" in balance and not isinstance(made, ReLURouter):
        raise ValueError(f"balance = {balance!r} needs router = 'relu', whose gates can be zero, got {shown(router)}")
    return made
