"""DenseFFN: which of its products are the CPU core's, and that they are the same network whoever computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_ffn as sf
from conftest import BACKENDS
from sparse_ffn.layers.projection import Projection
from sparse_ffn.ops import products
from sparse_ffn.ops.activations import ACTIVATIONS

core = pytest.mark.skipif("cpu" not in BACKENDS, reason="it is about the CPU core")
glu = pytest.mark.parametrize("glu", [False, True], ids=["plain", "GLU"])
LOW = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Called(TorchDispatchMode):
    """Our ops, and the dtypes of the operands of torch's products."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparse_ffn":
            self.ops.add(func.__name__.partition(".")[0])
        elif "mm" in func.__name__:
            self.dtypes |= {t.dtype for t in tree_leaves(args) if isinstance(t, Tensor)}
        return func(*args, **kwargs or {})


def dense(glu: bool, dtype: torch.dtype = torch.float32, d_ff: int = 2050, activation: str = "silu") -> sf.DenseFFN:
    layer = sf.DenseFFN(64, d_ff, d_out=130, glu=glu, activation=activation, dtype=dtype).eval()
    torch.nn.init.normal_(layer.key_bias)
    return layer


def exact(layer: sf.DenseFFN, x: Tensor) -> Tensor:
    wide = dense(layer.gate_keys is not None, torch.float64, layer.d_ff, layer.activation)
    wide.load_state_dict(layer.state_dict())
    with sf.backend("reference"):
        return wide(x.double())


def assert_near(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        y.double(), expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.detach().abs().max())
    )


@core
@glu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_few_tokens_are_the_cores(tokens: int, activation: str, dtype: torch.dtype, glu: bool) -> None:
    layer, x = dense(glu, dtype, activation=activation), torch.randn(tokens, 64).to(dtype)
    with torch.no_grad(), Called() as called:
        y = layer(x)
    assert (called.ops, called.dtypes) == ({"expert_ffn_inference"}, set())
    assert_near(y, exact(layer, x), dtype)


@core
@glu
def test_all_else_is_torchs(glu: bool) -> None:
    x = torch.randn(8, 64)
    with Called() as called:
        dense(glu)(x).sum().backward()  # a gradient
        with torch.no_grad():
            dense(glu)(torch.randn(9, 64))
            dense(glu, d_ff=200)(x)  # weights that are read at once
            dense(glu).train()(x)
            with sf.backend("torch"):
                dense(glu)(x)
    assert (called.ops, called.dtypes) == (set(), {torch.float32})


@core
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_of_few_tokens_is_not_tied_to_them() -> None:
    layer, x = dense(False).eval(), torch.randn(9, 64)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x[:4])
        torch.testing.assert_close(traced(x), layer(x))
    assert "expert_ffn" not in str(traced.inlined_graph)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for 16 bits."""
    monkeypatch.setattr(products, "slow_dtypes", lambda: LOW)


@glu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.usefixtures("slow")
def test_16_bits_without_instructions_are_multiplied_in_fp32(dtype: torch.dtype, glu: bool) -> None:
    layer, x = dense(glu, dtype), torch.randn(40, 64).to(dtype).requires_grad_()
    with Called() as called:
        y = layer(x)
        grads = torch.autograd.grad(y.float().square().mean(), [x, *layer.parameters()])
    assert called.dtypes == {torch.float32}
    assert {t.dtype for t in (y, *grads)} == {dtype}
    wide, leaf = dense(glu, torch.float64), x.detach().double().requires_grad_()
    wide.load_state_dict(layer.state_dict())
    expected = wide(leaf)
    assert_near(y, expected, dtype)
    for got, want in zip(grads, torch.autograd.grad(expected.square().mean(), [leaf, *wide.parameters()]), strict=True):
        assert_near(got, want, dtype)


@glu
@pytest.mark.usefixtures("slow")
def test_so_are_those_of_autocast(glu: bool) -> None:
    layer, x = dense(glu), torch.randn(40, 64)
    with Called() as called, torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    with called:
        y.float().sum().backward()
    assert (y.dtype, called.dtypes) == (torch.bfloat16, {torch.float32})
    assert layer.keys.grad is not None
    assert_near(y, exact(layer, x), torch.bfloat16)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("autocast", [False, True])
def test_so_are_the_linear_maps_of_other_layers(autocast: bool) -> None:
    layer = Projection(64, 130, bias=True).to(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(2, 40, 64).to(layer.weight.dtype)
    with Called() as called, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    with called:
        y.float().sum().backward()
    assert (y.dtype, called.dtypes) == (torch.bfloat16, {torch.float32})
    assert_near(y, torch.nn.functional.linear(x.double(), layer.weight.double()), torch.bfloat16)


@pytest.mark.usefixtures("slow")
def test_derivatives_of_second_order_stay() -> None:
    layer, x = dense(True, torch.bfloat16, d_ff=90), torch.randn(40, 64).bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(dx.float().square().sum(), x)
    assert again.abs().sum() > 0
    assert torch.func.vmap(layer)(x.unsqueeze(1)).shape == (40, 1, 130)
