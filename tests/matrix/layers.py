"""The layers of the matrix, each with options that take it through different code, and what is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_ffn as sf
from sparse_ffn.layers import LatentMoE, LowRankMoE, MixedMoE, SharedExpertMoE, SwitchHeadAttention
from sparse_ffn.layers.balanced import Balanced
from sparse_ffn.routing import NoisyTopKRouter

D = 8
Layer = sf.SparseFFN | LatentMoE | SharedExpertMoE | SwitchHeadAttention


def beside_a_shared_expert(**options: Any) -> SharedExpertMoE:
    """DeepSeek's block, its shared expert gated as Qwen2's; the shared one has those options that a dense FFN has."""
    dense = {name: value for name, value in options.items() if name in ("dropout", "device", "dtype", "n_layers")}
    routed, shared = sf.SigmaMoE(D, 9, 4, 3, **options), sf.DenseFFN(D, 6, glu=True, activation="silu", **dense)
    return SharedExpertMoE(routed, shared, gated=True)


LAYERS: dict[str, Callable[..., Layer]] = {
    "DenseFFN": lambda **o: sf.DenseFFN(D, 20, **o),
    "TopKFFN": lambda **o: sf.TopKFFN(D, 20, 5, glu=True, activation="silu", norm_aware=True, **o),
    "ProductKeyMemory": lambda **o: sf.ProductKeyMemory(D, 5, 7, n_heads=2, query_dim=6, query_norm="layer", **o),
    "SigmaMoE": lambda **o: sf.SigmaMoE(D, 9, 4, 3, bias=True, **o),
    "SoftmaxMoE": lambda **o: sf.SoftmaxMoE(
        D, 9, 4, 3, glu=True, activation="gelu", balance="cv2", null_experts=2, null_kind="constant", **o
    ),
    "SwitchMoE": lambda **o: sf.SwitchMoE(D, 9, 4, d_out=6, **o),
    "SBaseMoE": lambda **o: sf.SBaseMoE(D, 9, 4, 3, balance="z", **o),
    "NoisyTopKMoE": lambda **o: sf.NoisyTopKMoE(D, 9, 4, 3, **o),
    "LatentMoE": lambda **o: LatentMoE(D, 5, 9, 4, 3, **o),
    "MixedMoE": lambda **o: MixedMoE(D, [(5, 4), (4, 7)], 3, glu=True, activation="silu", balance_cost=True, **o),
    "LowRankMoE": lambda **o: LowRankMoE(D, 9, 16, 3, 2, bias=True, **o),
    "SharedExpertMoE": beside_a_shared_expert,
    "SwitchHeadAttention": lambda **o: SwitchHeadAttention(D, 2, 4, 3, **o),
    "MoE": lambda **o: sf.MoE(D, 9, 4, 3, router="unweighted", balance="bias", **o),  # the loads of bias balancing
}
ALL = tuple(LAYERS)
FFNS = tuple(name for name in LAYERS if name not in ("SharedExpertMoE", "SwitchHeadAttention"))
MIXTURES = tuple(name for name in LAYERS if name.endswith("MoE"))
LAST = ("LowRankMoE", "MixedMoE")
"""MoE's base with other experts: where a case takes seconds it is run for them on the CPU core alone, or for MoE."""
BALANCED = (*MIXTURES, "SwitchHeadAttention")
DENSE, NOT_DENSE = ("DenseFFN",), ALL[1:]


class _Quiet(NoisyTopKRouter):
    """A noisy router whose noise is multiplied by zero: its parameter still takes part."""

    def perturb(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        return logits_TE + 0 * F.linear(x_TD, self.noise_weight.to(x_TD.dtype))


def build(name: str, *, noise: bool = False, **options: Any) -> Layer:
    """A layer of the same weights every time; without noise, so that two forwards agree."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = LAYERS[name](**options)
    if isinstance(layer, sf.NoisyTopKMoE) and not noise:
        layer.router.__class__ = _Quiet
    return layer


def mixture(layer: nn.Module) -> Balanced | None:
    """The mixture of experts that a layer is or holds."""
    return next((module for module in layer.modules() if isinstance(module, Balanced)), None)


def tokens(*shape: int, seed: int = 2) -> Tensor:
    """Standard normal tokens [*shape, D], the same every time."""
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def loss(layer: nn.Module, y: Tensor) -> Tensor:
    """A loss of the output and of the balance."""
    return y.float().square().mean() + sf.aux_loss(layer)


def step(layer: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients of a training step, by name."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x) if call is None else call(x)
    loss(layer, y).backward()
    found = {"output": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert all(t is not None for t in found.values()), [name for name, t in found.items() if t is None]
    return {name: t.clone() for name, t in found.items()}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal names, and tensors equal but for rounding."""
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        torch.testing.assert_close(
            actual[name], e, rtol=tolerance, atol=tolerance, check_dtype=False, msg=lambda m, name=name: f"{name}: {m}"
        )
