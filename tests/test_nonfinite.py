"""NaN, infinities, and numbers near the ends of a dtype: a model that diverged shows, and one that did not does not.

Selections are in torch.topk's order (NaN before infinity, -infinity last, ties to the lower index), and activations are
right in value and derivative at any number, on every backend; ``.ci/run`` runs these tests on every instruction set.
"""

from __future__ import annotations

import flat
import pytest
import torch
from strange import INF, NAN, SMOOTH, assert_near, exact, numbers, stable, strange

import sparse_ffn as sf
from sparse_ffn import functional, ops
from sparse_ffn.backends import cpu
from sparse_ffn.ops.activations import ACTIVATIONS
from sparse_ffn.ops.product_key_topk import reference as product_keys
from sparse_ffn.ops.select import eager_stable_topk, stable_topk

built = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
ISA = cpu.instruction_set() if cpu.PROBLEM is None else None
ON_TILES = ISA in ("amx", "amx_emulated")
FLUSHES = ISA == "avx512_bf16" or ON_TILES
"""Whether bf16 numbers below 2^-126 count as zero in the core's products: on tiles, in those of many rows."""
ROUNDS_TO_ZERO = ISA in ("avx512_bf16", "amx")
"""Whether they become zero where it rounds to bf16."""
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


# ------------------------------------------------------------------------------------------------- selections


@pytest.mark.parametrize("n", [1, 3, 16, 40, 300])
def test_top_k_ranks_nan_first_and_infinity_next_and_ties_by_index(n: int) -> None:
    scores = strange(40, n)
    for k in sorted({1, min(n, 5), n}):
        expected = stable(scores, k)
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(stable_topk(scores.to(dtype), k), expected)
            assert torch.equal(eager_stable_topk(scores.to(dtype), k), expected)
    for dtype in (torch.bfloat16, torch.float16):
        scores = strange(40, n, dtype)
        assert torch.equal(eager_stable_topk(scores, k), stable(scores, k))
        assert torch.equal(stable_topk(scores, k), stable(scores, k))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 3), (40, 7), (300, 1), (300, 33), (300, 300), (3000, 700)])
