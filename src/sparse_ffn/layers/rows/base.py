"""ExpertRows: the rows of experts' hidden units in another form than one dense parameter, and the FFN out of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn import ops
from sparse_ffn.ops.activations import hidden_anywhere, hidden_into
from sparse_ffn.ops.units import Units

FROZEN = "stored rows are frozen: dequantize_experts_ makes parameters of them again, which train"


class ExpertRows(nn.Module):
    """Rows of hidden units [E, G, C] in another form than one dense parameter.

    They stand in a layer's ``keys``, ``gate_keys`` and ``values``. They are frozen: a backward pass gives gradients to
    what multiplies them and none to them. Subclasses keep what they store in buffers, so that state dicts, copies,
    ``.to(device)`` and loading onto meta are those of every module.
    """

    order: tuple[str, ...] = ()
    """The names of the parameters of the module that they stand in, before any of them became rows."""

    @property
    def shape(self) -> torch.Size:
        """(E, G, C)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of what ``dense`` returns."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where they are."""
        raise NotImplementedError

    @property
    def codes(self) -> ops.Codes | None:
        """What is stored, if it is codes."""
        return None

    def dense(self, experts: int | slice | Tensor | None = None) -> Tensor:
        """The rows as numbers, [E, G, C], or those of some experts by an index of the first dimension."""
        raise NotImplementedError

    def up(self, x: Tensor, expert: Tensor, token: Tensor | None) -> Tensor:
        """What hidden units see: [S, G], the rows of expert[s], int64 [S] in [0, E], times x[token[s]] (None: x[s])."""
        raise NotImplementedError

    def down(self, h: Tensor, expert: Tensor, token: Tensor | None, gate: Tensor | None, tokens: int) -> Tensor:
        """Sums of rows [tokens, C]: out[token[s]] += gate[s] · h[s] @ rows of expert[s]; None: out[s], and 1."""
        raise NotImplementedError

    def ffn(
        self,
        x: Tensor,
        units: Units,
        index: Tensor,
        gate: Tensor,
        *,
        dropout_mask: Tensor | None = None,
        activation: str,
    ) -> Tensor:
        """``ops.expert_ffn`` with rows of this kind in the place of its matrices; key_bias is a tensor."""
        keys: Any = units.keys
        gate_keys: Any = units.gate_keys
        values: Any = units.values
        tokens, k = index.shape
        expert = index.reshape(-1)
        token = torch.arange(tokens * k, device=index.device) // k
        up = keys.up(x, expert, token)
        if units.key_bias is not None:
            up = up + F.pad(units.key_bias.to(up.dtype), (0, 0, 0, 1))[expert]  # of no expert: zero
        glu_gate = None if gate_keys is None else gate_keys.up(x, expert, token)
        act = hidden_anywhere if torch.is_grad_enabled() else hidden_into
        h = act(activation, up, glu_gate, None if dropout_mask is None else dropout_mask.flatten(0, 1))
        out: Tensor = values.down(h, expert, token, gate.reshape(-1), tokens)
        return out

    def check_mode(self) -> None:
        """Raise RuntimeError if they cannot compute in the mode that they are in."""

    def stored(self) -> list[Tensor]:
        """The tensors that hold the rows: the same ones in tied stacks."""
        return list(self.buffers())

    def n_bytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(t.nbytes for t in self.stored())

    @property
    def requires_grad(self) -> bool:
        """False: they are frozen."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> ExpertRows:
        """Nothing, if it is False.

        Raises:
            TypeError: it is True.
        """
        if requires_grad:
            raise TypeError(FROZEN)
        return self

    def forward(self, *args: Any) -> Tensor:
        """Not called: a layer asks for ``up`` and ``down``.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} are operands of a layer, and no function of an input")


def rows_ffn(
    x: Tensor, units: Units, index: Tensor, gate: Tensor, *, dropout_mask: Tensor | None = None, activation: str
) -> Tensor:
    """``ops.expert_ffn`` of parameters or of stored rows."""
    ffn = units.values.ffn if isinstance(units.values, ExpertRows) else ops.expert_ffn
    return ffn(x, units, index, gate, dropout_mask=dropout_mask, activation=activation)


def n_numbers(module: nn.Module) -> int:
    """How many parameters a module has, stored rows counted as what they stand for."""
    rows = (m.shape.numel() for m in module.modules() if isinstance(m, ExpertRows))
    return sum(p.numel() for p in module.parameters()) + sum(rows)


def check_dense(layer: nn.Module) -> None:
    """Raise ValueError if a layer has stored rows, where only parameters will do."""
    stored = [name for name, child in layer.named_children() if isinstance(child, ExpertRows)]
    if stored:
        raise ValueError(f"{', '.join(stored)} of this layer are stored rows: call dequantize_experts_ on it first")
