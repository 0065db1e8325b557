"""The ops in float64, slot by slot: nothing that a token did not select is touched, so that only its own NaNs reach it.

T tokens, K slots a token, E experts, G units of an expert, F units, D d_model, O d_out. ``kept`` gets every number that
some backend keeps in the op's dtype between two sums. Three kinds of it follow the computation: ``Exact`` changes
nothing; ``Bound`` adds up magnitudes; ``Overflow`` makes NaN of what may leave the dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from strange import activation as exact_activation
from torch import Tensor

SQUARES = ("square", "squared_relu")


class Exact:
    """The computation as it is. ``sparse``: rows of a table that are not selected are not multiplied by zero."""

    positive = False

    def __init__(self, sparse: bool) -> None:
        self.sparse = sparse

    def __call__(self, t: Tensor) -> Tensor:
        return t

    def act(self, name: str, z: Tensor) -> Tensor:
        return exact_activation(name, z)

    def gate(self, t: Tensor) -> Tensor:
        """Gates that are computed on the way."""
        return t

    def other_order(self, t: Tensor) -> Tensor:
        """Nothing of what another order of the same products computes on the way."""
        return torch.zeros_like(t)


class Bound(Exact):
    """What everything would be if nothing cancelled, its inputs being magnitudes: rounding errors are relative to it.

    ``slack`` is added at each step, since numbers below the dtype's normal ones have errors of their own. Notes what is
    beyond ``limit``, and which gradients are, if no gate is below ``at_least``.
    """

    positive = True

    def __init__(self, slack: float, limit: float, sparse: bool, at_least: float = 0.0) -> None:
        super().__init__(sparse)
        self.slack, self.limit, self.at_least = slack, limit, at_least
        self.large: list[Tensor] = []
        self.large_gradients: dict[int, Tensor] = {}

    def __call__(self, t: Tensor) -> Tensor:
        i, t = len(self.large), t + self.slack
        self.large.append(t.detach() > self.limit)
        if t.requires_grad:
            t.register_hook(lambda grad: self._gradient(i, grad))
        return t

    def act(self, name: str, z: Tensor) -> Tensor:
        return z * z if name in SQUARES else z  # at least as large as all others, and as steep but for a tenth

    def gate(self, t: Tensor) -> Tensor:
        return t + (self.at_least - t.detach()).clamp_min(0)

    def other_order(self, t: Tensor) -> Tensor:
        """Nothing but what rounding adds to the gradient of t."""
        t = 0 * t
        if t.requires_grad:
            t.register_hook(lambda grad: grad + self.slack)
        return t

    def _gradient(self, i: int, grad: Tensor) -> Tensor:
        grad = grad + self.slack
        self.large_gradients[i] = grad > self.limit
        return grad

    def overflows(self) -> bool:
        """Whether anything may."""
        return any(bool(t.any()) for t in (*self.large, *self.large_gradients.values()))


class Overflow(Exact):
    """What depends on a number that may overflow, by a bound of the same computation, is NaN."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(sparse=True)
        self.bound, self.n = bound, 0

    def __call__(self, t: Tensor) -> Tensor:
        i, self.n = self.n, self.n + 1
        t = t + nan_where(self.bound.large[i])
        large = self.bound.large_gradients.get(i)
        if t.requires_grad and large is not None:
            t.register_hook(lambda grad: grad + nan_where(large))
        return t

    def act(self, name: str, z: Tensor) -> Tensor:
        return torch.where(z.isnan(), z * z, super().act(name, z))  # its slope is unknown, too


UNDERFLOW = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
"""By this bound an exponential may be zero that is below the normal numbers."""


def nan_where(condition: Tensor) -> Tensor:
    return torch.where(condition, math.nan, 0.0).double()


def hidden(
    kept: Exact,
    x: Tensor,
    keys: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    scale: Tensor | None,
    activation: str,
) -> Tensor:
    """Hidden units of some tokens [T, G]; keys are one for all [G, D], or each token's own [T, G, D]."""
    across = "td,gd->tg" if keys.dim() == 2 else "td,tgd->tg"
    up = torch.einsum(across, x, keys)
    up = kept(up if key_bias is None else up + key_bias)
    h = kept(kept.act(activation, up if gate_keys is None else kept(torch.einsum(across, x, gate_keys))))
    if gate_keys is not None:
        h = kept(h * up)
    return h if scale is None else kept(h * scale)


