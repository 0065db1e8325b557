"""Who is selected and with which gate: ranking and ties, expert dropout, the softmax orders, Sinkhorn, noise."""

from __future__ import annotations

import math
from functools import partial

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_ffn as sf
from sparse_ffn.routing import (
    DeepSeekRouter,
    NoisyTopKRouter,
    Routing,
    SigmoidRouter,
    SinkhornRouter,
    SoftmaxRouter,
    SoftmaxTopKRouter,
    UnweightedRouter,
)
from sparse_ffn.routing.sinkhorn import sinkhorn_potential
from sparse_ffn.routing.statistics import coactivation

ROUTERS = ["sigmoid", "softmax", "softmax_topk", "sinkhorn", "noisy_topk", "unweighted"]
EVERY_ROUTER = pytest.mark.parametrize("router", ROUTERS)
PROPERTY = settings(deadline=None, max_examples=30, derandomize=True)


def selector(n_experts, k, router="sigmoid", *, dtype=torch.float64, layer=sf.MoE, **options):
    """A layer whose logits are its input: d_model = n_experts and the identity as router weight."""
    if layer is sf.MoE or router != "sigmoid":
        options |= {"router": router}
    module = oracle.randomise(layer(n_experts, n_experts, 2, k, dtype=dtype, **options))
    with torch.no_grad():
        module.router.weight.copy_(torch.eye(n_experts))
    return module


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def route(logits, k, router="sigmoid", *, training=False, **options) -> Routing:
    logits = logits if isinstance(logits, torch.Tensor) else torch.tensor(logits, dtype=torch.float64)
    module = selector(logits.shape[-1], k, router, dtype=logits.dtype, **options).train(training)
    return module.router(logits, None)


@pytest.mark.parametrize("balance", ["entropy", "bias"])
def test_a_router_can_be_given_as_what_makes_it(balance):
    make = partial(DeepSeekRouter, n_groups=2, topk_groups=1)
    options = {"n_layers": 8, "dtype": torch.float64, "expert_dropout": 0.1, "balance": balance}
    router = sf.MoE(4, 6, 3, 2, router=make, **options).router
    assert type(router) is DeepSeekRouter
    assert (router.d_model, router.n_experts, router.k, router.n_groups) == (4, 6, 2, 2)
    assert (router.expert_dropout, router.init_scale, router.weight.dtype) == (0.1, 0.5, torch.float64)
    assert (router.bias is not None) == (balance == "bias")


# ------------------------------------------------------------------------------------------- selection, gates, ties


@EVERY_ROUTER
@pytest.mark.parametrize("k", [1, 2, 5])
def test_routing_is_the_oracles_outside_training(router, k):
    logits = normal(9, 5)
    routing, expected = route(logits, k, router), oracle.route(router, logits, k)
    assert routing.index_TK.tolist() == expected.index_TK
    torch.testing.assert_close(routing.logits_TE, logits)
    torch.testing.assert_close(routing.gate_TK, expected.gate_TK)


