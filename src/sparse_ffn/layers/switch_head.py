"""SwitchHeadAttention: attention with few heads, whose value and output projections are mixtures of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_ffn.backends.choice import choose
from sparse_ffn.checks import (
    check_flag,
    check_floating,
    check_mask,
    check_parameters,
    check_places,
    check_positive,
    check_rate,
    is_dtensor,
    shape_error,
)
from sparse_ffn.layers.base import check_input, initial_scale
from sparse_ffn.layers.head_experts import HeadExperts, HeadRouter
from sparse_ffn.layers.projection import Projection
from sparse_ffn.layers.rotary import turned
from sparse_ffn.layers.rows.base import n_numbers
from sparse_ffn.module import is_brought, unwrapped
from sparse_ffn.options import CheckedOptions, OptionOf
from sparse_ffn.routing.balance import check_balance
from sparse_ffn.routing.distributed import Sync

# B sequences, T tokens of one, H heads, C channels of a head, D d_model, E experts of a head


class SwitchHeadAttention(CheckedOptions, nn.Module):
    """Multi-head attention whose values and outputs are mixtures of experts (SwitchHead, 2312.07987, Eq. 4-6).

    With r what the routers see, and for each head h its gates s = σ(W r) of the k best of its own E experts:

        v_h = sum_e sV_he · values_he.T x,    y = sum_h sum_e sO_he · outputs_he.T attention_h(q, k, v)

    Queries and keys are dense. Fewer heads than usual, each with several experts, do the work of many heads and compute
    fewer attention matrices. Two ``cvmm`` calls and torch's ``scaled_dot_product_attention``; there is no cache of keys
    and values for decoding. Parameters: ``query.weight``, ``key.weight`` [H·d_head, d_model], ``values.weight``
    [H·E, d_model, d_head], ``outputs.weight`` [H·E, d_head, d_model], and for both ``router.weight`` [H·E, d_model].
    ``aux_loss`` and ``routing_stats`` find values and outputs as two layers of H·E experts.

    Args:
        d_model: width of the tokens.
        n_heads: H.
        n_experts: E, experts of a head, for its values and for its outputs.
        k: experts that a token selects for each head and each of both, 1 <= k <= n_experts.
        d_head: C, width of a head; None for d_model / n_heads.
        rotary: share of a head's channels that rotary positions turn (MoEUT turns half), in [0, 1].
        dropout: on the attention's weights.
        expert_dropout: as ``MoE``'s.
        balance: as ``MoE``'s; a loss is the mean over the heads.
        balance_weight: as ``MoE``'s.
        balance_over: as ``MoE``'s.
        aux: as ``MoE``'s.
        sync_balance: as ``MoE``'s.
        init_scale: c; projections have standard deviation c/sqrt(fan-in), of the outputs H·d_head; router rows norm c.
        n_layers: sets c = sqrt(2/n_layers).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ValueError: an argument outside its range; no ``d_head``, and n_heads does not divide d_model; ``"l1"``, for the
            routers' gates are sigmoids.
        TypeError: an argument of a wrong type, or that the layer does not have.
    """

    values: HeadExperts
    outputs: HeadExperts
    balance, balance_weight, balance_over, aux, sync_balance = (
        OptionOf(lambda layer: [layer._own_experts(name) for name in layer._projections]) for _ in range(5)
    )

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_experts: int,
        k: int = 2,
        *,
        d_head: int | None = None,
        rotary: float = 0.5,
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
        super().__init__()
        self.d_model, self.n_heads = check_positive("d_model", d_model), check_positive("n_heads", n_heads)
        self.n_experts = check_positive("n_experts", n_experts)
        k = check_positive("k", k, self.n_experts, "n_experts")
        if d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_head must be given where n_heads = {self.n_heads} does not divide d_model = {self.d_model}"
            )
        self.d_head = self.d_model // self.n_heads if d_head is None else check_positive("d_head", d_head)
        self.rotary, self.dropout = rotary, dropout
        self.init_scale, self.d_out = initial_scale(init_scale, n_layers), self.d_model
        names, weights = check_balance(balance, balance_weight)
        if "l1" in names:
            raise ValueError(f"balance = {names!r} needs gates that can be zero, and those of attention are sigmoids")
        width = self.n_heads * self.d_head
        make_router = partial(
            HeadRouter, self.n_heads, self.d_model, self.n_experts, k, expert_dropout=expert_dropout,
            selection_bias="bias" in names, init_scale=self.init_scale, device=device, dtype=dtype,
        )  # fmt: skip
        balanced = (names, weights, balance_over, aux, sync_balance)
        for name, fan in (("values", self.d_model), ("outputs", width)):
            std = self.init_scale / math.sqrt(fan)
            setattr(self, name, HeadExperts(name == "values", *self._projections[name], make_router, std, balanced))
        own = {"device": device, "dtype": dtype}
        self.query, self.key = (Projection(self.d_model, width, self.init_scale, **own) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        *,
        router_input: Tensor | None = None,
        value_input: Tensor | None = None,
        causal: bool = True,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., T, d_model], of the parameters' dtype (under autocast any but float64): queries and keys are of it.
            router_input: what the routers see instead of x, in x's shape and dtype or fp32.
            value_input: what the values are of instead of x, in x's shape and dtype: MoEUT's layer norm is on x alone.
            causal: a token attends to itself and to those before it only.
            mask: bool [..., T], True for real tokens. No real token attends to padding, which takes no part in balance
                and statistics either; padding attends to itself as well.

        Returns:
            [..., T, d_model].

        Raises:
            TypeError: no dense tensor, a wrong dtype, or causal no bool.
            ValueError: a wrong shape or device.
        """
        x_BTD = self._check_call(x, router_input, value_input, mask)
        causal = check_flag("causal", causal)
        n_sequences, time, _ = x_BTD.shape
        exact = choose(x) == "reference"  # which has derivatives of any order
        seen_TD = (x if router_input is None else router_input).reshape(-1, self.d_model)
        valued_TD = (x if value_input is None else value_input).reshape(-1, self.d_model)
        mask_T = None if mask is None else mask.reshape(-1)
        groups = self._own_experts("values")._n_sequences(x)

        def heads(rows: Tensor) -> Tensor:
            return rows.view(n_sequences, time, self.n_heads, self.d_head).transpose(1, 2)

        q, k = (turned(heads(project(x_BTD)), self.rotary) for project in (self.query, self.key))
        v = heads(self.values(valued_TD, seen_TD, mask_T, groups))
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            y = F.scaled_dot_product_attention(
                q, k, v.to(q.dtype),
                attn_mask=None if mask is None else _attended(mask.reshape(n_sequences, time), causal),
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal and mask is None,
            )  # fmt: skip
        out: Tensor = self.outputs(y.transpose(1, 2).reshape(-1, self.d_head), seen_TD, mask_T, groups)
        return out.view(x.shape)

    def _check_call(
        self, x: Tensor, router_input: Tensor | None, value_input: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """x as [B, T, d_model], if the call is right."""
        valued = self._own_experts("values")

        def check(name: str, given: Tensor, *also: torch.dtype) -> None:
            if is_brought(valued, valued.weight):
                check_floating(name, given)
            else:
                check_input(name, given, valued.weight, *also)

        check("x", x)
        if x.dim() < 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape [..., T, d_model = {self.d_model}], got {list(x.shape)}")
        for name, given, also in (("router_input", router_input, (torch.float32,)), ("value_input", value_input, ())):
            if given is None:
                continue
            check(name, given, *also)
            if given.shape != x.shape:
                raise ValueError(f"{name} must have x's shape, {list(x.shape)}, got {list(given.shape)}")
        if mask is not None:
            check_mask(mask, x)
        for name, size in self._projections.items():
            experts = self._own_experts(name)
            weight, router = experts.weight, experts._own_router().weight
            check_parameters(x, {f"{name}.weight": weight}, split=True)  # a part sharded by itself checks itself
            rows = self.n_heads * self.n_experts
            wanted = {"weight": (weight, (rows, *size)), "router.weight": (router, (rows, self.d_model))}
            if any(tensor.shape != shape for tensor, shape in wanted.values()):
                raise shape_error({f"{name}.{part}": pair for part, pair in wanted.items()})
        dense = (self.n_heads * self.d_head, self.d_model)
        for name in ("query", "key"):
            projection = getattr(self, name)
            if type(projection) is not Projection:  # others may store their weight packed
                continue
            if not is_dtensor(projection.weight):
                check_places(x, {f"{name}.weight": projection.weight})
            if projection.weight.shape != dense:
                raise shape_error({f"{name}.weight": (projection.weight, dense)})
        return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])

    @property
    def _projections(self) -> dict[str, tuple[int, int]]:
        """Widths of the rows that experts read and write."""
        return {"values": (self.d_model, self.d_head), "outputs": (self.d_head, self.d_model)}

    @property
    def rotary(self) -> float:
        """The share of a head's channels that positions turn; may be set."""
        return self._rotary

    @rotary.setter
    def rotary(self, rotary: float) -> None:
        self._rotary = check_rate("rotary", rotary, inclusive=True)

    @property
    def dropout(self) -> float:
        """The rate of dropout on the attention's weights; may be set."""
        return self._dropout

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        self._dropout = check_rate("dropout", dropout, inclusive=True)

    @property
    def expert_dropout(self) -> float:
        """The routers' ``expert_dropout``; may be set."""
        return self._own_experts("values")._own_router().expert_dropout

    @expert_dropout.setter
    def expert_dropout(self, expert_dropout: float) -> None:
        for name in self._projections:
            self._own_experts(name)._own_router().expert_dropout = expert_dropout

    @property
    def k(self) -> int:
        """Experts that a token selects for each head's values and outputs; may be set at any time."""
        return self._own_experts("values").k // self.n_heads

    @k.setter
    def k(self, k: int) -> None:
        k = check_positive("k", k, self.n_experts, "n_experts")
        for name in self._projections:
            self._own_experts(name).k = self.n_heads * k

    def _own_experts(self, name: str) -> HeadExperts:
        return unwrapped(name, getattr(self, name), HeadExperts)

    @property
    def n_parameters(self) -> int:
        """Number of parameters; quantised and other stored experts count as the parameters that they stand for."""
        return n_numbers(self)

    def reset_parameters(self) -> None:
        """Initialise all parameters and buffers anew."""
        for name in self._projections:
            self._own_experts(name).reset_parameters()
        for name in ("query", "key"):
            unwrapped(name, getattr(self, name), nn.Linear).reset_parameters()

    def extra_repr(self) -> str:
        """The sizes."""
        sizes = ("n_heads", "n_experts", "k", "d_head", "rotary", "dropout")
        return ", ".join([str(self.d_model), *(f"{name}={getattr(self, name)}" for name in sizes)])


def _attended(mask_BT: Tensor, causal: bool) -> Tensor:
    """Who attends to whom: real tokens, and each token to itself, so that no row is empty. bool [B, 1, T, T]."""
    time = mask_BT.shape[1]
    itself = torch.eye(time, dtype=torch.bool, device=mask_BT.device)
    allowed = mask_BT[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones_like(itself).tril()
    return allowed | itself
