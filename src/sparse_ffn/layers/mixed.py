"""MixedMoE: experts of unequal size behind one router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_flag, check_parameters, check_positive, check_tensor, shown
from sparse_ffn.layers.routed import Routed, RoutedOptions, check_one_of
from sparse_ffn.layers.rows.base import ExpertRows, check_dense, rows_ffn
from sparse_ffn.layers.units import fit, units_of
from sparse_ffn.module import Parametrizable, is_brought
from sparse_ffn.options import Unpack

# T tokens, D d_model, O d_out, E experts of all banks, K selected experts


class Bank(Parametrizable, nn.Module):
    """The experts of one size: ``keys`` and ``gate_keys`` [n, G, D], ``key_bias`` [n, G], ``values`` [n, G, O]."""

    def __init__(
        self, keys: nn.Parameter, values: nn.Parameter, gate_keys: nn.Parameter | None, key_bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.keys, self.gate_keys, self.key_bias, self.values = keys, gate_keys, key_bias, values

    def forward(
        self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, dropout_mask: Tensor | None, activation: str
    ) -> Tensor:
        """The sum over a token's slots in this bank; an index of n is a slot elsewhere: [T, O]."""
        return rows_ffn(x_TD, units_of(self), index_TK, gate_TK, dropout_mask=dropout_mask, activation=activation)


