"""The float64 oracle against closed forms small enough to check by hand: who tests the tests."""

import math

import oracle
import pytest
import torch


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def routed(logits, k, router="sigmoid", **choices):
    return oracle.route(router, matrix(*logits), k, **choices)


# -------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("name", "at_minus_one", "at_zero", "at_two"),
    [
        ("relu", 0.0, 0.0, 2.0),
        ("gelu", -0.15865525393145707, 0.0, 1.9544997361036416),
        ("gelu_tanh", -0.15880800939172324, 0.0, 1.954597694087775),
        ("silu", -0.2689414213699951, 0.0, 1.7615941559557649),
        ("identity", -1.0, 0.0, 2.0),
        ("squared_relu", 0.0, 0.0, 4.0),
        ("square", 1.0, 0.0, 4.0),
    ],
)
def test_activation_values(name, at_minus_one, at_zero, at_two):
    u = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert oracle.ACTIVATIONS[name](u).tolist() == pytest.approx([at_minus_one, at_zero, at_two], abs=1e-14)


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("relu", 0.0),
        ("gelu", 0.5),
        ("gelu_tanh", 0.5),
        ("silu", 0.5),
        ("identity", 1.0),
        ("squared_relu", 0.0),
        ("square", 0.0),
    ],
)
def test_activation_slope_at_zero(name, slope):
    u = torch.zeros((), dtype=torch.float64, requires_grad=True)
    oracle.ACTIVATIONS[name](u).backward()
    assert u.grad.item() == pytest.approx(slope, abs=1e-14)


def test_ranked_puts_ties_in_index_order():
    assert oracle.ranked([1.0, 3.0, 3.0, 0.0, 3.0], 4) == [1, 2, 4, 0]


# -------------------------------------------------------------------------------------------------- dense, Top-K

# Units of x = (1, 2): 1, 2, -3, 3 plus the bias 0, 0, 0, -2; so relu gives 1, 2, 0, 1.
TWO_LAYER = {
    "keys": matrix((1, 0), (0, 1), (-1, -1), (1, 1)),
    "key_bias": torch.tensor([0, 0, 0, -2], dtype=torch.float64),
    "values": matrix((1, 0), (10, 0), (100, 0), (0, 5)),
    "out_bias": torch.tensor([0.5, 0.25], dtype=torch.float64),
}


def test_dense_by_hand():
    assert oracle.dense(TWO_LAYER, row(1, 2)).tolist() == [[21.5, 5.25]]


def test_glu_multiplies_the_biased_keys_by_the_activated_gate():
    p = TWO_LAYER | {"gate_keys": matrix((1, 0), (-1, 0), (2, 0), (0, 0.5))}  # gates 1, 0 (relu of -1), 2, 1
    assert oracle.dense(p, row(1, 2)).tolist() == [[1 * 1 + 2 * -3 * 100 + 0.5, 1 * 5 + 0.25]]


@pytest.mark.parametrize(
    ("k", "output"),
    [(1, [20.5, 0.25]), (2, [21.5, 0.25]), (3, [21.5, 5.25]), (4, [21.5, 5.25])],
)
def test_topk_by_hand_with_a_tie_to_the_lower_unit(k, output):
    assert oracle.topk(TWO_LAYER, row(1, 2), k).tolist() == [output]


def test_norm_aware_topk_uses_the_norm_and_not_its_square():
    # contributions unit * norm 1*1, 2*10, 0, 1*5: the tie is gone
    assert oracle.topk(TWO_LAYER, row(1, 2), 2, norm_aware=True).tolist() == [[20.5, 5.25]]
    # units 3 and 2, norms 2 and 2.5: 6 > 5 by the norm, 12 < 12.5 by its square
    p = {"keys": matrix((3,), (2,)), "values": matrix((2,), (2.5,))}
    assert oracle.topk(p, row(1), 1, norm_aware=True).tolist() == [[6.0]]


