"""Top-k FFN out of the Triton kernels: select fused after torch's product, then only the selected units' rows.

Where so many units are selected that reading their rows one by one takes longer than a dense product, the products
are dense ones of matrices with zeros: see ``use_gather``. Saved are index and pre-activations of the selected units. What
has a number for every token and hidden unit exists for a block of tokens only, see ``blocks``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.backends.triton import bag, config, segments, topk
from sparse_ffn.backends.triton.launch import on_device, precision, rows
from sparse_ffn.ops.activations import hidden, hidden_backward
from sparse_ffn.ops.autocast import cast
from sparse_ffn.ops.library import absent
from sparse_ffn.ops.select import stable_topk

# T tokens, K selected units, F hidden units, D d_model, O d_out

# Of an H100, from its data sheet and other kernels' rates, not measured here: sustained operations per second of dense
# products, bytes per second out of the second-level cache (gathered rows) and out of the memory.
PRODUCTS = {"half": 600e12, "tf32": 300e12, "fp32": 50e12}
CACHE, MEMORY = 5.5e12, 3.0e12
MAX_BYTES, MIN_TOKENS = 64 << 20, 128  # of a block; guesses, not measured


def use_gather(x: Tensor, n_units: int, k: int) -> bool:
    """Whether reading the k selected rows of each token is predicted to be faster than a dense product.

    Both times for one column of the values. For 16 bits and many tokens that is k < 0.92 % of d_ff.
    """
    T, size = x.shape[0], x.element_size()
    rate = PRODUCTS[config.arithmetic(x.dtype, precision(x))]
    dense = max(2 * T * n_units / rate, n_units * size / MEMORY)
    return max(T * k * size / CACHE, min(n_units, T * k) * size / MEMORY) < dense


def blocks(x: Tensor, n_units: int) -> Iterator[slice]:
    """Blocks of tokens: a [tokens, hidden units] takes at most ``MAX_BYTES``, unless ``MIN_TOKENS`` take more."""
    size = x.element_size() if topk.fits(n_units) else 8  # beyond, what is sorted is fp64
    step = max(MAX_BYTES // (n_units * size), MIN_TOKENS)
    yield from (slice(begin, begin + step) for begin in range(0, max(x.shape[0], 1), step))


@on_device
def forward(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    activation: str,
    norm_aware: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [T, O]; the selected units int32 [T, K], their z and, for a GLU, their other half [T, K]."""
    sparse = use_gather(x, keys.shape[0], k)
    weights = (keys.to(x.dtype), values if sparse else values.to(x.dtype))
    units = (cast(gate_keys, x.dtype), cast(key_bias, x.dtype))
    norm_F = torch.linalg.vector_norm(values, dim=1, dtype=torch.float32) if norm_aware else None
    select = _select if topk.fits(keys.shape[0]) else _sorted
    found = []
    for part in blocks(x, keys.shape[0]):
        scale = None if dropout_mask is None else dropout_mask[part]
        h_TK, *saved = select(x[part], weights[0], k, *units, scale, activation, norm_F)
        found.append((_product(weights[1], saved[0], h_TK, sparse), *saved))
    out, index, z_TK, other_TK = map(_joined, zip(*found, strict=True))
    return out, index, z_TK, other_TK


