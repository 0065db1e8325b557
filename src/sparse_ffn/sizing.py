"""Sizes at which a sparse layer has as many parameters as a dense FFN: the paper's parameter-equal comparison."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.checks import check_count, check_positive, plain, shown
from sparse_ffn.layers.base import SparseFFN
from sparse_ffn.layers.dense import DenseFFN
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.product_key import ProductKeyMemory

_FREE_SIZES: tuple[tuple[type[SparseFFN], str], ...] = (
    (MoE, "n_experts"),
    (ProductKeyMemory, "n_sub_keys"),
    (DenseFFN, "d_ff"),
)
NEAR = 0.1  # of the parameters: what may still be called equal


def parameter_equal(layer_cls: type[SparseFFN], d_model: int, d_ff: int, **choices: Any) -> dict[str, Any]:
    """Arguments for a layer with about the parameters of the dense FFN of d_model and d_ff (no GLU, with biases).

    Args:
        layer_cls: ``MoE`` or one of its forms, ``ProductKeyMemory``, ``DenseFFN`` or ``TopKFFN``; its free size
            (``n_experts``, ``n_sub_keys`` or ``d_ff``) is chosen for the nearest count.
        d_model: width.
        d_ff: hidden units of the dense FFN.
        **choices: all other arguments of the layer; those it requires (``expert_size`` and ``k``, or ``k``) among them.

    Returns:
        ``d_model``, the free size and ``choices``, to be given to the layer with ``**``.

    Warns:
        SparseFFNWarning: even the nearest size has over a tenth more or fewer parameters than the dense FFN.

    Raises:
        TypeError: ``layer_cls`` is none of these, or a required choice is missing.
        ValueError: the free size is among the choices; or the layer refuses one of the sizes that are tried, as it does
            with a router whose groups must divide n_experts.
    """
    free = next((size for cls, size in _FREE_SIZES if isinstance(layer_cls, type) and issubclass(layer_cls, cls)), None)
    if free is None:
        raise TypeError(
            f"layer_cls must be MoE or one of its forms, ProductKeyMemory, DenseFFN or TopKFFN, got {shown(layer_cls)}"
        )
    if free in choices:
        raise ValueError(f"{free} = {choices[free]!r} is what parameter_equal chooses: leave it out")
    parameters = inspect.signature(layer_cls).parameters
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name not in ("d_model", free)
    ]
    missing = [name for name in required if name not in choices]
    if missing:
        raise TypeError(f"parameter_equal({layer_cls.__name__}, ...) needs {' and '.join(missing)}")

    d_model, choices = check_positive("d_model", d_model), {name: plain(value) for name, value in choices.items()}

    def arguments(size: int) -> dict[str, Any]:
        return {"d_model": d_model, free: size, **choices}

    def count(size: int) -> int:
        return layer_cls(**{**arguments(size), "device": "meta"}).n_parameters

    target = DenseFFN(d_model, d_ff, device="meta").n_parameters
    given = {name: p.default for name, p in parameters.items() if p.default is not p.empty} | choices
    k = check_positive("k", given.get("k", 1))
    least = max(1, k - check_count("null_experts", given.get("null_experts", 0)))
    low = high = 1 + math.isqrt(k - 1) if free == "n_sub_keys" else least  # a layer of that size has k to select
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count(middle) < target:
            low = middle
        else:
            high = middle
    nearest = min((low, high), key=lambda size: abs(count(size) - target))
    miss = count(nearest) / target - 1
    if abs(miss) > NEAR:
        warnings.warn(
            f"no {free} of {layer_cls.__name__} comes near the {target} parameters of the dense FFN with d_model = "
            f"{d_model} and d_ff = {d_ff}: {nearest} is the nearest, with {count(nearest)} ({miss:+.0%})",
            SparseFFNWarning,
            stacklevel=2,
        )
    return arguments(nearest)
