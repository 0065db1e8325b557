"""All experts' hidden units at once, those of experts that a token did not choose zero: between two dense products.

T tokens, K slots a token, S = T·K, E experts, G hidden units of an expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton.activations import activate, gradient
from sparse_ffn.backends.triton.launch import cdiv, launch, power_of_two

BLOCK_T, BLOCK_G = 16, 128


@triton.jit
def block_of(T, E, G, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr):
    """This program's tokens, expert, units, their addresses in [T, E, G], and which of them there are."""
    n_blocks = tl.cdiv(G, BLOCK_G)
    g = (tl.program_id(0) % n_blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    expert = tl.program_id(0) // n_blocks % E
    t = tl.program_id(0) // (n_blocks * E) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = (t.to(tl.int64) * E + expert)[:, None] * G + g[None, :]
    return t, expert, g, at, (t < T)[:, None] & (g < G)[None, :]


@triton.jit
def scale_of(dropout_mask, slot, mine, g, G):
    """Dropout's multipliers of these slots' units."""
    at = dropout_mask + slot.to(tl.int64)[:, None] * G + g[None, :]
    return tl.load(at, mask=mine[:, None] & (g < G)[None, :], other=0.0).to(tl.float32)


@triton.jit
def choice(
    index, gate, dropout_mask, t, T, expert, g, G, K, SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Each token's last slot with this expert (-1: none), and its units' weights: the sum over all such slots."""
    chosen = tl.full([BLOCK_T], -1, tl.int32)
    weight = tl.zeros([BLOCK_T, BLOCK_G if SCALE else 1], tl.float32)
    for j in range(0, K):
        slot = t * K + j
        mine = tl.load(index + slot, mask=t < T, other=-1) == expert
        part = tl.load(gate + slot, mask=mine, other=0.0).to(tl.float32)[:, None]
        if SCALE:
            part *= scale_of(dropout_mask, slot, mine, g, G)
        weight += part
        chosen = tl.where(mine, slot, chosen)
    return chosen, weight


@triton.jit
def masked_hidden_kernel(
    up, glu_gate, index, gate, dropout_mask, saved_up, saved_glu_gate, T, E, G, K,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, SCALE: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """What is in ``up`` becomes the hidden units times their weights; see ``hidden``."""
    t, expert, g, at, inside = block_of(T, E, G, BLOCK_T, BLOCK_G)
    chosen, weight = choice(index, gate, dropout_mask, t, T, expert, g, G, K, SCALE, BLOCK_T, BLOCK_G)
    mask = inside & (chosen >= 0)[:, None]
    pre = tl.load((glu_gate if GLU else up) + at, mask=mask, other=0.0).to(tl.float32)
    units = activate(pre, ACTIVATION)
    if GLU:
        factor = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        units *= factor
    tl.store(up + at, (units * weight).to(up.dtype.element_ty), mask=inside)
    if SAVE:
        for j in range(0, K):
            slot = t * K + j
            mine = tl.load(index + slot, mask=t < T, other=-1) == expert
            to = slot.to(tl.int64)[:, None] * G + g[None, :]
            saved = saved_glu_gate if GLU else saved_up
            tl.store(saved + to, pre.to(up.dtype.element_ty), mask=inside & mine[:, None])
            if GLU:
                tl.store(saved_up + to, factor.to(up.dtype.element_ty), mask=inside & mine[:, None])


@triton.jit
def masked_gradient_kernel(
    dh, up, glu_gate, index, gate, dropout_mask, weighted, dglu_gate, dots, T, E, G, K, S,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """What is in ``dh`` becomes the gradient of up; see ``hidden_gradient``."""
    t, expert, g, at, inside = block_of(T, E, G, BLOCK_T, BLOCK_G)
    chosen, weight = choice(index, gate, dropout_mask, t, T, expert, g, G, K, SCALE, BLOCK_T, BLOCK_G)
    mask = inside & (chosen >= 0)[:, None]
    saved = chosen.to(tl.int64)[:, None] * G + g[None, :]
    pre = tl.load((glu_gate if GLU else up) + saved, mask=mask, other=0.0).to(tl.float32)
    active = activate(pre, ACTIVATION)
    units = active
    if GLU:
        factor = tl.load(up + saved, mask=mask, other=0.0).to(tl.float32)
        units *= factor
    slope = tl.load(dh + at, mask=mask, other=0.0).to(tl.float32)
    part = (tl.program_id(0) % tl.cdiv(G, BLOCK_G)).to(tl.int64) * S
    for j in range(0, K):
        slot = t * K + j
        mine = tl.load(index + slot, mask=t < T, other=-1) == expert
        dot = slope * units
        if SCALE:
            dot *= scale_of(dropout_mask, slot, mine, g, G)
        tl.store(dots + part + slot, tl.sum(dot, 1), mask=mine)
    tl.store(weighted + at, (units * weight).to(weighted.dtype.element_ty), mask=inside)
    slope *= weight
    if GLU:
        tl.store(dh + at, (slope * active).to(dh.dtype.element_ty), mask=inside)
        slope *= factor
    before = dglu_gate if GLU else dh  # the activation
    tl.store(before + at, gradient(slope, pre, ACTIVATION).to(before.dtype.element_ty), mask=inside)


def hidden(
    up: Tensor,
    glu_gate: Tensor | None,
    index: Tensor,
    gate: Tensor,
    dropout_mask: Tensor | None,
    saved_up: Tensor | None,
    saved_glu_gate: Tensor | None,
    activation: str,
) -> None:
    """Turn up into the hidden units times their gates (and dropout's multipliers), zero for experts not chosen.

    Shapes, all contiguous: up and glu_gate [T, E, G], index int [T, K], gate [T, K], dropout_mask [T, K, G]; saved_up
    and saved_glu_gate [T, K, G] get those of the chosen experts (None: kept nowhere).
    """
    (T, E, G), K, block = up.shape, index.shape[1], _block(up.shape[2])
    launch(
        masked_hidden_kernel, cdiv(T, BLOCK_T) * E * cdiv(G, block), up, glu_gate, index, gate, dropout_mask,
        saved_up, saved_glu_gate, T, E, G, K,
        ACTIVATION=activation, GLU=glu_gate is not None, SCALE=dropout_mask is not None, SAVE=saved_up is not None,
        BLOCK_T=BLOCK_T, BLOCK_G=block,
    )  # fmt: skip


def hidden_gradient(
    dh: Tensor,
    up: Tensor,
    glu_gate: Tensor | None,
    index: Tensor,
    gate: Tensor,
    dropout_mask: Tensor | None,
    weighted: Tensor,
    dglu_gate: Tensor | None,
    activation: str,
) -> Tensor:
    """Turn the gradient of the weighted units dh [T, E, G] into that of up; return the gate's, fp32 [T, K].

    Shapes, all contiguous: up and glu_gate [T, K, G] as ``hidden`` saved them, weighted [T, E, G] gets the weighted
    units once more, dglu_gate [T, E, G] the gradient of glu_gate; the rest as for ``hidden``.
    """
    (T, E, G), K, block = dh.shape, index.shape[1], _block(dh.shape[2])
    dots = dh.new_zeros((cdiv(G, block), T, K), dtype=torch.float32)  # void slots keep 0
    launch(
        masked_gradient_kernel, cdiv(T, BLOCK_T) * E * cdiv(G, block), dh, up, glu_gate, index, gate, dropout_mask,
        weighted, dglu_gate, dots, T, E, G, K, T * K,
        ACTIVATION=activation, GLU=glu_gate is not None, SCALE=dropout_mask is not None, BLOCK_T=BLOCK_T, BLOCK_G=block,
    )  # fmt: skip
    return dots.sum(0)


def _block(n_units: int) -> int:
    return min(BLOCK_G, max(power_of_two(n_units), 16))