@pytest.mark.parametrize("norm_aware", [False, True])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_topk_ffn_ranks_its_units_in_that_order(
    dtype: torch.dtype, glu: bool, norm_aware: bool, n: int, k: int, on_backend: str
) -> None:
    """The gradient of the values shows which units were selected: with one column of ones, the hidden units."""
    for row in strange(8, n, dtype):
        x, keys = torch.ones(1, 1, dtype=dtype), row.unsqueeze(1)
        values = (torch.arange(n) % 3 + 1).to(dtype).unsqueeze(1)  # of differing norms
        score = row.abs().float() * values[:, 0].float() if norm_aware else row.abs()
        selected = stable(score.unsqueeze(0).float(), k)[0]
        gate_keys = torch.ones(n, 1, dtype=dtype) if glu else None
        values.requires_grad_()
        y = flat.topk_ffn(x, keys, values, k, gate_keys=gate_keys, activation="identity", norm_aware=norm_aware)
        (dvalues,) = torch.autograd.grad(y, values, torch.ones_like(y))
        units = torch.zeros(n, dtype=torch.bool).index_fill(0, selected, True)
        expected = torch.where(units, row, 0)
        assert torch.equal(dvalues[:, 0].isnan(), expected.isnan())
        assert torch.equal(dvalues[:, 0].nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@built
@pytest.mark.parametrize(("n", "k"), [(1, 1), (40, 7), (300, 33), (300, 299), (1000, 700)])
@pytest.mark.parametrize("norm_aware", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_core_selects_units_in_that_order_whatever_its_rows_have_in_common(
    dtype: torch.dtype, norm_aware: bool, n: int, k: int
) -> None:
    """Rows of one call: each begins its search where the one before it ended."""
    alike = torch.randn(8, n) * torch.logspace(-30, 30, 8).unsqueeze(1)
    up = torch.cat(
        [strange(12, n, dtype), alike.to(dtype), torch.randn(12, n).to(dtype), torch.zeros(1, n, dtype=dtype)]
    )
    norm = (torch.arange(n) % 3 + 1).float() if norm_aware else None
    score = up.abs().float() if norm is None else up.abs().float() * norm
    expected = torch.zeros(len(up), n, dtype=torch.bool).scatter(1, stable(score, k), True)
    index, hidden = torch.empty(len(up), k, dtype=torch.int64), torch.empty_like(up)
    kept, selected = torch.empty(len(up), k, dtype=dtype), torch.empty(len(up), -(-n // 32), dtype=torch.int32)
    outputs = (index, kept, hidden, selected, None, None)
    cpu.call("topk_hidden_forward", (up, None, None, norm, *outputs), cpu.ACTIVATIONS["identity"], k)
    assert torch.equal(index, expected.nonzero()[:, 1].view(-1, k))
    assert torch.equal(kept.nan_to_num(nan=7.0), up.gather(1, index).nan_to_num(nan=7.0))
    assert torch.equal(hidden.nan_to_num(nan=7.0), torch.where(expected, up, 0).nan_to_num(nan=7.0))
    bits = selected.unsqueeze(2) >> torch.arange(32) & 1
    assert torch.equal(bits.flatten(1)[:, :n].bool(), expected)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 9), (5, 4), (40, 8), (300, 33), (7, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_product_keys_are_the_references_whatever_the_scores(
    dtype: torch.dtype, n: int, k: int, on_backend: str
) -> None:
    first, second = (strange(60, n).to(dtype) for _ in range(2))
    first[:20] = first[:20].nan_to_num(nan=1.0)
    second[10:30] = second[10:30].nan_to_num(nan=2.0, posinf=1.0)
    best, index = functional.product_key_topk(first, second, k)
    assert torch.equal(index, product_keys.product_key_topk(first, second, k, stable))
    sums = first.gather(-1, index // n) + second.gather(-1, index % n)
    assert torch.equal(best.isnan(), sums.isnan())
    assert torch.equal(best.nan_to_num(nan=7.0), sums.nan_to_num(nan=7.0))


@built
@pytest.mark.parametrize("gate_function", ["sigmoid", "softmax", "softmax_topk", "unweighted"])
@pytest.mark.parametrize(("n_experts", "k"), [(4, 1), (5, 5), (40, 3), (70, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_rows_are_the_references_whatever_the_scores(
    dtype: torch.dtype, n_experts: int, k: int, gate_function: str
) -> None:
    """Router weights of one column make the scores: x is 1."""
    for row in strange(16, n_experts, dtype):
        t = {
            "x": torch.ones(2, 1, dtype=dtype),
            "router_weight": row.unsqueeze(1),
            "keys": torch.ones(n_experts, 1, 1, dtype=dtype),
            "values": torch.ones(n_experts, 1, 1, dtype=dtype),
        }
        found = flat.routed_ffn(**t, k=k, gate_function=gate_function)
        x, router, keys, values = t.values()
        wanted = flat.routed_reference(**t, k=k, gate_function=gate_function)
        assert torch.equal(found[1], stable(row.float().expand(2, -1), k))
        for name, a, b in zip(("output", "index", "gate", "sums"), found, wanted, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, msg=name)
        few = ops.routed_ffn_inference(x, router, None, ops.Units(keys, values), k, gate_function, "relu")
        assert torch.equal(few[1], found[1])


@built
def test_padding_that_is_no_number_is_in_no_sum() -> None:
    x, mask = torch.randn(6, 4), torch.tensor([True, True, False, True, False, True])
    weights = (torch.randn(3, 4), torch.randn(3, 5, 4), torch.randn(3, 5, 4))
    options = {"k": 2, "gate_function": "softmax", "mask": mask}
    found = []
    for padding in (1.0, NAN):
        x[~mask] = padding
        found += [compute(x, *weights, **options)[3] for compute in (flat.routed_ffn, flat.routed_reference)]
    for sums in found[1:]:
        torch.testing.assert_close(sums, found[0])


# ------------------------------------------------------------------------------------------------ divergence shows

LAYERS = {
    "topk": (lambda: sf.TopKFFN(8, 24, 3), "keys"),
    "topk, norm-aware glu": (lambda: sf.TopKFFN(8, 24, 3, glu=True, norm_aware=True, activation="silu"), "gate_keys"),
    "product keys": (lambda: sf.ProductKeyMemory(8, 6, 3, n_heads=2), "sub_keys"),
    "product keys, softmax": (lambda: sf.ProductKeyMemory(8, 6, 3, activation="softmax"), "sub_keys"),
    "product keys, query": (lambda: sf.ProductKeyMemory(8, 6, 3, query_dim=4, query_norm="layer"), "sub_keys"),
    **{
        f"moe, {router}": (lambda router=router: sf.MoE(8, 6, 4, 2, router=router), "router.weight")
        for router in ("sigmoid", "softmax", "softmax_topk", "sinkhorn", "unweighted")
    },
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_one_row_of_nan_shows_in_every_output(name: str, dtype: torch.dtype, training: bool, on_backend: str) -> None:
    make, parameter = LAYERS[name]
    layer = make().to(dtype).train(training)
    with torch.no_grad():
        layer.get_parameter(parameter).view(-1, layer.get_parameter(parameter).shape[-1])[3] = NAN
        y = layer(torch.randn(20, 8, dtype=dtype))
    assert y.isnan().any(1).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", LAYERS)
def test_a_token_that_is_no_number_shows_in_its_own_output_alone(name: str, bad: float, on_backend: str) -> None:
    make, _ = LAYERS[name]
    layer, x = make().eval(), torch.randn(20, 8)
    expected = layer(x)
    x[7, 2] = bad
    y = layer(x)
    others = torch.arange(20) != 7
    assert not y[7].isfinite().all()
    torch.testing.assert_close(y[others], expected[others])


# ------------------------------------------------------------------------------------------------------ activations


@dtypes
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("width", [1, 32])
def test_activations_and_their_derivatives_are_right_everywhere(
    name: str, width: int, glu: bool, dtype: torch.dtype, on_backend: str
) -> None:
    """One expert of equal units, weighed to sum to one of them: partial vectors of one unit and whole ones."""
    z = numbers(dtype)
    if name in SMOOTH and (on_backend == "torch" or (on_backend == "cpu" and dtype == torch.float64)):
        z = z[~z.isinf()]  # the torch backend's are torch's own functions
    if dtype == torch.bfloat16 and (FLUSHES or on_backend != "cpu"):  # torch's own products may flush, too
        z = z[(z == 0) | ~(z.abs() < torch.finfo(dtype).tiny)]
    x = z.unsqueeze(1).requires_grad_()
    ones = torch.ones(1, width, 1, dtype=dtype)
    gate = x.new_ones(len(z), 1)
    weights = {"keys": ones, "values": ones / width, "index": gate.long() - 1, "gate": gate}
    if glu:
        weights |= {"keys": 0 * ones, "gate_keys": ones, "key_bias": ones[..., 0]}  # what is gated is 0 * x + 1
    y = flat.expert_ffn(x, **weights, activation=name)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    value, derivative = exact(name, z)
    # 0 * infinity is nothing to compare
    chosen = torch.ones_like(z, dtype=torch.bool) if not glu else z.isfinite() & value.to(dtype).isfinite()
    value, derivative = value[chosen], derivative[chosen]
    assert_near(name, z[chosen], y.detach()[chosen, 0], value)
    assert_near(f"the derivative of {name}", z[chosen], slope[chosen, 0], derivative)


@dtypes
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 64])
def test_topk_ffn_computes_the_same_activations(name: str, width: int, dtype: torch.dtype, on_backend: str) -> None:
    """Of equal units, of which half are taken: partial vectors of one unit and whole ones."""
    z = numbers(dtype)
    if name in SMOOTH and (on_backend == "torch" or (on_backend == "cpu" and dtype == torch.float64)):
        z = z[~z.isinf()]
    ones, k = torch.ones(width, 1, dtype=dtype), (width + 1) // 2
    # on some processors torch's product takes bf16's smallest numbers as zero
    lost = (z.unsqueeze(1) @ ones[:1])[:, 0] == 0
    z = z[~lost | (z == 0) | (z.abs() >= torch.finfo(dtype).tiny)]
    x = z.unsqueeze(1).requires_grad_()
    y = flat.topk_ffn(x, ones, ones / k, k, activation=name)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    value, derivative = exact(name, z)
    assert_near(name, z, y.detach()[:, 0], value)
    assert_near(f"the derivative of {name}", z, slope[:, 0], derivative)


@pytest.mark.parametrize("on_backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("name", SMOOTH)
def test_a_gate_that_overflowed_closes_its_unit_in_both_passes(name: str, on_backend: str) -> None:
    """Of a GLU, in fp16: -120000 is -infinity there, where the gate and its derivative are 0."""
    units = {n: torch.ones(5, 4).half().requires_grad_() for n in ("keys", "values")}
    gate_keys = torch.ones(5, 4).half()
    gate_keys[2] = -300
    x = torch.full((1, 4), 100.0).half()
    y = flat.topk_ffn(x, **units, gate_keys=gate_keys.requires_grad_(), k=5, activation=name)
    others = torch.arange(5) != 2
    for grad in torch.autograd.grad(y.sum() / 1000, (*units.values(), gate_keys)):
        assert not grad[2].any()
        assert (grad[others] > 0).all()


# ---------------------------------------------------------------------------------------------------- small numbers


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 40], ids=["few rows", "many rows"])
def test_numbers_below_the_smallest_normal_one_count_but_of_bf16_where_the_processor_drops_them(
    tokens: int, dtype: torch.dtype
) -> None:
    small = torch.finfo(dtype).tiny / 16
    bf16 = dtype == torch.bfloat16
    rounded = 0.0 if bf16 and ROUNDS_TO_ZERO else small
    summed = 0.0 if bf16 and FLUSHES and not (ON_TILES and tokens == 1) else small
    kept = min(rounded, summed)
    x, one = torch.ones(tokens, 2, dtype=dtype), torch.ones(1, 2, 2, dtype=dtype)
    index, gate = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    with sf.backend("cpu"):
        for factors in ((x, small * one), (small * x, one)):
            product = ops.cvmm(*factors, index[:, 0])
            assert torch.equal(product, torch.full_like(product, 2 * kept))
            y = flat.expert_ffn(*factors, one, index, gate, activation="identity")
            assert torch.equal(y, torch.full_like(y, 4 * kept))
        wide = ops.wide_product(x.unsqueeze(0), small * one)
        assert torch.equal(wide, torch.full_like(wide, 2 * summed))
        # the bag widens its numbers first, and rounds its sums
        bag = ops.weighted_bag(small * one[0], index, gate.to(dtype) / 2)
        assert torch.equal(bag, torch.full_like(bag, rounded / 2))
        bag = ops.weighted_bag(small * one[0], index, 64 * gate.to(dtype))
        assert torch.equal(bag, torch.full_like(bag, 64 * small))
