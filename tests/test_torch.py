"""The layers inside torch's own machinery: compile, export, opcheck, gradcheck, autocast, checkpoint, DDP, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import sparse_ffn as sf

LAYERS: dict[str, Callable[..., sf.SparseFFN]] = {
    "dense": lambda **o: sf.DenseFFN(8, 20, **o),
    "topk": lambda **o: sf.TopKFFN(8, 20, 5, glu=True, activation="silu", norm_aware=True, **o),
    "product_key": lambda **o: sf.ProductKeyMemory(8, 5, 7, n_heads=2, query_dim=6, query_norm="layer", **o),
    "sigma": lambda **o: sf.SigmaMoE(8, 9, 4, 3, bias=True, **o),
    "softmax": lambda **o: sf.SoftmaxMoE(8, 9, 4, 3, glu=True, activation="gelu", balance="cv2", **o),
    "switch": lambda **o: sf.SwitchMoE(8, 9, 4, d_out=6, **o),
    "sbase": lambda **o: sf.SBaseMoE(8, 9, 4, 3, balance="z", **o),
    "noisy": lambda **o: sf.NoisyTopKMoE(8, 9, 4, 3, **o),
    "open": lambda **o: sf.MoE(8, 9, 4, 3, router="open", balance="bias", **o),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def gradients(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    (y.float().square().sum() + sf.aux_loss(layer)).backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())]


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@every_layer
def test_compiles_whole_and_gives_the_same_output_and_gradients(name: str, on_backend: str) -> None:
    torch._dynamo.reset()
    layer = LAYERS[name]()
    if name == "noisy":
        layer.router.perturb = lambda logits, x: logits  # compiled code draws other numbers
    # inductor 2.13 fuses plain torch's tiny dense backward wrongly on the CPU (not the graph: aot_eager is right)
    compiler = "aot_eager" if on_backend == "reference" else "inductor"
    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=True)
    x = torch.randn(2, 64, 8)
    assert_all_close(gradients(layer, compiled, x), gradients(layer, layer, x))
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@every_layer
def test_compiled_once_serves_every_number_of_tokens(name: str) -> None:
    torch._dynamo.reset()
    layer = LAYERS[name]().eval()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (7, 13, 40):
        compiled(torch.randn(2, tokens, 8))
    assert counter.frame_count == 1


@every_layer
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exports_with_a_dynamic_batch(name: str, strict: bool, on_backend: str) -> None:
    layer = LAYERS[name]().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (torch.randn(3, 5, 8),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    x = torch.randn(7, 5, 8)
    torch.testing.assert_close(program.module()(x), layer(x))


@every_layer
def test_first_derivatives_agree_with_finite_differences(name: str, on_backend: str) -> None:
    layer = LAYERS[name](dtype=torch.float64).eval()
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


@every_layer
def test_second_derivatives_on_the_reference_backend(name: str) -> None:
    layer = LAYERS[name](dtype=torch.float64).eval()
    with sf.backend("reference"):
        assert torch.autograd.gradgradcheck(layer, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("name", ["topk", "product_key", "sigma"])
def test_second_derivative_elsewhere_is_an_error_that_names_the_reference(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"sparse_ffn.backend\('reference'\)"):
        grad.sum().backward()


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_output_dtype_is_that_of_linear(name: str, dtype: torch.dtype, on_backend: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 5, 8)
    linear = nn.Linear(8, 8)
    with torch.autocast("cpu", dtype):
        assert layer(x).dtype == linear(x).dtype == dtype
        assert layer(x.to(dtype)).dtype == linear(x.to(dtype)).dtype
        double = LAYERS[name](dtype=torch.float64)
        assert double(x.double()).dtype == linear.double()(x.double()).dtype == torch.float64
    (layer(x).sum() + sf.aux_loss(layer)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_autocast_leaves_the_routing_in_fp32(on_backend: str) -> None:
    layer, x = sf.SigmaMoE(8, 9, 4, 3), torch.randn(50, 8)
    plain = layer.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer.router(x)
        layer(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert cast.logits_TE.dtype == cast.gate_TK.dtype == sf.aux_loss(layer).dtype == torch.float32


@every_layer
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    aux = {"aux": "inject"} if isinstance(LAYERS[name](), sf.MoE) else {}
    torch.manual_seed(1)
    layer = LAYERS[name](**aux)
    x = torch.randn(2, 6, 8)
    torch.manual_seed(2)
    expected = gradients(layer, layer, x)
    torch.manual_seed(2)
    actual = gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant), x)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_attached_loss_survives_non_reentrant_checkpointing_and_is_reported_lost_in_the_other() -> None:
    layer, x = sf.SigmaMoE(8, 9, 4, 3, balance_weight=1.0), torch.randn(6, 8, requires_grad=True)
    layer(x)
    expected = torch.autograd.grad(sf.aux_loss(layer), layer.router.weight)[0]
    checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(sf.aux_loss(layer), layer.router.weight)[0], expected)
    checkpoint(layer, x, use_reentrant=True)
    with pytest.warns(sf.SparseFFNWarning, match="use_reentrant=False"):
        sf.aux_loss(layer)


@every_layer
def test_copies_pickles_and_state_dicts_give_the_same_layer(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(4, 8)
    layer(x)
    layer.eval()
    other = LAYERS[name]().eval()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), layer(x))


@every_layer
def test_built_on_meta_then_emptied_and_reset_it_works(name: str) -> None:
    layer = LAYERS[name](device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(float("nan"))
    layer.reset_parameters()
    assert layer(torch.randn(4, 8)).isfinite().all()
    assert all(t.isfinite().all() for t in layer.state_dict().values())


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


@every_layer
def test_vmap_over_an_ensemble_on_the_reference_backend(name: str) -> None:
    layers = [LAYERS[name]().eval() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(layers)
    x = torch.randn(5, 8)
    with sf.backend("reference"):
        together = torch.func.vmap(lambda p: torch.func.functional_call(layers[0], p, (x,)))(stacked)
        one_by_one = torch.stack([layer(x) for layer in layers])
    torch.testing.assert_close(together, one_by_one)
