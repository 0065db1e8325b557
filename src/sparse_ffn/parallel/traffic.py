"""What travels between processes in a step, by arithmetic: of exchanged experts, split tables, and FSDP2's weights.

Routing is taken to be even: each token selects its experts by chance, all equally likely.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import torch

from sparse_ffn.checks import check_count, check_dtype, check_positive, check_type
from sparse_ffn.layers.base import SparseFFN
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.product_key import ProductKeyMemory
from sparse_ffn.layers.rows.base import check_dense
from sparse_ffn.parallel.exchange import choose, shares


class Traffic(NamedTuple):
    """Bytes that a process sends to others in a training step of one layer, and what it keeps."""

    forward: dict[str, float]
    """One pass of a forward by each exchange or split, there and back; the backward pass sends as much."""
    between_nodes: dict[str, float]
    """Those of ``forward`` that leave the node."""
    auto: str
    """What ``"auto"`` chooses for a layer of that dtype."""
    step: float
    """Forward and backward pass with "auto"."""
    fsdp: float
    """FSDP2 of the whole layer instead: weights gathered in both passes, gradients scattered once."""
    tokens_below: float
    """Tokens of a process below which splitting sends less than FSDP2 of the parameters that are split."""
    parameters: int
    """Bytes of the layer's parameters on each process, split."""
    parameters_whole: int
    """Bytes of all of the layer's parameters."""


def traffic(
    layer: SparseFFN, tokens: int, ranks: int, *, ranks_per_node: int = 8, dtype: torch.dtype = torch.bfloat16
) -> Traffic:
    """What travels if a layer is split over processes, and what FSDP2 would send.

    Args:
        layer: a MoE layer (``ExpertParallel``) or a product-key memory (``MemoryParallel``), also on meta.
        tokens: of one process.
        ranks: processes that share the layer.
        ranks_per_node: of them on one node.
        dtype: of tokens and weights on the wire.

    Returns:
        Bytes, computed and not measured: no speed follows from them alone.

    Raises:
        TypeError: another layer, or sizes that are no ints.
        ValueError: no process, fewer than no tokens, stored rows, or a memory that ``MemoryParallel`` does not split.
    """
    check_type("layer", layer, (MoE, ProductKeyMemory), "a sparse_ffn.MoE or ProductKeyMemory")
    if isinstance(layer, MoE):
        check_dense(layer)
    if isinstance(layer, ProductKeyMemory) and layer.experts:
        raise ValueError("layer has experts = True, which MemoryParallel does not split")
    tokens, ranks = check_count("tokens", tokens), check_positive("ranks", ranks)
    ranks_per_node = check_positive("ranks_per_node", ranks_per_node)
    check_dtype(dtype)
    size = (dtype or torch.bfloat16).itemsize
    off, beyond = (ranks - 1) / ranks, max(0, ranks - ranks_per_node) / ranks
    if isinstance(layer, MoE):
        sent = _expert_bytes(layer, ranks, size)
        auto = next((name for name in sent if sent_by(name, layer, ranks)), "gather")  # of one process: nothing travels
        split = [p for p in (layer.keys, layer.values, layer.gate_keys, layer.key_bias) if p is not None]
        share = shares(layer.n_experts, ranks)[0] / layer.n_experts
    else:
        assert isinstance(layer, ProductKeyMemory)
        sent = memory_bytes(layer, ranks, dtype or torch.bfloat16)
        auto, split = min(sent, key=lambda name: (sent[name], name)), [layer.values]
        whole = layer.d_out if auto == "columns" else layer.d_ff
        share = shares(whole, ranks)[0] / whole
    n_split, n_all = sum(p.numel() for p in split), sum(p.numel() for p in layer.parameters())
    per_token = 2 * sent[auto]
    weights = 3 * n_split * size * off
    return Traffic(
        forward={name: tokens * bytes_ for name, bytes_ in sent.items()},
        between_nodes={name: tokens * bytes_ * (beyond / off if off else 0) for name, bytes_ in sent.items()},
        auto=auto,
        step=tokens * per_token,
        fsdp=3 * n_all * size * off,
        tokens_below=weights / per_token if per_token else float("inf"),
        parameters=round((n_all - n_split + n_split * share) * size),
        parameters_whole=n_all * size,
    )


def sent_by(name: str, layer: MoE, ranks: int) -> bool:
    """Whether "auto" chooses the exchange of this name."""
    k = min(layer.k, layer.n_experts)
    return choose("auto", ranks, k) is choose(name, ranks, k)


def _expert_bytes(layer: MoE, ranks: int, size: int) -> dict[str, float]:
    """Bytes of a token that leave the process in a forward, there and back, by each exchange."""
    off, k, real = (ranks - 1) / ranks, layer.k, min(layer.k, layer.n_experts)  # the other slots are null experts'
    row = (layer.d_model + layer.d_out) * size
    gate, index = 4, 4  # fp32 and int32
    reached = _distinct(layer.n_experts, ranks, real)
    return {
        "gather": (ranks - 1) * (row + k * (gate + index)),
        "slots": real * off * (row + gate),
        "tokens": reached * off * (row + k * (gate + index)),
    }


def _distinct(n_experts: int, ranks: int, k: int) -> float:
    """Processes that hold one of k different experts, on average."""
    return sum(1 - comb(n_experts - n, k) / comb(n_experts, k) for n in shares(n_experts, ranks))


def memory_bytes(layer: ProductKeyMemory, ranks: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of a token that leave the process in a forward, by each way to split the values."""
    off, entries = (ranks - 1) / ranks, layer.n_heads * layer.k
    row, told = layer.d_out * dtype.itemsize, entries * (4 + 4)
    reached = ranks * (1 - (1 - 1 / ranks) ** entries)
    return {"columns": (ranks - 1) * told + off * row, "rows": reached * off * (told + row)}
