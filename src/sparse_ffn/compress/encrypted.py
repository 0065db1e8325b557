"""What inference on encrypted numbers wants of a layer (MOFHEI, 2412.07954): a quadratic activation, zeros by blocks.

Encryption itself is left to others: nothing here computes with encrypted numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune

from sparse_ffn.checks import check_loaded, check_plain, check_positive, check_rate, check_real, check_type, shown
from sparse_ffn.layers.dense import DenseFFN
from sparse_ffn.layers.rows.base import check_dense
from sparse_ffn.layers.units import UnitsFFN


@torch.no_grad()
def polynomial_units_(layer: UnitsFFN, a: float, b: float, c: float = 0.0) -> None:
    """Give a layer the activation a·z² + b·z + c in place of the one it has: in place, by parameters that it has.

    The layer's activation becomes ``"square"``: a·z² + b·z + c = a (z + b/2a)² + c - b²/4a. So b/2a is added to
    ``key_bias``, ``values`` are multiplied by a, and the constant, times the sum of the values, goes to ``out_bias``.
    That is where a layer computes all units; in another one the constant must be 0, which c = b²/4a makes it. Training
    the layer then trains its coefficients, unit by unit. Parameters that are tied to another layer's change there too.

    Args:
        layer: a ``DenseFFN``, ``TopKFFN`` or mixture with biases and without a GLU.
        a: not 0.
        b: any.
        c: any for a ``DenseFFN`` and for a ``TopKFFN`` with k = d_ff, b²/4a for others.

    Raises:
        TypeError: ``layer`` has no units with keys.
        ValueError: the layer has no biases, a GLU, stored rows, no numbers (on meta), or parameters that are masked or
            parametrised; a coefficient is no finite number, or beyond the layer's dtype; a is 0; or c is another than
            it may be. Nothing was changed then.
    """
    check_type("layer", layer, UnitsFFN, "a DenseFFN, a TopKFFN or a mixture of experts")
    check_dense(layer)
    a, b, c = check_real("a", a), check_real("b", b), check_real("c", c)
    if a == 0:
        raise ValueError(f"a must not be 0, got {shown(a)}: a linear activation is 'identity'")
    if layer.key_bias is None or layer.out_bias is None:
        raise ValueError("layer must have biases (bias=True), into which a polynomial's terms go")
    if layer.gate_keys is not None:
        raise ValueError("layer must not be a GLU, whose activation is of the gate, which has no bias")
    for name in ("key_bias", "out_bias", "values"):
        check_loaded(layer, name, getattr(layer, name))
        check_plain(layer, name, "layer", "give it the activation first")
        if getattr(layer, name).is_inference():
            raise ValueError(f"layer's {name} was made in inference mode, which nothing outside of it may change")
    shift, constant = b / (2 * a), c - b * b / (4 * a)
    adds_all = isinstance(layer, DenseFFN) and getattr(layer, "k", layer.d_ff) == layer.d_ff
    if not adds_all and abs(constant) > 1e-6 * max(abs(c), abs(constant)):
        raise ValueError(
            f"c must be b²/4a = {b * b / (4 * a)} for {type(layer).__name__}, which does not add all units, "
            f"got {shown(c)}"
        )
    most = torch.finfo(layer.values.dtype).max
    for term, number in {"a": a, "b/2a": shift, **({"c - b²/4a": constant} if adds_all else {})}.items():
        if not abs(number) <= most:
            raise ValueError(f"{term} must be a number of the layer's dtype, at most {most:g}, got {number:g}")
    layer.key_bias.add_(shift)
    if adds_all:
        layer.out_bias.add_(layer.values.sum(0), alpha=constant)
    layer.values.mul_(a)
    layer.activation = "square"


@torch.inference_mode(False)  # a tensor that is made in it never trains
@torch.no_grad()
def block_mask_(layer: UnitsFFN, share: float, block: tuple[int, int] = (8, 16)) -> None:
    """Zero a share of the blocks of a layer's keys, gate keys and values, in each those of least norm.

    A block is of neighbouring units of one expert and neighbouring columns: a product that packs a block into one
    ciphertext leaves it out. The masks are ``torch.nn.utils.prune``'s, which train and are saved as such, and which
    ``prune.remove`` makes permanent.

    Args:
        layer: a ``DenseFFN``, ``TopKFFN`` or mixture.
        share: of the blocks, rounded to a whole number of them, in [0, 1]; blocks that are zero already count.
        block: units and columns.

    Raises:
        TypeError: ``layer`` has no units with keys, or ``block`` holds no ints.
        ValueError: share outside its range, stored rows or none (on meta), parametrised ones, a layer split by
            ``sparse_ffn.parallel``, or a block that does not divide units and columns. Nothing was masked then.
    """
    check_type("layer", layer, UnitsFFN, "a DenseFFN, a TopKFFN or a mixture of experts")
    check_dense(layer)
    if layer._split is not None:
        raise ValueError("layer is split by sparse_ffn.parallel: mask its blocks before")
    share = check_rate("share", share, inclusive=True)
    sizes = _block(block)
    stacks: dict[str, Tensor] = {n: getattr(layer, n) for n in ("keys", "gate_keys", "values")}
    stacks = {name: stack for name, stack in stacks.items() if stack is not None}
    masks = {name: mask for name in stacks if (mask := layer._buffers.get(f"{name}_mask")) is not None}
    for name, mask in masks.items():  # a mask may be masked again; what the last forward made may be a step old
        stacks[name] = layer.get_parameter(f"{name}_orig") * mask
    for name, stack in stacks.items():
        check_loaded(layer, name, stack)
        if name not in masks:
            check_plain(layer, name, "layer", "mask its blocks first")
        if any(size % part for size, part in zip(stack.shape[-2:], sizes, strict=True)):
            raise ValueError(f"block = {sizes} must divide the units and columns of {name}, {tuple(stack.shape[-2:])}")
    for name, stack in stacks.items():
        prune.custom_from_mask(layer, name, _mask(stack, share, sizes))  # type: ignore[no-untyped-call]


def _block(block: Any) -> tuple[int, int]:
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise TypeError(f"block must hold two ints, units and columns, got {shown(block)}")
    rows, columns = (check_positive("block", size) for size in block)
    return rows, columns


def _mask(stack: Tensor, share: float, block: tuple[int, int]) -> Tensor:
    """1 where the stack stays: [..., units, columns]."""
    *experts, units, columns = stack.shape
    blocks = stack.reshape(*experts, units // block[0], block[0], columns // block[1], block[1])
    norms = blocks.double().square().sum((-3, -1))
    gone = norms.flatten().sort(stable=True).indices[: round(share * norms.numel())]
    kept = torch.ones(norms.numel(), dtype=stack.dtype, device=stack.device).index_fill(0, gone, 0)
    return kept.view(norms.shape).repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
