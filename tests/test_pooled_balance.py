"""pooled_balance: the loss of several calls of a layer is that of one call on their tokens together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_ffn as sf

D = 6


def made(balance: str = "entropy", **options) -> sf.MoE:
    torch.manual_seed(0)
    return sf.MoE(D, 5, 3, 2, balance=balance, balance_weight=1.0, dtype=torch.float64, **options)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(layer: sf.MoE, calls: list[tuple[Tensor, Tensor | None]], pooled: bool = True) -> list[Tensor]:
    """The loss of these calls, and its gradients to the router and to what was called with."""
    leaves = [x.clone().requires_grad_() for x, _ in calls]
    with sf.pooled_balance(layer) if pooled else torch.enable_grad():
        for leaf, (_, mask) in zip(leaves, calls, strict=True):
            layer(leaf, mask=mask)
    loss = sf.aux_loss(layer)
    return [loss.detach(), *torch.autograd.grad(loss, [layer.router.weight, *leaves])]


@pytest.mark.parametrize("over", ["batch", "sequence"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["entropy", "switch", "cv2", "z"])
def test_it_is_the_loss_of_one_call_on_all_the_tokens(name: str, over: str, masked: bool) -> None:
    layer = made(name, balance_over=over)
    parts = [tokens(3, 4, seed=i) for i in range(3)]
    masks = [None, torch.rand(3, 4) < 0.6, torch.rand(3, 4) < 0.6] if masked else [None] * 3
    one = torch.cat(masks[1:], 1) if masked else None
    one = None if one is None else torch.cat([torch.ones(3, 4, dtype=torch.bool), one], 1)
    actual = loss_of(layer, list(zip(parts, masks, strict=True)))
    expected = loss_of(layer, [(torch.cat(parts, 1), one)], pooled=False)
    torch.testing.assert_close(actual[:2], expected[:2])
    torch.testing.assert_close(torch.cat(actual[2:], 1), expected[2])
    for a, b in zip(loss_of(layer, [(parts[0], None)]), loss_of(layer, [(parts[0], None)], False), strict=True):
        torch.testing.assert_close(a, b)


class Shared(nn.Module):
    """Two layers, one after the other, three times over."""

    def __init__(self, kept: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kept = kept
        options = {"balance": ("entropy", "bias"), "balance_weight": (1.0, 1.0), "null_experts": 1}
        self.layers = nn.ModuleList(sf.MoE(D, 5, 3, 2, dtype=dtype, **options) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            for layer in self.layers:
                x = x + (layer(x) if self.kept else checkpoint(layer, x, use_reentrant=False))
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_checkpointing_changes_nothing(dtype: torch.dtype) -> None:
    found = []
    for kept in (True, False):
        model, x = Shared(kept, dtype), tokens(2, 7).to(dtype).requires_grad_()
        with sf.pooled_balance(model):
            y = model(x)
        loss = sf.aux_loss(model)
        stats = sf.routing_stats(model)["layers.1"]["load"]
        (y.square().sum() + loss).backward()
        assert sf.aux_loss(model) == 0  # the graph is gone
        loads = [layer.router.load for layer in model.layers]
        assert [load.sum().item() for load in loads] == [84, 84]  # as always: 3 calls, 14 tokens, 2 slots
        found.append([loss.detach(), stats, *loads, x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_before_and_after_the_context() -> None:
    layer, x = made(), tokens(9)
    with sf.pooled_balance(layer):
        layer(x)
        with pytest.raises(RuntimeError, match="leave the context first"):
            sf.aux_loss(layer)
        with pytest.raises(RuntimeError, match="is within pooled_balance already"), sf.pooled_balance(layer):
            pass
        layer(2 * x)
    pooled = sf.aux_loss(layer)
    layer(x)
    assert sf.aux_loss(layer) != pooled  # the last call's, as ever
    with sf.pooled_balance(layer):
        y = layer(x)
    assert sf.aux_loss(layer) > -10
    y.sum().backward()
    assert sf.aux_loss(layer) == 0  # a backward pass through the output ends it too
    with sf.pooled_balance(layer):
        layer(x)
    layer.eval()(x)
    assert sf.aux_loss(layer) == 0
    with sf.pooled_balance(layer):
        layer(x)
    assert sf.aux_loss(layer) == 0
    layer.train()
    with pytest.raises(ValueError, match="x must have shape"), sf.pooled_balance(layer):
        _ = layer(x), layer(x[:, :2])
    assert sf.aux_loss(layer) == 0
    layer(x)
    assert sf.aux_loss(layer) != 0


@pytest.mark.parametrize("last", [0, 1])
def test_a_backward_pass_through_any_of_the_outputs_ends_the_loss(last: int) -> None:
    layer = made()
    with sf.pooled_balance(layer):
        outputs = layer(tokens(9)), layer(tokens(8))
        layer.eval()
        layer(tokens(7))
        layer.train()
    assert sf.aux_loss(layer) < 0
    outputs[last].sum().backward()
    assert sf.aux_loss(layer) == 0


def test_what_cannot_be_pooled_is_said() -> None:
    with (
        pytest.raises(ValueError, match="needs aux='attach', but '0' has aux='inject'"),
        sf.pooled_balance(nn.Sequential(made(aux="inject"))),
    ):
        pass
    layer, other = made(balance_over="sequence"), made()
    model = nn.ModuleList([layer, other])
    with pytest.raises(ValueError, match=r"got different numbers of sequences, \['2', '3'\]"), sf.pooled_balance(model):
        _ = layer(tokens(2, 4)), layer(tokens(3, 4))
    other(tokens(3))
    assert sf.aux_loss(other) < 0  # out of the context as well
    with pytest.raises(ValueError, match="got different numbers of sequences"), sf.pooled_balance(model):
        _ = other(tokens(3)), layer(tokens(2, 4)), layer(tokens(3, 4))
    with pytest.raises(ValueError, match="got different numbers"), sf.pooled_balance(nn.ModuleList([other, layer])):
        _ = other(tokens(3)), layer(tokens(2, 4)), layer(tokens(3, 4))
    assert sf.aux_loss(model) == 0  # those that were not refused have none either


def test_what_cannot_be_pooled_is_said_at_the_end() -> None:
    layer, x = sf.SigmaMoE(16, 4, 8, 2), torch.randn(3, 5, 16)

    def changes_k() -> None:
        with sf.pooled_balance(layer):
            layer(x)
            layer.k = 3
            layer(x)

    def frees() -> None:
        with sf.pooled_balance(layer):
            layer(x).sum().backward()

    with pytest.raises(ValueError, match=r"the k of .+ changed between its calls, \[2, 3\]"):
        changes_k()
    with pytest.raises(RuntimeError, match="has freed the graph of a call of"):
        frees()
    with sf.pooled_balance(layer):
        layer(x).sum().backward(retain_graph=True)
        layer(x)
    sf.aux_loss(layer).backward()


def test_a_mask_may_be_filled_anew_for_the_next_call() -> None:
    layer, x = sf.SigmaMoE(8, 6, 4, 2), torch.randn(2, 9, 8)
    masks = torch.rand(2, 9) < 0.6
    with sf.pooled_balance(layer):
        for part, mask in zip(x, masks, strict=True):
            layer(part, mask=mask)
    expected, one = sf.aux_loss(layer), torch.empty(9, dtype=torch.bool)
    with sf.pooled_balance(layer):
        for part, mask in zip(x, masks, strict=True):
            layer(part, mask=one.copy_(mask))
    assert sf.aux_loss(layer) == expected
    before = sf.routing_stats(layer)[""]
    one.zero_()
    torch.testing.assert_close(sf.routing_stats(layer)[""], before)