class MixedMoE(Routed):
    """``MoE`` with experts of unequal size: banks of experts of one size each (AutoMoE, arXiv 2210.07535, section 3).

    The experts are counted through the banks. Parameters: ``banks.b.keys`` [E_b, G_b, d_model], ``banks.b.values``
    [E_b, G_b, d_out], ``router.weight`` [E, d_router] with E the sum of all E_b, and the others of ``MoE``. Each bank
    sorts the slots once. ``sparse_ffn.parallel`` does not split it.

    Args:
        d_model: input width.
        sizes: for each bank its number of experts and their size, (E_b, G_b).
        k: experts selected for a token, of whatever size.
        balance_cost: balance the units that the experts compute, and so the time that they take: the share of the slots
            that is wished on an expert is in proportion to 1/G. Otherwise it is the same for all. Entropy, Switch and
            CV² losses and bias balancing know of it.
        options: ``MoE``'s other arguments. Values have standard deviation c/sqrt(units of all banks).

    Raises:
        ValueError: a size below 1, no bank, or an argument outside its range.
        TypeError: ``sizes`` holds no pairs, or an argument is of a wrong type.
    """

    def __init__(
        self,
        d_model: int,
        sizes: Sequence[tuple[int, int]],
        k: int,
        *,
        balance_cost: bool = False,
        **options: Unpack[RoutedOptions],
    ) -> None:
        self.sizes = _checked(sizes)
        self.balance_cost = check_flag("balance_cost", balance_cost)
        self.n_experts = sum(experts for experts, _ in self.sizes)
        self.d_ff = sum(experts * size for experts, size in self.sizes)
        super().__init__(d_model, k, **options)

    @property
    def expert_sizes(self) -> tuple[int, ...]:
        """Hidden units of each expert."""
        return tuple(size for experts, size in self.sizes for _ in range(experts))

    def _check_served(self, balance: tuple[str, ...]) -> None:
        super()._check_served(balance)
        if self.balance_cost:
            check_one_of("balance_cost = True", balance, "entropy", "switch", "cv2", "bias")

    def _make_experts(self, glu: bool, bias: bool) -> None:
        check_flag("glu", glu)
        self.banks = nn.ModuleList(
            Bank(
                self._parameter(*size, self.d_model),
                self._parameter(*size, self.d_out),
                self._parameter(*size, self.d_model) if glu else None,
                self._parameter(*size) if bias else None,
            )
            for size in self.sizes
        )

    def _reset_experts(self) -> None:
        for bank in self._banks():
            check_dense(bank)
        for bank in self._banks():
            self._normal(bank.keys, self.d_model)
            self._normal(bank.values, self.d_ff)
            if bank.gate_keys is not None:
                self._normal(bank.gate_keys, self.d_model)
            if bank.key_bias is not None:
                nn.init.zeros_(bank.key_bias)
        super()._reset_experts()

    def _banks(self) -> list[Bank]:
        return list(self.banks)  # type: ignore[arg-type]

    @property
    def _typical(self) -> Tensor:
        return self._banks()[0].values

    def _check_call(self, x: Tensor, mask: Tensor | None) -> None:
        super()._check_call(x, mask)
        self._check_null()
        for bank, size in zip(self._banks(), self.sizes, strict=True):
            units = units_of(bank)
            if not fit(units, 2, self.d_model, self.d_out) or units.values.shape[:2] != size:
                raise self._shape_error()
            if type(bank) is Bank and units.values.device.type != "meta":  # FSDP and accelerate bring its weights
                check_parameters(x, bank._parameters)

    def _check_input(self, name: str, x: Tensor, *also: torch.dtype) -> None:
        if not is_brought(self._banks()[0], self._typical):
            super()._check_input(name, x, *also)

    def _forward(self, x: Tensor, mask: Tensor | None, router_input: Tensor) -> Tensor:
        for bank in self._banks():
            if isinstance(bank.values, ExpertRows):
                bank.values.check_mode()  # before the router counts
        mask_T = None if mask is None else mask.reshape(-1)
        x_TD, n_sequences = x.reshape(-1, self.d_model), self._n_sequences(x)
        return self._mixture(x_TD, router_input, mask_T, n_sequences, self.n_experts, self._experts)

    def _experts(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        parts, first = [], 0
        for bank, (experts, size) in zip(self.banks, self.sizes, strict=True):
            own_TK = index_TK - first
            own_TK = torch.where((own_TK >= 0) & (own_TK < experts), own_TK, experts)
            dropout_mask = self._dropout_mask(x_TD, *index_TK.shape, size)
            parts.append(bank(x_TD, own_TK, gate_TK, dropout_mask, self.activation))
            first += experts
        y_TO: Tensor = sum(parts[1:], parts[0])
        return y_TO

    @property
    def _wished(self) -> tuple[tuple[int, float], ...]:
        if not self.balance_cost:
            return ((self.n_experts, 1 / self.n_experts),)  # not super()'s: torch.compile takes that for the property
        total = sum(experts / size for experts, size in self.sizes)
        return tuple((experts, 1 / (size * total)) for experts, size in self.sizes)

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        found = super()._tensors()
        for b, (bank, size) in enumerate(zip(self._banks(), self.sizes, strict=True)):
            found[f"banks.{b}.keys"] = (bank.keys, (*size, self.d_model))
            found[f"banks.{b}.gate_keys"] = (bank.gate_keys, (*size, self.d_model))
            found[f"banks.{b}.key_bias"] = (bank.key_bias, size)
            found[f"banks.{b}.values"] = (bank.values, (*size, self.d_out))
        return found

    def flops_per_token(self, load: Tensor | None = None) -> int:
        """Router scores and k experts, of the mean size; null ones among them make it less.

        Args:
            load: the experts' shares of the slots [E], such as ``routing_stats``'s; None for equal shares.

        Raises:
            TypeError: ``load`` is no tensor.
            ValueError: ``load`` is of another length.
        """
        mean = self.d_ff / self.n_experts
        if load is not None:
            check_tensor("load", load)
            if load.shape != (self.n_experts,):
                raise ValueError(f"load must have shape [n_experts = {self.n_experts}], got {list(load.shape)}")
            mean = sum(share * size for share, size in zip(load.tolist(), self.expert_sizes, strict=True))
        glu = self._banks()[0].gate_keys is not None
        of_a_unit = 2 * (self.d_model * (2 if glu else 1) + self.d_out)
        return self._router_flops() + round(min(self.k, self.n_experts) * mean * of_a_unit)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults; the balance always."""
        glu = self._banks()[0].gate_keys is not None
        return self._repr_mixture(
            f"sizes={list(self.sizes)}", glu=(glu, False), balance_cost=(self.balance_cost, False)
        )


def _checked(sizes: Any) -> tuple[tuple[int, int], ...]:
    pairs = isinstance(sizes, (tuple, list)) and all(isinstance(s, (tuple, list)) and len(s) == 2 for s in sizes)
    if not pairs:
        raise TypeError(f"sizes must be a list of pairs (experts, units of each), got {shown(sizes)}")
    if not sizes:
        raise ValueError(f"sizes must hold a pair (experts, units of each) or more, got {sizes!r}")
    return tuple((check_positive("experts in sizes", e), check_positive("units in sizes", g)) for e, g in sizes)
