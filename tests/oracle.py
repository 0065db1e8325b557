"""The layers as slowly and plainly as possible: float64, one token at a time, from the paper's formulas only.

Nothing here comes from the library, so that the two can disagree. Parameters are a dict of float64 tensors by the names
of a layer's state_dict. Everything is differentiable by autograd, so all gradients of a layer can be compared.
Selections are Python sorts: the larger score first, equal scores by the lower position.

T tokens, D d_model, F d_ff, E experts, G expert_size, K selected, H heads, n sub-keys in a half.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": lambda u: 0.5 * u * (1 + torch.erf(u / math.sqrt(2))),
    "gelu_tanh": lambda u: 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
    "silu": lambda u: u * torch.sigmoid(u),
    "identity": lambda u: u,
    "squared_relu": lambda u: torch.relu(u) ** 2,
    "square": lambda u: u**2,
}


def ranked(scores: Tensor | list[float], k: int) -> list[int]:
    """The positions of the k largest scores, the largest first, equal ones by the lower position."""
    scores = scores.tolist() if isinstance(scores, Tensor) else scores
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def hidden_units(x: Tensor, keys: Tensor, key_bias: Tensor | None, gate_keys: Tensor | None, activation: str) -> Tensor:
    """act(keys·x + key_bias), or with gate keys act(gate_keys·x) * (keys·x + key_bias), of one token."""
    act = ACTIVATIONS[activation]
    u = keys @ x
    if key_bias is not None:
        u = u + key_bias
    return act(u) if gate_keys is None else act(gate_keys @ x) * u


# ---------------------------------------------------------------------------------------------- dense and Top-K


def dense(p: Params, x_TD: Tensor, *, activation: str = "relu") -> Tensor:
    """y = sum over all hidden units of unit times value row, plus the output bias."""
    outputs = []
    for x in x_TD:
        u = hidden_units(x, p["keys"], p.get("key_bias"), p.get("gate_keys"), activation)
        y = p["out_bias"] if "out_bias" in p else torch.zeros_like(p["values"][0])
        for i, value in enumerate(p["values"]):
            y = y + u[i] * value
        outputs.append(y)
    return _stack(outputs, x_TD, p["values"].shape[-1])


def topk_scores(p: Params, x: Tensor, *, activation: str, norm_aware: bool, rank_by: str = "hidden") -> Tensor:
    """What Top-K ranks the hidden units of one token by: |unit| or |act(gate)|, times the norm of its value row."""
    if rank_by == "gate":
        u = ACTIVATIONS[activation](p["gate_keys"] @ x).detach().abs()
    else:
        u = hidden_units(x, p["keys"], p.get("key_bias"), p.get("gate_keys"), activation).detach().abs()
    return u * p["values"].detach().norm(dim=1) if norm_aware else u


def topk(
    p: Params,
    x_TD: Tensor,
    k: int,
    *,
    activation: str = "relu",
    norm_aware: bool = False,
    rank_by: str = "hidden",
) -> Tensor:
    """Paper Eq. 6-7: the sum over the k units that contribute most, or whose gates are largest."""
    outputs = []
    for x in x_TD:
        u = hidden_units(x, p["keys"], p.get("key_bias"), p.get("gate_keys"), activation)
        y = p["out_bias"] if "out_bias" in p else torch.zeros_like(p["values"][0])
        for i in ranked(topk_scores(p, x, activation=activation, norm_aware=norm_aware, rank_by=rank_by), k):
            y = y + u[i] * p["values"][i]
        outputs.append(y)
    return _stack(outputs, x_TD, p["values"].shape[-1])


# ------------------------------------------------------------------------------------------------- product keys


def product_key_search(u_a: Tensor, u_b: Tensor, k: int) -> list[int]:
    """Two stages: the best of each half, then the best of their sums; equal sums by the place in that list of sums."""
    u_a, u_b, n = u_a.detach(), u_b.detach(), len(u_a)
    candidates = [(i, j) for i in ranked(u_a, k) for j in ranked(u_b, k)]
    best = ranked([float(u_a[i] + u_b[j]) for i, j in candidates], k)
    return [candidates[c][0] * n + candidates[c][1] for c in best]


def product_key_brute_force(u_a: Tensor, u_b: Tensor, k: int) -> list[int]:
    """One stage over all n² sums, equal sums by the lower index."""
    return ranked((u_a[:, None] + u_b[None, :]).flatten(), k)


def half_queries(p: Params, x: Tensor, head: int, query_norm: str | None) -> tuple[Tensor, Tensor]:
    """The two halves that one head compares with its sub-keys: of x itself, or of a learned query."""
    query = x
    if "query.weight" in p:
        n_heads = p["sub_keys"].shape[1]
        query = p["query.weight"].unflatten(0, (n_heads, -1))[head] @ x
        if "query.bias" in p:
            query = query + p["query.bias"].unflatten(0, (n_heads, -1))[head]
    halves = query.chunk(2)
    if query_norm == "layer":
        halves = [(q - q.mean()) / torch.sqrt(q.var(correction=0) + 1e-5) for q in halves]
    if query_norm == "rms":
        halves = [q / torch.sqrt((q**2).mean() + 1e-5) for q in halves]
    if "norm_weight" in p:
        halves = [p["norm_weight"] * q + p.get("norm_bias", 0) for q in halves]
    return tuple(halves)


def product_key_scores(p: Params, x: Tensor, head: int, query_norm: str | None = None) -> tuple[Tensor, Tensor]:
    """The scores of the n first and the n second sub-keys of one head for one token."""
    q_a, q_b = half_queries(p, x, head, query_norm)
    return p["sub_keys"][0, head] @ q_a, p["sub_keys"][1, head] @ q_b


def product_key(p: Params, x_TD: Tensor, k: int, *, activation: str = "relu", query_norm: str | None = None) -> Tensor:
    """Each head adds its k best values; a value picked by two heads counts twice; softmax is within one head."""
    _, n_heads, n, _ = p["sub_keys"].shape
    outputs = []
    for x in x_TD:
        y = torch.zeros_like(p["values"][0])
        for head in range(n_heads):
            u_a, u_b = product_key_scores(p, x, head, query_norm)
            chosen = product_key_search(u_a, u_b, k)
            u = torch.stack([u_a[i // n] + u_b[i % n] for i in chosen])
            weights = torch.softmax(u, 0) if activation == "softmax" or "keys" in p else ACTIVATIONS[activation](u)
            if "keys" in p:
                weights = weights * ACTIVATIONS[activation](p["keys"][chosen] @ x)
            for weight, i in zip(weights, chosen, strict=True):
                y = y + weight * p["values"][i]
        if "gate.weight" in p:
            y = p["out.weight"] @ (torch.nn.functional.silu(p["gate.weight"] @ x) * y)
        outputs.append(y)
    return _stack(outputs, x_TD, p["values"].shape[-1])


# ------------------------------------------------------------------------------------------------------ routing


class Routing(NamedTuple):
    """Of every token: the logits of all experts, the k selected experts in rank order, and their gates."""

    logits_TE: Tensor
    index_TK: list[list[int]]
    gate_TK: Tensor


def sinkhorn(logits_TE: Tensor, n_iters: int = 3, real: list[bool] | None = None) -> Tensor:
    """log of the balanced assignment: rows scaled to sum 1, then columns (of the real tokens) to N/E, n_iters times.

    b = -LSE_e(X + a) for a token, a = log(N/E) - LSE_n(X + b) for an expert; the result is X + a + b, columns last.
    """
    X = logits_TE.detach()
    n_tokens, n_experts = X.shape
    rows = [t for t in range(n_tokens) if real is None or real[t]]
    a = torch.zeros(n_experts, dtype=X.dtype)
    b = torch.zeros(n_tokens, dtype=X.dtype)
    for _ in range(n_iters if rows else 0):
        for t in range(n_tokens):
            b[t] = -torch.logsumexp(X[t] + a, 0)
        for e in range(n_experts):
            a[e] = math.log(len(rows) / n_experts) - torch.logsumexp(X[rows, e] + b[rows], 0)
    return X + a[None, :] + b[:, None]


def route(
    router: str,
    logits_TE: Tensor,
    k: int,
    *,
    noise_TE: Tensor | None = None,
    noise_logits_TE: Tensor | None = None,
    dropped_TE: Tensor | None = None,
    bias_E: Tensor | None = None,
    training: bool = False,
    n_iters: int = 3,
    real: list[bool] | None = None,
) -> Routing:
    """Choose k experts a token and weigh them. A dropped expert ranks behind all others and weighs exactly 0."""
    n_tokens, n_experts = logits_TE.shape
    scores_TE = logits_TE
    if router == "noisy_topk" and noise_TE is not None:  # paper Eq. 13
        scores_TE = logits_TE + noise_TE * torch.log1p(torch.exp(noise_logits_TE))
    rank_TE = sinkhorn(logits_TE, n_iters, real) if router == "sinkhorn" and training else scores_TE.detach()
    if bias_E is not None:
        rank_TE = rank_TE + bias_E
    index, gates = [], []
    for t in range(n_tokens):
        alive = [True] * n_experts if dropped_TE is None else [not d for d in dropped_TE[t].tolist()]
        order = ranked(rank_TE[t], n_experts)
        chosen = ([e for e in order if alive[e]] + [e for e in order if not alive[e]])[:k]
        index.append(chosen)
        zero = torch.zeros((), dtype=logits_TE.dtype)
        normaliser = zero
        if router == "softmax":
            normaliser = torch.exp(scores_TE[t] - scores_TE[t].max()).sum()
        if router in ("softmax_topk", "noisy_topk"):
            normaliser = sum((torch.exp(scores_TE[t, e] - scores_TE[t].max()) for e in chosen if alive[e]), zero)
        gate = []
        for e in chosen:
            if not alive[e]:
                gate.append(zero)
            elif router in ("sigmoid", "sinkhorn"):
                gate.append(1 / (1 + torch.exp(-logits_TE[t, e])))
            elif router in ("softmax", "softmax_topk", "noisy_topk"):
                gate.append(torch.exp(scores_TE[t, e] - scores_TE[t].max()) / normaliser)
            elif router == "unweighted":
                gate.append(zero + 1)
            else:
                raise ValueError(f"no router is called {router!r}")
        gates.append(torch.stack(gate))
    return Routing(logits_TE, index, _stack(gates, logits_TE, k))


# --------------------------------------------------------------------------------------------------- MoE family


def moe(
    p: Params,
    x_TD: Tensor,
    k: int,
    *,
    router: str = "sigmoid",
    activation: str = "relu",
    router_input: Tensor | None = None,
    **choices,
) -> tuple[Tensor, Routing]:
    """Paper Eq. 11: the sum over the selected experts of gate times expert; `choices` as in `route`."""
    r_TD = x_TD if router_input is None else router_input
    logits_TE = r_TD @ p["router.weight"].T
    if "router.noise_weight" in p:
        choices["noise_logits_TE"] = r_TD @ p["router.noise_weight"].T
    routing = route(router, logits_TE, k, **choices)
    outputs = []
    for t, x in enumerate(x_TD):
        y = p["out_bias"] if "out_bias" in p else torch.zeros_like(p["values"][0, 0])
        for e, gate in zip(routing.index_TK[t], routing.gate_TK[t], strict=True):
            bias = p["key_bias"][e] if "key_bias" in p else None
            gate_keys = p["gate_keys"][e] if "gate_keys" in p else None
            y = y + gate * (hidden_units(x, p["keys"][e], bias, gate_keys, activation) @ p["values"][e])
        outputs.append(y)
    return _stack(outputs, x_TD, p["values"].shape[-1]), routing


# ----------------------------------------------------------------------------------------------- balance losses


def balance_loss(kind: str, routing: Routing, sequences: list[list[int]] | None = None) -> Tensor:
    """One loss, unscaled. `sequences` lists the real tokens of each pool (one pool of all tokens by default).

    Pools without a token do not count; no pool at all gives 0.
    """
    n_tokens = len(routing.index_TK)
    pools = [list(range(n_tokens))] if sequences is None else sequences
    losses = [_pool_loss(kind, routing, pool) for pool in pools if pool]
    zero = 0 * routing.logits_TE.sum()
    return sum(losses, zero) / max(len(losses), 1)


def _pool_loss(kind: str, routing: Routing, tokens: list[int]) -> Tensor:
    logits_TE, index_TK, gate_TK = routing
    n_experts = logits_TE.shape[1]
    p = sum(torch.softmax(logits_TE[t], 0) for t in tokens) / len(tokens)
    if kind == "entropy":  # Eq. 20-21: minus the entropy of the mean softmax over all experts
        return torch.xlogy(p, p).sum()
    if kind == "switch":  # Eq. 15-17: E times the dot product of selection frequency and mean softmax
        f = torch.zeros(n_experts, dtype=p.dtype)
        for t in tokens:
            for e in index_TK[t]:
                f[e] += 1 / len(tokens)
        return n_experts * (f * p).sum()
    if kind == "cv2":  # Eq. 14 squared: population variance over squared mean of the summed normtopk(gates)
        importance = [torch.zeros((), dtype=p.dtype) for _ in range(n_experts)]
        for t in tokens:
            total = gate_TK[t].sum()
            for slot, e in enumerate(index_TK[t]):
                importance[e] = importance[e] + (gate_TK[t, slot] / total if total > 0 else 0)
        total = torch.stack(importance)
        mean = total.mean()
        return 0 * mean if mean == 0 else ((total - mean) ** 2).mean() / mean**2
    if kind == "z":
        return sum(torch.logsumexp(logits_TE[t], 0) ** 2 for t in tokens) / len(tokens)
    if kind in ("none", "bias"):
        return 0 * p.sum()
    raise ValueError(f"no balance loss is called {kind!r}")


def aux_loss(
    kinds: str | tuple[str, ...], weights: float | tuple[float, ...], routing: Routing, sequences=None
) -> Tensor:
    """The weighted sum that a layer adds to the model's loss."""
    kinds, weights = ((kinds,), (weights,)) if isinstance(kinds, str) else (kinds, weights)
    pairs = zip(kinds, weights, strict=True)
    return sum(weight * balance_loss(kind, routing, sequences) for kind, weight in pairs)


