"""The balance loss of a router's sums against float64: its value and its gradient, in one launch each."""

from __future__ import annotations

import copy

import pytest
import torch
from net import guarded, traps
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn.backends.triton import entropy
from sparse_ffn.ops.negative_entropy.op import negative_entropy

TINY = torch.finfo(torch.float32).tiny


def expected(sums: Tensor, count: int, weight: float, grad: float) -> tuple[Tensor, Tensor]:
    leaf = sums.double().requires_grad_()
    p = leaf / count
    loss = weight * (p * p.clamp_min(TINY).log()).sum(1).mean()
    # the clamped logarithm has no slope of its own at zero: that of p log p is its limit there
    slope = weight * (p.detach().clamp_min(TINY).log() + 1) / (count * len(sums))
    return loss.detach(), grad * slope


@pytest.mark.parametrize(("groups", "n_experts"), [(1, 1), (1, 7), (3, 6), (2, 64), (5, 33)])
def test_it_meets_float64(groups: int, n_experts: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "BLOCK", 32)  # several blocks, the last one ragged
    count = 24
    sums = count * torch.softmax(2 * torch.randn(groups, n_experts), 1).to(device)
    sums[0, 0] = 0  # an expert that no token can reach
    for weight, grad in ((1e-3, 1.0), (-2.0, 0.5)):
        loss, slope = expected(sums, count, weight, grad)
        leaf = guarded(sums).requires_grad_()
        with sf.backend("triton"), traps():
            actual = negative_entropy(leaf, count, weight)
            (found,) = torch.autograd.grad(actual, leaf, torch.tensor(grad, device=device))
        torch.testing.assert_close(actual.detach().double(), loss, rtol=1e-6, atol=1e-9)
        near = (
            1e-6 * slope.abs().max().item()
        )  # log p + 1 cancels near p = 1/e, and a GPU's log has an error of its own
        torch.testing.assert_close(found.double(), slope, rtol=1e-6, atol=near)
        assert actual.shape == ()
        assert actual.dtype == found.dtype == torch.float32


def test_nan_shows(device: str) -> None:
    sums = torch.tensor([[1.0, float("nan"), 2.0]], device=device, requires_grad=True)
    with sf.backend("triton"):
        loss = negative_entropy(sums, 3, 1.0)
        loss.backward()
    assert sums.grad is not None
    assert loss.isnan()
    assert sums.grad.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_a_layer_has_the_loss_and_gradients_of_its_router_called(over: str, device: str) -> None:
    layer = sf.SigmaMoE(16, 6, 8, 2, balance_weight=0.5, balance_over=over, device=device)
    called = copy.deepcopy(layer)
    called.router.register_forward_hook(lambda *args: None)  # a hooked router is called as a module
    x, found = torch.randn(2, 5, 16, device=device), []
    for each in (called, layer):
        with sf.backend("triton"):
            each(x)
            loss = sf.aux_loss(each)
            loss.backward()
        found.append((loss.detach(), each.router.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
