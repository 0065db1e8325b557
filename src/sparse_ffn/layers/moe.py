"""MoE: a mixture of experts as one stack of hidden units grouped by expert, with its router and balance losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from sparse_ffn import ops
from sparse_ffn.checks import (
    check_choice,
    check_finite,
    check_flag,
    check_places,
    check_positive,
    check_rate,
    shown,
)
from sparse_ffn.layers.base import SparseFFN, units_fit
from sparse_ffn.layers.last_forward import LastForward
from sparse_ffn.ops.autocast import autocast_dtype
from sparse_ffn.routing.balance import NAMES, NEED_LOGITS, weighted_losses
from sparse_ffn.routing.inject import inject
from sparse_ffn.routing.routers import ROUTERS, FusedRouting, Router, Routing, plain_gate

# T tokens, D d_model, E experts, G units of an expert, K selected experts


class MoEOptions(TypedDict, total=False):
    """The keyword arguments of ``MoE`` that all its named variants share."""

    activation: str
    glu: bool
    bias: bool
    d_out: int | None
    dropout: float
    expert_dropout: float
    balance_over: str
    aux: str
    sync_balance: bool
    init_scale: float
    n_layers: int | None
    device: Any
    dtype: torch.dtype | None


class MoE(SparseFFN):
    """y = sum over the k selected experts of gate_e · values_e.T act(keys_e x) (arXiv 2310.10837, Eq. 11).

    No capacity limit, no dropped token. Parameters: ``keys`` [E, G, d_model], ``values`` [E, G, d_out],
    ``router.weight`` [E, d_model]; with ``glu`` ``gate_keys`` [E, G, d_model]; with ``bias`` ``key_bias`` [E, G] and
    ``out_bias`` [d_out]; with ``balance="bias"`` the buffer ``router.bias`` [E].

    Args:
        d_model: input width.
        n_experts: E.
        expert_size: G, hidden units of an expert.
        k: experts selected for a token, 1 <= k <= n_experts.
        router: ``"sigmoid"``, ``"softmax"`` (over all experts), ``"softmax_topk"`` (over the selected), ``"sinkhorn"``,
            ``"noisy_topk"``, ``"open"`` (selected experts weigh 1); a class of ``sparse_ffn.routing``, or another
            callable that makes a router from the arguments of ``Router``; or a ``Router`` of these sizes, which then
            brings its own expert dropout and selection bias.
        activation: see ``SparseFFN``, as all other shared arguments.
        glu: gate the hidden units: act(gate_keys x) * (keys x + key_bias).
        bias: ``key_bias`` and ``out_bias``.
        d_out: output width.
        dropout: on the hidden units.
        expert_dropout: chance in training that a token cannot use an expert; no rescaling.
        balance: ``"entropy"``, ``"switch"``, ``"cv2"``, ``"z"`` (losses; see ``sparse_ffn.routing.balance`` for
            their ranges), ``"bias"`` (no loss: call ``sparse_ffn.update_router_bias`` once a step), ``"none"``, or
            a tuple of these.
        balance_weight: factor of the loss, a tuple with one for each name if ``balance`` is a tuple.
        balance_over: ``"batch"`` pools all real tokens, ``"sequence"`` each run along dimension -2 of x.
        aux: ``"attach"`` keeps the weighted loss for ``sparse_ffn.aux_loss`` until a backward pass frees its graph or
            the layer leaves training; ``"inject"`` adds its gradient in the backward pass without any change to the
            training loop (it is not scaled by a GradScaler nor divided by gradient accumulation). Layers that several
            blocks share want ``"inject"``: attach keeps the last call's.
        sync_balance: pool balance losses and loads over the default process group, which must be initialised.
        init_scale: c; keys have standard deviation c/sqrt(d_model), values c/sqrt(E·G), router rows norm c.
        n_layers: sets c = sqrt(2/n_layers).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ValueError: k > n_experts, or an argument outside its range.
    """

    router: Router
    _last: LastForward | None

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expert_size: int,
        k: int,
        *,
        router: str | Router | Callable[..., Router] = "sigmoid",
        activation: str = "relu",
        glu: bool = False,
        bias: bool = False,
        d_out: int | None = None,
        dropout: float = 0.0,
        expert_dropout: float = 0.0,
        balance: str | Sequence[str] = "entropy",
        balance_weight: float | Sequence[float] = 1e-3,
        balance_over: str = "batch",
        aux: str = "attach",
        sync_balance: bool = False,
        init_scale: float = 1.0,
        n_layers: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, d_out=d_out, activation=activation, dropout=dropout, init_scale=init_scale, n_layers=n_layers,
            bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.n_experts = check_positive("n_experts", n_experts)
        self.expert_size = check_positive("expert_size", expert_size)
        self.d_ff = self.n_experts * self.expert_size
        k = check_positive("k", k, at_most=self.n_experts, limit="n_experts")
        glu, expert_dropout = check_flag("glu", glu), check_rate("expert_dropout", expert_dropout)
        check_choice("balance_over", balance_over, ("batch", "sequence"))
        check_choice("aux", aux, ("attach", "inject"))
        self.balance, self.balance_weight = _balance(balance, balance_weight)
        self.balance_over, self.aux, self.sync_balance = balance_over, aux, check_flag("sync_balance", sync_balance)
        self.router = self._make_router(router, k, expert_dropout)
        experts = (self.n_experts, self.expert_size)
        self.keys = self._parameter(*experts, self.d_model)
        self.gate_keys = self._parameter(*experts, self.d_model) if glu else None
        self.key_bias = self._parameter(*experts) if bias else None
        self.values = self._parameter(*experts, self.d_out)
        self._last = None
        self._reset_experts()

    @property
    def k(self) -> int:
        """The router's ``k``: experts selected for a token, which may be set to any number up to n_experts."""
        return self._own_router().k

    @k.setter
    def k(self, k: int) -> None:
        self._own_router().k = k

    def _own_router(self) -> Router:
        # LoRA wraps it, and the wrapper has none of its attributes
        return next(module for module in self.router.modules() if isinstance(module, Router))

    def _make_router(self, router: str | Router | Callable[..., Router], k: int, expert_dropout: float) -> Router:
        sizes = (self.d_model, self.n_experts, k)
        made = router
        if not isinstance(router, Router):
            if isinstance(router, nn.Module) or not callable(router):
                check_choice("router", router, ROUTERS)
            made = (ROUTERS[router] if isinstance(router, str) else router)(
                *sizes,
                expert_dropout=expert_dropout,
                selection_bias="bias" in self.balance,
                init_scale=self.init_scale,
                **self._factory,
            )
        elif expert_dropout:
            raise ValueError(f"expert_dropout = {expert_dropout!r}: give it to the router module instead")
        if not isinstance(made, Router):
            raise TypeError(f"router must make a sparse_ffn.routing.Router, but {shown(router)} made {shown(made)}")
        if (made.d_model, made.n_experts, made.k) != sizes:
            raise ValueError(
                f"router has (d_model, n_experts, k) = {(made.d_model, made.n_experts, made.k)}, the layer {sizes}"
            )
        if ("bias" in self.balance) != (made.bias is not None):
            raise ValueError(
                f"balance = {self.balance!r} and a router with selection_bias={made.bias is not None} do not fit"
            )
        return made

    def reset_parameters(self) -> None:
        """Normal keys and values, zero biases; the router's own initialisation."""
        self._reset_experts()
        self.router.reset_parameters()

    def _reset_experts(self) -> None:
        self._normal(self.keys, self.d_model)
        self._normal(self.values, self.d_ff)  # of all units, not of an expert's (arXiv 2310.10837, section 5)
        if self.gate_keys is not None:
            self._normal(self.gate_keys, self.d_model)
        for bias in (self.key_bias, self.out_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def _selector_input(self, x: Tensor, router_input: Tensor | None) -> Tensor:
        if router_input is None:
            return x
        self._check_input("router_input", router_input)
        if router_input.shape != x.shape:
            raise ValueError(f"router_input must have x's shape {list(x.shape)}, got {list(router_input.shape)}")
        return router_input

    def _forward(self, x: Tensor, mask: Tensor | None, router_input: Tensor) -> Tensor:
        x_TD = x if x.dim() == 2 else x.reshape(-1, self.d_model)
        mask_T = None if mask is None else mask.reshape(-1)
        loss: Tensor | None
        if parts := self._fusable(x_TD, x is router_input):
            y, index_TK, loss = self._fused(x, x_TD, mask_T, *parts)
            results: tuple[Tensor | None, ...] = (y,)  # through which the loss's graph goes, too
        else:
            y, index_TK, loss = self._route_then_compute(x, x_TD, mask_T, router_input)
            results = (y, loss)
        # an exported program has no module to keep these; is_exporting() is true for all that torch 2.9 compiles
        if not torch.compiler._is_exporting_flag and not ops.in_backward():
            last = LastForward(loss, index_TK, mask_T, results)
            object.__setattr__(self, "_last", last)  # Module's own costs as much as a small op
        return y

    def _route_then_compute(
        self, x: Tensor, x_TD: Tensor, mask_T: Tensor | None, router_input: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output, selected experts, balance loss: the router's module, then the experts."""
        known = isinstance(self.router, Router) and type(self.router).forward is Router.forward
        weight = self.router.weight if known else None
        self._check_experts(weight, self.keys, self.values, self.gate_keys, self.key_bias)
        routing: Routing = self.router(router_input.reshape(-1, self.d_model), mask_T)
        if not isinstance(routing, Routing):
            raise TypeError(f"router must return a sparse_ffn.routing.Routing, got {shown(routing)}")
        if routing.logits_TE.shape[1] != self.values.shape[0]:
            raise ValueError(
                f"the router scored {routing.logits_TE.shape[1]} experts, values has {self.values.shape[0]}"
            )
        loss = self._balance_loss(routing, mask_T, x)
        gate_TK = routing.gate_TK
        if loss is not None and self.aux == "inject":
            gate_TK, loss = inject(gate_TK, loss), None
        x_TD = x_TD.to(autocast_dtype(x_TD))
        y = ops.expert_ffn(
            x_TD,
            ops.Units(self.keys, self.values, self.gate_keys, self.key_bias),
            routing.index_TK,
            gate_TK,
            dropout_mask=self._dropout_mask(x_TD, x_TD.shape[0], self.k, self.expert_size),
            activation=self.activation,
        )
        return y, routing.index_TK, loss

    def _fusable(self, x_TD: Tensor, own_input: bool) -> tuple[Any, ...] | None:
        """Router, its gate's name and all tensors if ``ops.routed_ffn`` computes this call, else None."""
        if not own_input or (self.training and (self.aux == "inject" or any(n in NEED_LOGITS for n in self.balance))):
            return None
        router = self.router
        gate_function = plain_gate(router)
        if gate_function is None:
            return None
        experts = ops.Units(*_tensors(self, "keys", "values", "gate_keys", "key_bias"))
        tensors = (*_tensors(router, "weight", "bias"), experts)
        return (router, gate_function, *tensors) if ops.routed_ffn_available(x_TD, *tensors) else None

    def _fused(
        self,
        x: Tensor,
        x_TD: Tensor,
        mask_T: Tensor | None,
        router: Router,
        gate_function: str,
        router_weight: Tensor,
        router_bias: Tensor | None,
        experts: ops.Units,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As ``_route_then_compute``, in one op."""
        check_places(x_TD, (router_weight, router_bias))
        self._check_experts(router_weight, *experts)
        if router_bias is not None and router_bias.shape != experts.values.shape[:1]:
            raise self._misfit()
        if not self.training and not torch.is_grad_enabled() and not ops.under_transforms():
            y, index_TK = ops.routed_ffn_inference(
                x_TD, router_weight, router_bias, experts, router.k, gate_function, self.activation
            )
            return y, index_TK, None
        y, index_TK, gate_TK, softmax_BE = ops.routed_ffn(
            x_TD,
            router_weight,
            experts,
            k=router.k,
            gate_function=gate_function,
            router_bias=router_bias,
            mask=mask_T,
            groups=self._n_sequences(x) or 1,
            dropout_mask=self._dropout_mask(x_TD, x_TD.shape[0], router.k, self.expert_size),
            activation=self.activation,
        )
        if router_bias is not None and self.training:
            router.count(index_TK, mask_T)
        return y, index_TK, self._balance_loss(FusedRouting(softmax_BE, index_TK, gate_TK), mask_T, x)

    def _check_experts(
        self,
        router_weight: Tensor | None,
        keys: Tensor,
        values: Tensor,
        gate_keys: Tensor | None,
        key_bias: Tensor | None,
    ) -> None:
        n_experts, size, width = values.shape if values.ndim == 3 else (-1, -1, -1)
        if (
            width != self.d_out
            or not units_fit((n_experts, size), self.d_model, keys, gate_keys, key_bias)
            or (router_weight is not None and router_weight.shape != (n_experts, self.d_model))
        ):
            raise self._misfit()

    def _parts(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        units = (self.n_experts, self.expert_size)
        keys = (*units, self.d_model)
        return {
            **{f"router.{name}": part for name, part in self._own_router()._parts().items()},
            "keys": (self.keys, keys),
            "gate_keys": (self.gate_keys, keys),
            "key_bias": (self.key_bias, units),
            "values": (self.values, (*units, self.d_out)),
        }

    def _n_sequences(self, x: Tensor) -> int | None:
        return x.shape[:-2].numel() if self.balance_over == "sequence" else None

    def _balance_loss(self, routing: Routing | FusedRouting, mask_T: Tensor | None, x: Tensor) -> Tensor | None:
        if not self.training:
            return None
        terms = tuple((n, w) for n, w in zip(self.balance, self.balance_weight, strict=True) if n not in _NO_LOSS)
        if not terms:
            return None
        return weighted_losses(routing, terms, mask_T=mask_T, n_sequences=self._n_sequences(x), sync=self.sync_balance)

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward left behind: copies and pickles start clean."""
        return {**self.__dict__, "_last": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> MoE:
        """As ``__getstate__``, which torch.nn.utils.parametrize overrides."""
        twin = self.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy({**self.__dict__, "_last": None}, memo)
        return twin

    def train(self, mode: bool = True) -> MoE:
        """As Module's; to leave training is to forget the kept balance loss."""
        if not mode and self._last is not None:
            self._last.forget_loss()
        return super().train(mode)

    @property
    def _aux(self) -> Tensor | None:
        last = self._living()
        return None if last is None else last.loss

    @property
    def _routed(self) -> tuple[Tensor, Tensor | None] | None:
        last = self._living()
        return None if last is None else (last.index_TK, last.mask_T)

    def _living(self) -> LastForward | None:
        """What the last forward left behind; tensors of a torch.func transform end with it."""
        for tensor in () if self._last is None else self._last.tensors():
            if tensor is not None and torch._C._functorch.unwrap_if_dead(tensor) is not tensor:
                raise RuntimeError(
                    "the last forward of this layer ran inside a transform of torch.func (vmap, grad, ...) that is "
                    "over: ask for aux_loss and routing_stats inside the transformed function"
                )
        return self._last

    @property
    def active_fraction(self) -> float:
        """k/n_experts."""
        return self.k / self.n_experts

    def flops_per_token(self) -> int:
        """Router scores (twice for noisy top-k) and the k selected experts."""
        router = sum(2 * p.numel() for p in self.router.parameters())
        inputs = self.d_model * (1 if self.gate_keys is None else 2)
        return router + 2 * self.k * self.expert_size * (inputs + self.d_out)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults; the balance always."""
        single = len(self.balance) == 1
        return self._repr_options(
            f"n_experts={self.n_experts}",
            f"expert_size={self.expert_size}",
            f"k={self.k}",
            activation=(self.activation, "relu"),
            glu=(self.gate_keys is not None, False),
            bias=(self.out_bias is not None, False),
            balance=(self.balance[0] if single else self.balance, None),
            balance_weight=(self.balance_weight[0] if single else self.balance_weight, None),
            balance_over=(self.balance_over, "batch"),
            aux=(self.aux, "attach"),
            sync_balance=(self.sync_balance, False),
        )


_NO_LOSS = ("bias", "none")


def _tensors(module: nn.Module, *names: str) -> list[Any]:
    """Attributes of a module that are parameters or buffers unless someone put another tensor in their place.

    Module.__getattr__ would cost 0.7 microseconds for each, a tenth of a decode step together.
    """
    own, buffers = module._parameters, module._buffers
    return [own[n] if n in own else buffers[n] if n in buffers else getattr(module, n) for n in names]


def _balance(names: str | Sequence[str], weights: float | Sequence[float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if isinstance(names, str):
        names, weights = (names,), (weights,)  # type: ignore[assignment]
    if not isinstance(names, Sequence) or not names:
        raise ValueError(
            f"balance must be one of {', '.join(map(repr, NAMES))} or a tuple of these, got {shown(names)}"
        )
    for name in names:
        check_choice("balance", name, NAMES)
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(names) != len(weights):
        raise ValueError(
            f"balance_weight must hold one weight for each of balance = {tuple(names)}, got {shown(weights)}"
        )
    if len(set(names)) != len(names) or ("none" in names and len(names) > 1):
        raise ValueError(f"balance must name each loss once, and 'none' only by itself, got {tuple(names)}")
    return tuple(names), tuple(check_finite("balance_weight", weight) for weight in weights)
