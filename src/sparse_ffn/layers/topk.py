"""TopKFFN: a dense FFN of which only the k hidden units of the largest activation count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.checks import check_choice, check_flag, check_positive
from sparse_ffn.layers.dense import DenseFFN
from sparse_ffn.ops.topk_ffn.reference import RANK_BY


class TopKFFN(DenseFFN):
    """y = sum of h_i·values_i over the k units of the largest |h_i| (arXiv 2310.10837, Eq. 6-7).

    All keys are computed, only k values are read: of equal widths that saves up to half of the arithmetic. Ties go to
    the lower unit. Parameters and initialisation are ``DenseFFN``'s, and with k = d_ff so is the function.

    Args:
        d_model: input width.
        d_ff: hidden units.
        k: units kept for a token, 1 <= k <= d_ff.
        activation: see ``SparseFFN``, as all other arguments. For ReLU the ranking by |h| is the paper's.
        glu: gate the hidden units.
        bias: ``key_bias`` and ``out_bias``.
        norm_aware: rank by |h_i|·‖values_i‖, the unit's contribution to the output.
        rank_by: ``"hidden"``, or with ``glu`` ``"gate"``: by |act(gate_keys_i x)| in the place of |h_i|, so that of
            ``keys`` too only k rows are needed (CATS, arXiv 2404.08763, with k in the place of a threshold).
        d_out: output width.
        dropout: on the hidden units, before the selection.
        init_scale: c; see ``DenseFFN``.
        n_layers: sets c = sqrt(2/n_layers).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ValueError: k > d_ff, ``rank_by="gate"`` without ``glu``, or an argument outside its range.
    """

    _any_kind = ()

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        k: int,
        *,
        activation: str = "relu",
        glu: bool = False,
        bias: bool = True,
        norm_aware: bool = False,
        rank_by: str = "hidden",
        d_out: int | None = None,
        dropout: float = 0.0,
        init_scale: float = 1.0,
        n_layers: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        k = check_positive("k", k, at_most=check_positive("d_ff", d_ff), limit="d_ff")  # before weights are drawn
        norm_aware = check_flag("norm_aware", norm_aware)
        _check_rank_by(rank_by, check_flag("glu", glu))
        super().__init__(
            d_model, d_ff, activation=activation, glu=glu, bias=bias, d_out=d_out, dropout=dropout,
            init_scale=init_scale, n_layers=n_layers, device=device, dtype=dtype,
        )  # fmt: skip
        self.k, self.norm_aware, self.rank_by = k, norm_aware, rank_by

    @property
    def k(self) -> int:
        """Units used for a token. May be set to any number up to d_ff at any time."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        self._k = check_positive("k", k, at_most=self.d_ff, limit="d_ff")

    @property
    def norm_aware(self) -> bool:
        """Whether units are ranked by what they add; may be set."""
        return self._norm_aware

    @norm_aware.setter
    def norm_aware(self, norm_aware: bool) -> None:
        self._norm_aware = check_flag("norm_aware", norm_aware)

    @property
    def rank_by(self) -> str:
        """``"hidden"`` or ``"gate"``; may be set."""
        return self._rank_by

    @rank_by.setter
    def rank_by(self, rank_by: str) -> None:
        _check_rank_by(rank_by, self.gate_keys is not None)
        self._rank_by = rank_by

    def _compute(self, x: Tensor, units: ops.Units) -> Tensor:
        return ops.topk_ffn(
            x,
            units,
            self.k,
            dropout_mask=self._dropout_mask(x, x.shape[0], self.d_ff),
            activation=self.activation,
            norm_aware=self.norm_aware,
            rank_by=self.rank_by,
        )

    @property
    def active_fraction(self) -> float:
        """k/d_ff."""
        return self.k / self.d_ff

    def flops_per_token(self) -> int:
        """2·d_ff·d_model (twice for a GLU) for all keys, 2·k·d_out for the values; by gate 2·k·d_model for keys."""
        if self.rank_by == "gate":
            return 2 * (self.d_ff * self.d_model + self.k * (self.d_model + self.d_out))
        return self._flops(self.d_ff, self.k)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults."""
        text = super().extra_repr().replace(f"d_ff={self.d_ff}", f"d_ff={self.d_ff}, k={self.k}", 1)
        text += ", norm_aware=True" if self.norm_aware else ""
        return text + (", rank_by='gate'" if self.rank_by == "gate" else "")


def _check_rank_by(rank_by: str, glu: bool) -> None:
    check_choice("rank_by", rank_by, RANK_BY)
    if rank_by == "gate" and not glu:
        raise ValueError('rank_by = "gate" needs a gate: glu=True')
