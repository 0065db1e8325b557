"""torch.func, vmap and derivatives beyond the first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

import sparse_ffn as sf

from .feature import AND_TRITON, feature
from .layers import ALL, DENSE, NOT_DENSE, assert_near, build, loss, step, tokens

FIRST_ORDER = {"torch": NOT_DENSE, "cpu": NOT_DENSE, "triton": ("SigmaMoE",)}
ANY_ORDER = {"reference": ALL, "torch": DENSE, "cpu": DENSE}


@feature("`torch.func.functional_call`")
def functional(name: str) -> None:
    """With another layer's parameters: the other's output, and gradients for the tensors given."""
    layer, other, x = build(name), build(name), tokens(12)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    expected = step(other, x)
    parameters = {key: p.detach().requires_grad_() for key, p in other.named_parameters()}
    y = functional_call(layer, parameters, (x,))
    loss(layer, y).backward()
    found = {"output": y.detach(), **{key: p.grad for key, p in parameters.items()}}
    assert_near(found, {key: expected[key] for key in found})


@feature("`torch.func.grad`", AND_TRITON)
def grad(name: str) -> None:
    """Gradients are backward's, those of `aux_loss` inside the function included (`balance="bias"`: in evaluation)."""
    layer, x = build(name), tokens(12)
    if name == "MoE":  # counts loads by a side effect, which torch.func refuses in training
        layer.eval()
    expected = step(layer, x)
    parameters = {key: p.detach() for key, p in layer.named_parameters()}
    found = torch.func.grad(lambda p: loss(layer, functional_call(layer, p, (x,))))(parameters)
    assert_near(found, {key: expected[key] for key in parameters})


@feature("`torch.func.vmap` over an ensemble")
def ensemble(name: str) -> None:
    """Outputs are those of the members one by one, and so are the gradients through it."""
    layers, x = [build(name).eval() for _ in range(3)], tokens(12)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for p in layer.parameters():
                p.mul_(1 + i / 4)
    stacked, _ = torch.func.stack_module_state(layers)
    y = torch.func.vmap(lambda p: functional_call(layers[0], p, (x,)))(stacked)
    y.square().mean((1, 2)).sum().backward()
    for i, layer in enumerate(layers):
        found = {"output": y[i].detach(), **{key: stacked[key].grad[i] for key in stacked}}
        expected = step(layer, x)
        assert_near(found, {key: expected[key] for key in found})


@feature("`vmap(grad(...))`, per-sample gradients")
def per_sample(name: str) -> None:
    """One gradient for each sequence, as from one backward pass for each."""
    layer, x = build(name).eval(), tokens(4, 6)
    parameters = {key: p.detach() for key, p in layer.named_parameters()}
    slope = torch.func.grad(lambda p, x: functional_call(layer, p, (x,)).square().mean())
    found = torch.func.vmap(slope, (None, 0))(parameters, x)
    for i in range(4):
        expected = step(layer, x[i])
        assert_near({key: g[i] for key, g in found.items()}, {key: expected[key] for key in parameters})


@feature("double backward", ANY_ORDER, FIRST_ORDER)
def double_backward(name: str) -> None:
    """The gradient of a directional derivative is the Hessian's product that forward over reverse mode gives."""
    layer, x, direction = build(name).eval(), tokens(12).requires_grad_(), tokens(12, seed=3)

    def function(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    (slope,) = torch.autograd.grad(function(x), x, create_graph=True)
    (product,) = torch.autograd.grad((slope * direction).sum(), x)
    with sf.backend("reference"):  # so that no other refusal is taken for that of the line before
        _, expected = torch.func.jvp(torch.func.grad(function), (x.detach(),), (direction,))
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)


@feature("`torch.func.jvp`, forward mode", ANY_ORDER, FIRST_ORDER)
def forward_mode(name: str) -> None:
    """The directional derivative is the one that the gradient gives."""
    layer, x, direction = build(name).eval(), tokens(12), tokens(12, seed=3)
    _, slope = torch.func.jvp(lambda x: layer(x).square().sum(), (x,), (direction,))
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(x)
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-4, atol=1e-4)


@feature("forward mode by dual numbers", ANY_ORDER, FIRST_ORDER)
def dual_numbers(name: str) -> None:
    """The same without `torch.func`."""
    layer, x, direction = build(name).eval(), tokens(12), tokens(12, seed=3)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(y.square().sum()).tangent
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(x)
    torch.testing.assert_close(tangent, (gradient * direction).sum(), rtol=1e-4, atol=1e-4)


FEATURES = (functional, grad, ensemble, per_sample, double_backward, forward_mode, dual_numbers)
