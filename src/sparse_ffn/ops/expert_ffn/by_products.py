"""Expert FFN out of products of the slots' rows with their experts' matrices: the formula of two backends."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.activations import hidden, hidden_backward
from sparse_ffn.ops.expert_ffn.backend import Gradients, Saved
from sparse_ffn.ops.units import Units

# T tokens, K slots a token, S = T·K, E experts, G units of an expert, D d_model, O d_out


def with_void(bias: Tensor) -> Tensor:
    """A row for each expert, [E, G], and one of zeros for void slots; F.pad of torch 2.9 refuses G = 0."""
    return torch.cat((bias, bias.new_zeros(1, bias.shape[1])))


class Products(Protocol):
    """The products of one call; rows [S, *] are in an order of its own."""

    def __init__(self, order: Tensor, offsets: Tensor, shape: tuple[int, int]) -> None:
        """Of T tokens with K slots each."""

    def of_tokens(self, x: Tensor) -> Tensor:
        """X [T, D] as ``up`` reads it."""

    def of_slots(self, per_slot: Tensor) -> Tensor:
        """Rows of a tensor that has one for each slot, [T, K, *]."""

    def of_experts(self, bias: Tensor) -> Tensor:
        """Rows of a tensor that has one for each expert, [E, *], each as often as it is needed."""

    def up(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Rows [S, G] of x times matrices [E, G, D]."""

    def down(self, h: Tensor, values: Tensor, gate: Tensor) -> Tensor:
        """Sums [T, O] over a token's slots of gate · h times values [E, G, O]."""

    def up_backward(
        self, grads: list[Tensor], x: Tensor, matrices: list[Tensor], needs: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradient of x, summed over stacks of matrices, and those of the stacks, for the gradients of ``up``."""

    def down_backward(
        self, grad: Tensor, h: Tensor, values: Tensor, gate: Tensor, needs: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of h, values and gate. Without ``needs`` those of matrices are None, here and above."""

    def sums(self, rows: Tensor) -> Tensor:
        """Sums [E, G] of the rows of each expert."""


class ByProducts:
    """A backend whose products are those of a class."""

    def __init__(self, products: type[Products]) -> None:
        self._products = products

    def forward(
        self, x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
    ) -> tuple[Tensor, Saved]:
        """The output, and what the backward pass needs."""
        order, offsets = sort_by_expert(index.reshape(-1), experts.keys.shape[0])
        products = self._products(order, offsets, (index.shape[0], index.shape[1]))
        rows = products.of_tokens(x)
        up = products.up(rows, experts.keys)
        if experts.key_bias is not None:
            up += products.of_experts(experts.key_bias.to(x.dtype))
        glu_gate = None if experts.gate_keys is None else products.up(rows, experts.gate_keys)
        h = hidden(activation, up, glu_gate, None if dropout_mask is None else products.of_slots(dropout_mask))
        return products.down(h, experts.values, gate), Saved(order, offsets, up, glu_gate)

    def inference(
        self, x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
    ) -> Tensor:
        """The output."""
        return self.forward(x, experts, index, gate, dropout_mask, activation)[0]

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        experts: Units,
        gate: Tensor,
        dropout_mask: Tensor | None,
        saved: Saved,
        needs_experts: bool,
        activation: str,
    ) -> Gradients:
        """The gradients."""
        order, offsets, up, glu_gate = saved
        keys, values, gate_keys, key_bias = experts
        products = self._products(order, offsets, (gate.shape[0], gate.shape[1]))
        scale = None if dropout_mask is None else products.of_slots(dropout_mask)
        h = hidden(activation, up, glu_gate, scale)
        dh, dvalues, dgate = products.down_backward(grad, h, values, gate, needs_experts)
        dup, dglu_gate = hidden_backward(activation, dh, up, glu_gate, scale)
        grads, matrices = ([t for t in pair if t is not None] for pair in ((dup, dglu_gate), (keys, gate_keys)))
        dx, (dkeys, *dgate_keys) = products.up_backward(grads, x, matrices, needs_experts)
        if dkeys is None or dvalues is None:
            return Gradients(dx, None, dgate)
        dkey_bias = None if key_bias is None else products.sums(dup).to(key_bias.dtype)
        return Gradients(dx, Units(dkeys, dvalues, dgate_keys[0] if dgate_keys else None, dkey_bias), dgate)
