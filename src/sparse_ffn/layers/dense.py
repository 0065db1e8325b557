"""DenseFFN: the exact two-layer network, the baseline that the sparse layers approximate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_ffn import ops
from sparse_ffn.backends.choice import choose
from sparse_ffn.checks import check_positive
from sparse_ffn.layers.units import UnitsFFN
from sparse_ffn.ops.activations import SKIP_TOKENS, hidden
from sparse_ffn.ops.autocast import autocast_dtype
from sparse_ffn.ops.products import linear

DECODE_WEIGHTS = 1 << 18
"""Values, at least: smaller ones are read faster than a call costs."""


class DenseFFN(UnitsFFN):
    """y = values.T act(keys x + key_bias) + out_bias, all hidden units computed (arXiv 2310.10837, section 2).

    Parameters: ``keys`` [d_ff, d_model], ``values`` [d_ff, d_out], with ``bias`` ``key_bias`` [d_ff] and ``out_bias``
    [d_out], with ``glu`` ``gate_keys`` [d_ff, d_model]: act(gate_keys x) * (keys x + key_bias).

    Args:
        d_model: input width.
        d_ff: hidden units.
        activation: see ``SparseFFN``, as all other arguments.
        glu: gate the hidden units.
        bias: ``key_bias`` and ``out_bias``.
        d_out: output width.
        dropout: on the hidden units.
        init_scale: c; keys have standard deviation c/sqrt(d_model), values c/sqrt(d_ff).
        n_layers: sets c = sqrt(2/n_layers).
        device: where the parameters live.
        dtype: their dtype.
    """

    _any_kind: tuple[str, ...] = ("keys", "gate_keys")

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "relu",
        glu: bool = False,
        bias: bool = True,
        d_out: int | None = None,
        dropout: float = 0.0,
        init_scale: float = 1.0,
        n_layers: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, d_out=d_out, activation=activation, dropout=dropout, init_scale=init_scale, n_layers=n_layers,
            bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.d_ff = check_positive("d_ff", d_ff)
        self._make_units(glu, bias)
        self.reset_parameters()

    @property
    def k(self) -> int:
        """All units: d_ff."""
        return self.d_ff

    @property
    def _units_shape(self) -> tuple[int, ...]:
        return (self.d_ff,)

    def _forward(self, x: Tensor, mask: Tensor | None, router_input: Tensor) -> Tensor:
        x_TD = x if x.dim() == 2 else x.reshape(-1, self.d_model)
        x, units = x_TD.to(autocast_dtype(x)), self._units()
        return self._compute(x, units) if self._split is None else self._split.compute(self, x, units)

    def _compute(self, x: Tensor, units: ops.Units) -> Tensor:
        """All of these units for tokens [T, d_model]: [T, d_out]."""
        if self._decodes(x, units):
            return self._as_one_expert(x, units)
        up = linear(x, units.keys, units.key_bias)
        dropout_mask = self._dropout_mask(up, up.shape[0], self.d_ff)
        if units.gate_keys is None:
            h = hidden(self.activation, up, None, dropout_mask)
        else:
            h = hidden(self.activation, up, linear(x, units.gate_keys), dropout_mask)
        return linear(h, units.values.t())

    def _decodes(self, x: Tensor, units: ops.Units) -> bool:
        """Whether the CPU core computes this: few tokens, no gradient, and many weights.

        It reads them faster than torch's products, and leaves out the values of hidden units that are zero.
        """
        # the gradient first: a compiled training then has no guard on the number of tokens
        return (
            not (torch.is_grad_enabled() or self.training or ops.under_transforms())
            and units.values.numel() >= DECODE_WEIGHTS
            and all(t is None or (t.dtype == x.dtype and not is_traceable_wrapper_subclass(t)) for t in units)
            and choose(x) == "cpu"
            and ops.at_most(x.shape[0], SKIP_TOKENS)
        )

    def _as_one_expert(self, x: Tensor, units: ops.Units) -> Tensor:
        index = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
        gate = torch.ones_like(index, dtype=torch.float32)
        expert = ops.Units._make([None if t is None else t.unsqueeze(0) for t in units])
        return ops.expert_ffn(x, expert, index, gate, activation=self.activation)

    @property
    def active_fraction(self) -> float:
        """1: every hidden unit is used."""
        return 1.0

    def flops_per_token(self) -> int:
        """2·d_ff·(d_model + d_out), and 2·d_ff·d_model more for a GLU."""
        return self._flops(self.d_ff, self.d_ff)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults."""
        return self._repr_options(
            f"d_ff={self.d_ff}",
            activation=(self.activation, "relu"),
            glu=(self.gate_keys is not None, False),
            bias=(self.out_bias is not None, True),
        )
