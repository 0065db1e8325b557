"""Expert FFN out of the Triton kernels: sort, grouped products, sums over a token's slots; no host wait.

Where ``dense.use_dense`` all experts are computed instead: there the slots keep their own order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import crossovers
from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.triton import columns, combine, config, decode, grouped, hidden, outer, routing
from sparse_ffn.backends.triton.decode import use_decode
from sparse_ffn.backends.triton.launch import cdiv, matrices, precision, rows
from sparse_ffn.ops.expert_ffn import dense
from sparse_ffn.ops.expert_ffn.backend import Gradients, Saved
from sparse_ffn.ops.units import Units

# T tokens, K slots a token, S = T·K, E experts, G units of an expert, D d_model, O d_out; _S rows are sorted by expert


@on_device
def forward(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs."""
    E, G, _ = experts.keys.shape
    if computes_all(x, experts, index.shape[1]):
        return dense.forward(x, experts, index, gate, dropout_mask, activation)
    order, offsets = routing.sort_slots(index, E)
    up_SG = x.new_empty(order.shape[0], G)
    saved = Saved(order, offsets, up_SG, None if experts.gate_keys is None else torch.empty_like(up_SG))
    return _forward(x, experts, gate, dropout_mask, activation, *saved), saved


@on_device
def inference(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> Tensor:
    """The output, nothing kept."""
    keys, values, gate_keys, key_bias = experts
    measured = crossovers.on_gpu(x, keys, index.shape[1])
    if not (use_decode(index.numel(), keys.shape[0]) if measured is None else x.shape[0] <= measured.decode):
        if computes_all(x, experts, index.shape[1]):
            return dense.inference(x, experts, index, gate, dropout_mask, activation)
        order, offsets = routing.sort_slots(index, keys.shape[0])
        return _forward(x, experts, gate, dropout_mask, activation, order, offsets, None, None)
    index = index.contiguous()
    h_SG = x.new_empty(index.numel(), keys.shape[1], dtype=torch.float32)
    y_SO = x.new_empty(index.numel(), values.shape[2], dtype=torch.float32)
    out = x.new_empty(x.shape[0], values.shape[2])
    scale = None if dropout_mask is None else dropout_mask.contiguous()
    decode.up_rows(rows(x), index, keys, gate_keys, key_bias, scale, h_SG, activation)
    decode.down_rows(h_SG, index, gate.contiguous(), values, y_SO)
    combine.combine(y_SO, None, None, out, index.shape[1])
    return out


def computes_all(x: Tensor, experts: Units, k: int) -> bool:
    """Whether all experts are computed, in training too; asked again by the backward pass."""
    measured = crossovers.on_gpu(x, experts.keys, k)
    if measured is None:
        return dense.use_dense(experts.keys.shape[0], k)
    return measured.dense is not None and x.shape[0] >= measured.dense


def _forward(
    x: Tensor,
    experts: Units,
    gate: Tensor,
    dropout_mask: Tensor | None,
    activation: str,
    order: Tensor,
    offsets: Tensor,
    up_SG: Tensor | None,
    glu_gate_SG: Tensor | None,
) -> Tensor:
    """The output; into up and glu_gate, if given, what the backward pass needs of the units."""
    keys, values, gate_keys, key_bias = experts
    (E, G, _), (T, K), O = keys.shape, gate.shape, values.shape[2]
    how, x, gate = precision(x), rows(x), gate.contiguous()
    kind = config.arithmetic(x.dtype, how, x, keys, values, gate_keys)
    block_m = config.block_m(x.device, kind, order.shape[0] / E)
    plan = routing.plan(order, offsets, K, block_m, inverse=True)

    # ReLU's saved activations are the hidden units themselves
    is_up = up_SG is not None and activation == "relu" and gate_keys is None and dropout_mask is None
    h_SG = up_SG if is_up and up_SG is not None else x.new_empty(order.shape[0], G)
    tile = config.tile(x.device, "one" if gate_keys is None else "two", kind, G, block_m)
    scale = None if dropout_mask is None else dropout_mask.contiguous()
    cast = (matrices(keys, x.dtype), None if gate_keys is None else matrices(gate_keys, x.dtype), key_bias)
    hidden.up(plan, x, *cast, scale, up_SG, glu_gate_SG, h_SG, activation, tile, how)
    del cast  # copies of fp32 weights
    values, tile = matrices(values, x.dtype), config.tile(x.device, "one", kind, O, block_m, depth=keys.shape[1])
    out = x.new_empty(T, O)
    for part, y in columns.blocks(x, order.shape[0], O, tile.n):
        grouped.multiply(plan, h_SG, values[:, :, part], y, tile, how)
        combine.combine(y, plan.inverse, gate, out[:, part], K)
    return out


@on_device
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
    if computes_all(x, experts, gate.shape[1]):
        return dense.backward(grad, x, experts, gate, dropout_mask, saved, activation)
    order, offsets, up_SG, glu_gate_SG = saved
    (E, G, D), (T, K), S = keys.shape, gate.shape, order.shape[0]
    how, x, grad = precision(x), rows(x), rows(grad)
    kind = config.arithmetic(x.dtype, how, x, grad, keys, values, gate_keys)
    block_m = config.block_m(x.device, kind, S / E)
    plan = routing.plan(order, offsets, K, block_m, inverse=True)

    dup_SG, weighted_SG = torch.empty_like(up_SG), torch.empty_like(up_SG)
    dglu_gate_SG = None if glu_gate_SG is None else torch.empty_like(up_SG)
    simple = gate_keys is None and dropout_mask is None
    tile = config.tile(x.device, "one" if simple else "two", kind, G, block_m)
    dgates = x.new_zeros(cdiv(G, tile.n), S, dtype=torch.float32)  # void slots keep 0
    hidden.hidden_gradient(
        plan, grad, matrices(values, x.dtype), up_SG, glu_gate_SG,
        None if dropout_mask is None else dropout_mask.contiguous(), gate.contiguous(),
        dup_SG, dglu_gate_SG, weighted_SG, dgates, activation, tile, how,
    )  # fmt: skip
    dgate = dgates.sum(0).to(gate.dtype).view(T, K)

    def to_matrix(left: Tensor, right: Tensor, weight: Tensor, second: tuple[Tensor, Tensor] | None = None) -> Tensor:
        out = weight.new_empty(weight.shape)
        tile = config.tile(x.device, "outer" if second is None else "pair", kind, weight.shape[2], side=G)
        outer.outer(left, right, offsets, order, out, tile, how, second=second, right_rows=plan.rows)
        return out

    dvalues = to_matrix(weighted_SG, grad, values)
    dgate_keys, glu, second = None, None, None
    if gate_keys is not None and dglu_gate_SG is not None:
        dgate_keys, glu = gate_keys.new_empty(gate_keys.shape), (dglu_gate_SG, matrices(gate_keys, x.dtype))
        second = (dglu_gate_SG, dgate_keys)
    dkeys = to_matrix(dup_SG, x, keys, second)
    dkey_bias = None if key_bias is None else key_bias.new_empty(E, G)
    if dkey_bias is not None:
        outer.sum_rows(dup_SG, offsets, dkey_bias)

    keys = matrices(keys, x.dtype)
    dx, tile = x.new_empty(T, D), config.tile(x.device, "one", kind, D, block_m, depth=G)
    for part, y in columns.blocks(x, S, D, tile.n):
        second = None if glu is None else (glu[0], glu[1][:, :, part])
        grouped.multiply(plan, dup_SG, keys[:, :, part], y, tile, how, second=second)
        combine.combine(y, plan.inverse, None, dx[:, part], K)
    return Gradients(dx, Units(dkeys, dvalues, dgate_keys, dkey_bias), dgate)