def pools(shape: tuple[int, ...], mask: Tensor | None = None, over: str = "batch") -> list[list[int]]:
    """The real tokens of each pool, as positions among the flattened tokens of x.shape[:-1] == shape."""
    n_tokens = math.prod(shape)
    real = [True] * n_tokens if mask is None else mask.flatten().tolist()
    length = max(n_tokens, 1) if over == "batch" else shape[-1]
    starts = range(0, n_tokens, length) if length else []
    return [[t for t in range(start, start + length) if t < n_tokens and real[t]] for start in starts]


def load(routing: Routing, tokens: list[int] | None = None) -> list[int]:
    """How many slots of the given tokens each expert holds."""
    counts = [0] * routing.logits_TE.shape[1]
    for t in range(len(routing.index_TK)) if tokens is None else tokens:
        for e in routing.index_TK[t]:
            counts[e] += 1
    return counts


# ---------------------------------------------------------------------------------------------- parameters, FLOPs


def n_parameters(
    layer: str, d_model: int, *, d_out: int | None = None, glu: bool = False, bias: bool = False, **sizes: int
) -> int:
    """The number of learned parameters: layer is "dense", "topk", "product_key", "moe" or "noisy"."""
    d_out = d_model if d_out is None else d_out
    if layer == "product_key":
        n, n_heads, query_dim = sizes["n_sub_keys"], sizes.get("n_heads", 1), sizes.get("query_dim")
        learned_query = n_heads * query_dim * d_model if query_dim else 0
        return n * n * d_out + 2 * n_heads * n * ((query_dim or d_model) // 2) + learned_query
    d_ff = sizes["d_ff"] if layer in ("dense", "topk") else sizes["n_experts"] * sizes["expert_size"]
    count = d_ff * d_model + d_ff * d_out
    count += d_ff * d_model if glu else 0
    count += d_ff + d_out if bias else 0
    count += sizes["n_experts"] * d_model if layer in ("moe", "noisy") else 0
    count += sizes["n_experts"] * d_model if layer == "noisy" else 0
    return count


def flops_per_token(layer: str, d_model: int, *, d_out: int | None = None, glu: bool = False, **sizes: int) -> int:
    """Forward, 2 per multiply-add, of the matrix products and weighted sums (paper.md section 1)."""
    d_out = d_model if d_out is None else d_out
    up = 2 * d_model if glu else d_model
    if layer == "dense":
        return 2 * sizes["d_ff"] * (up + d_out)
    if layer == "topk":
        return 2 * sizes["d_ff"] * up + 2 * sizes["k"] * d_out
    if layer == "product_key":
        n, k, n_heads, query_dim = sizes["n_sub_keys"], sizes["k"], sizes.get("n_heads", 1), sizes.get("query_dim")
        learned_query = 2 * d_model * n_heads * query_dim if query_dim else 0
        return learned_query + 2 * n_heads * n * (query_dim or d_model) + 2 * n_heads * k * d_out
    router = 2 * sizes["n_experts"] * d_model * (2 if layer == "noisy" else 1)
    return 2 * sizes["k"] * sizes["expert_size"] * (up + d_out) + router


# ------------------------------------------------------------------------------------------------------ helpers


def randomise(layer: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Fill a layer's parameters: of order 1 / sqrt(fan-in), with biases and a noise weight that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in layer.named_parameters():
        scale = {"values": 0.5, "key_bias": 0.5, "out_bias": 0.5, "router.weight": 1.5 / p.shape[-1] ** 0.5}
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.copy_(noise * scale.get(name, p.shape[-1] ** -0.5))
    return layer


def _stack(rows: list[Tensor], like: Tensor, width: int) -> Tensor:
    return torch.stack(rows) if rows else like.new_zeros(0, width) + 0 * like.sum()
