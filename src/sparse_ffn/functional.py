"""The stateless API: one function for each core, with its arguments checked.

The layers call the same ops without these checks. The ops check indices themselves, on the CPU only: elsewhere that
would wait for the device, so an index out of range there is an error of the device's own (or undefined).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.checks import check_choice, check_count, check_flag, check_floating, check_positive, check_tensor
from sparse_ffn.ops.activations import ACTIVATIONS
from sparse_ffn.ops.autocast import autocast_enabled


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
    _check_float("x", x, 2)
    _check_float("weight", weight, 3, like=x)
    check_tensor("expert_index", expert_index)
    slots = expert_index.numel()
    _check_index("expert_index", expert_index, (slots,), x)
    _check_shape("weight", weight, (weight.shape[0], x.shape[1], weight.shape[2]), "x")
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
        _check_weight("reduction_weight", reduction_weight, 1, x)
        _check_shape("reduction_weight", reduction_weight, (slots,), "expert_index")
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
        activation: ``relu gelu gelu_tanh silu identity squared_relu``.

    Returns:
        [T, O] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: no dense tensor, or a wrong dtype.
        ValueError: a wrong shape or device, or an unknown activation.
        IndexError: an index out of its range (checked on the CPU).
    """
    _check_float("x", x, 2)
    _check_float("keys", keys, 3, like=x)
    _check_float("values", values, 3, like=x)
    n_experts, size = keys.shape[:2]
    _check_shape("keys", keys, (n_experts, size, x.shape[1]), "x")
    _check_shape("values", values, (n_experts, size, values.shape[2]), "keys")
    _check_units(gate_keys, key_bias, keys, x)
    check_tensor("index", index)
    _check_index("index", index, (x.shape[0], index.shape[-1] if index.dim() else 0), x)
    _check_weight("gate", gate, 2, x)
    _check_shape("gate", gate, tuple(index.shape), "index")
    check_choice("activation", activation, ACTIVATIONS)
    return ops.expert_ffn(x, ops.Units(keys, values, gate_keys, key_bias), index, gate, activation=activation)


def weighted_bag(values: Tensor, index: Tensor, weight: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """Weighted sums of gathered rows: out[n] = sum_j weight[n, j] · values[index[n, j]].

    Args:
        values: [F, O] floating.
        index: int64 [N, K] in [0, F); an index named twice counts twice.
        weight: [N, K] floating.
        sparse_grad: give ``values`` a coalesced sparse gradient of the rows that were read (not under torch.compile).

    Returns:
        [N, O] in the dtype of values (autocast's under autocast).

    Raises:
        TypeError: no dense tensor, or a wrong dtype.
        ValueError: a wrong shape or device.
        IndexError: an index out of its range (checked on the CPU).
    """
    _check_float("values", values, 2)
    _check_weight("weight", weight, 2, values, "values")
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
        [..., k]. Ties go to the lower position in the k x k list of candidates.

    Raises:
        TypeError: no dense tensor, or a wrong dtype.
        ValueError: shapes that differ, or k out of range.
    """
    _check_float("first", first, None)
    _check_float("second", second, None, like=first, first="first")
    if first.dim() == 0 or first.shape != second.shape:
        raise ValueError(f"first and second must have one shape [..., n], got {list(first.shape)} and "
                         f"{list(second.shape)}")  # fmt: skip
    k = check_positive("k", k, at_most=first.shape[-1] ** 2, limit="n²")
    n = first.shape[-1]
    scores = torch.stack((first, second), -2).reshape(first.shape[:-1].numel(), 1, 2, n)
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
) -> Tensor:
    """Two-layer FFN of which only the k hidden units of the largest |h| count (arXiv 2310.10837, Eq. 6-7).

    Args:
        x: [T, D] floating.
        keys: [F, D].
        values: [F, O].
        k: 1 <= k <= F.
        gate_keys: [F, D]; with them the hidden units are act(gate_keys x) * (keys x + key_bias).
        key_bias: [F].
        activation: ``relu gelu gelu_tanh silu identity squared_relu``.
        norm_aware: rank by |h|·‖values‖.

    Returns:
        [T, O] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: no dense tensor, or a wrong dtype.
        ValueError: a wrong shape or device, an unknown activation, or k out of range.
    """
    _check_float("x", x, 2)
    _check_float("keys", keys, 2, like=x)
    _check_float("values", values, 2, like=x)
    _check_shape("keys", keys, (keys.shape[0], x.shape[1]), "x")
    _check_shape("values", values, (keys.shape[0], values.shape[1]), "keys")
    _check_units(gate_keys, key_bias, keys, x)
    check_choice("activation", activation, ACTIVATIONS)
    k = check_positive("k", k, at_most=keys.shape[0], limit="d_ff")
    norm_aware = check_flag("norm_aware", norm_aware)
    units = ops.Units(keys, values, gate_keys, key_bias)
    return ops.topk_ffn(x, units, k, activation=activation, norm_aware=norm_aware)


def _check_weight(name: str, weight: Tensor, dim: int, other: Tensor, first: str = "x") -> None:
    """Weights and gates have a dtype of their own, but share the device."""
    _check_float(name, weight, dim)
    if weight.device != other.device:
        raise ValueError(f"{name} is on {weight.device}, {first} is on {other.device}")


def _check_float(name: str, x: Tensor, dim: int | None, like: Tensor | None = None, first: str = "x") -> None:
    check_floating(name, x)
    if dim is not None and x.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {list(x.shape)}")
    if like is None:
        return
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, {first} is on {like.device}")
    if x.dtype != like.dtype and not autocast_enabled(x):
        raise TypeError(f"{name} has dtype {x.dtype}, {first} has {like.dtype}")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], other: str | None = None) -> None:
    if tuple(x.shape) != shape:
        to_fit = "" if other is None else f" to fit {other}"
        raise ValueError(f"{name} must have shape {list(shape)}{to_fit}, got {list(x.shape)}")


def _check_units(gate_keys: Tensor | None, key_bias: Tensor | None, keys: Tensor, x: Tensor) -> None:
    if gate_keys is not None:
        _check_float("gate_keys", gate_keys, keys.dim(), like=x)
        _check_shape("gate_keys", gate_keys, tuple(keys.shape), "keys")
    if key_bias is not None:
        _check_float("key_bias", key_bias, keys.dim() - 1, like=x)
        _check_shape("key_bias", key_bias, tuple(keys.shape[:-1]), "keys")


def _check_index(
    name: str, index: Tensor, shape: tuple[int, ...], like: Tensor, other: str | None = None, first: str = "x"
) -> None:
    check_tensor(name, index)
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {str(index.dtype).removeprefix('torch.')}")
    _check_shape(name, index, shape, other)
    if index.device != like.device:
        raise ValueError(f"{name} is on {index.device}, {first} is on {like.device}")
