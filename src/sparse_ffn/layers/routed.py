"""Routed: a mixture of experts as its router sees it; what the experts compute is a subclass's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_rate, shown
from sparse_ffn.layers.null_experts import NullExperts
from sparse_ffn.ops.autocast import autocast_dtype
from sparse_ffn.routing.base import AnyRouting, Router, Routing
from sparse_ffn.routing.distributed import Sync
from sparse_ffn.routing.inject import inject
from sparse_ffn.routing.routers import make_router

# T tokens, D d_model, O d_out, R d_router, E experts, K selected experts


class InnerOptions(TypedDict, total=False):
    """The keyword arguments that all mixtures share, but for widths; ``MoE`` says what they are."""

    activation: str
    glu: bool
    bias: bool
    null_experts: int
    null_kind: str
    null_share: float | None
    dropout: float
    expert_dropout: float
    balance_over: str
    aux: str
    sync_balance: Sync
    init_scale: float
    n_layers: int | None
    device: Any
    dtype: torch.dtype | None


class MoEOptions(InnerOptions, total=False):
    """Those, and widths."""

    d_out: int | None
    d_router: int | None


class RouterChoice(TypedDict, total=False):
    """The ones that ``MoE``'s named variants set."""

    router: str | Router | Callable[..., Router]
    balance: str | Sequence[str]
    balance_weight: float | Sequence[float]


class RoutedOptions(MoEOptions, RouterChoice, total=False):
    """All of them."""