@EVERY_ROUTER
@pytest.mark.parametrize("n_experts", [2, 5, 33, 90])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_logits_go_to_the_lowest_indices(router, n_experts, dtype):
    for k in {1, 2, n_experts // 2 + 1, n_experts}:
        for value in (0.0, 1.0):
            logits = torch.full((3, n_experts), value, dtype=dtype)
            assert route(logits, k, router).index_TK.tolist() == [list(range(k))] * 3


@EVERY_ROUTER
@PROPERTY
@given(data=st.data())
def test_ties_go_to_the_lower_index_among_few_distinct_logits(router, data):
    n_experts = data.draw(st.integers(1, 40))
    logits = torch.randint(
        -1, 2, (4, n_experts), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    k = data.draw(st.integers(1, n_experts))
    for dtype in (torch.float32, torch.bfloat16):
        assert route(logits.to(dtype), k, router).index_TK.tolist() == [oracle.ranked(row, k) for row in logits]


@pytest.mark.parametrize("router", ["sigmoid", "sinkhorn"])
def test_saturated_sigmoids_are_no_ties(router):
    """In fp32 the sigmoid of 30, 40 and 50 is exactly 1, and that of -110, -120 and -130 exactly 0."""
    for logits, order in [([30.0, 50, 40], [1, 2, 0]), ([-130.0, -120, -110], [2, 1, 0])]:
        routing = route(torch.tensor([logits]), 2, router)
        assert len(set(routing.gate_TK.flatten().tolist())) == 1
        assert routing.index_TK.tolist() == [order[:2]]


def test_probabilities_that_underflow_are_no_ties():
    logits = torch.tensor([[0.0, -130, -110, -120]])
    for router in ("softmax", "softmax_topk", "noisy_topk"):
        assert route(logits, 3, router).index_TK.tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("router", "training"),  # in training the last two rank by more than the logits
    [(router, False) for router in ROUTERS] + [(r, True) for r in ROUTERS if r not in ("noisy_topk", "sinkhorn")],
)
def test_logits_closer_than_bf16_resolves_are_ranked_in_fp32(router, autocast, training):
    """100 and 100.25 are one number in bf16."""
    module = sf.MoE(2, 2, 2, 1, router=router, dtype=torch.float32 if autocast else torch.bfloat16).train(training)
    x = torch.ones(1, 2, dtype=module.keys.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module.router.weight.copy_(torch.tensor([[100.0, 0.0], [100.0, 0.25]]))
        routing = module.router(x, None)
    assert routing.index_TK.tolist() == [[1]]
    assert routing.logits_TE.dtype == routing.gate_TK.dtype == torch.float32
    assert routing.logits_TE.tolist() == [[100, 100.25]]


@pytest.mark.parametrize("router", ["sigmoid", "sinkhorn"])
def test_sigmoid_gates_do_not_see_the_other_logits(router):
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    before, after = route(logits, 3, router).gate_TK, route(logits + torch.tensor([[7.0, 0, 0]]), 3, router).gate_TK
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert before.sum() > 1


def test_the_unweighted_router_ranks_on_logits_and_weighs_1():
    routing = route([[0.0, 2, 1]], 2, "unweighted")
    assert routing.index_TK.tolist() == [[1, 2]]
    assert routing.gate_TK.tolist() == [[1, 1]]


@pytest.mark.parametrize("router", ["sigmoid", "unweighted"])
def test_with_a_zero_router_a_sigma_moe_is_half_the_sum_of_the_selected_experts(router):
    module, x = sf.MoE(4, 5, 3, 2, router=router, dtype=torch.float64), normal(6, 4)
    torch.nn.init.zeros_(module.router.weight)
    two = torch.relu(x @ module.keys[:2].flatten(0, 1).T) @ module.values[:2].flatten(0, 1)
    torch.testing.assert_close(module(x), (0.5 if router == "sigmoid" else 1) * two)


# ------------------------------------------------------------------------------------------------- softmax orders


def test_softmax_before_the_selection_is_over_all_experts():
    logits = normal(7, 5)
    routing = route(logits, 2, layer=sf.SoftmaxMoE, router="softmax")
    expected = torch.softmax(logits, -1).gather(1, routing.index_TK)
    torch.testing.assert_close(routing.gate_TK, expected)
    assert (routing.gate_TK.sum(1) < 1).all()


def test_softmax_after_the_selection_is_the_renormalised_one():
    logits = normal(7, 5)
    routing = route(logits, 2, layer=sf.SoftmaxMoE)
    before = torch.softmax(logits, -1).gather(1, routing.index_TK)
    torch.testing.assert_close(routing.gate_TK, before / before.sum(1, keepdim=True))


@pytest.mark.parametrize("expert_dropout", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_softmax_topk_is_the_renormalised_softmax_with_expert_dropout_too(expert_dropout, k):
    over_all, over_selected = (
        selector(5, k, layer=sf.SoftmaxMoE, router=router, expert_dropout=expert_dropout)
        for router in ("softmax", "softmax_topk")
    )
    x = normal(50, 5)
    torch.manual_seed(0)
    before = over_all.router(x, None)
    torch.manual_seed(0)
    after = over_selected.router(x, None)
    assert torch.equal(before.index_TK, after.index_TK)
    total = before.gate_TK.sum(1, keepdim=True)
    torch.testing.assert_close(after.gate_TK, before.gate_TK / torch.where(total > 0, total, 1))


def test_renormalised_gates_survive_logits_of_any_size():
    for scale in (1e-30, 1e3, 1e30):
        gate = route(scale * normal(9, 5, dtype=torch.float32), 3, "softmax_topk").gate_TK
        torch.testing.assert_close(gate.sum(1), torch.ones(9))


def test_switch_is_the_softmax_before_with_one_expert():
    logits = normal(7, 5)
    module = selector(5, 1, layer=sf.SwitchMoE)
    assert module.k == sf.SwitchMoE(5, 5, 2).k == 1
    gate = module.router(logits, None).gate_TK
    torch.testing.assert_close(gate[:, 0], torch.softmax(logits, -1).amax(1))


# ------------------------------------------------------------------------------------------------- expert dropout


@EVERY_ROUTER
@PROPERTY
@given(data=st.data())
def test_expert_dropout_is_never_nan_for_any_sizes_and_rate(router, data):
    """The standalone reference code filled with -inf: with fewer than k survivors its output was NaN."""
    n_experts = data.draw(st.integers(1, 7))
    k = data.draw(st.integers(1, n_experts))
    rate = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    losses = {"balance": ("entropy", "cv2", "switch"), "balance_weight": (1.0, 1.0, 1.0)}
    module = selector(n_experts, k, router, expert_dropout=rate, dtype=dtype, **losses)
    x = normal(data.draw(st.integers(0, 30)), n_experts).to(dtype).requires_grad_()
    torch.manual_seed(data.draw(st.integers(0, 99)))
    y = module(x)
    aux = sf.aux_loss(module)
    (y.sum() + aux).backward()
    for t in (y, aux, x.grad, *(p.grad for p in module.parameters())):
        assert t.isfinite().all()


@EVERY_ROUTER
@PROPERTY
@given(data=st.data())
def test_slots_that_no_survivor_fills_come_last_and_are_void(router, data):
    n_experts = data.draw(st.integers(2, 7))
    k = data.draw(st.integers(1, n_experts))
    module = selector(n_experts, k, router, expert_dropout=0.6)
    x, seed = normal(40, n_experts), data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    logits, index, gate = module.router(x, None)
    torch.testing.assert_close(logits, x)  # the mask does not touch what the losses see
    alive = gate != 0
    assert (gate >= 0).all()
    assert torch.equal(alive, index < n_experts)
    ordered = index.sort(1).values
    assert ((ordered.diff(dim=1) > 0) | (ordered[:, 1:] == n_experts)).all()  # no expert twice
    assert (alive[:, :-1] | ~alive[:, 1:]).all()  # no survivor after a void slot
    selected = index.clamp_max(n_experts - 1)
    if router in ("sigmoid", "sinkhorn"):  # no rescaling
        torch.testing.assert_close(gate[alive], torch.sigmoid(x.gather(1, selected))[alive])
    if router == "softmax":
        torch.testing.assert_close(gate[alive], torch.softmax(x, 1).gather(1, selected)[alive])
    if router in ("softmax_topk", "noisy_topk"):
        torch.testing.assert_close(gate.sum(1), alive.any(1).to(gate))


@pytest.mark.parametrize("router", ["sigmoid", "softmax", "softmax_topk", "unweighted"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_survivors_are_the_best_ones_and_the_layer_computes_the_oracles_function(router, k):
    """The mask is read off the routing of a layer with k = E under the same seed."""
    x = normal(60, 4)
    reveal = selector(4, 4, router, expert_dropout=0.5)
    torch.manual_seed(0)
    index = reveal.router(x, None).index_TK
    dropped = torch.ones(60, 5, dtype=torch.bool).scatter(1, index, False)[:, :4]
    assert dropped.all(1).any()
    assert (~dropped).all(1).any()
    module = selector(4, k, router, expert_dropout=0.5, balance="none")
    inputs = x.clone().requires_grad_()
    torch.manual_seed(0)
    y = module(inputs)
    y.sum().backward()
    p = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
    expected_x = x.clone().requires_grad_()
    expected, _ = oracle.moe(p, expected_x, k, router=router, dropped_TE=dropped)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(inputs.grad, expected_x.grad)
    for name, value in module.named_parameters():
        gradient = torch.zeros_like(p[name]) if p[name].grad is None else p[name].grad
        torch.testing.assert_close(value.grad, gradient)


@EVERY_ROUTER
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_every_token_and_expert_is_dropped_independently_at_the_rate(router, rate):
    n_tokens, n_experts = 4000, 3
    torch.manual_seed(0)
    module = selector(n_experts, n_experts, router, expert_dropout=rate)
    index = module.router(torch.zeros(n_tokens, n_experts, dtype=torch.float64), None).index_TK
    alive = torch.zeros(n_tokens, n_experts + 1).scatter(1, index, 1.0)[:, :-1]
    deviation = math.sqrt(rate * (1 - rate) / n_tokens)
    assert (alive.mean(0) - (1 - rate)).abs().max() < 4 * deviation
    correlation = torch.corrcoef(torch.cat([alive.T, alive.T.roll(1, 1)]))  # between experts, and between neighbours
    assert (correlation - torch.eye(6)).abs().max() < 5 / math.sqrt(n_tokens)


def test_an_expert_that_is_always_best_is_selected_with_one_minus_the_rate():
    x = torch.zeros(4000, 4, dtype=torch.float64)
    x[:, 2] = 9
    torch.manual_seed(0)
    _, index, gate = selector(4, 1, expert_dropout=0.3).router(x, None)
    rate = ((index == 2) & (gate > 0)).double().mean().item()
    assert rate == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 4000))


@EVERY_ROUTER
def test_evaluation_drops_nothing_and_is_deterministic(router):
    x = normal(30, 5)
    with_dropout = selector(5, 2, router, expert_dropout=0.9).eval()
    without = selector(5, 2, router).eval()
    assert torch.equal(with_dropout(x), without(x))
    assert torch.equal(with_dropout(x), with_dropout(x))


def test_a_dropped_gate_sends_no_gradient_to_the_router():
    module = selector(3, 3, expert_dropout=0.5, balance="none")
    x = normal(1, 3)
    for seed in range(20):
        module.zero_grad()
        torch.manual_seed(seed)
        module(x).sum().backward()
        torch.manual_seed(seed)
        selected = module.router(x, None).index_TK.flatten().tolist()
        dropped = [e for e in range(3) if e not in selected]
        assert torch.count_nonzero(module.router.weight.grad[dropped]) == 0
        assert torch.count_nonzero(module.values.grad[dropped]) == 0


def test_void_slots_are_no_load_of_losses_statistics_and_biases():
    module = selector(4, 3, expert_dropout=0.5, balance=("switch", "bias"), balance_weight=(1.0, 0.0))
    with sf.RoutingMeter(module) as meter:
        module(torch.zeros(200, 4, dtype=torch.float64))
    load = module.router.load.double()
    assert 0 < load.sum() < 200 * 3
    assert sf.aux_loss(module).item() == pytest.approx(load.sum().item() / 200)  # every p is 1/E
    for stats in (sf.routing_stats(module)[""], meter.stats()[""]):
        torch.testing.assert_close(stats["load"], (load / load.sum()).float())


@EVERY_ROUTER
def test_the_regulariser_does_not_see_the_mask(router):
    """Paper.md 2.4: the entropy is of the raw logits of all experts."""
    x, values = normal(9, 5), []
    for rate in (0.0, 0.9):
        module = selector(5, 2, router, expert_dropout=rate, balance="entropy", balance_weight=1.0)
        module(x)
        values.append(sf.aux_loss(module).item())
    assert values[0] == values[1]


# ------------------------------------------------------------------------------------------------------ Sinkhorn


def loads(index, n_experts):
    return torch.bincount(index.flatten(), minlength=n_experts).double()


def cv(load):
    return (load.std(correction=0) / load.mean()).item()


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n_iters", [1, 3, 30])
def test_sinkhorn_selects_what_the_oracles_balanced_matrix_ranks_highest(k, n_iters):
    logits = normal(40, 6) + 2 * normal(6, seed=1)
    module = selector(6, k, layer=sf.SBaseMoE, n_iters=n_iters)
    _, index, gate = module.router(logits, None)
    expected = oracle.route("sinkhorn", logits, k, training=True, n_iters=n_iters)
    assert index.tolist() == expected.index_TK
    torch.testing.assert_close(gate, torch.sigmoid(logits.gather(1, index)))


@pytest.mark.parametrize("n_iters", [1, 3, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_columns_sum_to_n_over_e_after_the_last_update_and_rows_to_1_in_the_limit(n_iters, masked):
    """Rows are scaled with the potentials of the iteration before, then the columns with the last ones."""
    logits, mask = normal(80, 8) + normal(8, seed=1), torch.arange(80) % 5 > 0 if masked else None
    real = logits if mask is None else logits[mask]
    before, last = (sinkhorn_potential(logits, n, mask) for n in (n_iters - 1, n_iters))
    rows = -torch.logsumexp(real + before, 1, keepdim=True)
    balanced = (real + last + rows).exp()
    torch.testing.assert_close(balanced.sum(0), torch.full((8,), len(real) / 8, dtype=torch.float64))
    if n_iters == 100:
        torch.testing.assert_close(balanced.sum(1), torch.ones(len(real), dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 4])
def test_sinkhorn_flattens_the_load_in_training_and_not_in_evaluation(k):
    """The reference code's sign error left it far from flat; 3 iterations on these logits come close to even."""
    logits = normal(512, 16) + normal(16, seed=1)
    module = selector(16, k, layer=sf.SBaseMoE)
    raw, balanced = cv(loads(logits.topk(k).indices, 16)), cv(loads(module.router(logits, None).index_TK, 16))
    assert raw > 0.6
    assert balanced < raw / 3
    assert balanced < 0.25
    assert torch.equal(module.eval().router(logits, None).index_TK, logits.topk(k).indices)


def test_many_iterations_are_stable():
    logits = 3 * normal(64, 8) + normal(8, seed=1)
    module = selector(8, 2, layer=sf.SBaseMoE, n_iters=200)
    assert cv(loads(module.router(logits, None).index_TK, 8)) < 0.3
    for scale in (1e4, 1e30):
        y = selector(8, 2, layer=sf.SBaseMoE, dtype=torch.float32)((scale * logits).float())
        assert y.isfinite().all()


def test_sinkhorn_balances_over_the_batch_and_not_over_each_sequence():
    logits = normal(4, 8, 5) + normal(4, 1, 5, seed=1)
    module = selector(5, 1, layer=sf.SBaseMoE, balance="none")
    torch.testing.assert_close(module(logits), module(logits.flatten(0, 1)).unflatten(0, (4, 8)))
    one_by_one = torch.stack([module(sequence) for sequence in logits])
    assert not torch.allclose(module(logits), one_by_one)


def test_padding_does_not_touch_the_balance():
    mask, logits = normal(3, 12, seed=2) > 0, normal(3, 12, 5)
    garbage = torch.where(mask[..., None], logits, 50 * normal(3, 12, 5, seed=3))
    module = selector(5, 2, layer=sf.SBaseMoE)
    torch.testing.assert_close(module(garbage, mask=mask)[mask], module(logits[mask]))
    assert module(garbage, mask=mask & False).isfinite().all()


def test_sinkhorn_carries_no_gradient():
    module, x = selector(5, 2, layer=sf.SBaseMoE), normal(12, 5).requires_grad_()
    gate = module.router(x, None).gate_TK
    gate[0].sum().backward()
    assert torch.count_nonzero(x.grad[1:]) == 0


def test_one_token_keeps_valid_gates():
    """Balancing a single token makes all experts equally good: any selection is right."""
    _, index, gate = selector(5, 2, layer=sf.SBaseMoE).router(normal(1, 5), None)
    assert len(set(index[0].tolist())) == 2
    torch.testing.assert_close(gate, torch.sigmoid(normal(1, 5).gather(1, index)))


# --------------------------------------------------------------------------------------------------------- noise


def test_noise_weight_starts_at_zero():
    assert torch.count_nonzero(sf.NoisyTopKMoE(4, 5, 2, 2).router.noise_weight) == 0


def test_noise_is_in_training_only():
    x = normal(20, 5)
    module = selector(5, 2, layer=sf.NoisyTopKMoE)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    expected = route(x, 2, "softmax_topk")
    for got, want in zip(module.router(x, None), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_noise_is_normal_of_deviation_softplus_of_its_logits_and_independent():
    x = torch.zeros(20000, 3, dtype=torch.float64)
    x[:, 0] = 1
    module = selector(3, 3, layer=sf.NoisyTopKMoE)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.noise_weight.zero_()[:, 0] = torch.tensor([0.0, 2.0, -1.0])
    torch.manual_seed(0)
    _, index, gate = module.router(x, None)
    gate = torch.zeros(20000, 3, dtype=torch.float64).scatter(1, index, gate)
    log_ratio = (gate[:, :2] / gate[:, 2:]).log()  # noise of 0 and of 1, each less the noise of 2
    variance = torch.nn.functional.softplus(torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)) ** 2
    expected = torch.stack(
        [torch.stack([variance[0] + variance[2], variance[2]]), torch.stack([variance[2], variance[1] + variance[2]])]
    )
    torch.testing.assert_close(torch.cov(log_ratio.T), expected, rtol=0.05, atol=0.05)
    assert log_ratio.mean(0).abs().max() < 4 * math.sqrt(variance.max().item() * 2 / 20000)


def test_noise_weight_learns_through_the_gates():
    module = selector(5, 2, layer=sf.NoisyTopKMoE, balance="none")
    torch.manual_seed(0)
    module(normal(20, 5)).sum().backward()
    assert torch.count_nonzero(module.router.noise_weight.grad) > 0


# ---------------------------------------------------------------------------------------------- router_input, modules


@EVERY_ROUTER
def test_the_router_sees_router_input_and_the_experts_see_x(router):
    module = selector(5, 2, router).eval()
    x, r = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    p = dict(module.named_parameters())
    expected, _ = oracle.moe(p, x.flatten(0, 1), 2, router=router, router_input=r.flatten(0, 1))
    torch.testing.assert_close(module(x, router_input=r), expected.unflatten(0, (2, 3)))
    torch.testing.assert_close(module(x, router_input=x), module(x))


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("sigmoid", SigmoidRouter(5, 4, 2, dtype=torch.float64)),
        ("softmax", SoftmaxRouter(5, 4, 2, dtype=torch.float64)),
        ("softmax_topk", SoftmaxTopKRouter(5, 4, 2, dtype=torch.float64)),
        ("sinkhorn", SinkhornRouter(5, 4, 2, dtype=torch.float64)),
        ("noisy_topk", NoisyTopKRouter(5, 4, 2, dtype=torch.float64)),
        ("unweighted", UnweightedRouter(5, 4, 2, dtype=torch.float64)),
    ],
)
def test_a_router_may_be_given_by_name_or_as_a_module(name, router):
    by_module = sf.MoE(5, 4, 3, 2, router=router, dtype=torch.float64)
    by_name = sf.MoE(5, 4, 3, 2, router=name, dtype=torch.float64)
    by_name.load_state_dict(by_module.state_dict())
    assert by_module.router is router
    torch.manual_seed(0)
    expected = by_name(normal(9, 5))
    torch.manual_seed(0)
    assert torch.equal(by_module(normal(9, 5)), expected)


# ------------------------------------------------------------------------------------------------- router bias


def test_the_bias_is_added_to_the_logits_for_the_ranking():
    module = selector(3, 1, balance="bias")
    module.router.bias.copy_(torch.tensor([0.0, 1.5, 0.0]))
    logits = torch.tensor([[9.0, 7.0, 0.0], [9.0, 8.0, 0.0]], dtype=torch.float64)
    _, index, gate = module.router(logits, None)
    assert index.tolist() == [[0], [1]]
    torch.testing.assert_close(gate, torch.sigmoid(logits.gather(1, index)))


@EVERY_ROUTER
def test_a_dropped_expert_stays_last_whatever_its_bias(router):
    module = selector(4, 2, router, balance="bias", expert_dropout=0.5)
    module.router.bias.copy_(torch.tensor([1e4, 0.0, 0.0, -1e4]))
    torch.manual_seed(0)
    _, _, gate = module.router(normal(200, 4), None)
    alive = gate != 0
    assert (alive[:, :-1] | ~alive[:, 1:]).all()


def test_one_real_token_among_padding_gets_its_plain_top_k():
    """Nothing is to be balanced: its potentials are zero."""
    router, x, mask = SinkhornRouter(8, 6, 2).train(), torch.randn(9, 8), torch.arange(9) == 4
    found = router(x, mask)
    assert torch.equal(found.index_TK[4], found.logits_TE[4].topk(2).indices)


def test_coactivation_is_the_share_of_the_rows_tokens_that_the_columns_expert_has_too():
    index = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 3]])
    found = coactivation(index, torch.tensor([True, True, True, False]), 4)
    expected = torch.tensor([[1, 2 / 3, 1 / 3, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(found, expected)
