"""What holds for every shape, routing and mask: symmetries, layers equal to others, exact selection, bounds, sizes."""

from __future__ import annotations

import copy
import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_ffn as sf
from sparse_ffn import functional as F

PROPERTY = settings(deadline=None, max_examples=30, derandomize=True)
SEEDS = st.integers(0, 999)
ACTIVATIONS = st.sampled_from(list(oracle.ACTIVATIONS))
ROUTERS = ["sigmoid", "softmax", "softmax_topk", "sinkhorn", "noisy_topk", "unweighted"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@st.composite
def two_layer_options(draw):
    return {
        "activation": draw(ACTIVATIONS),
        "glu": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "d_out": draw(st.sampled_from([None, 1, 5])),
        "dtype": torch.float64,
    }


@st.composite
def dense_layers(draw):
    layer = sf.DenseFFN(draw(st.integers(1, 7)), draw(st.integers(1, 12)), **draw(two_layer_options()))
    return oracle.randomise(layer, draw(SEEDS))


@st.composite
def topk_layers(draw):
    d_ff = draw(st.integers(1, 12))
    options = draw(two_layer_options()) | {"norm_aware": draw(st.booleans())}
    options["rank_by"] = draw(st.sampled_from(["hidden", "gate"] if options["glu"] else ["hidden"]))
    layer = sf.TopKFFN(draw(st.integers(1, 7)), d_ff, draw(st.integers(1, d_ff)), **options)
    return oracle.randomise(layer, draw(SEEDS))


@st.composite
def product_key_layers(draw):
    n = draw(st.integers(1, 5))
    layer = sf.ProductKeyMemory(
        2 * draw(st.integers(1, 3)),
        n,
        draw(st.integers(1, n * n)),
        n_heads=draw(st.integers(1, 3)),
        activation=draw(st.sampled_from(["softmax", *oracle.ACTIVATIONS])),
        query_dim=draw(st.sampled_from([None, 4])),
        d_out=draw(st.sampled_from([None, 3])),
        dtype=torch.float64,
    )
    return oracle.randomise(layer, draw(SEEDS))


@st.composite
def moe_layers(draw, routers=tuple(ROUTERS), **fixed):
    n_experts = draw(st.integers(1, 6))
    sizes = (draw(st.integers(1, 6)), n_experts, draw(st.integers(1, 4)), draw(st.integers(1, n_experts)))
    options = draw(two_layer_options()) | {"router": draw(st.sampled_from(routers))} | fixed
    return oracle.randomise(sf.MoE(*sizes, **options), draw(SEEDS))


LAYERS = st.one_of(dense_layers(), topk_layers(), product_key_layers(), moe_layers())
TOKENS = st.integers(0, 9)


def inputs(layer, *shape, seed=0):
    return normal(*shape, layer.d_model, seed=seed)


def permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------- symmetries


@PROPERTY
@given(layer=LAYERS, n_tokens=TOKENS, seed=SEEDS)
def test_permuting_tokens_permutes_outputs(layer, n_tokens, seed):
    x, order = inputs(layer, n_tokens, seed=seed), permutation(n_tokens, seed)
    layer.eval()
    close(layer(x[order]), layer(x)[order])


@PROPERTY
@given(layer=moe_layers(routers=("sinkhorn",), balance="switch"), n_tokens=st.integers(2, 9), seed=SEEDS)
def test_permuting_tokens_permutes_outputs_of_a_balanced_training_batch(layer, n_tokens, seed):
    x, order = inputs(layer, n_tokens, seed=seed), permutation(n_tokens, seed)
    y, aux = layer(x), sf.aux_loss(layer)
    close(layer(x[order]), y[order])
    torch.testing.assert_close(sf.aux_loss(layer), aux)


@PROPERTY
@given(layer=LAYERS, shape=st.lists(st.integers(0, 3), max_size=3), seed=SEEDS)
def test_leading_dimensions_are_only_tokens(layer, shape, seed):
    x = inputs(layer, *shape, seed=seed)
    layer.eval()
    y = layer(x)
    assert y.shape == (*shape, layer.d_out)
    close(y, layer(x.reshape(-1, layer.d_model)).reshape(y.shape))
    close(y, layer(x.reshape(-1, layer.d_model).repeat(1, 2)[:, : layer.d_model]).reshape(y.shape))  # strided input


@PROPERTY
@given(layer=LAYERS, n_tokens=TOKENS, seed=SEEDS)
def test_each_token_is_computed_by_itself_in_evaluation(layer, n_tokens, seed):
    x = inputs(layer, n_tokens, seed=seed)
    layer.eval()
    alone = [layer(token) for token in x]
    close(layer(x), torch.stack(alone) if alone else x.new_zeros(0, layer.d_out))


@PROPERTY
@given(layer=moe_layers(), n_tokens=TOKENS, seed=SEEDS)
def test_permuting_the_hidden_units_of_an_expert_changes_nothing(layer, n_tokens, seed):
    x, twin = inputs(layer, n_tokens, seed=seed), copy.deepcopy(layer)
    with torch.no_grad():
        for e in range(layer.keys.shape[0]):
            order = permutation(layer.keys.shape[1], seed + e)
            for name in ("keys", "values", "gate_keys", "key_bias"):
                if (p := getattr(twin, name, None)) is not None:
                    p[e] = p[e][order]
    close(twin.eval()(x), layer.eval()(x))


@PROPERTY
@given(layer=moe_layers(), n_tokens=TOKENS, seed=SEEDS)
def test_permuting_experts_with_their_router_rows_changes_nothing(layer, n_tokens, seed):
    x, twin = inputs(layer, n_tokens, seed=seed), copy.deepcopy(layer)
    order = permutation(layer.keys.shape[0], seed)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name != "out_bias":
                p.copy_(p[order])
    close(twin.eval()(x), layer.eval()(x))


@PROPERTY
@given(layer=st.one_of(dense_layers(), topk_layers()), n_tokens=TOKENS, seed=SEEDS)
def test_permuting_hidden_units_changes_nothing(layer, n_tokens, seed):
    x, twin = inputs(layer, n_tokens, seed=seed), copy.deepcopy(layer)
    order = permutation(layer.d_ff, seed)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name != "out_bias":
                p.copy_(p[order])
    close(twin(x), layer(x))


@PROPERTY
@given(layer=LAYERS, n_tokens=TOKENS, seed=SEEDS)
def test_two_runs_are_bit_equal(layer, n_tokens, seed):
    results = []
    for _ in range(2):
        layer.zero_grad()
        x = inputs(layer, n_tokens, seed=seed).requires_grad_()
        torch.manual_seed(seed)
        y = layer(x)
        (y.sum() + sf.aux_loss(layer)).backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- padding

FOUR_LOSSES = {"balance": ("entropy", "switch", "cv2", "z"), "balance_weight": (1.0, 1.0, 1.0, 1.0)}


@PROPERTY
@given(
    layer=st.one_of([moe_layers(**FOUR_LOSSES, balance_over=over) for over in ("batch", "sequence")]),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    seed=SEEDS,
)
def test_padding_changes_nothing_in_loss_statistics_and_real_outputs(layer, lengths, seed):
    """Sequences in a padded batch, and the same ones with other padding."""
    if "router.noise_weight" in layer.state_dict():
        layer.eval()  # the noise of a token depends on its place
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    x = inputs(layer, len(lengths), width, seed=seed)
    padded = torch.where(mask[..., None], x, 1e3 * inputs(layer, len(lengths), width, seed=seed + 1))
    longer = torch.cat([padded, 1e3 * inputs(layer, len(lengths), 3, seed=seed + 2)], 1)
    results = []
    for batch in (x, padded, longer):
        real = torch.nn.functional.pad(mask, (0, batch.shape[1] - width))
        y = layer(batch, mask=real)[real]
        results.append((y, sf.aux_loss(layer), sf.routing_stats(layer)[""]["load"]))
    for y, aux, load in results[1:]:
        close(y, results[0][0])
        torch.testing.assert_close(aux, results[0][1])
        torch.testing.assert_close(load, results[0][2])


@PROPERTY
@given(
    layer=moe_layers(routers=("sigmoid", "softmax", "softmax_topk", "unweighted")), shape=st.tuples(TOKENS), seed=SEEDS
)
def test_outputs_of_padding_are_computed_as_usual(layer, shape, seed):
    x, mask = inputs(layer, *shape, seed=seed), normal(*shape, seed=seed) > 0
    assert torch.equal(layer(x, mask=mask), layer(x))


@PROPERTY
@given(layer=st.one_of(dense_layers(), topk_layers(), product_key_layers()), n_tokens=TOKENS, seed=SEEDS)
def test_layers_without_a_router_ignore_a_mask_and_refuse_a_router_input(layer, n_tokens, seed):
    x = inputs(layer, n_tokens, seed=seed)
    assert torch.equal(layer(x, mask=torch.zeros(n_tokens, dtype=torch.bool)), layer(x))
    with pytest.raises(ValueError, match="mask"):
        layer(x, mask=torch.zeros(n_tokens + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="router_input"):
        layer(x, router_input=x)


# --------------------------------------------------------------------------------- one layer is another one's case


@PROPERTY
@given(data=st.data(), options=two_layer_options(), seed=SEEDS)
def test_topk_of_all_units_is_dense(data, options, seed):
    d_model, d_ff = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 12))
    dense = oracle.randomise(sf.DenseFFN(d_model, d_ff, **options), seed)
    rank_by = data.draw(st.sampled_from(["hidden", "gate"] if options["glu"] else ["hidden"]))
    topk = sf.TopKFFN(d_model, d_ff, d_ff, norm_aware=data.draw(st.booleans()), rank_by=rank_by, **options)
    topk.load_state_dict(dense.state_dict())
    x = normal(data.draw(TOKENS), d_model, seed=seed)
    close(topk(x), dense(x))


