"""MoE: a mixture of experts as one stack of hidden units grouped by expert, with its router and balance losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_ffn.checks import check_positive, check_rate
from sparse_ffn.layers.fused_path import FusedPath
from sparse_ffn.ops.autocast import autocast_dtype
from sparse_ffn.routing.base import Router
from sparse_ffn.routing.distributed import Sync
from sparse_ffn.routing.inject import inject
from sparse_ffn.routing.routers import make_router

# T tokens, D d_model, O d_out, E experts, G units of an expert, K selected experts


class MoE(FusedPath):
    """y = sum over the k selected experts of gate_e · values_e.T act(keys_e x) (arXiv 2310.10837, Eq. 11).

    No capacity limit, no dropped token. Parameters: ``keys`` [E, G, d_model], ``values`` [E, G, d_out],
    ``router.weight`` [E, d_router]; with ``glu`` ``gate_keys`` [E, G, d_model]; with ``bias`` ``key_bias`` [E, G] and
    ``out_bias`` [d_out]; with ``balance="bias"`` the buffer ``router.bias`` [E]. N null experts make the router's rows
    E + N; those of the kind ``"constant"`` have ``constants`` [N, d_out]. ``quantize_experts_`` puts ``ExpertRows`` in
    the place of keys, gate_keys and values.

    Args:
        d_model: input width.
        n_experts: E.
        expert_size: G, hidden units of an expert.
        k: experts selected for a token, 1 <= k <= n_experts + null_experts.
        router: ``"sigmoid"``, ``"softmax"`` (over all experts), ``"softmax_topk"`` (over the selected), ``"sinkhorn"``,
            ``"noisy_topk"``, ``"unweighted"`` (selected experts weigh 1); a class of ``sparse_ffn.routing``, or another
            callable that makes a router from the arguments of ``Router``; or a ``Router`` of these sizes, which then
            brings its own width, expert dropout and selection bias.
        activation: see ``SparseFFN``, as all other shared arguments.
        glu: gate the hidden units: act(gate_keys x) * (keys x + key_bias).
        bias: ``key_bias`` and ``out_bias``.
        d_out: output width.
        d_router: width of what the router sees; None for d_model. Another one makes ``router_input`` a must.
        null_experts: N, experts without hidden units that the router scores behind the E others (2410.07348): k counts
            them, so that tokens use a varying number of hidden units.
        null_kind: what one adds: nothing (``"zero"``), gate · x (``"identity"``) or gate · ``constants[n]``
            (``"constant"``; they start at zero).
        null_share: the share of all slots that balancing wishes on null experts; None for N/(E + N).
        dropout: on the hidden units.
        expert_dropout: chance in training that a token cannot use an expert; no rescaling.
        balance: ``"entropy"``, ``"switch"``, ``"cv2"``, ``"z"`` (losses; see ``sparse_ffn.routing.balance`` for
            their ranges), ``"bias"`` (no loss: call ``sparse_ffn.update_router_bias`` once a step), ``"none"``, or
            a tuple of these.
        balance_weight: factor of the loss, a tuple with one for each name if ``balance`` is a tuple.
        balance_over: ``"batch"`` pools all real tokens, ``"sequence"`` each run along dimension -2 of x.
        aux: ``"attach"`` keeps the weighted loss for ``sparse_ffn.aux_loss``; ``"inject"`` adds its gradient in the
            backward pass (not scaled by a GradScaler nor divided by gradient accumulation), without any change to the
            training loop. A layer that several blocks share wants ``"inject"``: attach keeps the last call's loss.
        sync_balance: pool balance losses and loads over a process group, True for the default one.
        init_scale: c; keys have standard deviation c/sqrt(d_model), values c/sqrt(E·G), router rows norm c.
        n_layers: sets c = sqrt(2/n_layers).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ValueError: k > n_experts + null_experts, or an argument outside its range.
    """

    _units_dims = 2

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
        self.n_experts = check_positive("n_experts", n_experts)
        self.expert_size = check_positive("expert_size", expert_size)
        self.d_ff = self.n_experts * self.expert_size
        self._set_balance(balance, balance_weight, balance_over, aux, sync_balance)
        self._make_units(glu, bias)
        self._set_null(null_experts, null_kind, null_share)
        every = self.n_experts + self.null_experts
        limit = "n_experts + null_experts" if self.null_experts else "n_experts"
        self.router = make_router(
            router, self.d_model, d_router, every, check_positive("k", k, every, limit),
            balance=self.balance, expert_dropout=check_rate("expert_dropout", expert_dropout),
            init_scale=self.init_scale, **self._factory,
        )  # fmt: skip
        self.d_router = self.router.d_model
        super().reset_parameters()  # the router has initialised itself

    @property
    def _units_shape(self) -> tuple[int, ...]:
        return (self.n_experts, self.expert_size)

    def reset_parameters(self) -> None:
        """Normal keys and values, zero biases and constants; the router's own initialisation."""
        super().reset_parameters()
        self.router.reset_parameters()

    def _forward(self, x: Tensor, mask: Tensor | None, router_input: Tensor) -> Tensor:
        x_TD = x if x.dim() == 2 else x.reshape(-1, self.d_model)
        mask_T = None if mask is None else mask.reshape(-1)
        units, n_sequences = self._units(), self._n_sequences(x)
        if x is router_input and (y_TO := self._fused(x_TD, mask_T, units, n_sequences)) is not None:
            return y_TO
        routing = self._decide(router_input.reshape(-1, self.d_router), mask_T, units, n_sequences)
        loss, gate_TK = self._balance_loss(routing, mask_T, n_sequences), routing.gate_TK
        if loss is not None and self.aux == "inject":
            gate_TK, loss = inject(gate_TK, loss), None
        x_TD = x_TD.to(autocast_dtype(x_TD))
        index_TK = routing.index_TK.clamp_max(self.n_experts) if self.null_experts else routing.index_TK
        y_TO = self._experts(x_TD, units, index_TK, gate_TK)
        y_TO = self._add_null(y_TO, x_TD, routing.index_TK, gate_TK)
        self._keep(loss, routing.index_TK, mask_T, (y_TO, loss))
        return y_TO

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        router = {f"router.{name}": tensor for name, tensor in self._own_router()._tensors().items()}
        return {**router, **super()._tensors(), "constants": (self.constants, (self.null_experts, self.d_out))}

    @property
    def active_fraction(self) -> float:
        """k/n_experts, and at most 1; null experts make it less."""
        return min(1.0, self.k / self.n_experts)

    def flops_per_token(self) -> int:
        """Router scores (twice for noisy top-k) and k experts; null ones among them make it less."""
        n_units = min(self.k, self.n_experts) * self.expert_size
        return sum(2 * p.numel() for p in self.router.parameters()) + self._flops(n_units, n_units)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults; the balance always."""
        return self._repr_options(
            f"n_experts={self.n_experts}, expert_size={self.expert_size}, k={self.k}",
            activation=(self.activation, "relu"),
            glu=(self.gate_keys is not None, False),
            bias=(self.out_bias is not None, False),
            d_router=(self.d_router, self.d_model),
            null_experts=(self.null_experts, 0),
            null_kind=(self.null_kind, "zero"),
            null_share=(self.null_share, None),
            **self._balance_options(),
        )
