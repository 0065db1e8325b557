"""Layers whose parameters were exchanged: other dtypes give the reference's output, other shapes an error."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.routing import DeepSeekRouter, SigmoidRouter

LAYERS: dict[str, Callable[[], sf.SparseFFN]] = {
    "SigmaMoE": lambda: sf.SigmaMoE(16, 8, 8, 2, bias=True, glu=True, balance="bias"),
    "TopKFFN": lambda: sf.TopKFFN(16, 32, 8, glu=True),
    "ProductKeyMemory": lambda: sf.ProductKeyMemory(16, 6, 4, query_dim=8, query_norm="rms"),
}
COMPILED = ["torch", "cpu"]


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def made(kind: str, dtype: torch.dtype) -> sf.SparseFFN:
    layer = LAYERS[kind]().to(dtype)
    with torch.no_grad():
        for tensor in tensors(layer).values():
            tensor.copy_(torch.randn_like(tensor) / 2)
    return layer


def exchange(layer: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = layer.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(value) if leaf in module._parameters else value)


def output(layer: sf.SparseFFN, x: Tensor, backend: str, train: bool) -> Tensor:
    layer = copy.deepcopy(layer).train(train)
    with sf.backend(backend), torch.set_grad_enabled(train):
        return layer(x).detach().float()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_parameter_in_another_dtype(kind: str, base: torch.dtype, train: bool) -> None:
    layer, x = made(kind, base), torch.randn(9, 16).to(base)
    for name, tensor in tensors(layer).items():
        if name == "values":  # x must have its dtype
            continue
        for dtype in {torch.float32, torch.bfloat16, torch.float16} - {tensor.dtype}:
            changed = copy.deepcopy(layer)
            exchange(changed, name, tensor.detach().to(dtype))
            wanted = output(changed, x, "reference", train)
            for backend in COMPILED:
                error = (output(changed, x, backend, train) - wanted).abs().max()
                assert error <= 0.05 * wanted.abs().max(), (name, dtype, backend)


@pytest.mark.parametrize("backend", ["reference", *COMPILED])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("kind", "name", "rows"),
    [
        ("SigmaMoE", "keys", 4), ("SigmaMoE", "values", 4), ("SigmaMoE", "gate_keys", 4), ("SigmaMoE", "key_bias", 4),
        ("SigmaMoE", "router.weight", 4), ("TopKFFN", "keys", 16), ("TopKFFN", "values", 16),
        ("TopKFFN", "gate_keys", 16), ("TopKFFN", "key_bias", 16), ("ProductKeyMemory", "values", 16),
    ],
)  # fmt: skip
def test_one_parameter_of_another_size(kind: str, name: str, rows: int, train: bool, backend: str) -> None:
    layer = made(kind, torch.float32)
    exchange(layer, name, tensors(layer)[name].detach()[:rows])
    if name == "router.weight":
        layer.router.bias = layer.router.bias[:rows]
    with pytest.raises(ValueError, match=rf"{name} must have shape"):
        output(layer, torch.randn(9, 16), backend, train)


@pytest.mark.parametrize("backend", ["reference", *COMPILED])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", [*LAYERS, "DenseFFN"])
def test_a_parameter_that_was_left_on_another_device(kind: str, train: bool, backend: str) -> None:
    layer = made(kind, torch.float32) if kind in LAYERS else sf.DenseFFN(16, 32, glu=True)
    for name in [name for name, _ in layer.named_parameters()]:
        part = copy.deepcopy(layer)
        exchange(part, name, tensors(part)[name].detach().to("meta"))
        own = name.rpartition(".")[2]
        with pytest.raises(ValueError, match=rf"the layer's (\w+\.)*{own} is on meta|parameters are on meta"):
            output(part, torch.randn(9, 16), backend, train)


def test_experts_pruned_together_with_their_router() -> None:
    layer, x = made("SigmaMoE", torch.float32), torch.randn(9, 16)
    for name, tensor in tensors(layer).items():
        if name != "out_bias":
            exchange(layer, name, tensor.detach()[:4])
    for train in (True, False):
        torch.testing.assert_close(output(layer, x, "cpu", train), output(layer, x, "reference", train))


def test_a_routers_bias_is_fp32_unless_the_router_is_fp64() -> None:
    router = SigmoidRouter(8, 4, 2, selection_bias=True)
    router.bias += 1e-3
    kept = router.bias.clone()
    for change, dtype in (("double", torch.float64), ("float", torch.float32), ("bfloat16", torch.float32)):
        getattr(router, change)()
        assert router.bias.dtype == dtype
        torch.testing.assert_close(router.bias.float(), kept)


@pytest.mark.parametrize("kind", ["SigmaMoE", "TopKFFN", "ProductKeyMemory"])
def test_k_may_change_and_every_backend_follows(kind: str) -> None:
    layer, x = made(kind, torch.float32), torch.randn(9, 16)
    first = output(layer, x, "reference", False)
    layer.k = 5
    for train in (True, False):
        wanted = output(layer, x, "reference", train)
        assert (wanted - first).abs().max() > 1e-3
        for backend in COMPILED:
            torch.testing.assert_close(output(layer, x, backend, train), wanted, rtol=1e-4, atol=1e-5)
    for k in (0, 99, 2.0):
        with pytest.raises((TypeError, ValueError), match="k must be"):
            layer.k = k  # type: ignore[assignment]
    assert layer.k == 5


def test_k_is_the_routers() -> None:
    layer = sf.SigmaMoE(16, 8, 8, 2)
    layer.router.k = 3
    assert (layer.k, layer.active_fraction) == (3, 3 / 8)
    with pytest.raises(ValueError, match="k must be at least 1 and at most n_experts = 8, got 9"):
        layer.router.k = 9
    with pytest.raises(AttributeError):
        sf.DenseFFN(4, 8).k = 2  # type: ignore[misc]


@pytest.mark.parametrize("router", [SigmoidRouter(8, 4, 2), DeepSeekRouter(8, 4, 2)])
def test_a_router_takes_tokens_in_rows(router: SigmoidRouter) -> None:
    for x, mask, message in (
        (torch.randn(2, 3, 8), None, r"x must be \[tokens, d_model = 8\], got \[2, 3, 8\]"),
        (torch.randn(3, 7), None, r"got \[3, 7\]"),
        (torch.ones(3, 8, dtype=torch.int64), None, "floating"),
        (torch.randn(3, 8), torch.ones(3), "mask must be bool"),
        (torch.randn(3, 8), torch.ones(2, dtype=torch.bool), r"mask must have x.s shape .*\[3\], got \[2\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            router(x, mask)
