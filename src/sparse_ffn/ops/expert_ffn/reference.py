"""Expert FFN, the contract: every expert computed for every token, and those not selected weighed zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.ops.activations import hidden_anywhere
from sparse_ffn.ops.units import Units


def expert_ffn(
    x: Tensor,
    experts: Units,
    index: Tensor,
    gate: Tensor,
    dropout_mask: Tensor | None,
    activation: str,
) -> Tensor:
    """y[t] = sum_j gate[t, j] * FFN of expert index[t, j] (x[t]); shapes as in ``sparse_ffn.ops.expert_ffn``."""
    keys, values, gate_keys, key_bias = experts
    void = index >= keys.shape[0]
    gate = gate.masked_fill(void, 0)
    x = torch.where(void.all(1, keepdim=True), 0, x)  # nobody reads it, though it be NaN
    # T tokens, K slots, E experts, G units of an expert, D d_model, O d_out
    # one-hot products instead of a scatter: deterministic on every device
    chosen_TKE = (index.unsqueeze(-1) == torch.arange(keys.shape[0], device=index.device)).to(x.dtype)
    if dropout_mask is None:
        weight_TEG = torch.einsum("tk,tke->te", gate.to(x.dtype), chosen_TKE).unsqueeze(-1)
    else:
        weight_TEG = torch.einsum("tk,tkg,tke->teg", gate.to(x.dtype), dropout_mask, chosen_TKE)

    def product(matrices: Tensor, bias: Tensor | None) -> Tensor:
        z_TEG = F.linear(x, matrices.flatten(0, 1)).view(x.shape[0], *matrices.shape[:2])
        z_TEG = z_TEG if bias is None else z_TEG + bias
        return torch.where(chosen_TKE.any(1).unsqueeze(-1), z_TEG, 0)  # an overflow times zero would be NaN

    glu_gate_TEG = None if gate_keys is None else product(gate_keys, None)
    h_TEG = hidden_anywhere(activation, product(keys, key_bias), glu_gate_TEG, weight_TEG)
    return h_TEG.flatten(1) @ values.flatten(0, 1)
