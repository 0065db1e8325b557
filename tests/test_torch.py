"""The layers inside torch's own machinery, beyond the features that test_matrix.py tries one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from matrix.layers import LAYERS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparse_ffn as sf

every_layer = pytest.mark.parametrize("name", LAYERS)


def gradients(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    (y.float().square().sum() + sf.aux_loss(layer)).backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@every_layer
def test_first_derivatives_agree_with_finite_differences(name: str, on_backend: str) -> None:
    layer = LAYERS[name](dtype=torch.float64).eval()
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(parameters, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


@every_layer
def test_second_derivatives_on_the_reference_backend(name: str) -> None:
    layer = LAYERS[name](dtype=torch.float64).eval()
    with sf.backend("reference"):
        assert torch.autograd.gradgradcheck(layer, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


def test_autocast_leaves_the_routing_in_fp32(on_backend: str) -> None:
    layer, x = sf.SigmaMoE(8, 9, 4, 3), torch.randn(50, 8)
    plain = layer.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer.router(x)
        layer(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert cast.logits_TE.dtype == cast.gate_TK.dtype == sf.aux_loss(layer).dtype == torch.float32


@every_layer
def test_fp64_stays_fp64_under_autocast(name: str, on_backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert LAYERS[name](dtype=torch.float64)(torch.randn(5, 8, dtype=torch.float64)).dtype == torch.float64


@every_layer
def test_dtype_and_device_arguments_reach_every_parameter(name: str) -> None:
    layer = LAYERS[name](dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.bfloat16, "meta")}


@every_layer
def test_a_whole_training_step_on_the_meta_device(name: str) -> None:
    layer = LAYERS[name](device="meta")
    y = layer(torch.randn(2, 5, 8, device="meta"))
    (y.sum() + sf.aux_loss(layer)).backward()
    assert y.shape == (2, 5, layer.d_out)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@every_layer
def test_every_parameter_gets_a_gradient_every_step(name: str, on_backend: str) -> None:
    for tokens in (0, 1, 7):
        layer = LAYERS[name](dropout=0.3)
        (layer(torch.randn(tokens, 8)).sum() + sf.aux_loss(layer)).backward()
        for parameter_name, p in layer.named_parameters():
            assert p.grad is not None, (tokens, parameter_name)
            assert p.grad.isfinite().all(), (tokens, parameter_name)


@every_layer
def test_two_runs_are_equal_to_the_bit(name: str, on_backend: str) -> None:
    layer, x = LAYERS[name](dropout=0.2), torch.randn(40, 8)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(gradients(layer, layer, x))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_layer
def test_forward_never_waits_for_the_device(name: str) -> None:
    """Under fake tensors any .item(), nonzero() or data-dependent shape of the layers' own code raises."""
    with FakeTensorMode():
        layer = LAYERS[name]()
        y = layer(torch.randn(6, 8), mask=torch.ones(6, dtype=torch.bool))
        (y.sum() + sf.aux_loss(layer)).backward()
    assert y.shape == (6, layer.d_out)


# ------------------------------------------------------------------- submodules that are more than their weights


