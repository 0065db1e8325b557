"""SwitchHeadAttention: attention whose values and outputs are sums over experts, each head with its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_ffn as sf
from sparse_ffn.layers import SwitchHeadAttention
from sparse_ffn.layers.rotary import turned

D, H, E, K, C, T = 8, 3, 4, 2, 6, 5


def made(dtype: torch.dtype = torch.float64, **options) -> SwitchHeadAttention:
    torch.manual_seed(0)
    return SwitchHeadAttention(D, H, E, **{"k": K, "d_head": C, **options}, dtype=torch.float64).to(dtype)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gates(router: Tensor, seen: Tensor, k: int = K) -> Tensor:
    """[..., H, E], zero where not selected."""
    logits = (seen @ router.T).unflatten(-1, (H, E))
    return torch.sigmoid(logits) * torch.zeros_like(logits).scatter(-1, logits.topk(k, dim=-1).indices, 1.0)


def expected(p: dict[str, Tensor], x: Tensor, seen: Tensor, valued: Tensor, causal: bool = True) -> Tensor:
    """All experts of all heads, in einsums."""
    dense = ((x @ p[f"{name}.weight"].T).unflatten(-1, (H, C)) for name in ("query", "key"))
    q, k = (turned(heads.transpose(-2, -3), 0.5) for heads in dense)
    values, outputs = (p[f"{name}.weight"].unflatten(0, (H, E)) for name in ("values", "outputs"))
    v = torch.einsum("...the,hedc,...td->...htc", gates(p["values.router.weight"], seen), values, valued)
    scores = q @ k.transpose(-1, -2) / C**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    attended = torch.softmax(scores, -1) @ v
    return torch.einsum("...the,hecd,...htc->...td", gates(p["outputs.router.weight"], seen), outputs, attended)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_sum_over_experts_of_each_head(causal: bool, on_backend: str) -> None:
    layer = made(balance="none")
    given = [tokens(2, T, seed=i).requires_grad_() for i in range(3)]
    y = layer(given[0], router_input=given[1], value_input=given[2], causal=causal)
    p = dict(layer.named_parameters())
    assert {name: list(t.shape) for name, t in p.items()} == {
        "query.weight": [H * C, D], "key.weight": [H * C, D],
        "values.weight": [H * E, D, C], "values.router.weight": [H * E, D],
        "outputs.weight": [H * E, C, D], "outputs.router.weight": [H * E, D],
    }  # fmt: skip
    wanted = expected(p, *given, causal)
    torch.testing.assert_close(y, wanted)
    weight, leaves = tokens(2, T, seed=9), [*given, *p.values()]
    actual = torch.autograd.grad((y * weight).sum(), leaves)
    for a, b in zip(actual, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0
    one = layer(given[0][1], causal=causal)  # a sequence without a batch; routers and values see x
    torch.testing.assert_close(one, expected(p, *[given[0][1]] * 3, causal))


def test_one_expert_with_gates_of_one_is_torchs_attention() -> None:
    torch.manual_seed(0)
    layer = SwitchHeadAttention(D, 2, 1, 1, rotary=0.0, balance="none", dtype=torch.float64)
    for experts in (layer.values, layer.outputs):
        nn.init.constant_(experts.router.weight, 100.0)
    theirs = nn.MultiheadAttention(D, 2, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        values, outputs = layer.values.weight.mT.flatten(0, 1), layer.outputs.weight.flatten(0, 1).T
        theirs.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, values]))
        theirs.out_proj.weight.copy_(outputs)
    x, ones = tokens(2, T), torch.ones(2, T, D, dtype=torch.float64)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(x, router_input=ones), theirs(x, x, x, attn_mask=future)[0])


def test_positions_turn_pairs_by_growing_angles() -> None:
    x = tokens(2, T)
    y = turned(x, 0.5)
    assert torch.equal(y[..., 4:], x[..., 4:])
    a, b = torch.view_as_complex(torch.stack([x[..., :2], x[..., 2:4]], -1)), torch.tensor([1.0, 0.01]).double()
    angle = torch.arange(T)[:, None] * b
    wanted = torch.view_as_real(a * torch.polar(torch.ones_like(angle), angle))
    torch.testing.assert_close(y[..., :4], torch.cat([wanted[..., 0], wanted[..., 1]], -1))
    assert turned(x, 0.1) is x


def test_no_token_sees_what_it_must_not() -> None:
    layer, x = made(balance="none").eval(), tokens(2, T)
    changed = x.clone()
    changed[:, 3] += 1
    before, after = layer(x), layer(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert ((before != after)[:, 3:]).any(-1).all()
    for left in (False, True):  # padding at either end
        real = torch.ones(2, T, dtype=torch.bool)
        kept = slice(2, None) if left else slice(0, 3)
        real[0] = False
        real[0, kept] = True
        for causal in (True, False):
            y = layer(x, mask=real, causal=causal)
            assert y.isfinite().all()
            torch.testing.assert_close(y[0, kept], layer(x[0, kept], causal=causal))
            torch.testing.assert_close(y[1], layer(x[1], causal=causal))


def entropies(router: Tensor, seen: Tensor) -> Tensor:
    """Of each head the negative entropy of the mean over tokens [N, D]."""
    p = torch.softmax((seen @ router.T).unflatten(-1, (H, E)), -1).mean(0)
    return (p * p.log()).sum(-1)


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_the_balance_is_that_of_each_head(over: str) -> None:
    layer, x = made(balance_weight=1.0, balance_over=over), tokens(2, T)
    real = torch.rand(2, T) < 0.7
    layer(x, mask=real)
    parts = [x[real]] if over == "batch" else [x[i][real[i]] for i in range(2)]
    routers = [layer.values.router.weight, layer.outputs.router.weight]
    wanted = sum(torch.stack([entropies(router, part) for part in parts]).mean() for router in routers)
    loss = sf.aux_loss(layer)
    torch.testing.assert_close(loss, wanted, check_dtype=False)
    actual = torch.autograd.grad(loss, routers)
    for a, b in zip(actual, torch.autograd.grad(wanted, routers), strict=True):
        torch.testing.assert_close(a, b)
    with sf.pooled_balance(layer):  # two applications are one to their tokens together
        layer(x, mask=real)
        layer(x + 1)
    again = [x.flatten(0, 1)] if over == "batch" else list(x)
    parts = [torch.cat([part, whole + 1]) for part, whole in zip(parts, again, strict=True)]
    wanted = sum(torch.stack([entropies(router, part) for part in parts]).mean() for router in routers)
    torch.testing.assert_close(sf.aux_loss(layer), wanted, check_dtype=False)


def test_what_a_training_loop_calls_sees_both_routers() -> None:
    model, x = nn.Sequential(made(balance=("switch", "bias"), balance_weight=(1.0, 1.0))), tokens(7, T)
    names = ["0.values", "0.outputs"]
    with sf.RoutingMeter(model) as meter:
        model(x)
    stats = sf.routing_stats(model)
    assert list(stats) == list(meter.stats()) == names
    logits = (x.flatten(0, 1) @ model[0].values.router.weight.T).unflatten(-1, (H, E))
    load = torch.zeros_like(logits).scatter(-1, logits.topk(K, dim=-1).indices, 1.0).sum(0).flatten()
    torch.testing.assert_close(stats["0.values"]["load"], (load / load.sum()).float())
    assert sf.routing_agreement(model, copy.deepcopy(model), x) == dict.fromkeys(names, 1.0)
    assert sf.router_parameters(model) == [model[0].values.router.weight, model[0].outputs.router.weight]
    model.train()(x)
    sf.update_router_bias(model, 0.5)
    assert torch.equal(model[0].values.router.bias, 0.5 * torch.sign(load.mean() - load))
    found = []
    for aux in ("attach", "inject"):
        layer = made(balance_weight=1.0, aux=aux)
        loss = layer(x).square().sum()
        (loss + sf.aux_loss(layer)).backward()
        found.append(layer.values.router.weight.grad)
    torch.testing.assert_close(*found)


def test_slots_that_expert_dropout_leaves_void_are_no_load_of_a_head() -> None:
    layer = made(expert_dropout=0.8, balance=("switch", "bias"), balance_weight=(1.0, 0.0))
    for part in (layer.values, layer.outputs):
        nn.init.zeros_(part.router.weight)
    layer(tokens(20, T))
    load = layer.values.router.load + layer.outputs.router.load
    assert 0 < load.sum() < 2 * 100 * H * K
    assert sf.aux_loss(layer).item() == pytest.approx(load.sum().item() / (100 * H))  # every p is 1/E


def test_it_is_checkpointed_copied_and_cast_as_other_layers() -> None:
    layer, x = made(), tokens(2, T)
    y = layer(x)
    assert torch.equal(checkpoint(layer, x, use_reentrant=False), y)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert sf.aux_loss(other) == 0
        assert torch.equal(other(x), y)
    single = made(torch.float32)
    torch.testing.assert_close(single(x.float()), y.float())
    with torch.autocast("cpu", torch.bfloat16):
        cast = single(x.float())
    half = made(torch.bfloat16)(x.bfloat16())
    assert cast.dtype == half.dtype == torch.bfloat16
    for low in (cast, half):
        torch.testing.assert_close(low.double(), y, atol=0.05, rtol=0.05)
    assert layer(x[:0]).shape == (0, T, D)
    layer.k = E
    assert (layer.k, layer.values.k, layer.outputs.k) == (E, H * E, H * E)
    p = dict(layer.named_parameters())
    dense = gates(p["values.router.weight"], x, E) > 0
    assert dense.all()
    dropped = made(expert_dropout=0.5, dropout=0.5)
    assert not torch.equal(dropped(x), dropped(x))
    assert torch.equal(dropped.eval()(x), y)


@pytest.mark.exhaustive
def test_it_compiles_as_one_graph() -> None:
    layer, x = made(), tokens(2, T)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=torch.ones(2, T, dtype=torch.bool)), layer(x))


def test_initialisation_and_repr() -> None:
    layer = SwitchHeadAttention(64, 4, 5, n_layers=8)
    assert layer.d_head == 16
    for tensor in (layer.query.weight, layer.key.weight, layer.values.weight, layer.outputs.weight):
        assert tensor.std().item() == pytest.approx(0.5 / 8, rel=0.05)
    torch.testing.assert_close(layer.outputs.router.weight.norm(dim=1), torch.full((20,), 0.5))
    assert layer.n_parameters == 2 * 64 * 64 + 2 * 4 * 5 * 64 * (16 + 1)
    before = layer.values.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.values.weight, before)
    assert repr(layer).startswith("SwitchHeadAttention(\n  64, n_heads=4, n_experts=5, k=2, d_head=16, rotary=0.5")


def test_what_does_not_fit_is_said() -> None:
    layer, x = made(), tokens(2, T)
    with pytest.raises(ValueError, match="k = 4 of all heads must be a multiple of n_heads = 3"):
        layer.values.k = 4
    assert layer.values.k == H * K
    with pytest.raises(ValueError, match="d_head must be given where n_heads = 3 does not divide d_model = 8"):
        SwitchHeadAttention(D, H, E)
    with pytest.raises(ValueError, match="k must be at least 1 and at most n_experts = 4, got 5"):
        layer.k = 5
    with pytest.raises(ValueError, match=r"balance = \('z', 'l1'\) needs gates that can be zero"):
        made(balance=("z", "l1"), balance_weight=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"x must have shape \[..., T, d_model = 8\], got \[8\]"):
        layer(x[0, 0])
    with pytest.raises(ValueError, match=r"value_input must have x's shape, \[2, 5, 8\], got \[2, 4, 8\]"):
        layer(x, value_input=x[:, 1:])
    wrong = nn.Parameter(layer.outputs.weight[:, 1:])
    with pytest.raises(ValueError, match=r"outputs.weight must have shape \[12, 6, 8\], got \[12, 5, 8\]"):
        torch.func.functional_call(layer, {"outputs.weight": wrong}, x)


def test_a_mask_of_any_strides_is_taken() -> None:
    layer, x = SwitchHeadAttention(16, 2, 4), torch.randn(2, 3, 5, 16)
    mask = (torch.rand(3, 5) < 0.7)[None].expand(2, 3, 5)
    torch.testing.assert_close(layer(x, mask=mask), layer(x, mask=mask.contiguous()))
