"""The activations and their derivatives on fp32 tiles, chosen by name at compile time."""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(100.0)


@triton.jit
def above(z):
    """At least -FAR, where smooth activations are 0, so that -infinity is multiplied by no zero; a NaN stays one."""
    return tl.maximum(z, -FAR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def near(z):
    """Within FAR of zero, from where on the derivatives of smooth activations are 0 or 1; a NaN stays one."""
    return tl.minimum(above(z), FAR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z); a NaN stays a NaN."""
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "squared_relu":
        r = tl.where(z < 0, 0.0, z)
        return r * r
    elif ACTIVATION == "square":
        return z * z
    elif ACTIVATION == "gelu":
        return above(z) * (0.5 * (1 + tl.erf(z * 0.7071067811865476)))  # in this order: another one spills registers
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        return above(z) * tl.sigmoid(1.5957691216057308 * z * (1 + 0.044715 * z * z))
    elif ACTIVATION == "silu":
        return above(z) * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def gradient(slope, z, ACTIVATION: tl.constexpr):
    """Slope times act'(z), at 0 the one that torch takes; where ReLU is off also an infinite slope makes 0."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, slope)
    elif ACTIVATION == "squared_relu":
        return tl.where(z <= 0, 0.0, 2 * (slope * z))
    elif ACTIVATION == "square":
        return 2 * (slope * z)
    elif ACTIVATION == "identity":
        return slope
    else:
        return slope * derivative(near(z), ACTIVATION)


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """act'(z) of a smooth activation."""
    if ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * z * (1 + 0.044715 * z * z))
        return s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    else:
        tl.static_assert(ACTIVATION == "silu")
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