def _units(x: Tensor, keys: Tensor, gate_keys: Tensor | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What goes into the activation, and the other half of a GLU: [T, F]."""
    up_TF = F.linear(x, keys, key_bias)
    return (up_TF, None) if gate_keys is None else (F.linear(x, gate_keys), up_TF)


def _select(
    x: Tensor,
    keys: Tensor,
    k: int,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    activation: str,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The selected units of some tokens: h, index, z and the other half."""
    z_TF, other_TF = _units(x, keys, gate_keys, key_bias)
    index, z_TK = x.new_empty(x.shape[0], k, dtype=torch.int32), x.new_empty(x.shape[0], k)
    other_TK = None if other_TF is None else torch.empty_like(z_TK)
    h_TK = torch.empty_like(z_TK)
    scale = None if dropout_mask is None else rows(dropout_mask)
    topk.select(rows(z_TF), other_TF, scale, norm, index, z_TK, other_TK, h_TK, activation)
    return h_TK, index, z_TK, absent(x) if other_TK is None else other_TK


def _sorted(
    x: Tensor,
    keys: Tensor,
    k: int,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    activation: str,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same beyond ``topk.MAX_F`` units: torch sorts them."""
    z_TF, other_TF = _units(x, keys, gate_keys, key_bias)
    h_TF = hidden(activation, z_TF, other_TF, dropout_mask)
    index = stable_topk(h_TF.abs() if norm is None else h_TF.abs() * norm, k)
    other_TK = absent(x) if other_TF is None else other_TF.gather(1, index)
    return h_TF.gather(1, index), index.to(torch.int32), z_TF.gather(1, index), other_TK


@on_device
def backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    index: Tensor,
    z: Tensor,
    other: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, keys, values, gate_keys and key_bias; empty tensors for the arguments that are absent."""
    products = _Gathered if use_gather(x, keys.shape[0], index.shape[1]) else _Dense
    of = products(index, keys.shape[0])
    scale_TK = None if dropout_mask is None else dropout_mask.gather(1, index.long()).float()
    z_TK, other_TK = z.float(), None if gate_keys is None else other.float()
    dvalues, dh_TK = of.both_gradients(grad, values, hidden(activation, z_TK, other_TK, scale_TK))
    dz_TK, dother_TK = hidden_backward(activation, dh_TK, z_TK, other_TK, scale_TK)
    dup_TK = dz_TK if dother_TK is None else dother_TK
    dx, dkeys = of.gradients(dup_TK, keys, x)
    dkey_bias = absent(x) if key_bias is None else of.sums(dup_TK, key_bias)
    if gate_keys is None:
        return dx, dkeys, dvalues, absent(x), dkey_bias
    dx_too, dgate_keys = of.gradients(dz_TK, gate_keys, x)
    return dx + dx_too, dkeys, dvalues, dgate_keys, dkey_bias


class _Gathered:
    """Products with the [T, F] matrix of the selected units' numbers, row by row."""

    def __init__(self, index: Tensor, n_units: int) -> None:
        self.index = index
        self.segments = segments.every_row(index, n_units, config.BAG.cap)

    def both_gradients(self, grad: Tensor, values: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of values and h where the output is h @ values."""
        dvalues = values.new_empty(values.shape)
        dh = bag.bag_gradient(self.segments, rows(grad), h.contiguous(), dvalues, rows(values))
        assert dh is not None
        return dvalues, dh

    def gradients(self, dz: Tensor, keys: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and keys where z = x @ keys.T."""
        dkeys = keys.new_empty(keys.shape)
        bag.bag_gradient(self.segments, rows(x), dz.contiguous(), dkeys)
        return _bag(keys, self.index, dz, x.dtype), dkeys

    def sums(self, dz: Tensor, bias: Tensor) -> Tensor:
        """Gradient of a bias that is part of z."""
        dbias = bias.new_empty(bias.shape[0], 1)
        bag.bag_gradient(self.segments, dz.new_ones(1, 1).expand(dz.shape[0], 1), dz.contiguous(), dbias)
        return dbias.squeeze(1)


class _Dense:
    """The same out of torch's dense products, a block of tokens at a time; several blocks are summed in fp32."""

    def __init__(self, index: Tensor, n_units: int) -> None:
        self.index, self.n_units = index.long(), n_units

    def both_gradients(self, grad: Tensor, values: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h, across = h.to(grad.dtype), values.to(grad.dtype).t()
        dvalues: Any = None
        dh = []
        for part in blocks(grad, self.n_units):
            dvalues = _plus(dvalues, self._matrix(h, part).t() @ grad[part])
            dh.append((grad[part] @ across).gather(1, self.index[part]).float())
        return dvalues.to(values.dtype), _joined(dh)

    def gradients(self, dz: Tensor, keys: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        dz, narrow = dz.to(x.dtype), keys.to(x.dtype)
        dkeys: Any = None
        dx = []
        for part in blocks(x, self.n_units):
            dz_TF = self._matrix(dz, part)
            dkeys = _plus(dkeys, dz_TF.t() @ x[part])
            dx.append(dz_TF @ narrow)
        return _joined(dx), dkeys.to(keys.dtype)

    def sums(self, dz: Tensor, bias: Tensor) -> Tensor:
        total = dz.new_zeros(self.n_units)
        for part in blocks(dz, self.n_units):
            total += self._matrix(dz, part).sum(0)
        return total.to(bias.dtype)

    def _matrix(self, selected: Tensor, part: slice) -> Tensor:
        return _densify(selected[part], self.index[part], self.n_units)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.float().add_(more)


def _joined(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _product(values: Tensor, index: Tensor, h: Tensor, sparse: bool) -> Tensor:
    if sparse:
        return _bag(values, index, h, h.dtype)
    return _densify(h, index.long(), values.shape[0]) @ values.to(h.dtype)


def _densify(selected: Tensor, index: Tensor, width: int) -> Tensor:
    return selected.new_zeros(selected.shape[0], width).scatter_(1, index, selected)


def _bag(values: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    out = values.new_empty(index.shape[0], values.shape[1], dtype=dtype)
    bag.bag(rows(values), index.contiguous(), weight.contiguous(), out)
    return out