def test_topk_by_gate_takes_no_notice_of_what_it_gates():
    # units 1*5 and 2*1: by themselves the first is larger, by their gates the second
    p = {"keys": matrix((5,), (1,)), "gate_keys": matrix((1,), (2,)), "values": matrix((1,), (10,))}
    assert oracle.topk(p, row(1), 1).tolist() == [[5.0]]
    assert oracle.topk(p, row(1), 1, rank_by="gate").tolist() == [[20.0]]


def test_topk_ranks_by_magnitude():
    p = {"keys": matrix((1,), (-3,)), "values": matrix((1,), (1,))}
    assert oracle.topk(p, row(1), 1, activation="identity").tolist() == [[-3.0]]


def test_topk_gradient_is_the_dense_one_masked():
    p = {name: value.clone().requires_grad_() for name, value in TWO_LAYER.items()}
    oracle.topk(p, row(1, 2), 1).sum().backward()
    assert p["values"].grad.tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]
    assert p["keys"].grad.tolist() == [[0, 0], [10, 20], [0, 0], [0, 0]]
    assert p["key_bias"].grad.tolist() == [0, 10, 0, 0]
    assert p["out_bias"].grad.tolist() == [1, 1]


# -------------------------------------------------------------------------------------------------- product keys


def product_key_params(sub_a, sub_b, values=None, **others):
    sub_keys = torch.stack([matrix(*sub_a), matrix(*sub_b)])[:, None]
    n = sub_keys.shape[2]
    return {
        "sub_keys": sub_keys,
        "values": torch.eye(n * n, dtype=torch.float64) if values is None else values,
    } | others


def test_product_key_by_hand():
    # x = (2 | 1): first half scores 2, -2, second half 3, 1; sums 5, 3, 1, -1 at index i_first * n + i_second
    p = product_key_params([(1,), (-1,)], [(3,), (1,)])
    assert oracle.product_key(p, row(2, 1), 1).tolist() == [[5, 0, 0, 0]]
    assert oracle.product_key(p, row(2, 1), 3).tolist() == [[5, 3, 1, 0]]
    assert oracle.product_key(p, row(2, 1), 4, activation="identity").tolist() == [[5, 3, 1, -1]]
    assert oracle.product_key(p, row(2, 1), 4).tolist() == [[5, 3, 1, 0]]


def test_product_key_softmax_is_over_the_selected_scores_of_one_head():
    p = product_key_params([(1,), (-1,)], [(math.log(3),), (0,)])  # sums 1 + ln 3, 1, -1 + ln 3, -1
    assert oracle.product_key(p, row(1, 1), 2, activation="softmax").tolist()[0] == pytest.approx([0.75, 0.25, 0, 0])


def test_product_key_heads_add_and_softmax_is_per_head():
    p = product_key_params([(1,), (-1,)], [(2,), (0,)])
    two = p | {"sub_keys": p["sub_keys"].repeat(1, 2, 1, 1)}
    assert oracle.product_key(two, row(2, 1), 1).tolist() == [[8, 0, 0, 0]]  # the same value twice
    assert oracle.product_key(two, row(2, 1), 1, activation="softmax").tolist() == [[2, 0, 0, 0]]


def test_product_key_ties_go_to_the_lower_place_in_the_list_of_sums():
    # halves rank 1, 0 (scores 0, 1) and 0, 1 (scores 1, 0): the list of sums is 2, 1, 1, 0 at indices 2, 3, 0, 1
    u_a, u_b = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    assert oracle.product_key_search(u_a, u_b, 2) == [2, 3]
    assert oracle.product_key_search(u_a, u_b, 4) == [2, 3, 0, 1]
    assert oracle.product_key_brute_force(u_a, u_b, 2) == [2, 0]
    assert oracle.product_key_search(torch.zeros(3), torch.zeros(3), 3) == [0, 1, 2]


