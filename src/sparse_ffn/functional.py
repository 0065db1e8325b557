"""The stateless API: the ops that make sense by themselves, with their arguments checked.

The layers call the same ops without these checks. The ops check indices themselves, on the CPU only: elsewhere that
would wait for the device, so an index out of range there is an error of the device's own (or undefined).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.checks import check_choice, check_count, check_flag, check_floating, check_positive, check_tensor
from sparse_ffn.ops.activations import ACTIVATIONS
from sparse_ffn.ops.autocast import autocast_enabled, without_autocast
from sparse_ffn.ops.topk_ffn.reference import RANK_BY


def cvmm(
    x: Tensor,
    weight: Tensor,
    expert_index: Tensor,
    *,
    gather_index: Tensor | None = None,
    scatter_index: Tensor | None = None,
    reduction_weight: Tensor | None = None,
    n_out: int | None = None,
) -> Tensor:
    """Conditional vector-matrix multiplication: each row times its expert's matrix (arXiv 2310.10837, appendix B.1).

    out[scatter_index[s]] += reduction_weight[s] · x[gather_index[s]] @ weight[expert_index[s]]

    Args:
        x: [N, M] floating.
        weight: [E, M, L], any strides: a transposed view costs no copy.
        expert_index: int64 [S] in [0, E]; E names no expert: the slot is void, it adds 0 and reads no matrix.
        gather_index: int64 [S] in [0, N), the row of x that slot s reads; None: row s (then S = N).
        scatter_index: int64 [S] in [0, n_out), the row that slot s is added to; None: row s (then n_out = S). Rows
            that no slot names are zero.
        reduction_weight: [S] factors, floating; None: 1. A void slot's gets a gradient of 0.
        n_out: rows of the output; needed with ``scatter_index``.

    Returns:
        [n_out, L] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: no dense tensor, a wrong dtype, or ``n_out`` that is no int.
        ValueError: a wrong shape or device, or ``n_out`` below 0.
        IndexError: an index out of its range (checked on the CPU).
    """
    _check_float("x", x, (None, None))
    _check_float("weight", weight, (None, x.shape[1], None), "x", x)
    check_tensor("expert_index", expert_index)
    slots = expert_index.numel()
    _check_index("expert_index", expert_index, (slots,), x)
    if gather_index is None:
        _check_shape("expert_index (without gather_index)", expert_index, (x.shape[0],))
    else:
        _check_index("gather_index", gather_index, (slots,), x, "expert_index")
    if n_out is not None:
        n_out = check_count("n_out", n_out)
    if scatter_index is None:
        if n_out not in (None, slots):
            raise ValueError(f"n_out must be the number of slots, {slots}, without scatter_index, got {n_out}")
    else:
        if n_out is None:
            raise ValueError("n_out must be given with scatter_index")
        _check_index("scatter_index", scatter_index, (slots,), x, "expert_index")
    if reduction_weight is not None:
        _check_weight("reduction_weight", reduction_weight, (slots,), "expert_index", x)
    return ops.cvmm(
        x, weight, expert_index, gather=gather_index, scatter=scatter_index, reduction=reduction_weight, n_out=n_out
    )


def expert_ffn(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate: Tensor,
    *,
    gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Each token through the two-layer FFNs of its k experts: sum_j gate_j · values.T act(keys x) (Eq. 11).

    Args:
        x: [T, D] floating.
        keys: [E, G, D].
        values: [E, G, O].
        index: int64 [T, K] in [0, E], the experts of each token; an expert named twice counts twice, and E names none:
            such a slot is void, it adds 0 and reads no weights.
        gate: [T, K] floating, their weights; a void slot's gets a gradient of 0.
        gate_keys: [E, G, D]; with them the hidden units are act(gate_keys x) * (keys x + key_bias).
        key_bias: [E, G].
        activation: ``relu gelu gelu_tanh silu identity square squared_relu``.

    Returns:
        [T, O] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: no dense tensor, or a wrong dtype.
        ValueError: a wrong shape or device, or an unknown activation.
        IndexError: an index out of its range (checked on the CPU).
    """
    units = ops.Units(keys, values, gate_keys, key_bias)
    _check_units(x, units, 3, activation)
    check_tensor("index", index)
    _check_index("index", index, (x.shape[0], index.shape[-1] if index.dim() else 0), x)
    _check_weight("gate", gate, tuple(index.shape), "index", x)
    return ops.expert_ffn(x, units, index, gate, activation=activation)


