"""Top-k FFN: the torch.library op, its fake, its autograd, and the choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_dtype, cast, weights_for
from sparse_ffn.ops.library import absent, define, implementation, refuse_double_backward, set_autograd
from sparse_ffn.ops.topk_ffn import reference
from sparse_ffn.ops.units import Units


def topk_ffn(
    x: Tensor,
    units: Units,
    k: int,
    *,
    dropout_mask: Tensor | None = None,
    activation: str = "relu",
    norm_aware: bool = False,
) -> Tensor:
    """Two-layer FFN of which only the k hidden units of the largest |h| count; arguments are trusted to fit.

    Shapes: x [T, D], units of keys [F, D] and values [F, O], dropout_mask [T, F] (dropout's multiplier, applied before
    the selection, no gradient); result [T, O] in x's dtype or autocast's.
    """
    dtype = autocast_dtype(x)
    x, dropout_mask = cast(x, dtype), cast(dropout_mask, dtype)
    chosen = choose(x)
    units = Units(*weights_for(chosen, dtype, *units))
    keys, values, gate_keys, key_bias = units
    if chosen == "reference":
        return reference.topk_ffn(x, units, k, dropout_mask, activation, norm_aware)
    out: Tensor = _forward(x, keys, values, k, gate_keys, key_bias, dropout_mask, activation, norm_aware, chosen)[0]
    return out


def _forward_kernel(*args: Any) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = implementation("topk_ffn", args[-1]).forward(*args[:-1])
    return out


def _forward_fake(
    x: Tensor, keys: Tensor, values: Tensor, k: int, gate_keys: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    selected = x.new_empty(x.shape[0], k)
    other = absent(x) if gate_keys is None else torch.empty_like(selected)
    index = x.new_empty(x.shape[0], k, dtype=torch.int32)
    return x.new_empty(x.shape[0], values.shape[1]), index, selected, other


def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    grad, *rest = args[:-1]
    out: tuple[Tensor, ...] = implementation("topk_ffn", args[-1]).backward(grad.contiguous(), *rest)
    return out


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    present = (x, keys, values, gate_keys, key_bias)
    return tuple(absent(x) if a is None else a.new_empty(a.shape) for a in present)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, keys, values, _, gate_keys, key_bias, dropout_mask, activation, _, chosen = inputs
    ctx.save_for_backward(x, keys, values, gate_keys, key_bias, dropout_mask, *output[1:])
    ctx.options = activation, chosen
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    dx, dkeys, dvalues, dgate_keys, dkey_bias = _backward(grad, *saved, *ctx.options)
    gate_keys, key_bias = saved[3], saved[4]
    return (
        *(dx, dkeys, dvalues, None),
        None if gate_keys is None else dgate_keys,
        None if key_bias is None else dkey_bias,
        *(None, None, None, None),
    )


_forward = define(
    "topk_ffn(Tensor x, Tensor keys, Tensor values, int k, Tensor? gate_keys, Tensor? key_bias, Tensor? dropout_mask, "
    "str activation, bool norm_aware, str backend) -> (Tensor out, Tensor index, Tensor z, Tensor other)",
    _forward_kernel,
    _forward_fake,
)
_backward = define(
    "topk_ffn_backward(Tensor grad, Tensor x, Tensor keys, Tensor values, Tensor? gate_keys, Tensor? key_bias, "
    "Tensor? dropout_mask, Tensor index, Tensor z, Tensor other, str activation, str backend) "
    "-> (Tensor dx, Tensor dkeys, Tensor dvalues, Tensor dgate_keys, Tensor dkey_bias)",
    _backward_kernel,
    _backward_fake,
)
_forward = set_autograd(_forward, _autograd, _setup_context)
_backward = refuse_double_backward(_backward)
