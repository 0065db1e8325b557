"""Top-k FFN out of the Triton kernels: select fused after torch's product, then only the selected units' rows.

Where so many units are selected that reading their rows one by one takes longer than a dense product, the products
are dense ones of matrices with zeros: see ``use_gather``. Saved are index and pre-activations of the selected units.
What has a number for every token and hidden unit exists for a block of tokens only, see ``blocks``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.triton import bag, config, segments, topk
from sparse_ffn.backends.triton.launch import precision, rows
from sparse_ffn.ops.activations import hidden_anywhere
from sparse_ffn.ops.autocast import cast
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.ops.topk_ffn import by_products
from sparse_ffn.ops.topk_ffn.backend import Gradients, Saved
from sparse_ffn.ops.units import Units

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
    x: Tensor, units: Units, k: int, dropout_mask: Tensor | None, activation: str, norm_aware: bool, rank_by: str
) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs."""
    keys, values, gate_keys, key_bias = units
    n_units, sparse = keys.shape[0], use_gather(x, keys.shape[0], k)
    norm_F = torch.linalg.vector_norm(values, dim=1, dtype=torch.float32) if norm_aware else None
    keys, gate_keys, key_bias = keys.to(x.dtype), cast(gate_keys, x.dtype), cast(key_bias, x.dtype)
    values = values if sparse else values.to(x.dtype)
    select = _select if topk.fits(n_units) else _sorted
    outputs, saved = [], []
    for part in blocks(x, n_units):
        scale = None if dropout_mask is None else dropout_mask[part]
        up_TF = F.linear(x[part], keys, key_bias)
        glu_gate_TF = None if gate_keys is None else F.linear(x[part], gate_keys)
        h_TK, of_part = select(up_TF, glu_gate_TF, scale, norm_F, k, activation, rank_by)
        del up_TF, glu_gate_TF  # before the next block's
        outputs.append(_product(values, of_part.selected, h_TK, sparse))
        saved.append(of_part)
    selected, up_TK, glu_gate_TK = zip(*saved, strict=True)
    gated = None if gate_keys is None else _joined(glu_gate_TK)
    return _joined(outputs), Saved(_joined(selected), _joined(up_TK), gated)


def _select(
    up_TF: Tensor,
    glu_gate_TF: Tensor | None,
    scale: Tensor | None,
    norm: Tensor | None,
    k: int,
    activation: str,
    rank_by: str,
) -> tuple[Tensor, Saved]:
    """The selected units of some tokens."""
    up_TK = up_TF.new_empty(up_TF.shape[0], k)
    index, h_TK = up_TK.new_empty(up_TK.shape, dtype=torch.int32), torch.empty_like(up_TK)
    glu_gate_TK = None if glu_gate_TF is None else torch.empty_like(up_TK)
    scale = None if scale is None else rows(scale)
    topk.select(rows(up_TF), glu_gate_TF, scale, norm, index, up_TK, glu_gate_TK, h_TK, activation, rank_by == "gate")
    return h_TK, Saved(index, up_TK, glu_gate_TK)


def _sorted(
    up_TF: Tensor,
    glu_gate_TF: Tensor | None,
    scale: Tensor | None,
    norm: Tensor | None,
    k: int,
    activation: str,
    rank_by: str,
) -> tuple[Tensor, Saved]:
    """The same beyond ``topk.MAX_F`` units: torch sorts them."""
    h_TF = hidden_anywhere(activation, up_TF, glu_gate_TF, scale)
    ranked_TF = h_TF
    if rank_by == "gate" and glu_gate_TF is not None:
        ranked_TF = hidden_anywhere(activation, glu_gate_TF, None, scale)
    score = ranked_TF.abs()
    index = stable_topk(score if norm is None else score * norm, k)
    glu_gate_TK = None if glu_gate_TF is None else glu_gate_TF.gather(1, index)
    return h_TF.gather(1, index), Saved(index.to(torch.int32), up_TF.gather(1, index), glu_gate_TK)


def inference(
    x: Tensor, units: Units, k: int, dropout_mask: Tensor | None, activation: str, norm_aware: bool, rank_by: str
) -> Tensor:
    """The output."""
    return forward(x, units, k, dropout_mask, activation, norm_aware, rank_by)[0]


