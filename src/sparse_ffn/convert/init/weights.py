"""FFNWeights: a dense two-layer FFN of any model, in this library's layout: one row per hidden unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.ops.activations import hidden

PAD = 8  # 16-bit rows stay multiples of the 16 bytes that a vector load of a GPU reads


def wide(x: Tensor) -> Tensor:
    """The tensor in fp32 at least; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ over all elements."""
    return float((wide(found) - wide(expected)).norm() / wide(expected).norm().clamp_min(1e-30))


@dataclass(frozen=True)
class FFNWeights:
    """y = values.T h + out_bias, h = act(keys x + key_bias), or act(gate_keys x + gate_bias) * (keys x + key_bias).

    D d_model, F d_ff, O d_out.
    """

    keys: Tensor
    """[F, D]"""
    values: Tensor
    """[F, O]"""
    activation: str
    gate_keys: Tensor | None = None
    """[F, D]"""
    key_bias: Tensor | None = None
    """[F]"""
    gate_bias: Tensor | None = None
    """[F]"""
    out_bias: Tensor | None = None
    """[O]"""
    dropout: float = 0.0
    """On the hidden units."""
    trainable: dict[str, bool] = field(default_factory=dict)
    """Of each tensor, by name: whether it wants a gradient."""

    @property
    def d_model(self) -> int:
        """D."""
        return self.keys.shape[1]

    @property
    def d_ff(self) -> int:
        """F."""
        return self.keys.shape[0]

    @property
    def d_out(self) -> int:
        """O."""
        return self.values.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """All that are there, by name."""
        names = ("keys", "values", "gate_keys", "key_bias", "gate_bias", "out_bias")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def deciding_keys(self) -> Tensor:
        """Those that decide whether a unit is on: the gate's in a GLU."""
        return self.keys if self.gate_keys is None else self.gate_keys

    def map_units(self, change: Callable[[Tensor], Tensor]) -> FFNWeights:
        """The same with every tensor that has a row for each unit changed."""
        changed: dict[str, Any] = {name: change(t) for name, t in self.tensors().items() if name != "out_bias"}
        return replace(self, **changed)

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden units of x [T, D]: [T, F], without dropout."""
        up = F.linear(x, self.keys, self.key_bias)
        if self.gate_keys is None:
            return hidden(self.activation, up, None, None)
        return hidden(self.activation, up, F.linear(x, self.gate_keys, self.gate_bias), None)

    def output(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, O]."""
        return F.linear(self.hidden(x), self.values.t(), self.out_bias)

    def flops_per_token(self) -> int:
        """2 a multiply-add, biases not counted."""
        inputs = self.d_model * (1 if self.gate_keys is None else 2)
        return 2 * self.d_ff * (inputs + self.d_out)

    def n_parameters(self) -> int:
        """Number of parameters."""
        return sum(t.numel() for t in self.tensors().values())

    def scaled(self, scale: float) -> FFNWeights:
        """Weights that compute with act what these would with act(scale·z)/scale; tensors are new where they differ."""
        inside = ("keys", "key_bias") if self.gate_keys is None else ("gate_keys", "gate_bias")
        factors = {**dict.fromkeys(inside, scale), "values": 1 / scale}
        scaled: dict[str, Any] = {n: t * factors[n] for n, t in self.tensors().items() if n in factors}
        return replace(self, **scaled)

    def with_constant_input(self) -> FFNWeights:
        """The same function of x with a 1 and PAD - 1 zeros appended: the gate's bias is then a column of its keys.

        The layers have no gate bias: that column computes the same and learns the same. One of ``keys``, 0 at first,
        trains beside it.
        """
        assert self.gate_keys is not None
        gate_bias = self.gate_keys.new_zeros(self.d_ff) if self.gate_bias is None else self.gate_bias
        gate_keys = F.pad(torch.cat([self.gate_keys, gate_bias.unsqueeze(1)], dim=1), (0, PAD - 1))
        trainable = {name: wants for name, wants in self.trainable.items() if name != "gate_bias"}
        return replace(
            self, keys=F.pad(self.keys, (0, PAD)), gate_keys=gate_keys, gate_bias=None, trainable=trainable
        )  # fmt: skip