def weighted_bag(values: Tensor, index: Tensor, weight: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """Weighted sums of gathered rows: out[n] = sum_j weight[n, j] · values[index[n, j]].

    Args:
        values: [F, O] floating.
        index: int64 [N, K] in [0, F); an index named twice counts twice.
        weight: [N, K] floating.
        sparse_grad: give ``values`` a sparse gradient of the rows that were read, each once and in ascending order (not
            under torch.compile). It is coalesced, but autograd does not keep that mark where it adds it to ``.grad``.

    Returns:
        [N, O] in the dtype of values (autocast's under autocast).

    Raises:
        TypeError: no dense tensor, or a wrong dtype.
        ValueError: a wrong shape or device.
        IndexError: an index out of its range (checked on the CPU).
    """
    _check_float("values", values, (None, None))
    _check_weight("weight", weight, (None, None), "", values, "values")
    _check_index("index", index, tuple(weight.shape), values, "weight", "values")
    return ops.weighted_bag(values, index, weight, sparse_grad=check_flag("sparse_grad", sparse_grad))


def product_key_topk(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the n² sums first[i] + second[j], exactly (arXiv 2310.10837, Eq. 8).

    Args:
        first: [..., n] floating scores of the first half's sub-keys.
        second: [..., n] of the second half's.
        k: 1 <= k <= n².

    Returns:
        The sums [..., k], largest first (NaN before infinity), differentiable, and their indices i·n + j, int64
        [..., k]. Ties go to the lower position in the k x k list of candidates. Pairs of an infinite and a minus
        infinite score, whose sum is NaN, are not looked for.

    Raises:
        TypeError: no dense tensor, or a wrong dtype.
        ValueError: shapes that differ, or k out of range.
    """
    _check_float("first", first, None)
    _check_float("second", second, None, like=first, of="first")
    if first.dtype != second.dtype:  # under autocast too, which casts what is multiplied
        raise TypeError(f"second has dtype {second.dtype}, first has {first.dtype}")
    if first.dim() == 0 or first.shape != second.shape:
        raise ValueError(f"first and second must have one shape [..., n], got {list(first.shape)} and "
                         f"{list(second.shape)}")  # fmt: skip
    k = check_positive("k", k, at_most=first.shape[-1] ** 2, limit="n²")
    n = first.shape[-1]
    with without_autocast(first):  # it would not stack the 16-bit dtype that it does not cast to
        scores = torch.stack((first, second), -2).reshape(math.prod(first.shape[:-1]), 1, 2, n)
    best, index = ops.product_key_topk(scores, k)
    return best.view(*first.shape[:-1], k), index.view(*first.shape[:-1], k)


def topk_ffn(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None,
    activation: str = "relu",
    norm_aware: bool = False,
    rank_by: str = "hidden",
) -> Tensor:
    """Two-layer FFN of which only the k hidden units of the largest |h| count (arXiv 2310.10837, Eq. 6-7).

    Args:
        x: [T, D] floating.
        keys: [F, D].
        values: [F, O].
        k: 1 <= k <= F.
        gate_keys: [F, D]; with them the hidden units are act(gate_keys x) * (keys x + key_bias).
        key_bias: [F].
        activation: ``relu gelu gelu_tanh silu identity square squared_relu``.
        norm_aware: rank by |h|·‖values‖.
        rank_by: ``"hidden"``, or with ``gate_keys`` ``"gate"``: rank by |act(gate_keys x)| in the place of |h|.

    Returns:
        [T, O] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: no dense tensor, or a wrong dtype.
        ValueError: a wrong shape or device, an unknown activation or ``rank_by``, ``"gate"`` without ``gate_keys``, or
            k out of range.
    """
    units = ops.Units(keys, values, gate_keys, key_bias)
    _check_units(x, units, 2, activation)
    check_choice("rank_by", rank_by, RANK_BY)
    if rank_by == "gate" and gate_keys is None:
        raise ValueError('rank_by = "gate" needs gate_keys')
    k = check_positive("k", k, at_most=keys.shape[0], limit="d_ff")
    norm_aware = check_flag("norm_aware", norm_aware)
    return ops.topk_ffn(x, units, k, activation=activation, norm_aware=norm_aware, rank_by=rank_by)


Shape = tuple[int | None, ...]
"""None is any size."""


def _check_float(
    name: str, x: Tensor, shape: Shape | None, fit: str = "", like: Tensor | None = None, of: str = "x"
) -> None:
    """Raise unless x is floating, of this shape, and on the device and (but for autocast) of the dtype of another.

    Autocast leaves fp64 alone, which then mixes with nothing.
    """
    check_floating(name, x)
    if shape is not None:
        _check_shape(name, x, shape, fit)
    if like is not None:
        _check_device(name, x, like, of)
        double = torch.float64 in (x.dtype, like.dtype)
        if x.dtype != like.dtype and (double or not autocast_enabled(x)):
            raise TypeError(f"{name} has dtype {x.dtype}, {of} has {like.dtype}")


def _check_shape(name: str, x: Tensor, shape: Shape, fit: str = "") -> None:
    """Raise unless x has this shape, so that it fits the argument ``fit``."""
    if x.dim() != len(shape):
        raise ValueError(f"{name} must have {len(shape)} dimensions, got shape {list(x.shape)}")
    wanted = [has if size is None else size for has, size in zip(x.shape, shape, strict=True)]
    if list(x.shape) != wanted:
        raise ValueError(f"{name} must have shape {wanted}{fit and f' to fit {fit}'}, got {list(x.shape)}")


def _check_device(name: str, x: Tensor, like: Tensor, of: str) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, {of} is on {like.device}")


def _check_units(x: Tensor, units: ops.Units, dim: int, activation: str) -> None:
    """Raise unless x [T, D] and the units' tensors, of which keys have ``dim`` dimensions, fit each other."""
    _check_float("x", x, (None, None))
    keys, values, gate_keys, key_bias = units
    _check_float("keys", keys, (*[None] * (dim - 1), x.shape[1]), "x", x)
    _check_float("values", values, (*keys.shape[:-1], None), "keys", x)
    if gate_keys is not None:
        _check_float("gate_keys", gate_keys, tuple(keys.shape), "keys", x)
    if key_bias is not None:
        _check_float("key_bias", key_bias, tuple(keys.shape[:-1]), "keys", x)
    check_choice("activation", activation, ACTIVATIONS)


def _check_index(name: str, index: Tensor, shape: Shape, like: Tensor, fit: str = "", of: str = "x") -> None:
    check_tensor(name, index)
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {str(index.dtype).removeprefix('torch.')}")
    _check_shape(name, index, shape, fit)
    _check_device(name, index, like, of)


def _check_weight(name: str, weight: Tensor, shape: Shape, fit: str, like: Tensor, of: str = "x") -> None:
    """Weights and gates have a dtype of their own, but share the device."""
    _check_float(name, weight, shape, fit)
    _check_device(name, weight, like, of)
