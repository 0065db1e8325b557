"""LowRankMoE: experts that differ from one dense FFN, which they share, by matrices of low rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn import ops
from sparse_ffn.checks import check_flag, check_positive
from sparse_ffn.layers.routed import MoEOptions, Routed
from sparse_ffn.module import tensors_of
from sparse_ffn.ops.activations import hidden_anywhere
from sparse_ffn.ops.products import linear
from sparse_ffn.options import Unpack
from sparse_ffn.routing.base import Router

# T tokens, D d_model, O d_out, E experts, G units of each, R rank, K selected experts, S slots: T times K

NAMES = (
    "keys", "key_down", "key_up", "gate_keys", "gate_down", "gate_up", "key_bias", "values", "value_down", "value_up"
)  # fmt: skip


class LowRankMoE(Routed):
    """Experts over one base: LoRA experts (MixLoRA, 2404.15159), or compressed ones (ResMoE, 2503.06881).

    With z_e = keys x + key_up_e (key_down_e x) + key_bias_e and h_e = act(z_e), or act of the gate's keys, which are
    made alike, times z_e:

        y = sum over the k selected experts of gate_e · (values.T h_e + value_up_e.T (value_down_e.T h_e))

    What the base adds is computed once for a token, not once for each of its experts, so that a token costs 2·G·(D + O)
    + 2·k·r·(2·G + D + O) multiplications and additions: less than full experts' for r < (1 - 1/k)·G·(D + O)/(2·G + D +
    O). Parameters: ``keys`` [G, D] and ``values`` [G, O], which all experts share, ``key_down`` [E, r, D], ``key_up``
    [E, G, r], ``value_down`` [E, G, r], ``value_up`` [E, r, O]; with ``glu`` ``gate_keys`` [G, D], ``gate_down`` and
    ``gate_up``; with ``bias`` ``key_bias`` [E, G]; and the router's and others of ``MoE``.

    ``compress_experts_`` makes one of a ``MoE``, ``from_dense`` of an FFN. ``sparse_ffn.parallel`` does not split it.

    Args:
        d_model: input width.
        n_experts: E.
        expert_size: G, hidden units of the base and of each expert.
        k: experts selected for a token.
        rank: r, at least 1.
        router: as ``MoE``'s. With ``"softmax_topk"`` gates sum to 1, so that the base counts once.
        balance: as ``MoE``'s.
        balance_weight: as ``MoE``'s.
        options: ``MoE``'s other arguments. The base starts as a dense FFN of G units, ``key_up``, ``gate_up`` and
            ``value_up`` at zero, what they multiply normal with standard deviation c/sqrt(its input width).

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of a wrong type.
    """

    gate_keys: nn.Parameter | None
    key_bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expert_size: int,
        k: int,
        rank: int,
        *,
        router: str | Router | Callable[..., Router] = "softmax_topk",
        balance: str | Sequence[str] = "entropy",
        balance_weight: float | Sequence[float] = 1e-3,
        **options: Unpack[MoEOptions],
    ) -> None:
        self.n_experts = check_positive("n_experts", n_experts)
        self.expert_size = check_positive("expert_size", expert_size)
        self.rank = check_positive("rank", rank)
        self.d_ff = self.n_experts * self.expert_size
        super().__init__(d_model, k, router=router, balance=balance, balance_weight=balance_weight, **options)

    def _own(self) -> dict[str, Any]:
        """The experts' tensors by name; None for those that this layer does not have."""
        return dict(zip(NAMES, tensors_of(self, *NAMES), strict=True))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        E, G, R, D, O = self.n_experts, self.expert_size, self.rank, self.d_model, self.d_out
        keys, down, up = (G, D), (E, R, D), (E, G, R)
        return dict(zip(NAMES, (keys, down, up, keys, down, up, (E, G), (G, O), (E, G, R), (E, R, O)), strict=True))

    def _make_experts(self, glu: bool, bias: bool) -> None:
        check_flag("glu", glu)
        for name, shape in self._shapes().items():
            absent = (name.startswith("gate_") and not glu) or (name == "key_bias" and not bias)
            setattr(self, name, None if absent else self._parameter(*shape))

    def _reset_experts(self) -> None:
        for name, width in (("keys", self.d_model), ("key_down", self.d_model), ("gate_keys", self.d_model),
                            ("gate_down", self.d_model), ("values", self.expert_size),
                            ("value_down", self.expert_size)):  # fmt: skip
            if (parameter := getattr(self, name)) is not None:
                self._normal(parameter, width)
        for name in ("key_up", "gate_up", "value_up", "key_bias"):
            if (parameter := getattr(self, name)) is not None:
                nn.init.zeros_(parameter)
        super()._reset_experts()

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        own, shapes = self._own(), self._shapes()
        return {**super()._tensors(), **{name: (own[name], shapes[name]) for name in NAMES}}

    def _check_call(self, x: Tensor, mask: Tensor | None) -> None:
        super()._check_call(x, mask)
        self._check_null()
        pairs = zip(self._own().values(), self._shapes().values(), strict=True)
        if any(tensor is not None and tensor.shape != shape for tensor, shape in pairs):
            raise self._shape_error()

    def _forward(self, x: Tensor, mask: Tensor | None, router_input: Tensor) -> Tensor:
        mask_T = None if mask is None else mask.reshape(-1)
        x_TD, n_sequences = x.reshape(-1, self.d_model), self._n_sequences(x)
        return self._mixture(x_TD, router_input, mask_T, n_sequences, self.n_experts, self._experts)

    def _experts(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        p = self._own()
        tokens, k = index_TK.shape
        # the base reads every token: those that no expert has may hold anything
        x_TD = torch.where((index_TK < self.n_experts).any(1, keepdim=True), x_TD, 0)
        expert_S = index_TK.reshape(-1)
        token_S = torch.arange(tokens, device=x_TD.device).unsqueeze(1).expand(tokens, k).reshape(-1)

        def of_slots(base_GD: Tensor, down_ERD: Tensor, up_EGR: Tensor) -> Tensor:
            low_SR = ops.cvmm(x_TD, down_ERD.mT, expert_S, gather=token_S)
            own_SG = ops.cvmm(low_SR, up_EGR.mT, expert_S)
            return (linear(x_TD, base_GD).unsqueeze(1) + own_SG.view(tokens, k, base_GD.shape[0])).flatten(0, 1)

        up_SG = of_slots(p["keys"], p["key_down"], p["key_up"])
        if p["key_bias"] is not None:
            up_SG = up_SG + F.pad(p["key_bias"].to(up_SG.dtype), (0, 0, 0, 1))[expert_S]  # of no expert: zero
        glu_SG = None if p["gate_keys"] is None else of_slots(p["gate_keys"], p["gate_down"], p["gate_up"])
        dropped = self._dropout_mask(x_TD, tokens * k, self.expert_size)
        h_SG = hidden_anywhere(self.activation, up_SG, glu_SG, dropped)
        own_SR = ops.cvmm(h_SG, p["value_down"], expert_S)
        y_TO = ops.cvmm(own_SR, p["value_up"], expert_S, scatter=token_S, reduction=gate_TK.reshape(-1), n_out=tokens)
        # a void slot's units are the base's, and count nothing
        gate_T1K = torch.where(index_TK < self.n_experts, gate_TK, 0).to(h_SG.dtype).unsqueeze(1)
        mixed_TG = torch.bmm(gate_T1K, h_SG.view(tokens, k, h_SG.shape[1])).squeeze(1)
        return y_TO + linear(mixed_TG, p["values"].t())

    def flops_per_token(self) -> int:
        """Router scores, the base once and the matrices of low rank of k experts; null ones among them make it less."""
        keys = 1 if self.gate_keys is None else 2
        base = 2 * self.expert_size * (keys * self.d_model + self.d_out)
        own = keys * (self.expert_size + self.d_model) + self.expert_size + self.d_out
        return self._router_flops() + base + 2 * min(self.k, self.n_experts) * self.rank * own

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults; the balance always."""
        sizes = (f"n_experts={self.n_experts}", f"expert_size={self.expert_size}", f"rank={self.rank}")
        return self._repr_mixture(*sizes, glu=(self.gate_keys is not None, False))
