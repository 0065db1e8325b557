"""An FFN that was found in a model, and the formula between its linear maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from sparse_ffn.convert.find.edits import Edit
from sparse_ffn.convert.find.linear import Linear
from sparse_ffn.convert.find.probe import Unknown, close
from sparse_ffn.convert.init.weights import FFNWeights
from sparse_ffn.ops.activations import ACTIVATIONS, hidden

QUICK_GELU = ("silu", 1.702)  # z·sigmoid(1.702·z), CLIP's
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


@dataclass(frozen=True)
class Formula:
    """What was found between the linear maps of an FFN."""

    activation: str
    """A name in ``ACTIVATIONS``."""
    glu_gate: str
    """Where a GLU's gate is: ``""`` none, ``"first"`` or ``"second"`` of two linear maps, or in one of doubled width
    ``"first half"``, ``"second half"``, ``"even"`` or ``"odd"`` rows."""
    scale: float = 1.0
    """s, if the activation is act(s·z)/s."""

    @property
    def name(self) -> str:
        """Of the activation, in words."""
        return self.activation if self.scale == 1 else f"{self.activation}({self.scale:g}·z)/{self.scale:g}"

    def hidden(self, ups: list[Tensor]) -> Tensor:
        """Hidden units from the linear maps' outputs."""
        up, gate = self.part(ups)
        if gate is None:
            return hidden(self.activation, self.scale * up, None, None) / self.scale
        return hidden(self.activation, up, self.scale * gate, None) / self.scale

    def part(self, ups: list[MaybeTensor], dim: int = -1) -> tuple[MaybeTensor, Tensor | None]:
        """The plain part and the gate, of outputs, weights or biases whose units lie along ``dim``."""
        if self.glu_gate in ("first", "second"):
            a, b = ups
        elif not self.glu_gate or (both := ups[0]) is None:
            return ups[0], None
        elif "half" in self.glu_gate:
            a, b = both.chunk(2, dim)
        else:
            a, b = (both.movedim(dim, 0)[first::2].movedim(0, dim) for first in (0, 1))
        return (b, a) if self.glu_gate in ("first", "first half", "even") else (a, b)


def find_formula(ups: list[Tensor], h: Tensor) -> Formula:
    """The activation, and a GLU's arrangement, that give h from the outputs of the first linear maps."""
    gates: tuple[str, ...]
    if len(ups) == 2:
        gates = ("first", "second")
    elif ups[0].shape[-1] == 2 * h.shape[-1]:
        gates = ("first half", "second half", "even", "odd")
    else:
        gates = ("",)
    kinds = [*((activation, 1.0) for activation in ACTIVATIONS), QUICK_GELU]
    for gate in gates:
        for activation, scale in kinds:
            formula = Formula(activation, gate, scale)
            if (gate or activation != "identity") and close(formula.hidden(ups), h):
                return formula
    raise Unknown(f"the hidden units are not one of {', '.join(ACTIVATIONS)} of the first linear map's output")


@dataclass(frozen=True)
class Found:
    """An FFN in a model."""

    name: str
    """Where its replacement will be."""
    module: nn.Module
    """What is there now."""
    ups: tuple[Linear, ...]
    down: Linear
    formula: Formula
    dropout: float
    """On the hidden units."""
    out_dropout: float = 0.0
    """On the output: a dropout after the layer replaces it."""
    enclosing: str = ""
    """The module that the edits' owners are relative to."""
    edits: tuple[Edit, ...] = ()
    """What else changes where the FFN is not one module."""
    by_example: bool = False
    """Whether its module runs on an example only."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The first linear maps and the last one."""
        return *self.ups, self.down

    @property
    def pattern(self) -> str:
        """In words: the linear maps' names and the formula."""
        names = ", ".join(linear.attribute for linear in self.linears)
        return f"{names}: {self.formula.name}{' GLU' if self.formula.glu_gate else ''}"

    def weights(self) -> FFNWeights:
        """The parameters in this library's layout: views, unless the activation has a scale."""
        keys, gate_keys = self.formula.part([up.weight for up in self.ups], 0)
        key_bias, gate_bias = self.formula.part([up.bias for up in self.ups], 0)
        key, gate = self.ups[0], self.ups[-1]
        if self.formula.glu_gate == "first":
            key, gate = gate, key
        trainable = {
            "keys": key.trainable[0], "gate_keys": gate.trainable[0], "key_bias": key.trainable[1],
            "gate_bias": gate.trainable[1], "values": self.down.trainable[0], "out_bias": self.down.trainable[1],
        }  # fmt: skip
        weights = FFNWeights(
            keys, self.down.weight.t(), self.formula.activation, gate_keys=gate_keys, key_bias=key_bias,
            gate_bias=gate_bias, out_bias=self.down.bias, dropout=self.dropout, trainable=trainable,
        )  # fmt: skip
        return weights if self.formula.scale == 1 else weights.scaled(self.formula.scale)