def test_learned_query_gives_each_head_its_own_rows():
    # head 0 sees (x0 | x1), head 1 sees (x1 | x0)
    query = matrix((1, 0), (0, 1), (0, 1), (1, 0))
    p = product_key_params([(1,), (0,)], [(1,), (0,)], **{"query.weight": query})
    p["sub_keys"] = torch.stack([p["sub_keys"][:, 0], 10 * p["sub_keys"][:, 0] * torch.tensor([1, 0]).view(2, 1, 1)], 1)
    # head 0: 2 + 3 at index 0; head 1: 10 * x1 = 30 + 0 at indices 0 and 1, the lower wins
    assert oracle.product_key(p, row(2, 3), 1).tolist() == [[35, 0, 0, 0]]


def test_query_norms_are_over_each_half():
    p = {"sub_keys": torch.zeros(2, 1, 1, 2, dtype=torch.float64), "values": matrix((1,))}
    p["query.weight"] = torch.eye(4, dtype=torch.float64)
    x = torch.tensor([3, 5, 30, 40], dtype=torch.float64)
    layer = torch.cat(oracle.half_queries(p, x, 0, "layer"))
    rms = torch.cat(oracle.half_queries(p, x, 0, "rms"))
    assert layer.tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-5)
    assert rms.tolist() == pytest.approx([3 / 17**0.5, 5 / 17**0.5, 30 / 1250**0.5, 40 / 1250**0.5], abs=1e-5)


# ------------------------------------------------------------------------------------------------------ routers


def test_sigmoid_gates_are_independent_and_not_renormalised():
    index, gate = routed([[math.log(3), 0, -50]], 2)[1:]
    assert index == [[0, 1]]
    assert gate.tolist()[0] == pytest.approx([0.75, 0.5])


def test_softmax_before_uses_all_experts_and_after_only_the_selected():
    logits = [[math.log(2), math.log(5), math.log(3)]]
    assert routed(logits, 2, "softmax").gate_TK.tolist()[0] == pytest.approx([0.5, 0.3])
    assert routed(logits, 2, "softmax_topk").gate_TK.tolist()[0] == pytest.approx([5 / 8, 3 / 8])


def test_the_unweighted_router_weighs_the_selected_with_one():
    index, gate = routed([[0.1, 0.3, 0.2]], 2, "unweighted")[1:]
    assert index == [[1, 2]]
    assert gate.tolist() == [[1, 1]]


def test_dropped_experts_rank_last_and_weigh_nothing():
    dropped = torch.tensor([[True, False, True]])
    for router in ("sigmoid", "softmax", "softmax_topk", "noisy_topk", "unweighted", "sinkhorn"):
        index, gate = routed([[5, 0, 4]], 2, router, dropped_TE=dropped)[1:]
        assert index == [[1, 0]]
        assert gate[0, 1] == 0
        assert gate[0, 0] > 0
    assert routed([[5, 0, 4]], 2, "softmax_topk", dropped_TE=dropped).gate_TK.tolist() == [[1, 0]]
    assert routed([[5, 0, 4]], 2, "softmax_topk", dropped_TE=~dropped | dropped).gate_TK.tolist() == [[0, 0]]


def test_dropping_does_not_change_the_softmax_over_all_experts():
    dropped = torch.tensor([[True, False, False]])
    gate = routed([[math.log(2), math.log(5), math.log(3)]], 2, "softmax", dropped_TE=dropped).gate_TK
    assert gate.tolist()[0] == pytest.approx([0.5, 0.3])


def test_noise_is_scaled_by_softplus_of_its_own_logits():
    # softplus(0) = ln 2; noise 1/ln 2 lifts expert 1 by exactly 1 above expert 0
    noise = row(0, 1 / math.log(2), 0)
    routing = routed([[0, 0, -9]], 2, "noisy_topk", noise_TE=noise, noise_logits_TE=row(0, 0, 0))
    assert routing.index_TK == [[1, 0]]
    assert routing.gate_TK.tolist()[0] == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])
    assert routed([[0, 0, -9]], 2, "noisy_topk").gate_TK.tolist() == [[0.5, 0.5]]


