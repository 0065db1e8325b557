"""Mixed precision, checkpointing, optimizers and gradient clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

import sparse_ffn as sf
from sparse_ffn.layers.balanced import Balanced

from .feature import AND_TRITON, feature
from .layers import BALANCED, assert_near, build, loss, mixture, step, tokens


@feature("autocast, bf16")
def autocast_bf16(name: str) -> None:
    """Output in bf16, routing as in fp32, gradients in fp32 and near those of fp32."""
    _autocast(name, torch.bfloat16, 0.1)


@feature("autocast, fp16")
def autocast_fp16(name: str) -> None:
    """As above in fp16."""
    _autocast(name, torch.float16, 0.02)


def _autocast(name: str, dtype: torch.dtype, tolerance: float) -> None:
    layer, x = build(name), tokens(4, 16)
    expected, selected = step(layer, x), _selected(layer)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            y = layer(x)
            assert y.dtype == nn.Linear(8, 8)(x).dtype == layer(x.to(dtype)).dtype == dtype
            return layer(x)

    actual = step(layer, x, call)
    assert all(t.dtype == torch.float32 for key, t in actual.items() if key != "output")
    if selected is not None:
        assert torch.equal(_selected(layer), selected)
    for key, e in expected.items():  # units near the threshold of TopKFFN may change: compare as a whole
        distance = (actual[key].float() - e).norm() / e.norm().clamp_min(1e-3)
        assert distance < tolerance, (key, distance)


def _selected(layer: sf.SparseFFN) -> Tensor | None:
    return layer._routed[0].clone() if isinstance(layer, Balanced) else None


@feature("`torch.amp.GradScaler`, fp16")
def grad_scaler(name: str) -> None:
    """Unscaled gradients, balance loss included, are near those of fp32; an overflow skips the step."""
    layer, x = build(name), tokens(64)
    expected = step(layer, x)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(layer.parameters(), 0.1)

    def scaled(x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = layer(x)
        scaler.scale(loss(layer, y)).backward()

    scaled(x)
    scaler.unscale_(optimizer)
    for key, p in layer.named_parameters():
        distance = (p.grad - expected[key]).norm() / expected[key].norm().clamp_min(1e-3)
        assert distance < 0.02, (key, distance)
    scaler.step(optimizer)
    scaler.update()
    before, scale = [p.detach().clone() for p in layer.parameters()], scaler.get_scale()
    scaled(x * float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert scaler.get_scale() == scale / 2


@feature("`checkpoint(use_reentrant=False)`", AND_TRITON)
def checkpoint(name: str) -> None:
    """Gradients equal to the bit, with dropout and noise; balance loss and loads count once."""
    _checkpointed(name, reentrant=False)


@feature("`checkpoint(use_reentrant=True)`")
def checkpoint_reentrant(name: str) -> None:
    """As above with `aux="inject"`, up to the rounding of a forward pass that keeps nothing; with `aux="attach"`, whose
    loss then has no gradient, `aux_loss` warns."""
    _checkpointed(name, reentrant=True, **({"aux": "inject"} if name in BALANCED else {}))
    layer = build(name)
    if (moe := mixture(layer)) is not None and moe.balance != ("bias",):
        checkpointing.checkpoint(layer, tokens(6).requires_grad_(), use_reentrant=True)
        with pytest.warns(sf.SparseFFNWarning, match=r"use_reentrant=False.*inject"):
            sf.aux_loss(layer)


def _checkpointed(name: str, reentrant: bool, **options: Any) -> None:
    layer = build(name, noise=True, dropout=0.3, **({"expert_dropout": 0.2} if name in BALANCED else {}), **options)
    torch.manual_seed(3)
    expected = step(layer, tokens(2, 6))
    loads = _loads(layer)
    torch.manual_seed(3)
    actual = step(layer, tokens(2, 6), lambda x: checkpointing.checkpoint(layer, x, use_reentrant=reentrant))
    if reentrant:
        assert_near(actual, expected)
    assert reentrant or all(torch.equal(actual[key], e) for key, e in expected.items())
    assert sf.aux_loss(layer) == 0
    assert torch.equal(_loads(layer), loads)


def _loads(layer: sf.SparseFFN) -> Tensor:
    """What the router counted since this was last asked."""
    moe = mixture(layer)
    if moe is None:
        return torch.zeros(1)
    load = moe.router.load.clone()
    moe.router.load.zero_()
    return load


OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


@feature("optimizers with `foreach=True`")
def foreach(name: str) -> None:
    """SGD, Adam, AdamW and Adagrad move the parameters as their plain loops do."""
    _optimized(name, foreach=True)


@feature("optimizers with `fused=True`")
def fused(name: str) -> None:
    """As above."""
    _optimized(name, fused=True)


def _optimized(name: str, **how: bool) -> None:
    for kind in OPTIMIZERS:
        results = []
        for options in (how, {"foreach": False}):
            layer = build(name)
            optimizer = kind(layer.parameters(), lr=0.01, **options)
            for seed in (1, 2):
                step(layer, tokens(20, seed=seed))
                optimizer.step()
            results.append(dict(layer.named_parameters()))
        assert_near(*results)


@feature("`clip_grad_norm_`, `clip_grad_value_`, `parameters_to_vector`")
def clipping(name: str) -> None:
    """The norm is that of all gradients; a flat vector of the parameters fills another layer."""
    layer = build(name)
    gradients = step(layer, tokens(20))
    norm = torch.stack([gradients[key].norm() for key, _ in layer.named_parameters()]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(layer.parameters(), norm.item() / 2), norm)
    for key, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key] / 2)
    nn.utils.clip_grad_value_(layer.parameters(), 1e-6)
    assert all(p.grad.abs().max() <= 1e-6 for p in layer.parameters())
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(2 * vector, layer.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(layer.parameters()), 2 * vector)


@feature("another default dtype or device")
def defaults(name: str) -> None:
    """`torch.set_default_dtype` and a default device change nothing for a layer and tokens that exist."""
    layer, x = build(name), tokens(12)
    expected = step(layer, x)
    with torch.no_grad():
        outputs = [layer.eval()(x[:n]) for n in (1, 12)]
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                assert_near(step(layer.train(), x), expected, 0)
                with torch.no_grad():
                    found = [layer.eval()(x[:n]) for n in (1, 12)]
        finally:
            torch.set_default_dtype(before)
        assert all(torch.equal(y, e) and y.dtype == e.dtype for y, e in zip(found, outputs, strict=True))


FEATURES = (
    defaults, autocast_bf16, autocast_fp16, grad_scaler, checkpoint, checkpoint_reentrant, foreach, fused, clipping,
)  # fmt: skip
