"""Top-k FFN in the CPU core: torch multiplies by the keys, the core selects, then only the selected units are touched.

Where so many units are selected that reading their rows one by one takes longer than a dense product, the products are
torch's, of matrices with zeros: see ``gathers``. Kept are the selected units' pre-activations, and a bit for each unit.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.backends.cpu import ACTIVATIONS
from sparse_ffn.backends.layout import contiguous
from sparse_ffn.ops.activations import GIVE_ZEROS, SKIP_TOKENS
from sparse_ffn.ops.products import linear, product, slow_dtypes, supported
from sparse_ffn.ops.topk_ffn import by_products
from sparse_ffn.ops.topk_ffn.backend import Gradients, Saved
from sparse_ffn.ops.units import Units
from sparse_ffn.ops.weighted_bag import cpu as bag

# T tokens, K selected units, F hidden units, D d_model, O d_out

# Measured of one thread, with T from 1 to 1024. Multiply-adds per second of torch's products, of fp32 on Zen 5 and on
# Sapphire Rapids (54e9, 75e9), of 16 bits on the one and, with AMX, on the other; and bytes per second at which these
# bring a matrix into their own layout, which is most of their time with few tokens.
PRODUCTS, LAYOUT = {"fp32": 60e9, "half": 240e9, "amx": 480e9}, 13e9
# Bytes per second of gathered rows; in the backward pass multiply-adds, bytes written for every unit, and seconds that
# its calls take beyond those of dense products.
GATHER = 75e9
GATHER_BACK, WRITE, CALLS = 35e9, 32e9, 75e-6
FEW = 1 << 17
"""Multiply-adds of a gather up to which it is taken in any case: it takes less time than a call."""


def gathers(T: int, n_units: int, k: int, width: int, dtype: torch.dtype) -> bool:
    """Whether reading the k selected rows of each token is predicted to be faster than a dense product."""
    return T * k * width <= FEW or T * k * dtype.itemsize / GATHER < _dense(T, n_units, dtype)


def gathers_back(T: int, n_units: int, k: int, width: int, dtype: torch.dtype) -> bool:
    """The same for the backward pass, which writes a row for every unit in any case."""
    if T * k * width <= FEW:
        return True
    return T * k / GATHER_BACK + n_units * dtype.itemsize / WRITE + CALLS / width < _dense(T, n_units, dtype)


def _dense(T: int, n_units: int, dtype: torch.dtype) -> float:
    """Seconds of a dense product for a column of the matrix."""
    return T * n_units / _rate(dtype) + n_units * dtype.itemsize / LAYOUT


@functools.cache
def _rate(dtype: torch.dtype) -> float:
    if dtype == torch.float32 or dtype in slow_dtypes():
        return PRODUCTS["fp32"]
    return PRODUCTS["amx" if supported("amx_tile") else "half"]


def forward(
    x: Tensor, units: Units, k: int, dropout_mask: Tensor | None, activation: str, norm_aware: bool, rank_by: str
) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs."""
    T, F = x.shape[0], units.keys.shape[0]
    saved = Saved(
        cpu.empty(T, (F + 31) // 32, dtype=torch.int32),
        cpu.empty(T, k, dtype=x.dtype),
        None if units.gate_keys is None else cpu.empty(T, k, dtype=x.dtype),
    )
    return _output(x, units, k, dropout_mask, activation, norm_aware, rank_by, saved), saved


def inference(
    x: Tensor, units: Units, k: int, dropout_mask: Tensor | None, activation: str, norm_aware: bool, rank_by: str
) -> Tensor:
    """The output, nothing kept."""
    return _output(x, units, k, dropout_mask, activation, norm_aware, rank_by, (None, None, None))


def _output(
    x: Tensor,
    units: Units,
    k: int,
    dropout_mask: Tensor | None,
    activation: str,
    norm_aware: bool,
    rank_by: str,
    saved: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    keys, values, gate_keys, key_bias = units
    T, (F, O) = x.shape[0], values.shape
    glu_gate_TF = None if gate_keys is None else linear(x, gate_keys)
    norm_F = values.float().norm(dim=1) if norm_aware else None
    skips = T <= SKIP_TOKENS and activation in GIVE_ZEROS and saved[0] is None
    if rank_by == "gate":
        assert glu_gate_TF is not None
        ranked = (glu_gate_TF, None, contiguous(dropout_mask), norm_F)
        index, h_TK = _by_gate(x, keys, key_bias, ranked, k, activation, saved)
        if gathers(T, F, k, O, x.dtype):
            return bag.forward(values, index, h_TK, skips=skips)
        return product(by_products.matrix(h_TK, index, F), values)
    up_TF = _up(x, keys, key_bias, glu_gate_TF if skips else None)
    selected = (up_TF, glu_gate_TF, contiguous(dropout_mask), norm_F)
    if gathers(T, F, k, O, x.dtype):
        index, kept = cpu.empty(T, k, dtype=torch.int64), cpu.empty(T, k, dtype=x.dtype)
        cpu.call("topk_hidden_forward", (*selected, index, kept, None, *saved), ACTIVATIONS[activation], k)
        return bag.forward(values, index, kept, skips=skips)
    h_TF = cpu.empty(T, F, dtype=x.dtype)
    cpu.call("topk_hidden_forward", (*selected, None, None, h_TF, *saved), ACTIVATIONS[activation], k)
    return product(h_TF, values)


def _by_gate(
    x: Tensor,
    keys: Tensor,
    key_bias: Tensor | None,
    ranked: tuple[Tensor | None, ...],
    k: int,
    activation: str,
    saved: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """The units of the largest gates, ascending, and their h: the core takes gates for the units of a plain FFN."""
    T = x.shape[0]
    bits, up, glu_gate = saved
    index, gate_TK = cpu.empty(T, k, dtype=torch.int64), cpu.empty(T, k, dtype=x.dtype)
    cpu.call("topk_hidden_forward", (*ranked, index, gate_TK, None, bits, glu_gate, None), ACTIVATIONS[activation], k)
    up_TK = _selected_up(x, keys, key_bias, index)
    if up is not None:
        up.copy_(up_TK)
    return index, gate_TK.mul_(up_TK)


def _selected_up(x: Tensor, keys: Tensor, key_bias: Tensor | None, index: Tensor) -> Tensor:
    """What the units ``index`` [T, K] see, keys x + key_bias."""
    T, (F, D) = x.shape[0], keys.shape
    if not gathers(T, F, index.shape[1], D, x.dtype):
        return linear(x, keys, key_bias).gather(1, index)
    up_TK = bag.dot_products(x, keys, index)
    return up_TK if key_bias is None else up_TK.add_(key_bias[index])


def _up(x: Tensor, keys: Tensor, key_bias: Tensor | None, closing: Tensor | None) -> Tensor:
    """What all units see [T, F]. Of one token 0 where ``closing``, a gate that may give zero, does: it is not read."""
    if x.shape[0] != 1 or closing is None or keys.numel() <= FEW:
        return linear(x, keys, key_bias)
    index = (~(closing <= 0)).nonzero()[:, 1].unsqueeze(0)
    return torch.zeros_like(closing).scatter_(1, index, _selected_up(x, keys, key_bias, index))


def backward(
    grad: Tensor,
    x: Tensor,
    units: Units,
    dropout_mask: Tensor | None,
    saved: Saved,
    needs_units: bool,
    activation: str,
) -> Gradients:
    """The gradients."""
    T, k = saved.up.shape
    keys, values, gate_keys, key_bias = units
    F, O = values.shape
    if gathers_back(T, F, k, O, x.dtype):
        index = cpu.empty(T, k, dtype=torch.int64)
        cpu.call("topk_index", (saved.selected, index), F)
        listed = saved._replace(selected=index)
        return by_products.backward(_Bags(index), grad, x, units, dropout_mask, listed, needs_units, activation)
    h_TF, dh_TF = cpu.empty(T, F, dtype=x.dtype), product(grad, values.t())
    dglu_gate_TF = None if gate_keys is None else cpu.empty(T, F, dtype=x.dtype)
    tensors = (*saved, contiguous(dropout_mask), dh_TF, h_TF, dh_TF, dglu_gate_TF)
    cpu.call("topk_hidden_backward", tensors, ACTIVATIONS[activation])
    dup_TF = dh_TF
    dx = product(dup_TF, keys)
    if gate_keys is not None and dglu_gate_TF is not None:
        dx.add_(product(dglu_gate_TF, gate_keys))
    if not needs_units:
        return Gradients(dx, None)
    dvalues, dkeys = product(h_TF.t(), grad), product(dup_TF.t(), x)
    dgate_keys = None if dglu_gate_TF is None else product(dglu_gate_TF.t(), x)
    return Gradients(dx, Units(dkeys, dvalues, dgate_keys, None if key_bias is None else dup_TF.sum(0)))


class _Bags:
    """Products row by row."""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def down_backward(self, grad: Tensor, values: Tensor, h: Tensor, needs: bool) -> tuple[Tensor | None, Tensor]:
        return bag.backward(grad, values, self.index, h, needs)

    def up_backward(self, dup: Tensor, keys: Tensor, x: Tensor, needs: bool) -> tuple[Tensor, Tensor | None]:
        dx = bag.forward(keys, self.index, dup)
        return dx, bag.values_backward(x, keys, self.index, dup) if needs else None

    def sums(self, dup: Tensor, bias: Tensor) -> Tensor:
        total = torch.zeros(bias.shape[0], dtype=torch.float32, device="cpu")
        return total.index_add_(0, self.index.flatten(), dup.flatten().float()).to(bias.dtype)
