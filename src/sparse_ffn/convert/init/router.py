"""Initial weights of routers: the experts' mean keys, or a fit to what the experts contribute to real outputs.

T tokens, D d_model, E experts, G units of an expert, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.convert.init.weights import FFNWeights, wide

SMALL = 0.1  # standard deviation of logits: σ(±0.1) = 0.5 ± 0.025, so that all gates are nearly those at zero


def mean_keys(ffn: FFNWeights, n_experts: int) -> Tensor:
    """Avg-K: the mean key of each expert's units (the gate's in a GLU), [E, D]."""
    return ffn.deciding_keys.view(n_experts, -1, ffn.d_model).mean(1)


def contributions(ffn: FFNWeights, n_experts: int, x_TD: Tensor) -> Tensor:
    """Norm of each expert's part of the output, [T, E] in fp32 at least."""
    h_TEG = ffn.hidden(x_TD).view(len(x_TD), n_experts, -1)
    values_EGO = ffn.values.reshape(n_experts, -1, ffn.d_out)
    # a part may be beyond fp16 where the sum of all is not
    parts = ((wide(h_TEG[:, e]) @ wide(values_EGO[e])).norm(dim=1) for e in range(n_experts))
    return torch.stack([*parts], dim=1)


def fit_router(ffn: FFNWeights, n_experts: int, inputs: Tensor) -> Tensor:
    """Weights [E, D] whose logits rank the experts as their contributions do.

    A softmax regression on each token's shares of the squared contributions, over all inputs [T, D] at once. The units
    of ``ffn`` are in the experts' order.
    """
    part_TE = contributions(ffn, n_experts, inputs.to(ffn.keys)).square()
    share_TE = part_TE / part_TE.sum(1, keepdim=True).clamp_min(1e-30)
    return _regression(ffn, n_experts, inputs, lambda logits_TE: F.cross_entropy(logits_TE, share_TE))


def fit_ranking(ffn: FFNWeights, n_experts: int, k: int, inputs: Tensor) -> Tensor:
    """Weights [E, D] whose k largest logits are those of the k largest contributions.

    A logistic regression of whether an expert is among them, over all inputs [T, D] at once. A decision weighs as much
    as what it is about: how far the contribution is from the middle between the k-th and the next. Biases of the logits
    change nothing: what real FFNs see has a mean, which the weights rank by.
    """
    part_TE = contributions(ffn, n_experts, inputs.to(ffn.keys))
    middle_T1 = part_TE.topk(k + 1, dim=1).values[:, -2:].mean(1, keepdim=True)
    above_TE = (part_TE > middle_T1).to(part_TE.dtype)
    weight_TE = (part_TE - middle_T1).abs()
    weight_TE = weight_TE / weight_TE.mean().clamp_min(1e-30)

    def loss(logits_TE: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits_TE, above_TE, weight_TE)

    return _regression(ffn, n_experts, inputs, loss)


def _regression(
    ffn: FFNWeights, n_experts: int, inputs: Tensor, loss: Callable[[Tensor], Tensor], n_steps: int = 20
) -> Tensor:
    """Weights whose logits have a small loss, by a few steps of L-BFGS."""
    x_TD = wide(inputs.to(ffn.keys))
    scale = x_TD.square().mean().sqrt().clamp_min(1e-12)
    x_TD = x_TD / scale
    weight = x_TD.new_zeros(n_experts, x_TD.shape[1]).requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=n_steps, line_search_fn="strong_wolfe")

    def loss_and_gradient() -> float:
        with torch.enable_grad():
            found = loss(F.linear(x_TD, weight))
            weight.grad = torch.autograd.grad(found, weight)[0]
        return float(found.detach())

    optimizer.step(loss_and_gradient)  # type: ignore[no-untyped-call]
    return (weight.detach() / scale).to(ffn.keys.dtype)


def centre(weight_ED: Tensor, inputs: Tensor | None) -> Tensor:
    """The same ranking with logits so small that all gates are near their value at zero."""
    weight_ED = wide(weight_ED)
    weight_ED = weight_ED - weight_ED.mean(0)  # what all experts share ranks none
    x = None if inputs is None else inputs.to(weight_ED)
    size = weight_ED.norm(dim=1).mean() if x is None else F.linear(x, weight_ED).std(correction=0)
    return weight_ED * (SMALL / size.clamp_min(1e-12))
