"""The activations and their derivatives on fp32 tiles, chosen by name at compile time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z); a NaN stays a NaN."""
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "squared_relu":
        r = tl.where(z < 0, 0.0, z)
        return r * r
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        return z * tl.sigmoid(1.5957691216057308 * z * (1 + 0.044715 * z * z))
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """act'(z), at 0 the one that torch takes."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "squared_relu":
        return tl.where(z < 0, 0.0, 2 * z)
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * z * (1 + 0.044715 * z * z))
        return s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(z.shape, 1.0, tl.float32)