def expert_ffn(
    kept: Exact,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    (T, K), E = index.shape, keys.shape[0]
    experts = zip(*((None,) * E if w is None else w.unbind() for w in (keys, gate_keys, key_bias, values)), strict=True)
    gate = gate.reshape(-1, 1)
    scale = None if dropout_mask is None else dropout_mask.reshape(T * K, keys.shape[1])
    tokens, parts = [], []
    for e, (*weights, value) in enumerate(experts):
        slots = (index.reshape(-1) == e).nonzero().squeeze(1)
        if len(slots):
            tokens.append(slots // K)
            rows = x.index_select(0, tokens[-1])
            h = hidden(kept, rows, *weights, None if scale is None else scale[slots], activation)
            part = kept(kept(h * gate.index_select(0, slots)) @ value)
            parts.append(part + kept.other_order(h @ value))  # backward may scale the gradient by the gate first
    out = x.new_zeros(T, values.shape[2])
    return out.index_add(0, torch.cat(tokens), torch.cat(parts)) if parts else out


def routed_ffn(
    kept: Exact,
    x: Tensor,
    router_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate: Tensor,
    softmax: Tensor,
    gate_function: str,
    groups: int = 1,
    mask: Tensor | None = None,
    router_bias: Tensor | None = None,
    **units: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gates and sums of softmaxes. Right gates [T, K] and softmaxes [T, E] come in, which the bound needs."""
    score = kept(x @ router_weight.t())
    every = kept(_probabilities(kept, score, softmax))
    if gate_function == "sigmoid":
        chosen = torch.sigmoid(score.gather(1, index)) if not kept.positive else _moved(gate, score.gather(1, index))
    elif gate_function == "softmax":
        chosen = every.gather(1, index)
    elif gate_function == "softmax_topk":
        chosen = _probabilities(kept, score.gather(1, index), gate)
    else:
        chosen = 1 + 0 * score.gather(1, index)
    chosen = kept(chosen)
    if mask is not None:  # a token that does not count has no softmax in the sums, and so no NaN of one
        uncounted = ~mask.unsqueeze(1)
        every = kept(_probabilities(kept, score.masked_fill(uncounted, 0), softmax)).masked_fill(uncounted, 0)
    sums = every.view(groups, -1, every.shape[1]).sum(1)
    return expert_ffn(kept, x, keys, values, index, kept.gate(chosen), **units), chosen, sums


def _probabilities(kept: Exact, score: Tensor, right: Tensor) -> Tensor:
    """Softmax; its bound is itself, and moves with all scores as far as it can."""
    if not kept.positive:
        return torch.softmax(score, dim=1)
    moved, right = score - score.detach(), right + UNDERFLOW
    return right * (1 + moved + (right * moved).sum(1, keepdim=True))


def _moved(right: Tensor, score: Tensor) -> Tensor:
    return (right + UNDERFLOW) * (1 + (score - score.detach()))


def cvmm(
    kept: Exact,
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    reduction: Tensor | None = None,
    n_out: int | None = None,
) -> Tensor:
    rows, parts = [], []
    for e, matrix in enumerate(weight.unbind()):
        s = (expert == e).nonzero().squeeze(1)
        y = kept(x.index_select(0, s if gather is None else gather[s]) @ matrix)
        parts.append(y if reduction is None else kept(y * reduction.index_select(0, s).unsqueeze(1)))
        rows.append(s if scatter is None else scatter[s])
    out = x.new_zeros(len(expert) if n_out is None else n_out, weight.shape[2])
    return out.index_add(0, torch.cat(rows), torch.cat(parts))


def weighted_bag(kept: Exact, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    if not kept.sparse:
        return weight.new_zeros(len(weight), len(values)).scatter_add(1, index, weight) @ values
    rows = values.index_select(0, index.reshape(-1)).view(*index.shape, values.shape[1])
    return torch.einsum("tk,tko->to", weight, rows)


def topk_ffn(
    kept: Exact,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """With the units ``index`` [T, K]."""
    if not kept.sparse:
        h = hidden(kept, x, keys, gate_keys, key_bias, dropout_mask, activation)
        return weighted_bag(kept, values, index, h.gather(1, index))
    scale = None if dropout_mask is None else dropout_mask.gather(1, index)
    parts = (None if w is None else w[index] for w in (keys, gate_keys, key_bias))
    return weighted_bag(kept, values, index, hidden(kept, x, *parts, scale, activation))


def wide_product(kept: Exact, x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bmk,bnk->bmn", x, w)