class Routed(NullExperts):
    """y = sum over the k selected experts of gate_e · f_e(x). Subclasses make the experts and compute f.

    Before this constructor they set ``n_experts`` and ``d_ff``; arguments are ``MoE``'s.
    """

    d_router: int
    """Width of what the router sees."""

    def __init__(
        self,
        d_model: int,
        k: int,
        *,
        router: str | Router | Callable[..., Router] = "sigmoid",
        activation: str = "relu",
        glu: bool = False,
        bias: bool = False,
        d_out: int | None = None,
        d_router: int | None = None,
        null_experts: int = 0,
        null_kind: str = "zero",
        null_share: float | None = None,
        dropout: float = 0.0,
        expert_dropout: float = 0.0,
        balance: str | Sequence[str] = "entropy",
        balance_weight: float | Sequence[float] = 1e-3,
        balance_over: str = "batch",
        aux: str = "attach",
        sync_balance: Sync = False,
        init_scale: float = 1.0,
        n_layers: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, d_out=d_out, activation=activation, dropout=dropout, init_scale=init_scale, n_layers=n_layers,
            bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_balance(balance, balance_weight, balance_over, aux, sync_balance)
        self._make_experts(glu, bias)
        self._set_null(null_experts, null_kind, null_share)
        self._check_served(self.balance)
        self.router = make_router(
            router, self.d_model, d_router, self.n_experts + self.null_experts, self._checked_k(k),
            balance=self.balance, expert_dropout=check_rate("expert_dropout", expert_dropout),
            init_scale=self.init_scale, **self._factory,
        )  # fmt: skip
        self.d_router = self.router.d_model
        self._reset_experts()  # the router has initialised itself

    @property
    def expert_dropout(self) -> float:
        """The router's; may be set."""
        return self._own_router().expert_dropout

    @expert_dropout.setter
    def expert_dropout(self, expert_dropout: float) -> None:
        self._own_router().expert_dropout = expert_dropout

    @property
    def null_share(self) -> float | None:
        """The share of all slots that is wished on null experts; may be set. None for that of equal experts."""
        return self._null_share

    @null_share.setter
    def null_share(self, null_share: float | None) -> None:
        null_share = self._checked_share(null_share)
        _check_share_served(null_share, self.balance)
        self._null_share = null_share

    def _check_served(self, balance: tuple[str, ...]) -> None:
        _check_share_served(self.null_share, balance)

    def _make_experts(self, glu: bool, bias: bool) -> None:
        """Check these two and make the experts' parameters."""
        raise NotImplementedError

    def _reset_experts(self) -> None:
        """Initialise what is neither the router's nor a null expert's; the biases are zero."""
        for zero in (self.out_bias, self.constants):
            if zero is not None:
                nn.init.zeros_(zero)

    def reset_parameters(self) -> None:
        """Normal keys and values, zero biases and constants; the router's own initialisation."""
        self._reset_experts()
        self._own_router().reset_parameters()

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

    def _mixture(
        self,
        x_TD: Tensor,
        router_input: Tensor,
        mask_T: Tensor | None,
        n_sequences: int | None,
        n_experts: int,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The formula, with all that a forward leaves behind: [T, O].

        Args:
            x_TD: the tokens.
            router_input: [..., d_router].
            mask_T: the real tokens.
            n_sequences: as ``_n_sequences`` says.
            n_experts: those whose weights there are: the layer's, unless someone changed them.
            experts: of x [T, D], index [T, K] and gate [T, K] the sum over the slots whose index is below n_experts.
        """
        routing = self._decide(router_input.reshape(-1, self.d_router), mask_T, n_experts, n_sequences)
        gate_TK, travels = routing.gate_TK, self._split is not None
        loss = None if travels else self._balance_loss(routing, mask_T, n_sequences)
        if loss is not None and self.aux == "inject":
            gate_TK, loss = inject(gate_TK, loss), None
        x_TD = x_TD.to(autocast_dtype(x_TD))
        index_TK = routing.index_TK.clamp_max(n_experts) if self.null_experts else routing.index_TK
        y_TO = self._add_null(experts(x_TD, index_TK, gate_TK), x_TD, routing.index_TK, gate_TK, n_experts)
        if travels:  # the exchange is first: it, and not an all-reduce of the loss, is where a failed process says so
            loss = self._balance_loss(routing, mask_T, n_sequences)
            if loss is not None and self.aux == "inject":
                y_TO, loss = inject(y_TO, loss).clone(), None  # a copy, since an output may be changed in place
        self._keep(loss, routing.index_TK, mask_T, (y_TO, loss))
        return y_TO

    def _decide(self, x_TR: Tensor, mask_T: Tensor | None, n_experts: int, n_sequences: int | None) -> AnyRouting:
        """What the router decides; a subclass may compute it together with what the balance losses need."""
        return self._route(x_TR, mask_T, n_experts)

    def _route(self, x_TR: Tensor, mask_T: Tensor | None, n_experts: int) -> Routing:
        """What the router decides, as it is or wrapped."""
        router, own = self.router, self._own_router()
        if own is router and type(own).forward is Router.forward:
            self._check_router(n_experts, own.weight)
        routing: Routing = router(x_TR, mask_T) if self._split is None else self._split.route(router, x_TR, mask_T)
        if not isinstance(routing, Routing):
            raise TypeError(f"router must return a sparse_ffn.routing.Routing, got {shown(routing)}")
        n_scored = routing.logits_TE.shape[1]
        if n_scored != n_experts + self.null_experts:
            null = f" and {self.null_experts} null ones" if self.null_experts else ""
            raise ValueError(f"the router scored {n_scored} experts, the layer has {n_experts}{null}")
        return routing

    def _check_router(self, n_experts: int, weight: Tensor, bias: Tensor | None = None) -> None:
        experts = n_experts + self.null_experts
        if weight.shape != (experts, self.d_router) or (bias is not None and bias.shape != (experts,)):
            if str(error := self._shape_error()):  # which names a weight of another shape than its router was made with
                raise error
            raise ValueError(
                f"router scores {weight.shape[0]} experts of tokens of width {weight.shape[1]}, the layer has "
                f"{experts} of d_router = {self.d_router}"
            )

    def _router_flops(self) -> int:
        """Of the scores, without biases."""
        shapes = [shape for tensor, shape in self._own_router()._tensors().values() if tensor is not None]
        return sum(2 * math.prod(shape) for shape in shapes if len(shape) > 1)

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        router = {f"router.{name}": tensor for name, tensor in self._own_router()._tensors().items()}
        return {**router, "constants": (self.constants, (self.null_experts, self.d_out))}

    @property
    def active_fraction(self) -> float:
        """k/n_experts, and at most 1; null experts make it less."""
        return min(1.0, self.k / self.n_experts)

    def _repr_mixture(self, *sizes: str, **options: tuple[Any, Any]) -> str:
        """Sizes and what differs from the defaults; the balance always."""
        return self._repr_options(
            *sizes,
            f"k={self.k}",
            activation=(self.activation, "relu"),
            **options,
            bias=(self.out_bias is not None, False),
            d_router=(self.d_router, self.d_model),
            null_experts=(self.null_experts, 0),
            null_kind=(self.null_kind, "zero"),
            null_share=(self.null_share, None),
            **self._balance_options(),
        )


def _check_share_served(null_share: float | None, balance: tuple[str, ...]) -> None:
    if null_share is not None:
        check_one_of(f"null_share = {null_share}", balance, "entropy", "switch", "bias")


def check_one_of(option: str, balance: tuple[str, ...], *served: str) -> None:
    """Raise unless one of these serves an option."""
    if not set(served) & set(balance):
        raise ValueError(f"{option} needs one of {', '.join(map(repr, served))} as balance, got {balance}")
