"""Expert FFN where a token chooses so many of the experts that computing them all is predicted to be faster.

Two dense products of torch, and between them the units of experts that were not chosen are zero. Part of the backend
"triton"; kept for the backward pass is no more than there: the pre-activations of the chosen experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.backends.triton import masked
from sparse_ffn.ops.autocast import cast
from sparse_ffn.ops.library import absent

# T tokens, K slots a token, S = T·K, E experts, G units of an expert, F = E·G, D d_model, O d_out


def use_dense(n_experts: int, k: int) -> bool:
    """Whether all experts are computed: for E <= 2.5·k.

    A prediction, not a measurement: a roofline of an H100 gives the dense products of all experts at E/k = 4 about 1.6
    times the time of the sorted ones (D 1024, G 128, k 4, bf16), and that time is proportional to E/k.
    """
    return 2 * n_experts <= 5 * k


def forward(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    activation: str,
    *,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, O], and with ``save`` z and a GLU's other half [S, G] of the chosen experts, in the slots' order."""
    (E, G, _), (T, K) = keys.shape, index.shape
    if T * K >= 1 << 30:
        raise ValueError(f"one call takes fewer than 2**30 slots (tokens times k), got {T * K}")
    z, other = _units(x, keys, key_bias), None
    if gate_keys is not None:
        z, other = _units(x, gate_keys, None), z
    saved_z = z.new_empty(T * K if save else 0, G)
    saved_other = absent(x) if other is None else torch.empty_like(saved_z)
    masked.hidden(
        z, other, index.contiguous(), gate.contiguous(), None if dropout_mask is None else dropout_mask.contiguous(),
        saved_z if save else None, saved_other if save and other is not None else None, activation,
    )  # fmt: skip
    return z.view(T, E * G) @ _matrix(values, x), saved_z, saved_other


def backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    z: Tensor,
    other: Tensor,
    index: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, keys, values, gate, gate_keys and key_bias; empty tensors for the arguments that are absent."""
    (E, G, _), T = keys.shape, x.shape[0]
    dz = (grad @ _matrix(values, x).t()).view(T, E, G)
    weighted, dother = torch.empty_like(dz), None if gate_keys is None else torch.empty_like(dz)
    dgate = masked.hidden_gradient(
        dz, z, None if gate_keys is None else other, index, gate.contiguous(),
        None if dropout_mask is None else dropout_mask.contiguous(), weighted, dother, activation,
    )  # fmt: skip

    def to_matrix(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
        return (left.view(T, E * G).t() @ right).to(weight.dtype).view(weight.shape)

    dup = dz if dother is None else dother
    dx = dup.view(T, E * G) @ _matrix(keys, x)
    if gate_keys is not None:
        dx = torch.addmm(dx, dz.view(T, E * G), _matrix(gate_keys, x))
    return (
        *(dx, to_matrix(dup, x, keys), to_matrix(weighted, grad, values), dgate.to(gate.dtype)),
        absent(x) if gate_keys is None else to_matrix(dz, x, gate_keys),
        absent(x) if key_bias is None else dup.sum(0, dtype=torch.float32).to(key_bias.dtype),
    )


def _units(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """X times all matrices: [T, E, G]."""
    bias = None if bias is None else cast(bias, x.dtype).flatten()
    return F.linear(x, _matrix(matrices, x), bias).view(x.shape[0], *matrices.shape[:2])


def _matrix(matrices: Tensor, x: Tensor) -> Tensor:
    """All matrices above each other [F, *], in x's dtype."""
    return matrices.to(x.dtype).flatten(0, 1)