class Added(nn.Module):
    """What LoRA does to a linear map: another one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Parameter(torch.randn_like(base.weight))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, self.delta)


@pytest.mark.parametrize("query_norm", [None, "rms"])
def test_a_query_that_was_wrapped_is_called(query_norm: str | None, on_backend: str) -> None:
    layer, x = sf.ProductKeyMemory(8, 5, 7, n_heads=2, query_dim=6, query_norm=query_norm), torch.randn(20, 8)
    merged = sf.ProductKeyMemory(8, 5, 7, n_heads=2, query_dim=6, query_norm=query_norm)
    merged.load_state_dict(layer.state_dict())
    layer.query = Added(layer.query)
    with torch.no_grad():
        merged.query.weight.add_(layer.query.delta)
    torch.testing.assert_close(layer(x), merged(x))
    layer(x).sum().backward()
    assert layer.query.delta.grad.any()


def test_hooks_on_the_query_run(on_backend: str) -> None:
    layer, x = sf.ProductKeyMemory(8, 5, 7, query_dim=6), torch.randn(20, 8)
    plain = layer(x)
    layer.query.register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(layer(x), 2 * plain)  # scores and so ReLU's weights double


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hooks_that_change_nothing_change_no_selection(dtype: torch.dtype, on_backend: str) -> None:
    """FlopCounterMode's, a profiler's: the query is still computed in fp32 at least."""
    layer = sf.ProductKeyMemory(64, 32, 16, n_heads=2, query_dim=64, query_norm="layer", dtype=dtype)
    exact, x = sf.ProductKeyMemory(64, 32, 16, n_heads=2, query_dim=64, query_norm="layer"), torch.randn(200, 64)
    exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    x = x.to(dtype)
    expected = exact(x.float())
    before = (layer(x).float() - expected).norm()
    with FlopCounterMode(display=False):
        counted = layer(x)
    layer.query.register_forward_hook(lambda module, args, y: None)
    for y in (counted, layer(x)):
        assert (y.float() - expected).norm() < 2 * before


# -------------------------------------------------------------------------- what a transform of torch.func cannot do


def transformed(layer: nn.Module) -> None:
    """A training forward of the layer under torch.func.grad."""
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    torch.func.grad(lambda p: functional_call(layer, p, (torch.randn(5, 8),)).sum())(parameters)


@pytest.mark.parametrize("make", [lambda: sf.TopKFFN(8, 12, 3), lambda: sf.MoE(8, 9, 4, 3, balance="z").eval()])
@pytest.mark.parametrize("tracer", ["eager", "aot_eager"])
def test_a_transform_inside_of_compile_is_right_or_refused(
    make: Callable[[], nn.Module], tracer: str, on_backend: str
) -> None:
    """Dynamo's tensors do not tell that a derivative is wanted: the op without one gave zeros."""
    torch._dynamo.reset()
    layer, x = make(), torch.randn(5, 8)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def gradients(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return torch.func.grad(lambda p: functional_call(layer, p, (x,)).square().sum())(parameters)

    expected = gradients(parameters)
    try:
        found = torch.compile(gradients, fullgraph=True, backend=tracer)(parameters)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException):
        return
    torch.testing.assert_close(found, expected)


def test_asking_for_the_loss_after_the_transform_says_that_it_is_over(on_backend: str) -> None:
    layer = sf.SigmaMoE(8, 9, 4, 3)
    transformed(layer)
    for ask in (sf.aux_loss, sf.routing_stats):
        with pytest.raises(RuntimeError, match=r"inside a transform of torch\.func .* that is over"):
            ask(layer)
    layer(torch.randn(5, 8))
    assert sf.aux_loss(layer) != 0


@pytest.mark.filterwarnings("error::sparse_ffn.SparseFFNWarning")
def test_a_transformed_loss_is_not_said_to_have_no_gradient() -> None:
    layer, x = sf.SigmaMoE(8, 9, 4, 3), torch.randn(5, 8)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().mean() + sf.aux_loss(layer)

    gradients = torch.func.grad(loss)(parameters)
    with sf.backend("reference"):
        ones = {name: torch.ones_like(p) for name, p in parameters.items()}
        _, tangent = torch.func.jvp(loss, (parameters,), (ones,))
    torch.testing.assert_close(tangent, sum(g.sum() for g in gradients.values()), check_dtype=False)


def test_counting_loads_in_a_transform_is_refused(on_backend: str) -> None:
    with pytest.raises(RuntimeError, match=r'balance="bias" counts .* take another balance'):
        transformed(sf.SigmaMoE(8, 9, 4, 3, balance="bias"))


def test_a_sparse_gradient_in_a_transform_is_refused(on_backend: str) -> None:
    with pytest.raises(RuntimeError, match="sparse_grad=True does not work inside"):
        transformed(sf.ProductKeyMemory(8, 5, 7, sparse_grad=True))
