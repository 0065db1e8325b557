"""Expert FFN out of the Triton kernels: sort, grouped products, sums over a token's slots; no host wait."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import crossovers
from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.triton import columns, combine, config, decode, grouped, hidden, outer, routing
from sparse_ffn.backends.triton.decode import use_decode
from sparse_ffn.backends.triton.launch import cdiv, matrices, precision, rows
from sparse_ffn.ops.expert_ffn import single_units
from sparse_ffn.ops.expert_ffn.backend import Gradients, Saved
from sparse_ffn.ops.units import Units

# T tokens, K slots a token, S = T·K, E experts, G units of an expert, D d_model, O d_out; _S rows are sorted by expert


@on_device
def forward(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs."""
    if single_units.takes(experts):
        return single_units.forward(x, experts, index, gate, dropout_mask, activation)
    G = experts.keys.shape[1]
    up_SG = x.new_empty(index.numel(), G)
    glu_gate_SG = None if experts.gate_keys is None else torch.empty_like(up_SG)
    out, plan = _forward(x, experts, index, gate, dropout_mask, activation, up_SG, glu_gate_SG)
    return out, Saved(plan.order, plan.offsets, up_SG, glu_gate_SG)


@on_device
def inference(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> Tensor:
    """The output, nothing kept."""
    if single_units.takes(experts):
        return single_units.inference(x, experts, index, gate, dropout_mask, activation)
    keys, values, gate_keys, key_bias = experts
    most = crossovers.decode_tokens_on_gpu(x, keys, index.shape[1])
    if not (use_decode(index.numel(), keys.shape[0]) if most is None else x.shape[0] <= most):
        return _forward(x, experts, index, gate, dropout_mask, activation, None, None)[0]
    index = index.contiguous()
    h_SG = x.new_empty(index.numel(), keys.shape[1], dtype=torch.float32)
    y_SO = x.new_empty(index.numel(), values.shape[2], dtype=torch.float32)
    out = x.new_empty(x.shape[0], values.shape[2])
    scale = None if dropout_mask is None else dropout_mask.contiguous()
    decode.up_rows(rows(x), index, keys, gate_keys, key_bias, scale, h_SG, activation)
    decode.down_rows(h_SG, index, gate.contiguous(), values, y_SO)
    combine.combine(y_SO, None, None, out, index.shape[1])
    return out


def _forward(
    x: Tensor,
    experts: Units,
    index: Tensor,
    gate: Tensor,
    dropout_mask: Tensor | None,
    activation: str,
    up_SG: Tensor | None,
    glu_gate_SG: Tensor | None,
) -> tuple[Tensor, routing.Plan]:
    """The output, and the slots' plan; into up and glu_gate, if given, what the backward pass needs of the units."""
    keys, values, gate_keys, key_bias = experts
    (E, G, D), (T, K), O, S = keys.shape, gate.shape, values.shape[2], index.numel()
    how, x, gate = precision(x), rows(x), gate.contiguous()
    kind = config.arithmetic(x.dtype, how, x, keys, values, gate_keys)
    block_m = config.block_m(x.device, kind, S / max(E, 1))
    plan = routing.sort_slots(index, E, K, block_m, inverse=True)

    # ReLU's saved activations are the hidden units themselves
    is_up = up_SG is not None and activation == "relu" and gate_keys is None and dropout_mask is None
    h_SG = up_SG if is_up and up_SG is not None else x.new_empty(S, G)
    tile = config.tile(x.device, "one" if gate_keys is None else "two", kind, G, D, block_m)
    scale = None if dropout_mask is None else dropout_mask.contiguous()
    cast = (matrices(keys, x.dtype), None if gate_keys is None else matrices(gate_keys, x.dtype), key_bias)
    hidden.up(plan, x, *cast, scale, up_SG, glu_gate_SG, h_SG, activation, tile, how)
    del cast  # copies of fp32 weights
    values, out = matrices(values, x.dtype), x.new_empty(T, O)
    width = columns.width(x, S, O, G, columns.STEP)
    tile = config.tile(x.device, "one", kind, width, G, block_m, alone=True)
    for part, y in columns.blocks(x, S, O, width):
        grouped.multiply(plan, h_SG, values[:, :, part], y, tile, how)
        combine.combine(y, plan.inverse, gate, out[:, part], K)
    return out, plan


@on_device
def backward(
    grad: Tensor,
    x: Tensor,
    experts: Units,
    gate: Tensor,
    dropout_mask: Tensor | None,
    saved: Saved,
    needs_experts: bool,
    activation: str,
) -> Gradients:
    """The gradients."""
    if single_units.takes(experts):
        return single_units.backward(grad, x, experts, gate, dropout_mask, saved, needs_experts, activation)
    keys, values, gate_keys, key_bias = experts
    order, offsets, up_SG, glu_gate_SG = saved
    (E, G, D), (T, K), S = keys.shape, gate.shape, order.shape[0]
    how, x, grad = precision(x), rows(x), rows(grad)
    kind = config.arithmetic(x.dtype, how, x, grad, keys, values, gate_keys)
    mean = S / max(E, 1)
    block_m = config.block_m(x.device, kind, mean)
    plan = routing.plan(order, offsets, K, block_m, inverse=True)

    dup_SG, weighted_SG = torch.empty_like(up_SG), torch.empty_like(up_SG)
    dglu_gate_SG = None if glu_gate_SG is None else torch.empty_like(up_SG)
    tile = config.tile(x.device, "two", kind, G, grad.shape[1], block_m)
    dgates = x.new_empty(cdiv(G, tile.n), S, dtype=torch.float32)
    hidden.hidden_gradient(
        plan, grad, matrices(values, x.dtype), up_SG, glu_gate_SG,
        None if dropout_mask is None else dropout_mask.contiguous(), gate.contiguous(),
        dup_SG, dglu_gate_SG, weighted_SG, dgates, activation, tile, how,
    )  # fmt: skip

    def to_matrix(left: Tensor, right: Tensor, weight: Tensor, second: tuple[Tensor, Tensor] | None = None) -> Tensor:
        out = weight.new_empty(weight.shape)
        tile = config.tile(x.device, "outer" if second is None else "pair", kind, weight.shape[2], mean, side=G)
        outer.outer(left, right, offsets, order, out, tile, how, second=second, right_rows=plan.rows)
        return out

    dexperts, glu = None, None
    if needs_experts:
        dvalues = to_matrix(weighted_SG, grad, values)
        dgate_keys = None if gate_keys is None else gate_keys.new_empty(gate_keys.shape)
        second = None if dgate_keys is None or dglu_gate_SG is None else (dglu_gate_SG, dgate_keys)
        dkeys = to_matrix(dup_SG, x, keys, second)
        dkey_bias = None if key_bias is None else key_bias.new_empty(E, G)
        if dkey_bias is not None:
            outer.sum_rows(dup_SG, offsets, dkey_bias)
        dexperts = Units(dkeys, dvalues, dgate_keys, dkey_bias)

    if gate_keys is not None and dglu_gate_SG is not None:
        glu = (dglu_gate_SG, matrices(gate_keys, x.dtype))
    keys, dx, dgate = matrices(keys, x.dtype), x.new_empty(T, D), gate.new_empty(T, K)
    width = columns.width(x, S, D, G if glu is None else 2 * G, columns.STEP)
    tile = config.tile(x.device, "one", kind, width, G, block_m, alone=True)
    for part, y in columns.blocks(x, S, D, width):
        second = None if glu is None else (glu[0], glu[1][:, :, part])
        grouped.multiply(plan, dup_SG, keys[:, :, part], y, tile, how, second=second)
        combine.combine(y, plan.inverse, None, dx[:, part], K, dots=None if part.start else (dgates, dgate))
    if not D:  # there was no block
        combine.combine(dup_SG[:, :0], plan.inverse, None, dx, K, dots=(dgates, dgate))
    return Gradients(dx, dexperts, dgate)
