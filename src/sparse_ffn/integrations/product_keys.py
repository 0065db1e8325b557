"""Checkpoints of other product-key memories: facebookresearch/XLM's and those of the package product-key-memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from sparse_ffn.integrations.checkpoints import Keys, check_free, filled
from sparse_ffn.layers import ProductKeyMemory

QUERY, BATCH_NORM = "query_proj.query_mlps.0", "query_proj.query_mlps.1"
DECIDED = ("d_model", "n_sub_keys", "n_heads", "d_out", "query_dim", "device", "dtype")
"""Options that the tensors say."""


def from_xlm(state_dict: Mapping[str, Tensor], k: int, *, prefix: str = "", **options: Any) -> ProductKeyMemory:
    """Make a ``ProductKeyMemory`` from the state of XLM's ``HashingMemory`` with product keys (arXiv 1907.05242).

    Its tensors are ``keys`` [H, 2, n, C], or [n, C] for all heads and halves, ``values.weight`` [n², O], and a linear
    query's ``weight`` [H·2·C, D] and perhaps ``bias``. A batch norm of the query is multiplied into it, so that the
    layer computes what the memory does in evaluation. What else its code knows (queries of several layers or of
    convolutions, shuffled indices, a memory of other size) has no counterpart here and is an error; options that no
    tensor shows must have their defaults.

    Args:
        state_dict: any that contains the memory.
        k: values read by a head, its ``mem_knn``. No tensor says it.
        prefix: of the memory's keys, such as ``"memories.4."``; every key that starts with it must be used.
        options: of ``ProductKeyMemory``. ``activation`` is ``"softmax"`` unless said otherwise.

    Returns:
        The layer, in the dtype and on the device of the values.

    Raises:
        ValueError: a key that is missing or that nothing uses, a tensor of another size than the others say, or an
            option that they decide, as ``n_heads``.
    """
    check_free(options, (*DECIDED, "query_bias"))
    keys = Keys(state_dict, prefix)
    values, shared = keys.take("values.weight", 2), getattr(keys.left.get("keys"), "ndim", 4) == 2
    sub_keys = keys.take("keys", 2 if shared else 4)
    ours, width, d_model, n_heads = {"values": values}, 2 * sub_keys.shape[-1], 2 * sub_keys.shape[-1], 1
    has_query = f"{QUERY}.weight" in keys.left
    if has_query:
        weight = keys.take(f"{QUERY}.weight", 2)
        bias = keys.take(f"{QUERY}.bias", 1) if f"{QUERY}.bias" in keys.left else None
        if f"{BATCH_NORM}.running_var" in keys.left:
            weight, bias = _without_batch_norm(keys, weight, bias)
        ours["query.weight"] = weight
        if bias is not None:
            ours["query.bias"] = bias
        d_model, n_heads = weight.shape[1], weight.shape[0] // width
    keys.finish()
    ours["sub_keys"] = sub_keys.expand(2, n_heads, -1, -1) if shared else sub_keys.transpose(0, 1)
    sizes = (d_model, sub_keys.shape[-2], k)
    return _made(sizes, ours, query_dim=width if has_query else None, query_bias="query.bias" in ours, **options)


def from_product_key_memory(
    state_dict: Mapping[str, Tensor], k: int, *, prefix: str = "", **options: Any
) -> ProductKeyMemory:
    """Make a ``ProductKeyMemory`` from the state of ``PKM`` of the package product-key-memory (lucidrains).

    Its tensors are ``keys`` [H, n, 2, C], ``to_queries.weight`` [2·H·C, D], the LayerNorm's ``norm.weight`` and
    ``norm.bias`` [C], and ``values.weight`` [n², O]. What else it knows (a batch norm, norms before and after, values
    that are combined) has no counterpart here and is an error.

    Args:
        state_dict: any that contains the memory.
        k: values read by a head, its ``topk``. No tensor says it.
        prefix: of the memory's keys; every key that starts with it must be used.
        options: of ``ProductKeyMemory``. ``activation`` is ``"softmax"`` unless said otherwise: ``"relu"`` is its
            ``non_competitive_gates``.

    Returns:
        The layer, in the dtype and on the device of the values.

    Raises:
        ValueError: a key that is missing or that nothing uses, a tensor of another size than the others say, or an
            option that they decide, as ``n_heads``.
    """
    check_free(options, (*DECIDED, "query_norm", "norm_affine"))
    keys = Keys(state_dict, prefix)
    sub_keys, query = keys.take("keys", 4), keys.take("to_queries.weight", 2)
    n_heads, n, _, half = sub_keys.shape
    if query.shape[0] != 2 * n_heads * half:
        raise ValueError(f"{prefix + 'to_queries.weight'!r} must have 2·{n_heads}·{half} rows, got {list(query.shape)}")
    ours = {
        "values": keys.take("values.weight", 2),
        "sub_keys": rearrange(sub_keys, "h n s c -> s h n c"),
        "query.weight": rearrange(query, "(s h c) d -> (h s c) d", s=2, h=n_heads),
        "norm_weight": keys.take("norm.weight", 1),
        "norm_bias": keys.take("norm.bias", 1),
    }
    keys.finish()
    return _made(
        (query.shape[1], n, k), ours, query_dim=2 * half, query_norm="layer", norm_affine=True, **options
    )  # fmt: skip


def _without_batch_norm(keys: Keys, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The linear map that does what a linear map and the batch norm after it do in evaluation."""
    mean, variance, scale, shift = (
        keys.take(f"{BATCH_NORM}.{name}", 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    keys.left.pop(f"{BATCH_NORM}.num_batches_tracked", None)
    factor = scale / (variance + 1e-5).sqrt()
    centre = -mean if bias is None else bias - mean
    return weight * factor.unsqueeze(1), shift + factor * centre


def _made(sizes: tuple[int, int, int], ours: Mapping[str, Tensor], **options: Any) -> ProductKeyMemory:
    values = ours["values"]
    shape = {"n_heads": ours["sub_keys"].shape[1], "d_out": values.shape[1]}
    layer = ProductKeyMemory(
        *sizes, **{"activation": "softmax", **shape, **options}, device="meta", dtype=values.dtype
    )  # fmt: skip
    return filled(layer, ours)
