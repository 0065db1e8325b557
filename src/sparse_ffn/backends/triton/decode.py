"""Few tokens: no sort, each slot's row times its expert's matrices, bound by the reading of the weights.

T tokens, K slots a token, S = T·K, G hidden units of an expert, D d_model, O d_out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton.activations import activate
from sparse_ffn.backends.triton.launch import cdiv, launch

BLOCK_G, BLOCK_D, BLOCK_O = 16, 128, 128


def use_decode(n_slots: int, n_experts: int) -> bool:
    """Whether to take each slot by itself, which reads an expert's weights once for each of its slots.

    While there are no more slots than experts that is rarely more than once; below 16 the sort would cost more.
    """
    return n_slots <= max(16, n_experts)


@triton.jit
def up_rows_kernel(
    x, index, keys, gate_keys, key_bias, dropout_mask, h, G, D, E, K, stride_x,
    stride_ke, stride_kg, stride_kd, stride_ge, stride_gg, stride_gd, stride_be, stride_bg,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of one slot's hidden units, fp32."""
    n_blocks = tl.cdiv(G, BLOCK_G)
    slot = tl.program_id(0) // n_blocks
    g = (tl.program_id(0) % n_blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    g_ok = g < G
    expert = tl.load(index + slot)
    if (expert < 0) | (expert >= E):
        return
    row = x + (slot // K).to(tl.int64) * stride_x
    far_g = g.to(tl.int64)
    pre = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    up = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = g_ok[:, None] & (d < D)[None, :]
        value = tl.load(row + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        far_d = d.to(tl.int64)[None, :]
        key = tl.load(keys + expert * stride_ke + far_g[:, None] * stride_kg + far_d * stride_kd, mask=mask, other=0.0)
        up += key.to(tl.float32) * value
        if GLU:
            at = gate_keys + expert * stride_ge + far_g[:, None] * stride_gg + far_d * stride_gd
            pre += tl.load(at, mask=mask, other=0.0).to(tl.float32) * value
    hidden = tl.sum(up, 1)
    if BIAS:
        hidden += tl.load(key_bias + expert * stride_be + far_g * stride_bg, mask=g_ok, other=0.0).to(tl.float32)
    hidden = activate(tl.sum(pre, 1), ACTIVATION) * hidden if GLU else activate(hidden, ACTIVATION)
    at = slot.to(tl.int64) * G + g
    if SCALE:
        hidden *= tl.load(dropout_mask + at, mask=g_ok, other=0.0).to(tl.float32)
    tl.store(h + at, hidden, mask=g_ok)


@triton.jit
def down_rows_kernel(
    h, index, gate, values, y, G, O, E, stride_ve, stride_vg, stride_vo, BLOCK_G: tl.constexpr, BLOCK_O: tl.constexpr
):
    """A block of one slot's output times its gate, fp32; zero if it is void."""
    n_blocks = tl.cdiv(O, BLOCK_O)
    slot = tl.program_id(0) // n_blocks
    o = (tl.program_id(0) % n_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_ok = o < O
    expert = tl.load(index + slot)
    total = tl.zeros([BLOCK_G, BLOCK_O], tl.float32)
    known = (expert >= 0) & (expert < E)  # else nothing wrote this slot's hidden units
    for start in range(0, G if known else 0, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        hidden = tl.load(h + slot.to(tl.int64) * G + g, mask=g < G, other=0.0)[:, None]
        at = values + expert * stride_ve + g.to(tl.int64)[:, None] * stride_vg + o.to(tl.int64)[None, :] * stride_vo
        total += hidden * tl.load(at, mask=(g < G)[:, None] & o_ok[None, :], other=0.0).to(tl.float32)
    if known:
        total *= tl.load(gate + slot).to(tl.float32)
    tl.store(y + slot.to(tl.int64) * O + o, tl.sum(total, 0), mask=o_ok)


def up_rows(
    x: Tensor,
    index: Tensor,
    keys: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    h: Tensor,
    activation: str,
) -> None:
    """Hidden units of every slot into h, fp32 [S, G]; the other shapes as in ``sparse_ffn.ops.expert_ffn``."""
    E, G, D = keys.shape
    launch(
        up_rows_kernel, h.shape[0] * cdiv(G, BLOCK_G), x, index, keys, gate_keys, key_bias, dropout_mask, h, G, D, E,
        index.shape[1], x.stride(0), *keys.stride(), *(0, 0, 0) if gate_keys is None else gate_keys.stride(),
        *(0, 0) if key_bias is None else key_bias.stride(),
        ACTIVATION=activation, GLU=gate_keys is not None, BIAS=key_bias is not None, SCALE=dropout_mask is not None,
        BLOCK_G=BLOCK_G, BLOCK_D=BLOCK_D,
    )  # fmt: skip


def down_rows(h: Tensor, index: Tensor, gate: Tensor, values: Tensor, y: Tensor) -> None:
    """Each slot's hidden units times its gate and its expert's values into y, fp32 [S, O]."""
    E, G, O = values.shape
    launch(
        down_rows_kernel, y.shape[0] * cdiv(O, BLOCK_O), h, index, gate, values, y, G, O, E, *values.stride(),
        BLOCK_G=BLOCK_G, BLOCK_O=BLOCK_O,
    )  # fmt: skip
