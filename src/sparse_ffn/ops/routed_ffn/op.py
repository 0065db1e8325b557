"""Routed FFN: a MoE layer whose router is a linear map, top-k and a gate, as one torch.library op of the CPU core.

The op saves a pass over x, its gradient and the scores [T, E]; where the core cannot compute, a layer runs its router
and ``expert_ffn`` one after the other, which is the same function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_enabled
from sparse_ffn.ops.library import absent, define, refuse_double_backward, set_autograd
from sparse_ffn.ops.routed_ffn import cpu
from sparse_ffn.ops.units import Units


def routed_ffn_available(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    experts: Units,
) -> bool:
    """Whether the op computes this input now: fp32 or bf16 throughout (a router's bias fp32), on the CPU core."""
    dtype = x.dtype
    return (
        dtype in (torch.float32, torch.bfloat16)
        and router_weight.dtype == dtype
        and all(t is None or t.dtype == dtype for t in experts)
        and (router_bias is None or router_bias.dtype == torch.float32)
        and x.shape[0] > 0
        and not autocast_enabled(x)
        and choose(x) == "cpu"
    )


def routed_ffn(
    x: Tensor,
    router_weight: Tensor,
    experts: Units,
    *,
    k: int,
    gate_function: str,
    router_bias: Tensor | None = None,
    mask: Tensor | None = None,
    groups: int = 1,
    dropout_mask: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.routed_ffn`` computes: out, index, gate, softmax sums; arguments are trusted to fit.

    Shapes: x [T, D], router_weight [R, D], experts of keys [E, G, D] and values [E, G, O], router_bias fp32 [R]
    (ranking only), mask bool [T], dropout_mask [T, K, G]; results [T, O], int64 [T, K], fp32 [T, K], fp32 [groups, R].
    A router may have more rows than there are experts: a slot that selects one of those from E on is void.
    """
    found: tuple[Tensor, ...] = _forward(
        x, router_weight, router_bias, mask, *experts, dropout_mask, k, gate_function, groups, activation
    )
    return found[0], found[1], found[2], found[3]


def routed_ffn_inference(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    experts: Units,
    k: int,
    gate_function: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Output and index of ``routed_ffn``, without a gradient."""
    found: tuple[Tensor, Tensor] = _inference(x, router_weight, router_bias, *experts, k, gate_function, activation)
    return found


def _forward_fake(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    k: int,
    gate_function: str,
    groups: int,
    activation: str,
) -> tuple[Tensor, ...]:
    tokens, (n_experts, size, d_out) = x.shape[0], values.shape
    z = x.new_empty(tokens * k, size)
    return (
        x.new_empty(tokens, d_out),
        x.new_empty(tokens, k, dtype=torch.int64),
        x.new_empty(tokens, k, dtype=torch.float32),
        x.new_empty(groups, router_weight.shape[0], dtype=torch.float32),
        z,
        absent(x) if gate_keys is None else torch.empty_like(z),
        x.new_empty(tokens * k, dtype=torch.int32),
        x.new_empty(n_experts + 1, dtype=torch.int32),
    )


def _inference_fake(
    x: Tensor, router_weight: Tensor, router_bias: Tensor | None, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], values.shape[2]), x.new_empty(x.shape[0], rest[2], dtype=torch.int64)


def _backward_fake(
    grad: Tensor,
    grad_gate: Tensor | None,
    grad_sums: Tensor | None,
    x: Tensor,
    router_weight: Tensor,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    present = (x, router_weight, keys, values, gate_keys, key_bias)
    return tuple(absent(x) if t is None else t.new_empty(t.shape) for t in present)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, router_weight, _, mask, keys, values, gate_keys, key_bias, dropout_mask, _, gate_function, _, activation = inputs
    _, index, gate, _, *saved = output
    ctx.save_for_backward(x, router_weight, mask, keys, values, gate_keys, key_bias, dropout_mask, index, gate, *saved)
    ctx.options = gate_function, activation
    ctx.mark_non_differentiable(index, *saved)
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad: Tensor | None, _: Any, grad_gate: Tensor | None, grad_sums: Tensor | None, *unused: Any
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    x, values = saved[0], saved[4]
    if grad is None:
        if grad_gate is None and grad_sums is None:
            return (None,) * 13
        grad = x.new_zeros(x.shape[0], values.shape[2])
    dx, drouter, dkeys, dvalues, dgate_keys, dkey_bias = _backward(grad, grad_gate, grad_sums, *saved, *ctx.options)
    return (
        *(dx, drouter, None, None, dkeys, dvalues),
        None if saved[5] is None else dgate_keys,
        None if saved[6] is None else dkey_bias,
        *(None,) * 5,
    )


_PARTS = "Tensor keys, Tensor values, Tensor? gate_keys, Tensor? key_bias"
_forward = define(
    f"routed_ffn(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor? mask, {_PARTS}, Tensor? dropout_mask, "
    "SymInt k, str gate_function, SymInt groups, str activation) -> (Tensor out, Tensor index, Tensor gate, "
    "Tensor sums, Tensor z, Tensor other, Tensor order, Tensor offsets)",
    cpu.forward,
    _forward_fake,
)
_backward = define(
    "routed_ffn_backward(Tensor grad, Tensor? grad_gate, Tensor? grad_sums, Tensor x, Tensor router_weight, "
    f"Tensor? mask, {_PARTS}, Tensor? dropout_mask, Tensor index, Tensor gate, Tensor z, Tensor other, Tensor order, "
    "Tensor offsets, str gate_function, str activation) -> (Tensor dx, Tensor drouter_weight, "
    "Tensor dkeys, Tensor dvalues, Tensor dgate_keys, Tensor dkey_bias)",
    cpu.backward,
    _backward_fake,
)
_inference = define(
    f"routed_ffn_inference(Tensor x, Tensor router_weight, Tensor? router_bias, {_PARTS}, SymInt k, str gate_function, "
    "str activation) -> (Tensor out, Tensor index)",
    cpu.inference,
    _inference_fake,
)
_forward = set_autograd(_forward, _autograd, _setup_context)
_backward = refuse_double_backward(_backward)