@PROPERTY
@given(data=st.data(), options=two_layer_options(), seed=SEEDS)
def test_open_moe_of_all_experts_is_dense_with_the_experts_concatenated(data, options, seed):
    d_model, n_experts, size = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)))
    moe = oracle.randomise(sf.MoE(d_model, n_experts, size, n_experts, router="unweighted", **options), seed)
    dense = sf.DenseFFN(d_model, n_experts * size, **options)
    state = {name: p for name, p in moe.state_dict().items() if not name.startswith("router")}
    flat = {name: p if name == "out_bias" else p.flatten(0, 1) for name, p in state.items()}
    dense.load_state_dict(flat)
    x = normal(data.draw(TOKENS), d_model, seed=seed)
    close(moe(x), dense(x))


@PROPERTY
@given(data=st.data(), activation=ACTIVATIONS, seed=SEEDS)
def test_product_keys_reading_all_values_are_dense_with_the_concatenated_sub_keys(data, activation, seed):
    n, d_model = data.draw(st.integers(1, 5)), 2 * data.draw(st.integers(1, 4))
    pkm = oracle.randomise(sf.ProductKeyMemory(d_model, n, n * n, activation=activation, dtype=torch.float64), seed)
    dense = sf.DenseFFN(d_model, n * n, activation=activation, bias=False, dtype=torch.float64)
    first, second = pkm.sub_keys[0, 0], pkm.sub_keys[1, 0]
    rows = [torch.cat([first[i // n], second[i % n]]) for i in range(n * n)]
    dense.load_state_dict({"keys": torch.stack(rows), "values": pkm.values})
    x = normal(data.draw(TOKENS), d_model, seed=seed)
    close(pkm(x), dense(x))


@PROPERTY
@given(data=st.data(), options=two_layer_options(), seed=SEEDS)
def test_one_expert_is_dense_times_its_gate(data, options, seed):
    moe = oracle.randomise(sf.MoE(4, 1, 6, 1, router="sigmoid", **(options | {"bias": False})), seed)
    dense = sf.DenseFFN(4, 6, **(options | {"bias": False}))
    dense.load_state_dict({n: p[0] for n, p in moe.state_dict().items() if not n.startswith("router")})
    x = normal(data.draw(TOKENS), 4, seed=seed)
    close(moe(x), torch.sigmoid(x @ moe.router.weight.T) * dense(x))


# ----------------------------------------------------------------------------------------------- exact selection


@st.composite
def half_scores(draw):
    """Scores of both halves with ties within a half and among the sums, or without any."""
    n = draw(st.integers(1, 8))
    seed, integers = draw(SEEDS), draw(st.booleans())
    first, second = normal(2, n, seed=seed)
    return (first.round(), second.round()) if integers else (first, second)


@settings(PROPERTY, max_examples=60)
@given(scores=half_scores(), data=st.data())
def test_two_stage_selection_finds_the_brute_force_scores_and_breaks_ties_by_place(scores, data):
    first, second = scores
    k = data.draw(st.integers(1, len(first) ** 2))
    for dtype in (torch.float64, torch.float32):
        sums, index = F.product_key_topk(first.to(dtype), second.to(dtype), k)
        best = oracle.product_key_brute_force(first.to(dtype), second.to(dtype), k)
        all_sums = (first.to(dtype)[:, None] + second.to(dtype)[None]).flatten()
        assert torch.equal(sums, all_sums[best])
        assert torch.equal(sums, all_sums[index])
        assert len(set(index.tolist())) == k
        assert index.tolist() == oracle.product_key_search(first.to(dtype), second.to(dtype), k)


@pytest.mark.parametrize("n", range(1, 7))
def test_two_stage_selection_is_exact_for_every_k(n):
    scores = normal(2, 50, n, seed=n)
    for k in range(1, n * n + 1):
        sums, index = F.product_key_topk(*scores, k)
        expected = (scores[0][:, :, None] + scores[1][:, None, :]).flatten(1).topk(k)
        assert torch.equal(sums, expected.values)
        assert torch.equal(index, expected.indices)


@PROPERTY
@given(scores=half_scores(), data=st.data())
def test_product_keys_read_exactly_the_selected_values(scores, data):
    """With unit values and softmax weights, which are never 0, the output shows the selection."""
    n = len(scores[0])
    k = data.draw(st.integers(1, n * n))
    layer = sf.ProductKeyMemory(2, n, k, activation="softmax", d_out=n * n, dtype=torch.float64)
    with torch.no_grad():
        layer.sub_keys.copy_(torch.stack(scores)[:, None, :, None])
        layer.values.copy_(torch.eye(n * n))
    y = layer(torch.ones(2, dtype=torch.float64))
    assert set(y.nonzero().flatten().tolist()) == set(oracle.product_key_search(*scores, k))
    assert y.sum().item() == pytest.approx(1)


def test_product_keys_select_when_k_is_more_than_n_too():
    """The published research runs had k >= n and read all n² values; here k is always the number read."""
    layer = sf.ProductKeyMemory(4, 3, 5, activation="softmax", n_heads=2, d_out=9, dtype=torch.float64)
    oracle.randomise(layer)
    torch.nn.init.eye_(layer.values)
    one_head = sf.ProductKeyMemory(4, 3, 5, activation="softmax", d_out=9, dtype=torch.float64)
    x, total = normal(20, 4), 0
    for head in range(2):
        one_head.load_state_dict({"sub_keys": layer.sub_keys[:, head : head + 1], "values": layer.values})
        y = one_head(x)
        assert (y != 0).sum(1).tolist() == [5] * 20
        close(y.sum(1), torch.ones(20, dtype=torch.float64))
        total = total + y
    close(layer(x), total)  # heads add after their own softmax


@PROPERTY
@given(layer=topk_layers(), n_tokens=TOKENS, seed=SEEDS)
def test_topk_keeps_the_units_of_the_largest_contribution(layer, n_tokens, seed):
    options = {"activation": layer.activation, "glu": hasattr(layer, "gate_keys") and layer.gate_keys is not None}
    options |= {"bias": layer.key_bias is not None, "dtype": torch.float64, "d_out": layer.d_ff}
    kept = sf.TopKFFN(layer.d_model, layer.d_ff, layer.k, **options)
    dense = sf.DenseFFN(layer.d_model, layer.d_ff, **options)
    for twin in (kept, dense):
        oracle.randomise(twin, seed)
        torch.nn.init.eye_(twin.values)
        if layer.key_bias is not None:
            torch.nn.init.zeros_(twin.out_bias)
    x = inputs(layer, n_tokens, seed=seed)
    for sparse, units in zip(kept(x), dense(x), strict=True):
        chosen = oracle.ranked(units.abs(), layer.k)
        expected = torch.zeros_like(units)
        expected[chosen] = units[chosen]
        close(sparse, expected)


@pytest.mark.parametrize("norm_aware", [False, True])
@pytest.mark.parametrize("d_ff", [6, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_units_go_to_the_lowest_indices(norm_aware, d_ff, dtype):
    layer = sf.TopKFFN(1, d_ff, 5, activation="identity", bias=False, norm_aware=norm_aware, d_out=d_ff, dtype=dtype)
    torch.nn.init.ones_(layer.keys)
    torch.nn.init.eye_(layer.values)
    signs = torch.tensor([[1.0], [-1.0]], dtype=dtype)  # ranks by magnitude
    expected = signs * (torch.arange(d_ff) < 5)
    assert torch.equal(layer(signs), expected.to(dtype))


def test_norm_aware_ranking_uses_the_norm_and_not_its_square():
    layer = sf.TopKFFN(1, 2, 1, bias=False, norm_aware=True, dtype=torch.float64)
    with torch.no_grad():
        layer.keys.copy_(torch.tensor([[3.0], [2.0]]))
        layer.values.copy_(torch.tensor([[2.0], [2.5]]))
    assert layer(torch.ones(1, dtype=torch.float64)).item() == 6  # 3*2 > 2*2.5, though 3*4 < 2*6.25


@PROPERTY
@given(layer=topk_layers(), n_tokens=TOKENS, seed=SEEDS)
def test_topk_gradient_is_the_dense_one_of_the_selected_units(layer, n_tokens, seed):
    """Rows of values that no token selected get no gradient."""
    x = inputs(layer, n_tokens, seed=seed)
    layer(x).sum().backward()
    p = {name: value.detach() for name, value in layer.named_parameters()}
    how = {"activation": layer.activation, "norm_aware": layer.norm_aware, "rank_by": layer.rank_by}
    selected = {i for token in x for i in oracle.ranked(oracle.topk_scores(p, token, **how), layer.k)}
    others = [i for i in range(layer.d_ff) if i not in selected]
    for name in ("keys", "values", "gate_keys", "key_bias"):
        if (p := getattr(layer, name, None)) is not None:
            assert torch.count_nonzero(p.grad[others]) == 0


# ------------------------------------------------------------------------------------------------------- bounds


@PROPERTY
@given(data=st.data(), seed=SEEDS, scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_balance_losses_and_statistics_stay_in_their_ranges(data, seed, scale):
    ranges = {"entropy": lambda e, k: (-math.log(e), 0), "switch": lambda e, k: (0, e), "cv2": lambda e, k: (0, e - 1)}
    name = data.draw(st.sampled_from(list(ranges)))
    layer = data.draw(moe_layers(balance=name, balance_weight=1.0))
    n_experts = layer.keys.shape[0]
    layer(scale * inputs(layer, data.draw(st.integers(1, 9)), seed=seed))
    lowest, highest = ranges[name](n_experts, layer.k)
    assert lowest - 1e-6 <= sf.aux_loss(layer).item() <= highest + 1e-6
    stats = sf.routing_stats(layer)[""]
    assert -1e-6 <= stats["entropy"] <= 1 + 1e-6
    assert 1 / n_experts - 1e-6 <= stats["busiest"] <= 1 / layer.k + 1e-6
    assert 0 <= stats["dead"] <= 1 - layer.k / n_experts + 1e-6
    assert stats["load"].sum().item() == pytest.approx(1)


@PROPERTY
@given(n_experts=st.integers(1, 8), data=st.data(), seed=SEEDS)
def test_raising_one_logit_leaves_the_other_sigmoid_gates_unchanged(n_experts, data, seed):
    layer = sf.SigmaMoE(n_experts, n_experts, 1, n_experts, dtype=torch.float64)
    torch.nn.init.eye_(layer.router.weight)
    logits, raised = normal(3, n_experts, seed=seed), data.draw(st.integers(0, n_experts - 1))
    gates = []
    for x in (logits, logits + 5 * torch.eye(n_experts, dtype=torch.float64)[raised]):
        _, index, gate = layer.router(x, None)
        gates.append(torch.zeros(3, n_experts, dtype=torch.float64).scatter(1, index, gate))
    others = [e for e in range(n_experts) if e != raised]
    assert torch.equal(gates[0][:, others], gates[1][:, others])
    assert (gates[1][:, raised] > gates[0][:, raised]).all()


# ------------------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize(
    "make",
    [
        lambda p: sf.DenseFFN(4, 12, bias=False, d_out=12, dropout=p, activation="silu"),
        lambda p: sf.TopKFFN(4, 12, 12, bias=False, d_out=12, dropout=p, activation="silu"),
        lambda p: sf.MoE(4, 4, 3, 4, router="unweighted", d_out=12, dropout=p, activation="silu"),
        lambda p: sf.ProductKeyMemory(4, 3, 9, d_out=9, dropout=p, activation="silu"),
    ],
    ids=["DenseFFN", "TopKFFN", "MoE", "ProductKeyMemory"],
)
def test_dropout_is_on_single_hidden_units_with_rescale_and_off_in_evaluation(make):
    layer, without = make(0.25), make(0.0)
    without.load_state_dict(layer.state_dict())
    for module in (layer, without):  # unit values: the output is the hidden units
        with torch.no_grad():
            module.values.copy_(torch.eye(module.d_out).view_as(module.values))
    x = normal(400, 4, dtype=torch.float32)
    torch.manual_seed(0)
    units, dropped = without(x), layer(x)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (units / 0.75)[kept])
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert 0.5 < kept.float().mean(0).min() < kept.float().mean(0).max() < 0.9  # every unit for itself
    torch.testing.assert_close(layer.eval()(x), units)


def test_topk_selects_after_dropout():
    """So a dropped unit makes room: one of 16 units is nearly always left. After the selection half would be gone."""
    layer = sf.TopKFFN(4, 16, 1, activation="identity", bias=False, d_out=16, dropout=0.5)
    torch.nn.init.eye_(layer.values)
    torch.manual_seed(0)
    assert (layer(normal(300, 4, dtype=torch.float32)) != 0).sum(1).tolist() == [1] * 300


@pytest.mark.parametrize("layer", [sf.DenseFFN(4, 6, dropout=0.9), sf.MoE(4, 2, 3, 1, dropout=0.9, bias=True)])
def test_dropout_never_touches_the_output(layer):
    torch.nn.init.zeros_(layer.values)
    torch.nn.init.ones_(layer.out_bias)
    assert torch.equal(layer(normal(9, 4, dtype=torch.float32)), torch.ones(9, 4))


# ------------------------------------------------------------------------------------------------ initialisation


def std(t):
    return t.detach().double().std(correction=0).item()


@pytest.mark.parametrize(("n_experts", "expert_size"), [(4, 128), (16, 32), (64, 8)])
@pytest.mark.parametrize("n_layers", [2, 16])
def test_moe_initialisation_depends_on_the_width_of_all_experts_and_not_on_the_split(n_experts, expert_size, n_layers):
    torch.manual_seed(0)
    layer = sf.SigmaMoE(64, n_experts, expert_size, 2, n_layers=n_layers, glu=True, bias=True)
    c = math.sqrt(2 / n_layers)
    assert std(layer.keys) == pytest.approx(c / math.sqrt(64), rel=0.03)
    assert std(layer.gate_keys) == pytest.approx(c / math.sqrt(64), rel=0.03)
    assert std(layer.values) == pytest.approx(c / math.sqrt(512), rel=0.03)
    assert torch.count_nonzero(layer.key_bias) == torch.count_nonzero(layer.out_bias) == 0
    norms = layer.router.weight.detach().norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    assert norms[0].item() == pytest.approx(c, rel=0.15)


def test_the_original_smaller_initialisation_of_switch_is_not_its_default():
    states = []
    for layer_cls in (sf.SigmaMoE, sf.SwitchMoE):
        torch.manual_seed(0)
        states.append(layer_cls(6, 4, 2, 1).state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value)


@pytest.mark.parametrize("layer_cls", [sf.DenseFFN, sf.TopKFFN])
def test_dense_initialisation_is_a_plain_normal(layer_cls):
    torch.manual_seed(0)
    extra = {"k": 8} if layer_cls is sf.TopKFFN else {}
    layer = layer_cls(64, 512, glu=True, n_layers=8, **extra)
    assert std(layer.keys) == pytest.approx(0.5 / 8, rel=0.03)
    assert std(layer.gate_keys) == pytest.approx(0.5 / 8, rel=0.03)
    assert std(layer.values) == pytest.approx(0.5 / math.sqrt(512), rel=0.03)
    assert torch.count_nonzero(layer.key_bias) == torch.count_nonzero(layer.out_bias) == 0
    assert layer.keys.abs().max() > 3.2 * 0.5 / 8  # not truncated


def test_product_key_initialisation():
    torch.manual_seed(0)
    plain = sf.ProductKeyMemory(64, 32, 8, n_heads=4, n_layers=8)
    assert std(plain.sub_keys) == pytest.approx(0.5 / 8, rel=0.03)
    assert std(plain.values) == pytest.approx(0.5 / 32, rel=0.03)
    standard = sf.ProductKeyMemory(64, 32, 8, n_heads=4, n_layers=8, value_init="standard")
    assert std(standard.values) == pytest.approx(0.5 / 8, rel=0.03)
    learned = sf.ProductKeyMemory(64, 32, 8, n_heads=4, n_layers=8, query_dim=16)
    assert std(learned.sub_keys) == pytest.approx(0.5 / 4, rel=0.05)
    assert std(learned.query.weight) == pytest.approx(0.5 / 8, rel=0.03)


@pytest.mark.parametrize(
    ("layer_cls", "sizes"),
    [
        (sf.DenseFFN, (6, 8)),
        (sf.TopKFFN, (6, 8, 2)),
        (sf.ProductKeyMemory, (6, 3, 2)),
        (sf.SigmaMoE, (6, 4, 2, 2)),
        (sf.SoftmaxMoE, (6, 4, 2, 2)),
        (sf.SwitchMoE, (6, 4, 2)),
        (sf.SBaseMoE, (6, 4, 2, 2)),
        (sf.NoisyTopKMoE, (6, 4, 2, 2)),
    ],
)
def test_init_scale_scales_and_n_layers_is_the_pre_ln_scale(layer_cls, sizes):
    states = []
    for options in ({}, {"init_scale": 0.5}, {"n_layers": 8}, {"init_scale": 1.0, "n_layers": 8}):
        torch.manual_seed(0)
        states.append(layer_cls(*sizes, **options).state_dict())
    for name, value in states[0].items():
        for scaled in states[1:]:
            torch.testing.assert_close(scaled[name], 0.5 * value)
    with pytest.raises(ValueError, match="init_scale"):
        layer_cls(*sizes, init_scale=0.3, n_layers=8)


# --------------------------------------------------------------------------------------------- counts and sizes


def test_biases_are_on_for_dense_and_topk_and_off_for_experts():
    assert {"key_bias", "out_bias"} <= set(sf.DenseFFN(2, 2).state_dict()) & set(sf.TopKFFN(2, 2, 1).state_dict())
    assert set(sf.SigmaMoE(2, 2, 2, 1).state_dict()) == {"keys", "values", "router.weight"}
    assert set(sf.ProductKeyMemory(2, 2, 1).state_dict()) == {"sub_keys", "values"}


def count(layer):
    return sum(p.numel() for p in layer.parameters())


@PROPERTY
@given(data=st.data())
def test_parameter_and_flop_counts_are_the_formulas(data):
    d_model, d_ff, n_experts, size = (data.draw(st.integers(1, 9)) for _ in range(4))
    k = data.draw(st.integers(1, d_ff))
    options = {"glu": data.draw(st.booleans()), "bias": data.draw(st.booleans()), "d_out": data.draw(st.integers(1, 9))}
    flops = {name: value for name, value in options.items() if name != "bias"}
    layers = {"dense": sf.DenseFFN(d_model, d_ff, **options), "topk": sf.TopKFFN(d_model, d_ff, k, **options)}
    for name, layer in layers.items():
        assert count(layer) == oracle.n_parameters(name, d_model, d_ff=d_ff, **options)
        assert layer.flops_per_token() == oracle.flops_per_token(name, d_model, d_ff=d_ff, k=k, **flops)
        assert layer.active_fraction == pytest.approx(1 if name == "dense" else k / d_ff)
    k = data.draw(st.integers(1, n_experts))
    for name, layer_cls in {"moe": sf.SigmaMoE, "noisy": sf.NoisyTopKMoE}.items():
        layer, sizes = layer_cls(d_model, n_experts, size, k, **options), {"n_experts": n_experts, "expert_size": size}
        assert count(layer) == oracle.n_parameters(name, d_model, **sizes, **options)
        assert layer.flops_per_token() == oracle.flops_per_token(name, d_model, k=k, **sizes, **flops)
        assert layer.active_fraction == pytest.approx(k / n_experts)
        assert layer.d_ff == n_experts * size


@PROPERTY
@given(data=st.data())
def test_product_key_counts_are_the_formulas(data):
    d_model, n, n_heads = 2 * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    k, d_out = data.draw(st.integers(1, n * n)), data.draw(st.integers(1, 9))
    sizes = {"n_heads": n_heads, "query_dim": data.draw(st.sampled_from([None, 2, 8])), "d_out": d_out}
    layer = sf.ProductKeyMemory(d_model, n, k, **sizes)
    assert count(layer) == oracle.n_parameters("product_key", d_model, n_sub_keys=n, **sizes)
    assert layer.flops_per_token() == oracle.flops_per_token("product_key", d_model, n_sub_keys=n, k=k, **sizes)
    assert layer.d_ff == n * n
    assert 0 < layer.active_fraction <= 1
    if n_heads == 1:
        assert layer.active_fraction == pytest.approx(k / n**2)


@pytest.mark.parametrize(
    ("d_model", "d_ff", "dense", "n_experts", "moe", "n_sub_keys", "pkm"),
    [
        (412, 2053, 1_694_137, 16, 1_694_144, 62, 1_685_904),
        (1024, 4110, 8_422_414, 32, 8_421_376, 89, 8_475_648),
        (512, 2053, 2_104_837, 16, 2_105_344, 62, 2_095_104),
    ],
    ids=["WT-S", "WT-B", "E8"],
)
def test_parameter_equal_gives_the_papers_sizes(d_model, d_ff, dense, n_experts, moe, n_sub_keys, pkm):
    """The table of paper.md section 2.2."""
    assert count(sf.DenseFFN(d_model, d_ff, device="meta")) == dense
    kwargs = sf.parameter_equal(sf.SigmaMoE, d_model, d_ff, expert_size=128, k=4)
    assert kwargs == {"d_model": d_model, "n_experts": n_experts, "expert_size": 128, "k": 4}
    assert count(sf.SigmaMoE(**kwargs, device="meta")) == moe
    kwargs = sf.parameter_equal(sf.ProductKeyMemory, d_model, d_ff, k=32, n_heads=4)
    assert kwargs == {"d_model": d_model, "n_sub_keys": n_sub_keys, "k": 32, "n_heads": 4}
    assert count(sf.ProductKeyMemory(**kwargs, device="meta")) == pkm
    assert sf.parameter_equal(sf.TopKFFN, d_model, d_ff, k=128) == {"d_model": d_model, "d_ff": d_ff, "k": 128}


@pytest.mark.filterwarnings("ignore:no .* comes near")
@PROPERTY
@given(data=st.data())
def test_parameter_equal_is_the_nearest_size(data):
    d_model, d_ff = 2 * data.draw(st.integers(2, 40)), data.draw(st.integers(20, 300))
    options = {"glu": data.draw(st.booleans()), "bias": data.draw(st.booleans())}
    size, n_heads = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 3))
    target = oracle.n_parameters("dense", d_model, d_ff=d_ff, bias=True)
    for name, layer_cls, free, sizes in [
        ("topk", sf.TopKFFN, "d_ff", options),
        ("moe", sf.SigmaMoE, "n_experts", options | {"expert_size": size}),
        ("noisy", sf.NoisyTopKMoE, "n_experts", options | {"expert_size": size}),
        ("product_key", sf.ProductKeyMemory, "n_sub_keys", {"n_heads": n_heads}),
    ]:
        kwargs = sf.parameter_equal(layer_cls, d_model, d_ff, k=1, **sizes)
        chosen = kwargs[free]
        assert kwargs == {"d_model": d_model, free: chosen, "k": 1, **sizes}
        counts = {n: oracle.n_parameters(name, d_model, **{free: n}, **sizes) for n in range(1, chosen + 2)}
        assert abs(counts[chosen] - target) == min(abs(count - target) for count in counts.values())


# ------------------------------------------------------------------------------------------------ the two cores


@st.composite
def cvmm_problems(draw):
    n_rows, width, n_experts, n_out, n_slots = (draw(st.integers(1, 6)) for _ in range(5))
    seed, n_slots = draw(SEEDS), draw(st.sampled_from([0, 1, n_slots]))
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": normal(n_rows, width, seed=seed).requires_grad_(),
        "weight": normal(n_experts, width, 3, seed=seed + 1).requires_grad_(),
        "expert_index": torch.randint(n_experts, (n_slots,), generator=generator),
        "gather_index": torch.randint(n_rows, (n_slots,), generator=generator),
        "scatter_index": torch.randint(n_out, (n_slots,), generator=generator),
        "reduction_weight": normal(n_slots, seed=seed + 2).requires_grad_(),
        "n_out": n_out,
    }


def cvmm_loop(x, weight, expert_index, gather_index, scatter_index, reduction_weight, n_out):
    rows = [torch.zeros(weight.shape[-1], dtype=x.dtype) for _ in range(n_out)]
    for s, e in enumerate(expert_index.tolist()):
        to = int(scatter_index[s])
        rows[to] = rows[to] + reduction_weight[s] * (x[int(gather_index[s])] @ weight[e])
    return torch.stack(rows)


@PROPERTY
@given(problem=cvmm_problems(), backend=st.sampled_from(["reference", "torch", "auto"]))
def test_cvmm_is_the_loop_over_slots_with_all_gradients(problem, backend):
    inputs = [problem[name] for name in ("x", "weight", "reduction_weight")]
    with sf.backend(backend):
        actual = F.cvmm(**problem)
    expected = cvmm_loop(**problem)
    close(actual, expected)
    outward = normal(*expected.shape, seed=9)
    gradients = torch.autograd.grad((actual * outward).sum(), inputs, allow_unused=True)
    wanted = torch.autograd.grad((expected * outward).sum() + 0 * sum(t.sum() for t in inputs), inputs)
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str
)
def test_cvmm_of_every_dtype_is_near_the_fp64_loop(backend, dtype, tolerance):
    """Relative to the largest entry: sums in fp32, then one rounding for each of products and sums over slots."""
    slots, generator = 30, torch.Generator().manual_seed(0)
    indices = [torch.randint(n, (slots,), generator=generator) for n in (5, 9, 7)]
    inputs = [t.to(dtype).requires_grad_() for t in (normal(9, 16), normal(5, 16, 12, seed=1), normal(slots, seed=2))]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    names = ("gather_index", "scatter_index", "reduction_weight", "n_out")
    with sf.backend(backend):
        actual = F.cvmm(*inputs[:2], indices[0], **dict(zip(names, (*indices[1:], inputs[2], 7), strict=True)))
    expected = cvmm_loop(*exact[:2], indices[0], *indices[1:], exact[2], 7)
    outward = normal(7, 12, seed=3).to(dtype)
    results = [actual, *torch.autograd.grad(actual, inputs, outward)]
    wanted = [expected, *torch.autograd.grad(expected, exact, outward.double())]
    for got, want in zip(results, wanted, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@PROPERTY
@given(problem=cvmm_problems(), seed=SEEDS)
def test_permuting_the_slots_of_a_cvmm_changes_nothing_and_of_plain_rows_permutes_the_output(problem, seed):
    order = permutation(len(problem["expert_index"]), seed)
    slots = ("expert_index", "gather_index", "scatter_index", "reduction_weight")
    close(F.cvmm(**(problem | {name: problem[name][order] for name in slots})), F.cvmm(**problem))
    x, expert_index = normal(len(order), problem["weight"].shape[1]), problem["expert_index"]
    plain = F.cvmm(x, problem["weight"], expert_index)
    close(F.cvmm(x[order], problem["weight"], expert_index[order]), plain[order])


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("n_tokens", [0, 1, 5])
def test_experts_without_tokens_get_exactly_zero_gradient(backend, n_tokens, poisoned):
    x, weight = normal(n_tokens, 4).requires_grad_(), normal(6, 4, 3, seed=1).requires_grad_()
    with sf.backend(backend):
        F.cvmm(x, weight, torch.full((n_tokens,), 2)).sum().backward()
    assert torch.count_nonzero(weight.grad[[0, 1, 3, 4, 5]]) == 0
    close(weight.grad[2], x.detach().sum(0)[:, None].expand(4, 3))


@PROPERTY
@given(data=st.data(), seed=SEEDS, backend=st.sampled_from(["reference", "torch", "auto"]), sparse_grad=st.booleans())
def test_weighted_bag_is_the_sum_over_its_rows_with_all_gradients(data, seed, backend, sparse_grad):
    n_values, n_bags, k = (data.draw(st.integers(1, 6)), data.draw(st.integers(0, 6)), data.draw(st.integers(1, 5)))
    values, weight = normal(n_values, 3, seed=seed).requires_grad_(), normal(n_bags, k, seed=seed + 1).requires_grad_()
    index = torch.randint(n_values, (n_bags, k), generator=torch.Generator().manual_seed(seed))
    with sf.backend(backend):
        actual = F.weighted_bag(values, index, weight, sparse_grad=sparse_grad)
    expected = (weight[..., None] * values[index]).sum(1)
    close(actual, expected)
    outward = normal(n_bags, 3, seed=seed + 2)
    gradients = torch.autograd.grad((actual * outward).sum(), (values, weight))
    wanted = torch.autograd.grad((expected * outward).sum(), (values, weight))
    assert gradients[0].is_sparse == sparse_grad
    close(gradients[0].to_dense(), wanted[0])
    close(gradients[1], wanted[1])


@PROPERTY
@given(layer=moe_layers(routers=("sigmoid",), d_out=None, bias=False), n_tokens=TOKENS, seed=SEEDS)
def test_expert_ffn_is_the_layer_without_its_router(layer, n_tokens, seed):
    x = inputs(layer, n_tokens, seed=seed)
    _, index, gate = layer.router(x, None)
    gate_keys = getattr(layer, "gate_keys", None)
    how = {"gate_keys": gate_keys, "activation": layer.activation}
    close(F.expert_ffn(x, layer.keys, layer.values, index, gate, **how), layer(x))


def test_experts_of_a_memory_drop_units():
    layer, x = sf.ProductKeyMemory(8, 5, 6, experts=True, dropout=0.5), torch.randn(30, 8)
    assert not torch.allclose(layer(x), layer.eval()(x))