def test_router_bias_moves_the_ranking_and_not_the_gates():
    index, gate = routed([[0, 0, 0]], 1, bias_E=torch.tensor([0, 0, 0.1]))[1:]
    assert index == [[2]]
    assert gate.tolist() == [[0.5]]


def test_sinkhorn_balances_columns_exactly_and_rows_in_the_limit():
    logits = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few, many = (oracle.sinkhorn(logits, n).exp() for n in (3, 60))
    assert few.sum(0).tolist() == pytest.approx([3] * 4)
    assert many.sum(0).tolist() == pytest.approx([3] * 4)
    assert many.sum(1).tolist() == pytest.approx([1] * 12, abs=1e-9)


def test_sinkhorn_splits_two_identical_preferences():
    # both tokens prefer expert 0; the one that prefers it more keeps it
    logits = matrix((2, 0), (1, 0))
    assert routed(logits.tolist(), 1, "sinkhorn", training=True, n_iters=20).index_TK == [[0], [1]]
    assert routed(logits.tolist(), 1, "sinkhorn", training=False).index_TK == [[0], [0]]


def test_sinkhorn_does_not_see_padding():
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    real = [True, False, True, True, False, True]
    changed = logits + 100 * torch.tensor([not r for r in real])[:, None] * torch.tensor([1.0, 0, 0])
    rows = [t for t in range(6) if real[t]]
    assert torch.equal(oracle.sinkhorn(logits, 3, real)[rows], oracle.sinkhorn(changed, 3, real)[rows])
    assert torch.allclose(oracle.sinkhorn(logits, 3, real)[rows], oracle.sinkhorn(logits[rows], 3))
    assert torch.equal(oracle.sinkhorn(logits, 3, [False] * 6), logits)


# ---------------------------------------------------------------------------------------------------------- MoE

# expert 0 negates and doubles, expert 1 triples, expert 2 is dead; one unit each, one feature
THREE_EXPERTS = {
    "keys": matrix((-1,), (1,), (0,))[:, None],
    "values": matrix((2,), (3,), (7,))[:, None],
    "router.weight": matrix((0,), (math.log(3),), (-1,)),
}


def test_moe_by_hand():
    y, routing = oracle.moe(THREE_EXPERTS, matrix((1,), (-1,)), 2)
    assert routing.index_TK == [[1, 0], [2, 0]]
    assert y.tolist() == [[pytest.approx(0.75 * 3)], [pytest.approx(0.5 * 2)]]


def test_moe_biases_and_router_input():
    p = THREE_EXPERTS | {"key_bias": matrix((4,), (0,), (1,)), "out_bias": torch.tensor([100.0], dtype=torch.float64)}
    y, routing = oracle.moe(p, row(1), 1, router="unweighted", router_input=row(-1))
    assert routing.index_TK == [[2]]
    assert y.tolist() == [[107]]


def test_moe_gate_gradient_reaches_only_the_selected_router_rows():
    p = {name: value.clone().requires_grad_() for name, value in THREE_EXPERTS.items()}
    oracle.moe(p, row(1), 1)[0].sum().backward()
    assert p["router.weight"].grad.flatten().tolist() == pytest.approx([0, 0.75 * 0.25 * 3, 0])
    assert p["values"].grad.flatten().tolist() == pytest.approx([0, 0.75, 0])


@pytest.mark.parametrize("layer", [oracle.dense, lambda p, x: oracle.topk(p, x, 1)])
def test_no_tokens_give_an_empty_output(layer):
    assert layer(TWO_LAYER, torch.zeros(0, 2, dtype=torch.float64)).shape == (0, 2)


def test_no_tokens_through_moe():
    y, routing = oracle.moe(THREE_EXPERTS, torch.zeros(0, 1, dtype=torch.float64), 2)
    assert y.shape == (0, 1)
    assert routing.index_TK == []
    for kind in ("entropy", "switch", "cv2", "z", "none"):
        assert oracle.balance_loss(kind, routing) == 0


# ------------------------------------------------------------------------------------------------ balance losses


