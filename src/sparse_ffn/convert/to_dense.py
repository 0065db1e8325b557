"""to_dense: a sparse layer as the dense FFN that computes the same, where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_current
from sparse_ffn.convert.config_base import Converted
from sparse_ffn.convert.init.build import freeze
from sparse_ffn.convert.init.experts import copy_weights, gate_at_zero
from sparse_ffn.convert.init.partition import product_keys
from sparse_ffn.convert.init.weights import FFNWeights
from sparse_ffn.layers import DenseFFN, MoE, ProductKeyMemory, SparseFFN
from sparse_ffn.layers.rows.base import check_dense
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.ops.autocast import without_autocast
from sparse_ffn.routing.deepseek import DeepSeekRouter
from sparse_ffn.routing.routers import ROUTERS, UnweightedRouter

KNOWN = (*ROUTERS.values(), DeepSeekRouter)
"""Routers whose ``gate`` says what they do at zero logits; a subclass may do more."""


@torch.inference_mode(False)  # a tensor that is made in it never trains
@torch.no_grad()
def to_dense(layer: Converted) -> DenseFFN:
    """The dense FFN that computes what a layer computes in evaluation.

    Args:
        layer: one whose k selects everything, with gates that do not depend on the token: ``TopKFFN`` at k = d_ff,
            ``MoE`` at k = n_experts with an unweighted or a zero router, ``SharedExpertMoE`` of such a one,
            ``ProductKeyMemory`` at k = n_sub_keys² without ``query_norm`` and softmax.

    Returns:
        A new ``DenseFFN`` of the same device, dtype, training mode and ``requires_grad``. Its units are in the layer's
        order, a shared expert's first.

    Raises:
        TypeError: no layer of this library.
        ValueError: no dense FFN computes the same, the message says why; or a tensor of the layer is masked or
            normalised by a hook, sharded, or held by accelerate.
    """
    if isinstance(layer, SharedExpertMoE):
        return _with_shared(layer)
    if not isinstance(layer, SparseFFN):
        modules = layer.named_modules() if isinstance(layer, nn.Module) else ()
        inside = [name for name, module in modules if isinstance(module, SparseFFN)]
        hint = f": give the layer in it, at {', '.join(map(repr, inside))}" if inside else ""
        raise TypeError(f"layer must be a SparseFFN or SharedExpertMoE, got {type(layer).__name__}{hint}")
    if isinstance(layer, MoE):
        weights = _experts(layer)
    elif isinstance(layer, ProductKeyMemory):
        weights = _memory(layer)
    elif isinstance(layer, DenseFFN):
        if layer.k < layer.d_ff:
            raise _no_dense(layer, f"each token uses its own k = {layer.k} of d_ff = {layer.d_ff} units")
        weights = _weights(layer)
    else:
        raise _no_dense(layer, "its function is unknown here")
    return _dense(replace(weights, dropout=layer.dropout, trainable=_trainable(layer))).train(layer.training)


def _dense(weights: FFNWeights) -> DenseFFN:
    options: dict[str, Any] = {"activation": weights.activation, "dropout": weights.dropout}
    options |= {"glu": weights.gate_keys is not None, "bias": weights.key_bias is not None}
    options |= {"device": weights.keys.device, "dtype": weights.keys.dtype}
    dense = DenseFFN(weights.d_model, weights.d_ff, d_out=weights.d_out, **options)
    copy_weights(dense, weights)
    freeze(dense, weights)
    return dense


def _with_shared(layer: SharedExpertMoE) -> DenseFFN:
    """The units of the shared expert and of all others in one."""
    routed, shared = to_dense(layer._own_moe()), to_dense(layer._own_shared())
    if layer._own_moe() is not layer._own_routed():
        raise _no_dense(layer, "its routed experts lie between two projections")
    if layer.gate is not None:
        raise _no_dense(layer, "the shared expert's weight depends on the token (gated = True)")
    differing = [n for n in ("activation", "dropout") if getattr(shared, n) != getattr(routed, n)]
    if differing or (shared.gate_keys is None) != (routed.gate_keys is None):
        raise _no_dense(layer, f"its shared expert is of another kind ({', '.join(differing) or 'glu'})")
    parts = [_weights(shared), _weights(routed)]
    if any(part.key_bias is not None for part in parts):
        parts = [part if part.key_bias is not None else _with_zero_biases(part) for part in parts]
    ours, theirs = (part.tensors() for part in parts)
    joined: dict[str, Any] = {name: torch.cat([ours[name], theirs[name]]) for name in ours if name != "out_bias"}
    if "out_bias" in ours:
        joined["out_bias"] = ours["out_bias"] + theirs["out_bias"]
    trainable = {
        n: any(getattr(own, n).requires_grad for own in (shared, routed) if getattr(own, n) is not None) for n in joined
    }
    weights = FFNWeights(**joined, activation=shared.activation, dropout=shared.dropout, trainable=trainable)
    return _dense(weights).train(layer.training)


def _with_zero_biases(ffn: FFNWeights) -> FFNWeights:
    return replace(ffn, key_bias=ffn.keys.new_zeros(ffn.d_ff), out_bias=ffn.values.new_zeros(ffn.d_out))


def _weights(layer: DenseFFN | MoE) -> FFNWeights:
    for name in ("keys", "values", "gate_keys", "key_bias", "out_bias"):
        check_current(layer, name)
    gate_keys, key_bias, out_bias = layer.gate_keys, layer.key_bias, layer.out_bias
    return FFNWeights(layer.keys, layer.values, layer.activation, gate_keys, key_bias, out_bias=out_bias)


def _trainable(layer: SparseFFN) -> dict[str, bool]:
    """Whether the dense FFN's tensors train: a product key does if one of its parts does."""
    trainable = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    keys = [wants for name, wants in trainable.items() if name in ("sub_keys", "query.weight")]
    bias = [wants for name, wants in trainable.items() if name in ("sub_keys", "query.bias")]
    return trainable | ({"keys": any(keys), "key_bias": any(bias)} if keys else {})