@on_device
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
    index, up_TK, glu_gate_TK = saved
    n_units = units.keys.shape[0]
    of = (_Gathered if use_gather(x, n_units, index.shape[1]) else _Dense)(index, n_units)
    wide = Saved(index, up_TK.float(), None if glu_gate_TK is None else glu_gate_TK.float())
    return by_products.backward(of, grad, x, units, dropout_mask, wide, needs_units, activation)


class _Gathered:
    """Products row by row."""

    def __init__(self, index: Tensor, n_units: int) -> None:
        self.index, self.n_units = index, n_units

    @functools.cached_property
    def groups(self) -> segments.Segments:
        return segments.every_row(self.index, self.n_units, config.BAG.cap)

    def down_backward(self, grad: Tensor, values: Tensor, h: Tensor, needs: bool) -> tuple[Tensor | None, Tensor]:
        if not needs:
            return None, bag.dot_products(rows(grad), rows(values), self.index.contiguous())
        dvalues = values.new_empty(values.shape)
        dh = bag.bag_gradient(self.groups, rows(grad), h.contiguous(), dvalues, rows(values))
        assert dh is not None
        return dvalues, dh

    def up_backward(self, dup: Tensor, keys: Tensor, x: Tensor, needs: bool) -> tuple[Tensor, Tensor | None]:
        dkeys = keys.new_empty(keys.shape) if needs else None
        if dkeys is not None:
            bag.bag_gradient(self.groups, rows(x), dup.contiguous(), dkeys)
        return _bag(keys, self.index, dup, x.dtype), dkeys

    def sums(self, dup: Tensor, bias: Tensor) -> Tensor:
        dbias = bias.new_empty(bias.shape[0], 1)
        bag.bag_gradient(self.groups, dup.new_ones(1, 1).expand(dup.shape[0], 1), dup.contiguous(), dbias)
        return dbias.squeeze(1)


class _Dense:
    """Dense products of torch, a block of tokens at a time; several blocks are summed in fp32."""

    def __init__(self, index: Tensor, n_units: int) -> None:
        self.index, self.n_units = index.long(), n_units

    def down_backward(self, grad: Tensor, values: Tensor, h: Tensor, needs: bool) -> tuple[Tensor | None, Tensor]:
        h, across = h.to(grad.dtype), values.to(grad.dtype).t()
        dvalues: Tensor | None = None
        dh = []
        for part in blocks(grad, self.n_units):
            if needs:
                dvalues = _plus(dvalues, self._matrix(h, part).t() @ grad[part])
            dh.append((grad[part] @ across).gather(1, self.index[part]).float())
        return cast(dvalues, values.dtype), _joined(dh)

    def up_backward(self, dup: Tensor, keys: Tensor, x: Tensor, needs: bool) -> tuple[Tensor, Tensor | None]:
        dup, narrow = dup.to(x.dtype), keys.to(x.dtype)
        dkeys: Tensor | None = None
        dx = []
        for part in blocks(x, self.n_units):
            dup_TF = self._matrix(dup, part)
            if needs:
                dkeys = _plus(dkeys, dup_TF.t() @ x[part])
            dx.append(dup_TF @ narrow)
        return _joined(dx), cast(dkeys, keys.dtype)

    def sums(self, dup: Tensor, bias: Tensor) -> Tensor:
        total = dup.new_zeros(self.n_units)
        for part in blocks(dup, self.n_units):
            total += self._matrix(dup, part).sum(0)
        return total.to(bias.dtype)

    def _matrix(self, selected: Tensor, part: slice) -> Tensor:
        return by_products.matrix(selected[part], self.index[part], self.n_units)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.float().add_(more)


def _joined(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _product(values: Tensor, index: Tensor, h: Tensor, sparse: bool) -> Tensor:
    if sparse:
        return _bag(values, index, h, h.dtype)
    return by_products.matrix(h, index.long(), values.shape[0]) @ values


def _bag(values: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    out = values.new_empty(index.shape[0], values.shape[1], dtype=dtype)
    bag.bag(rows(values), index.contiguous(), weight.contiguous(), out)
    return out
