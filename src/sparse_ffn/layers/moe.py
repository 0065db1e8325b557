"""MoE: a mixture of experts as one stack of hidden units grouped by expert, with its router and balance losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.checks import check_positive
from sparse_ffn.layers.fused_path import FusedPath
from sparse_ffn.layers.routed import Routed
from sparse_ffn.layers.rows.base import ExpertRows
from sparse_ffn.layers.units import UnitsFFN
from sparse_ffn.routing.base import Router
from sparse_ffn.routing.distributed import Sync

# T tokens, D d_model, O d_out, E experts, G units of an expert, K selected experts


class MoE(FusedPath):
    """y = sum over the k selected experts of gate_e · values_e.T act(keys_e x) (arXiv 2310.10837, Eq. 11).

    No capacity limit, no dropped token. Parameters: ``keys`` [E, G, d_model], ``values`` [E, G, d_out],
    ``router.weight`` [E, d_router]; with ``glu`` ``gate_keys`` [E, G, d_model]; with ``bias`` ``key_bias`` [E, G] and
    ``out_bias`` [d_out]; with ``balance="bias"`` the buffer ``router.bias`` [E]. With N null experts the router has
    E + N rows; those of the kind ``"constant"`` have ``constants`` [N, d_out]. ``quantize_experts_`` puts
    ``ExpertRows`` in the place of keys, gate_keys and values.

    Args:
        d_model: input width.
        n_experts: E.
        expert_size: G, hidden units of an expert.
        k: experts selected for a token, 1 <= k <= n_experts + null_experts.
        router: ``"sigmoid"``, ``"softmax"`` (over all experts), ``"softmax_topk"`` (over the selected), ``"sinkhorn"``,
            ``"noisy_topk"``, ``"unweighted"`` (selected experts weigh 1), ``"relu"`` (only those of positive logit);
            a class of ``sparse_ffn.routing``, or another callable that makes a router from the arguments of ``Router``;
            or a ``Router`` of these sizes, which then brings its own width, expert dropout, selection bias and scale.
        activation: see ``SparseFFN``, as all other shared arguments.
        glu: gate the hidden units: act(gate_keys x) * (keys x + key_bias).
        bias: ``key_bias`` and ``out_bias``.
        d_out: output width.
        d_router: width of what the router sees; None for d_model. With any other ``router_input`` is required.
        null_experts: N, experts without hidden units that the router scores behind the E others (2410.07348): k counts
            them, so that tokens use a varying number of hidden units.
        null_kind: what one adds: nothing (``"zero"``), gate · x (``"identity"``) or gate · ``constants[n]``
            (``"constant"``; they start at zero).
        null_share: the share of all slots that balancing (by entropy, Switch or bias) wishes on null experts; None for
            N/(E + N).
        dropout: on the hidden units.
        expert_dropout: chance in training that a token cannot use an expert; no rescaling.
        balance: ``"entropy"``, ``"switch"``, ``"cv2"``, ``"z"`` (losses; see ``sparse_ffn.routing.balance`` for
            their ranges), ``"bias"`` (no loss), ``"l1"`` (for ``router="relu"``), ``"none"``, or a tuple of these.
            With ``"bias"`` and ``"l1"`` call ``sparse_ffn.update_router_bias`` once a step.
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
        self.n_experts = check_positive("n_experts", n_experts)
        self.expert_size = check_positive("expert_size", expert_size)
        self.d_ff = self.n_experts * self.expert_size
        super().__init__(
            d_model, k, router=router, activation=activation, glu=glu, bias=bias, d_out=d_out, d_router=d_router,
            null_experts=null_experts, null_kind=null_kind, null_share=null_share, dropout=dropout,
            expert_dropout=expert_dropout, balance=balance, balance_weight=balance_weight, balance_over=balance_over,
            aux=aux, sync_balance=sync_balance, init_scale=init_scale, n_layers=n_layers, device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def _units_shape(self) -> tuple[int, ...]:
        return (self.n_experts, self.expert_size)

    def _make_experts(self, glu: bool, bias: bool) -> None:
        self._make_units(glu, bias)

    def _reset_experts(self) -> None:
        self._reset_units()
        super()._reset_experts()

    def _forward(self, x: Tensor, mask: Tensor | None, router_input: Tensor) -> Tensor:
        x_TD = x if x.dim() == 2 else x.reshape(-1, self.d_model)
        mask_T = None if mask is None else mask.reshape(-1)
        units, n_sequences = self._units(), self._n_sequences(x)
        if x is router_input and (y_TO := self._fused(x_TD, mask_T, units, n_sequences)) is not None:
            return y_TO
        if isinstance(units.values, ExpertRows):
            units.values.check_mode()  # before the router counts
        experts, n_experts = partial(self._experts, units=units), units.values.shape[0]
        return self._mixture(x_TD, router_input, mask_T, n_sequences, n_experts, experts)

    def _units(self) -> ops.Units:
        self._check_null()
        return super()._units()

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        return {**Routed._tensors(self), **UnitsFFN._tensors(self)}

    def flops_per_token(self) -> int:
        """Router scores (twice for noisy top-k) and k experts; null ones among them make it less."""
        n_units = min(self.k, self.n_experts) * self.expert_size
        return self._router_flops() + self._flops(n_units, n_units)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults; the balance always."""
        sizes = (f"n_experts={self.n_experts}", f"expert_size={self.expert_size}")
        return self._repr_mixture(*sizes, glu=(self.gate_keys is not None, False))