def _no_dense(layer: Converted, why: str) -> ValueError:
    return ValueError(f"no dense FFN computes what this {type(layer).__name__} does: {why}")


def _experts(layer: MoE) -> FFNWeights:
    check_dense(layer)
    if layer.null_experts:
        raise _no_dense(layer, f"it has null experts (null_experts = {layer.null_experts})")
    if layer.k < layer.n_experts:
        raise _no_dense(layer, f"each token uses its own k = {layer.k} of n_experts = {layer.n_experts}")
    if type(layer.router) not in KNOWN:
        raise _no_dense(layer, f"the gates of its {type(layer.router).__name__} are unknown here")
    check_current(layer, "router.weight")
    if not isinstance(layer.router, UnweightedRouter) and bool(layer.router.weight.any()):
        raise _no_dense(layer, "its gates depend on the token (the router's weights are not zero)")
    weights = _weights(layer).map_units(lambda rows: rows.flatten(0, 1))
    return replace(weights, values=weights.values * gate_at_zero(layer))


def _memory(layer: ProductKeyMemory) -> FFNWeights:
    if layer.k < layer.d_ff:
        raise _no_dense(layer, f"each token uses its own k = {layer.k} of {layer.d_ff} values")
    if layer.activation == "softmax" or layer.query_norm is not None:
        raise _no_dense(layer, "its weights are normalised over the token's scores or query")
    if layer.experts or layer.gated:
        raise _no_dense(layer, "experts = True" if layer.experts else "gated = True")
    for name in ("sub_keys", "values", *(f"query.{n}" for n in ("weight", "bias") if layer.query is not None)):
        check_current(layer, name)
    keys = product_keys(layer.sub_keys)
    bias: Tensor | None = None
    if layer.query is not None:
        with without_autocast(keys):
            if layer.query.bias is not None:
                bias = (keys @ layer.query.bias.view(layer.n_heads, -1, 1)).flatten()
            keys = keys @ layer.query.weight.view(layer.n_heads, -1, layer.d_model)
    return FFNWeights(keys.flatten(0, 1), layer.values.repeat(layer.n_heads, 1), layer.activation, key_bias=bias)