@pytest.mark.parametrize(("k", "balanced", "collapsed"), [(1, 1, 4), (2, 2, 4), (4, 4, 4)])
def test_switch_is_k_at_balance_and_n_experts_at_collapse(k, balanced, collapsed):
    one_hot = 60 * torch.eye(4, dtype=torch.float64)
    rotated = one_hot if k == 1 else sum(one_hot.roll(i, 1) for i in range(k))
    assert oracle.balance_loss("switch", routed(rotated.tolist(), k)) == pytest.approx(balanced)
    assert oracle.balance_loss("switch", routed(one_hot[:1].tolist(), k)) == pytest.approx(collapsed)


def test_switch_by_hand():
    # f = (2/3, 1/3), p = mean of (3/4, 1/4), (3/4, 1/4), (1/4, 3/4) = (7/12, 5/12)
    routing = routed([[math.log(3), 0], [math.log(3), 0], [0, math.log(3)]], 1)
    assert oracle.balance_loss("switch", routing) == pytest.approx(2 * (2 / 3 * 7 / 12 + 1 / 3 * 5 / 12))


def test_entropy_by_hand():
    uniform, collapsed = routed([[0, 0, 0, 0]] * 2, 1), routed([[60, 0, 0, 0]] * 2, 1)
    assert oracle.balance_loss("entropy", uniform) == pytest.approx(-math.log(4))
    assert oracle.balance_loss("entropy", collapsed) == pytest.approx(0)
    mixed = routed([[math.log(3), 0], [0, 0]], 1)  # p = (5/8, 3/8)
    assert oracle.balance_loss("entropy", mixed) == pytest.approx(5 / 8 * math.log(5 / 8) + 3 / 8 * math.log(3 / 8))


def test_cv2_by_hand():
    assert oracle.balance_loss("cv2", routed([[9, 0], [0, 9]], 1, "softmax_topk")) == 0
    assert oracle.balance_loss("cv2", routed([[9, 0], [9, 0]], 1, "softmax_topk")) == 1  # E - 1
    # normtopk makes (3/4, 1/2) to (3/5, 2/5): importances 1.1 and 0.9, mean 1, variance 0.01
    assert oracle.balance_loss("cv2", routed([[math.log(3), 0], [0, 0]], 2)) == pytest.approx(0.01)
    assert oracle.balance_loss("cv2", routed([[0, 0]], 1, dropped_TE=torch.tensor([[True, True]]))) == 0


