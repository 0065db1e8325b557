"""Routing and experts as one op of the CPU core: the same function as its reference, and as the two one by one."""

from __future__ import annotations

import copy
from typing import Any

import flat
import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn.backends import cpu
from sparse_ffn.ops.route import reference

pytestmark = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")

D, G, O = 33, 17, 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
GATES = list(reference.GATES)
ROUTERS = ["sigmoid", "softmax", "softmax_topk", "unweighted", "sinkhorn", "noisy_topk"]


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) / 2).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("gate_function", GATES)
@pytest.mark.parametrize(("tokens", "n_experts", "k"), [(1, 3, 2), (40, 5, 5), (130, 70, 20), (300, 16, 4), (64, 1, 1)])
def test_output_gates_sums_and_gradients_meet_the_reference(
    tokens: int, n_experts: int, k: int, gate_function: str, form: str, dtype: torch.dtype, poisoned: None
) -> None:
    tensors: dict[str, Tensor | None] = {
        "x": leaf(tokens, D, dtype=dtype),
        "router_weight": leaf(n_experts, D, dtype=dtype),
        "keys": leaf(n_experts, G, D, dtype=dtype),
        "values": leaf(n_experts, G, O, dtype=dtype),
        "gate_keys": None,
        "key_bias": None,
        "router_bias": None,
        "mask": None,
        "dropout_mask": None,
    }
    groups, activation = 1, "relu"
    if form == "everything":
        groups, activation = (2 if tokens % 2 == 0 else 1), "silu"
        tensors |= {
            "gate_keys": leaf(n_experts, G, D, dtype=dtype),
            "key_bias": leaf(n_experts, G, dtype=dtype),
            "router_bias": torch.randn(n_experts),
            "mask": torch.rand(tokens) > 0.3,
            "dropout_mask": ((torch.rand(tokens, k, G) > 0.3) / 0.7).to(dtype),
        }
    options: dict[str, Any] = {"k": k, "gate_function": gate_function, "groups": groups, "activation": activation}
    wide = {
        n: t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(t.requires_grad)
        for n, t in tensors.items()
    }
    actual, expected = flat.routed_ffn(**tensors, **options), flat.routed_reference(**wide, **options)
    assert torch.equal(actual[1], expected[1])
    upstream = [torch.randn_like(expected[i]).to(dtype).double() for i in (0, 2, 3)]
    trained = [n for n, t in tensors.items() if t is not None and t.requires_grad]

    def results(found: tuple[Tensor, ...], inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
        outputs = {"output": found[0], "gate": found[2], "sums": found[3]}
        grads = torch.autograd.grad(
            list(outputs.values()),
            [inputs[n] for n in trained],  # type: ignore[misc]
            [u.to(o.dtype) for u, o in zip(upstream, outputs.values(), strict=True)],
        )
        return outputs | {f"gradient of {n}": g for n, g in zip(trained, grads, strict=True)}

    got, wanted = results(actual, tensors), results(expected, wide)
    for name, tensor in got.items():
        scale = max(1.0, wanted[name].abs().max().item())
        difference = (tensor.double() - wanted[name]).abs().max().item()
        assert difference <= TOLERANCE[dtype] * scale, f"{name}: off by {difference}, scale {scale}"


def layer_results(layer: sf.MoE, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x, mask=mask)
    (y.square().sum() + 100 * sf.aux_loss(layer)).backward()
    found = {"output": y.detach(), "aux_loss": sf.aux_loss(layer).detach(), "gradient of x": x.grad}
    found |= {f"gradient of {n}": p.grad for n, p in layer.named_parameters()}
    found["load"] = layer.router.load.clone()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("balance_over", ["batch", "sequence"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("balance", ["entropy", "switch", "cv2", "z", "bias", ("entropy", "cv2"), "none"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_computes_the_same_in_one_op_as_in_two(
    router: str, balance: Any, masked: bool, balance_over: str, training: bool
) -> None:
    weight: Any = (0.1,) * len(balance) if isinstance(balance, tuple) else 0.1
    layer = sf.MoE(
        D,
        6,
        G,
        2,
        router=router,
        balance=balance,
        balance_weight=weight,
        balance_over=balance_over,
        glu=True,
        bias=True,
    ).train(training)
    x = torch.randn(3, 20, D)
    mask = torch.rand(3, 20) > 0.3 if masked else None
    separate = copy.deepcopy(layer)
    separate.router.register_forward_hook(lambda *args: None)  # a hooked router is called as a module
    torch.manual_seed(1)
    expected = layer_results(separate, x, mask)
    torch.manual_seed(1)
    actual = layer_results(layer, x, mask)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def calls(layer: sf.MoE, x: Tensor, **arguments: Any) -> set[str]:
    """Names of our ops that a forward pass of the layer runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x, **arguments)
    names = {e.key for e in profile.key_averages() if e.key.startswith("sparse_ffn::")}
    return {n.removeprefix("sparse_ffn::") for n in names}


def test_one_op_serves_plain_routers_and_two_serve_all_others() -> None:
    x = torch.randn(10, D)
    layer = sf.SigmaMoE(D, 6, G, 2)
    assert calls(layer, x) == {"routed_ffn"}
    assert calls(layer.bfloat16(), x.bfloat16()) == {"routed_ffn"}
    with torch.no_grad():
        assert calls(layer.float().eval(), x) == {"routed_ffn_inference"}
    layer.train()
    for other in (
        sf.SigmaMoE(D, 6, G, 2, expert_dropout=0.1),
        sf.SigmaMoE(D, 6, G, 2, aux="inject"),
        sf.SigmaMoE(D, 6, G, 2, balance="z"),
        sf.SBaseMoE(D, 6, G, 2),
        sf.NoisyTopKMoE(D, 6, G, 2),
    ):
        assert calls(other, x) == {"expert_ffn"}
    assert calls(sf.SBaseMoE(D, 6, G, 2).eval(), x) == {"routed_ffn"}
    assert calls(layer, x, router_input=x.clone()) == {"expert_ffn"}
    assert calls(layer.double(), x.double()) == {"expert_ffn"}


def test_a_subclass_of_a_router_keeps_its_say() -> None:
    class Reversed(sf.routing.SigmoidRouter):
        def rank(self, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
            return -logits_TE

    x, plain = torch.randn(10, D), sf.SigmaMoE(D, 6, G, 2)
    reversed_ = sf.MoE(D, 6, G, 2, router=Reversed(D, 6, 2))
    reversed_.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(x), reversed_(x))


def test_hooks_on_the_router_run() -> None:
    layer, seen = sf.SigmaMoE(D, 6, G, 2), []
    layer.router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    layer(torch.randn(10, D))
    assert seen[0].logits_TE.shape == (10, 6)


@pytest.mark.parametrize("shape", [(512, 16, 32, 4), (256, 64, 16, 8), (100, 16, 8, 4)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_what_a_training_step_keeps_is_the_hidden_units_and_four_numbers_a_slot(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    tokens, n_experts, size, k = shape
    layer = sf.SigmaMoE(D, n_experts, size, k, dtype=dtype)
    x = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in (x, *layer.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    elements = sum(t.numel() for t in kept.values())
    assert elements >= tokens * k * size, "the measure would see them"
    assert elements <= tokens * k * size + 4 * tokens * k


def test_opcheck_holds() -> None:
    library = torch.ops.sparse_ffn
    x, router = torch.randn(6, D, requires_grad=True), torch.randn(5, D, requires_grad=True)
    keys, values = torch.randn(5, G, D, requires_grad=True), torch.randn(5, G, O, requires_grad=True)
    for glu in (False, True):
        gate_keys, key_bias = (keys.detach().flip(0).requires_grad_(), torch.randn(5, G)) if glu else (None, None)
        scale, mask, bias = (torch.rand(6, 2, G), torch.rand(6) > 0.5, torch.randn(5)) if glu else (None, None, None)
        call = (x, router, bias, mask, keys, values, gate_keys, key_bias, scale, 2, "sigmoid", 1, "silu")
        torch.library.opcheck(library.routed_ffn.default, call)
        _, index, gate, sums, *saved = (t.detach() for t in library.routed_ffn(*call))
        plain = [None if t is None else t.detach() for t in (x, router, mask, keys, values, gate_keys, key_bias, scale)]
        grads = (torch.randn(6, O), torch.randn_like(gate), torch.randn_like(sums))
        back = (*grads, *plain, index, gate, *saved, True, "sigmoid", "silu")
        torch.library.opcheck(library.routed_ffn_backward.default, back)
        forward = (x, router, bias, mask, keys, values, gate_keys, key_bias, scale, 2, "sigmoid", 1, "silu")
        torch.library.opcheck(
            library.routed_ffn_inference.default, tuple(t.detach() if isinstance(t, Tensor) else t for t in forward)
        )
