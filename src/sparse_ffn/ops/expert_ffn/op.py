"""Expert FFN: the torch.library op, its fake, its autograd, and the choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_dtype, cast, weights_for
from sparse_ffn.ops.expert_ffn import reference
from sparse_ffn.ops.indices import check_indices, checked
from sparse_ffn.ops.library import (
    absent,
    define,
    implementation,
    refuse_double_backward,
    set_autograd,
    under_transforms,
)
from sparse_ffn.ops.units import Units


def expert_ffn(
    x: Tensor,
    experts: Units,
    index: Tensor,
    gate: Tensor,
    *,
    dropout_mask: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """y[t] = sum_j gate[t, j] * values[e].T h(x[t]; e) with e = index[t, j]; arguments are trusted to fit.

    Shapes: x [T, D], experts of keys [E, G, D] and values [E, G, O], index int64 [T, K], gate [T, K] (its own dtype),
    dropout_mask [T, K, G] (dropout's multiplier, no gradient); result [T, O] in x's dtype or autocast's. A slot whose
    index is E is void: it adds 0, reads no weights, and its gate's gradient is 0.
    """
    dtype = autocast_dtype(x)
    x, dropout_mask = cast(x, dtype), cast(dropout_mask, dtype)
    chosen = choose(x)
    experts = Units(*weights_for(chosen, dtype, *experts))
    keys, values, gate_keys, key_bias = experts
    if chosen == "reference":
        index = checked("index", index, keys.shape[0], True)
        return reference.expert_ffn(x, experts, index, gate, dropout_mask, activation)
    arguments = (x, keys, values, index, gate, gate_keys, key_bias, dropout_mask, activation, chosen)
    trained = (x, keys, values, gate, gate_keys, key_bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)
    if wanted or under_transforms():
        out: Tensor = _forward(*arguments)[0]
    else:
        out = _inference(*arguments)
    return out


def _check_index(x: Tensor, keys: Tensor, values: Tensor, index: Tensor, *rest: Any) -> None:
    check_indices(rest[-1], ("index", index, keys.shape[0], True))


def _inference_kernel(*args: Any) -> Tensor:
    _check_index(*args)
    out: Tensor = implementation("expert_ffn", args[-1]).inference(*args[:-1])
    return out


def _inference_fake(*args: Any) -> Tensor:
    return _forward_fake(*args)[0]


def _forward_kernel(*args: Any) -> tuple[Tensor, ...]:
    _check_index(*args)
    out: tuple[Tensor, ...] = implementation("expert_ffn", args[-1]).forward(*args[:-1])
    return out


def _forward_fake(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    activation: str,
    backend: str,
) -> tuple[Tensor, ...]:
    slots, size = index.shape[0] * index.shape[1], keys.shape[1]
    z = x.new_empty(slots, size)
    other = absent(x) if gate_keys is None else x.new_empty(slots, size)
    order = index.new_empty(slots, dtype=torch.int32)
    return (
        x.new_empty(x.shape[0], values.shape[2]),
        z,
        other,
        order,
        index.new_empty(keys.shape[0] + 1, dtype=torch.int32),
    )


def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    grad, *rest = args[:-1]
    grad = grad.contiguous()  # y.sum() sends an expanded one
    out: tuple[Tensor, ...] = implementation("expert_ffn", args[-1]).backward(grad, *rest)
    return out


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    present = (x, keys, values, gate, gate_keys, key_bias)
    return tuple(absent(x) if a is None else a.new_empty(a.shape) for a in present)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, keys, values, _, gate, gate_keys, key_bias, dropout_mask, activation, chosen = inputs
    ctx.save_for_backward(x, keys, values, gate, gate_keys, key_bias, dropout_mask, *output[1:])
    ctx.options = activation, chosen
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    dx, dkeys, dvalues, dgate, dgate_keys, dkey_bias = _backward(grad, *saved, *ctx.options)
    gate_keys, key_bias = saved[4], saved[5]
    return (
        *(dx, dkeys, dvalues, None, dgate),
        None if gate_keys is None else dgate_keys,
        None if key_bias is None else dkey_bias,
        *(None, None, None),
    )


_forward = define(
    "expert_ffn(Tensor x, Tensor keys, Tensor values, Tensor index, Tensor gate, Tensor? gate_keys, Tensor? key_bias, "
    "Tensor? dropout_mask, str activation, str backend) "
    "-> (Tensor out, Tensor z, Tensor other, Tensor order, Tensor offsets)",
    _forward_kernel,
    _forward_fake,
)
_backward = define(
    "expert_ffn_backward(Tensor grad, Tensor x, Tensor keys, Tensor values, Tensor gate, Tensor? gate_keys, "
    "Tensor? key_bias, Tensor? dropout_mask, Tensor z, Tensor other, Tensor order, Tensor offsets, str activation, "
    "str backend) -> (Tensor dx, Tensor dkeys, Tensor dvalues, Tensor dgate, Tensor dgate_keys, Tensor dkey_bias)",
    _backward_kernel,
    _backward_fake,
)
_inference = define(
    "expert_ffn_inference(Tensor x, Tensor keys, Tensor values, Tensor index, Tensor gate, Tensor? gate_keys, "
    "Tensor? key_bias, Tensor? dropout_mask, str activation, str backend) -> Tensor",
    _inference_kernel,
    _inference_fake,
)
_forward = set_autograd(_forward, _autograd, _setup_context)
_backward = refuse_double_backward(_backward)