def test_z_by_hand():
    assert oracle.balance_loss("z", routed([[0, 0], [1, 1]], 1)) == pytest.approx(
        (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    )


def test_sequence_pools_average_over_sequences_that_hold_real_tokens():
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert oracle.pools((3, 2), mask, "batch") == [[0, 1, 2]]
    assert oracle.pools((3, 2), mask, "sequence") == [[0, 1], [2], []]
    routing = routed([[0, 0], [0, 0], [60, 0], [9, 3], [4, 5], [6, 7]], 1)
    pools = oracle.pools((3, 2), mask, "sequence")
    assert oracle.balance_loss("entropy", routing, pools) == pytest.approx(-math.log(2) / 2)
    assert oracle.balance_loss("entropy", routing, [[], []]) == 0


def test_aux_loss_is_the_weighted_sum():
    routing = routed([[0, 0]], 1)
    both = oracle.aux_loss(("entropy", "switch"), (10, 3), routing)
    assert both == pytest.approx(-10 * math.log(2) + 3)
    assert oracle.aux_loss("switch", 2, routing) == 2
    assert oracle.aux_loss("none", 2, routing) == 0


def test_pools_of_more_than_two_dimensions_are_along_the_last_one():
    assert oracle.pools((2, 1, 3), None, "sequence") == [[0, 1, 2], [3, 4, 5]]
    assert oracle.pools((2, 1, 3), None, "batch") == [[0, 1, 2, 3, 4, 5]]
    assert oracle.pools((2, 0), None, "sequence") == oracle.pools((0, 2), None, "sequence") == []


def test_load_counts_slots():
    routing = routed([[2, 1, 0], [2, 0, 1]], 2)
    assert oracle.load(routing) == [2, 1, 1]
    assert oracle.load(routing, [0]) == [1, 1, 0]


# --------------------------------------------------------------------------------------- parameters and FLOPs


def test_parameter_counts_are_the_papers():
    """The table of paper.md section 2.2: WT-S, WT-B and E8."""
    for d_model, d_ff, dense, n_experts, moe, n_sub_keys, pkm in [
        (412, 2053, 1_694_137, 16, 1_694_144, 62, 1_685_904),
        (1024, 4110, 8_422_414, 32, 8_421_376, 89, 8_475_648),
        (512, 2053, 2_104_837, 16, 2_105_344, 62, 2_095_104),
    ]:
        assert oracle.n_parameters("dense", d_model, d_ff=d_ff, bias=True) == dense
        assert oracle.n_parameters("moe", d_model, n_experts=n_experts, expert_size=128) == moe
        assert oracle.n_parameters("product_key", d_model, n_sub_keys=n_sub_keys, n_heads=4) == pkm


def test_flops_are_the_papers_share_plus_the_router():
    """Paper.md section 1: K/N_E + 1/(2G) of the dense layer, which for WT-S is 25.0% + 0.39%."""
    dense = oracle.flops_per_token("dense", 412, d_ff=2048)
    moe = oracle.flops_per_token("moe", 412, n_experts=16, expert_size=128, k=4)
    assert dense == 4 * 412 * 2048
    assert moe / dense == pytest.approx(4 / 16 + 1 / 256)
    assert oracle.flops_per_token("topk", 412, d_ff=2048, k=128) == 2 * 412 * 2048 + 2 * 412 * 128
    pkm = oracle.flops_per_token("product_key", 412, n_sub_keys=46, k=128, n_heads=4)
    assert pkm == 2 * 412 * 46 * 4 + 2 * 412 * 128 * 4


def test_counts_of_options_by_hand():
    """Width 10; d_out 3; 2 experts of 4 units, or 8 units; 5 sub-keys; 2 heads with queries of width 6."""
    experts, width = {"n_experts": 2, "expert_size": 4}, {"d_out": 3, "glu": True}
    assert oracle.n_parameters("topk", 10, d_ff=8) == 80 + 80
    assert oracle.n_parameters("topk", 10, d_ff=8, **width) == 80 + 80 + 24
    assert oracle.n_parameters("dense", 10, d_ff=8, bias=True, **width) == 80 + 80 + 24 + 8 + 3
    assert oracle.n_parameters("moe", 10, bias=True, **experts, **width) == 80 + 80 + 24 + 8 + 3 + 20
    assert oracle.n_parameters("noisy", 10, **experts) == 80 + 80 + 20 + 20
    assert oracle.n_parameters("product_key", 10, n_sub_keys=5) == 250 + 2 * 5 * 5
    learned = {"n_sub_keys": 5, "n_heads": 2, "query_dim": 6}
    assert oracle.n_parameters("product_key", 10, d_out=3, **learned) == 75 + 2 * 2 * 5 * 3 + 2 * 6 * 10
    assert oracle.flops_per_token("dense", 10, d_ff=8, **width) == 2 * (80 + 80 + 24)
    assert oracle.flops_per_token("topk", 10, d_ff=8, k=2, **width) == 2 * (80 + 80 + 2 * 3)
    assert oracle.flops_per_token("moe", 10, k=1, **experts, **width) == 2 * (40 + 40 + 4 * 3 + 20)
    assert oracle.flops_per_token("noisy", 10, k=1, **experts) == 2 * (40 + 40 + 20 + 20)
    pkm = oracle.flops_per_token("product_key", 10, k=4, d_out=3, **learned)
    assert pkm == 2 * (2 * 6 * 10 + 2 * 2 * 5 * 3 + 2 * 4 * 3)
