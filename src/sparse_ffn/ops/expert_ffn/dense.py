"""Expert FFN where a token chooses so many of the experts that computing them all is predicted to be faster.

Two dense products of torch, and between them the units of experts that were not chosen are zero. Part of the backend
"triton"; kept for the backward pass is no more than there: the pre-activations of the chosen experts, in the slots' own
order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.backends.triton import masked
from sparse_ffn.ops.autocast import cast
from sparse_ffn.ops.expert_ffn.backend import Gradients, Saved
from sparse_ffn.ops.units import Units

# T tokens, K slots a token, S = T·K, E experts, G units of an expert, F = E·G, D d_model, O d_out


def use_dense(n_experts: int, k: int) -> bool:
    """Whether all experts are computed: for E <= 2.5·k.

    A prediction, not a measurement: a roofline of an H100 gives the dense products of all experts at E/k = 4 about 1.6
    times the time of the sorted ones (D 1024, G 128, k 4, bf16), and that time is proportional to E/k.
    """
    return 2 * n_experts <= 5 * k


def forward(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs. Unsorted: order holds each slot's expert, offsets are zeros."""
    E, G, _ = experts.keys.shape
    expert = index.reshape(-1).clamp(-1, E).to(torch.int32)
    up_SG = x.new_empty(index.numel(), G)
    glu_gate_SG = None if experts.gate_keys is None else torch.empty_like(up_SG)
    saved = Saved(expert, expert.new_zeros(E + 1), up_SG, glu_gate_SG)
    return _forward(x, experts, index, gate, dropout_mask, activation, up_SG, glu_gate_SG), saved


def inference(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> Tensor:
    """The output, nothing kept."""
    return _forward(x, experts, index, gate, dropout_mask, activation, None, None)


def _forward(
    x: Tensor,
    experts: Units,
    index: Tensor,
    gate: Tensor,
    dropout_mask: Tensor | None,
    activation: str,
    up_SG: Tensor | None,
    glu_gate_SG: Tensor | None,
) -> Tensor:
    """The output; into up and glu_gate, if given, those of the chosen experts."""
    if index.numel() >= 1 << 30:
        raise ValueError(f"one call takes fewer than 2**30 slots (tokens times k), got {index.numel()}")
    up_TEG = _units(x, experts.keys, experts.key_bias)
    glu_gate_TEG = None if experts.gate_keys is None else _units(x, experts.gate_keys, None)
    masked.hidden(
        up_TEG, glu_gate_TEG, index.contiguous(), gate.contiguous(),
        None if dropout_mask is None else dropout_mask.contiguous(), up_SG, glu_gate_SG, activation,
    )  # fmt: skip
    return up_TEG.flatten(1) @ _matrix(experts.values, x)


def backward(
    grad: Tensor,
    x: Tensor,
    experts: Units,
    gate: Tensor,
    dropout_mask: Tensor | None,
    saved: Saved,
    activation: str,
) -> Gradients:
    """The gradients."""
    keys, values, gate_keys, key_bias = experts
    (E, G, _), T = keys.shape, x.shape[0]
    dup_TEG = (grad @ _matrix(values, x).t()).view(T, E, G)
    weighted_TEG, dglu_gate_TEG = torch.empty_like(dup_TEG), None if gate_keys is None else torch.empty_like(dup_TEG)
    dgate = masked.hidden_gradient(
        dup_TEG, saved.up, saved.glu_gate, saved.order.view(gate.shape), gate.contiguous(),
        None if dropout_mask is None else dropout_mask.contiguous(), weighted_TEG, dglu_gate_TEG, activation,
    )  # fmt: skip

    def to_matrix(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
        return (left.view(T, E * G).t() @ right).to(weight.dtype).view(weight.shape)

    dx = dup_TEG.view(T, E * G) @ _matrix(keys, x)
    dgate_keys = None
    if gate_keys is not None and dglu_gate_TEG is not None:
        dx = torch.addmm(dx, dglu_gate_TEG.view(T, E * G), _matrix(gate_keys, x))
        dgate_keys = to_matrix(dglu_gate_TEG, x, gate_keys)
    dkey_bias = None if key_bias is None else dup_TEG.sum(0, dtype=torch.float32).to(key_bias.dtype)
    dexperts = Units(to_matrix(dup_TEG, x, keys), to_matrix(weighted_TEG, grad, values), dgate_keys, dkey_bias)
    return Gradients(dx, dexperts, dgate.to(gate.dtype))


def _units(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """X times all matrices: [T, E, G]."""
    bias = None if bias is None else cast(bias, x.dtype).flatten()
    return F.linear(x, _matrix(matrices, x), bias).view(x.shape[0], *matrices.shape[:2])


def _matrix(matrices: Tensor, x: Tensor) -> Tensor:
    """All matrices above each other [F, *], in x's dtype."""
    return matrices.to(x.dtype).flatten(0, 1)
