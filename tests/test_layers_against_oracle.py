"""Outputs and all gradients of every layer equal the float64 oracle's: layer x activation x dtype x option x backend.

The oracle gets the layer's own (rounded) parameters and inputs, so only the layer's arithmetic is compared. Inputs are
drawn so that neither a selection nor the kink of an activation hangs on rounding (`clear_tokens`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import oracle
import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn.layers import LatentMoE, LowRankMoE, MixedMoE, SwitchHeadAttention

# Largest error allowed, relative to the largest entry of the tensor. An output or gradient is a chain of four to six
# rounded steps (up product, activation, gate, down product, and the same backwards); steps add up a few dozen terms of
# mixed sign. That makes about ten times the unit roundoff of the low precisions (bf16 2^-9, fp16 2^-12), whose sums are
# kept in fp32, and a few hundred times that of fp32 (2^-24) and fp64 (2^-53), whose sums are not kept any better.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# A gradient that is 0 or nearly so in exact arithmetic is a difference of terms of order 1 and is compared with those.
FLOOR = 0.3
MARGIN = 0.03  # by how much selections and kinks are clear: more than the rounding of a bf16 score of order 1

DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32", "bf16", "fp16"])
WIDE_AND_NARROW = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
ACTIVATIONS = pytest.mark.parametrize("activation", list(oracle.ACTIVATIONS))


# ------------------------------------------------------------------------------------------------------ the cases


@dataclass(frozen=True)
class Case:
    """How to build a layer and what the oracle calls it."""

    layer: Callable[..., torch.nn.Module]
    sizes: dict
    choices: dict = field(default_factory=dict)
    router: str | None = None  # the oracle's name of the router, for the MoE family

    def build(self, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
        layer = self.layer(**(self.sizes | self.choices | options), dtype=dtype)
        oracle.randomise(layer)
        return layer


MOE = {"d_model": 6, "n_experts": 5, "expert_size": 3, "k": 2}
FFN = {
    "DenseFFN": Case(sf.DenseFFN, {"d_model": 6, "d_ff": 11}),
    "TopKFFN": Case(sf.TopKFFN, {"d_model": 6, "d_ff": 11, "k": 4}),
}
PRODUCT_KEYS = {"ProductKeyMemory": Case(sf.ProductKeyMemory, {"d_model": 6, "n_sub_keys": 4, "k": 3, "n_heads": 2})}
FAMILY = {
    "SigmaMoE": Case(sf.SigmaMoE, MOE, {}, "sigmoid"),
    "SoftmaxMoE-softmax": Case(sf.SoftmaxMoE, MOE, {"router": "softmax"}, "softmax"),
    "SoftmaxMoE-softmax_topk": Case(sf.SoftmaxMoE, MOE, {"router": "softmax_topk"}, "softmax_topk"),
    "SwitchMoE": Case(sf.SwitchMoE, MOE, {}, "softmax"),
    "SBaseMoE": Case(sf.SBaseMoE, MOE, {}, "sinkhorn"),
    "NoisyTopKMoE": Case(sf.NoisyTopKMoE, MOE, {}, "noisy_topk"),
    "MoE-unweighted": Case(sf.MoE, MOE, {"router": "unweighted"}, "unweighted"),
}
ROUTERS = {
    name: Case(sf.MoE, MOE, {"router": name}, name)
    for name in ("sigmoid", "softmax", "softmax_topk", "sinkhorn", "noisy_topk", "unweighted")
}
ALL = FFN | PRODUCT_KEYS | FAMILY
EACH_LAYER = pytest.mark.parametrize("case", list(ALL.values()), ids=list(ALL))
EACH_MOE = pytest.mark.parametrize("case", list(FAMILY.values()), ids=list(FAMILY))


# ------------------------------------------------------------------------------------------------ unambiguous inputs


def gap(scores: Tensor, k: int) -> float:
    """How far the k-th best score is above the next one; a tie of zeros is harmless, they contribute nothing."""
    if k >= len(scores):
        return math.inf
    best = scores.sort(descending=True).values
    return math.inf if best[k - 1] == 0 else (best[k - 1] - best[k]).item()


def topk_options(options: dict) -> dict:
    return {"norm_aware": options.get("norm_aware", False), "rank_by": options.get("rank_by", "hidden")}


def distance_to_doubt(layer: torch.nn.Module, x: Tensor, router_input: Tensor, options: dict) -> float:
    """Of one token, the smallest distance to a tie in a selection or to the kink of an activation."""
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    distances = []
    if "sub_keys" in p:
        for head in range(p["sub_keys"].shape[1]):
            u_a, u_b = oracle.product_key_scores(p, x, head, options.get("query_norm"))
            sums = (u_a[:, None] + u_b[None]).flatten()
            distances += [sums.abs().min().item(), gap(sums - sums.min() + 1, layer.k)]
        return min(distances)
    pre = p["keys"].flatten(0, -2) @ x
    distances.append((pre + p["key_bias"].flatten() if "key_bias" in p else pre).abs().min().item())
    if "gate_keys" in p:
        distances.append((p["gate_keys"].flatten(0, -2) @ x).abs().min().item())
    if "router.weight" in p:
        logits = p["router.weight"] @ router_input
        distances.append(gap(logits - logits.min() + 1, layer.k))
    if isinstance(layer, sf.TopKFFN):
        how = {"activation": options.get("activation", "relu")} | topk_options(options)
        distances.append(gap(oracle.topk_scores(p, x, **how), layer.k))
    return min(distances)


def clear_tokens(layer: torch.nn.Module, shape: tuple[int, ...], options: dict, x_0: float | None = None):
    """An x and a router_input of the given shape [..., d_model], every token clear by MARGIN; x_0 fixes feature 0."""
    dtype = next(layer.parameters()).dtype
    generator = torch.Generator().manual_seed(2)
    tokens = []
    while len(tokens) < math.prod(shape[:-1]):
        x, r = torch.randn(2, shape[-1], generator=generator, dtype=torch.float64).to(dtype)
        x[0] = x[0] if x_0 is None else x_0
        selector_input = r if options.get("router_input") else x
        if distance_to_doubt(layer, x.double(), selector_input.double(), options) > MARGIN:
            tokens.append(torch.stack([x, r]))
    both = torch.stack(tokens, 1) if tokens else torch.zeros(2, 0, shape[-1], dtype=dtype)
    x, r = both.reshape(2, *shape)
    return x, r


# ---------------------------------------------------------------------------------------------- the two computations


def compute_layer(layer, x, router_input, mask, weight, aux_weight=1.0) -> dict[str, Tensor]:
    """The output, the aux loss and all gradients of sum(weight * output) + aux loss."""
    x = x.clone().requires_grad_()
    inputs = {"x": x}
    if router_input is not None:
        inputs["router_input"] = router_input = router_input.clone().requires_grad_()
    torch.manual_seed(3)
    y = layer(x, mask=mask, router_input=router_input)
    aux = sf.aux_loss(layer)
    ((y.double() * weight).sum() + aux_weight * aux.double()).backward()
    result = {"y": y, "aux": aux} | {f"d {name}": t.grad for name, t in inputs.items()}
    result |= {f"d {name}": p.grad for name, p in layer.named_parameters()}
    missing = [name for name, t in result.items() if t is None]
    assert not missing, f"no gradient: {missing}"
    return result


def compute_oracle(case: Case, layer, x, router_input, mask, weight, options, aux_weight=1.0) -> dict[str, Tensor]:
    """The same from the oracle, with the layer's parameters."""
    options = case.choices | options
    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    inputs = {"x": x.detach().double().requires_grad_()}
    if router_input is not None:
        inputs["router_input"] = router_input.detach().double().requires_grad_()
    tokens = {name: t.flatten(0, -2) if t.dim() > 1 else t[None] for name, t in inputs.items()}
    x_TD = tokens["x"]
    activation = options.get("activation", "relu")
    aux = torch.zeros((), dtype=torch.float64)
    if case.layer is sf.DenseFFN:
        y = oracle.dense(p, x_TD, activation=activation)
    elif case.layer is sf.TopKFFN:
        y = oracle.topk(p, x_TD, layer.k, activation=activation, **topk_options(options))
    elif case.layer is sf.ProductKeyMemory:
        y = oracle.product_key(p, x_TD, layer.k, activation=activation, query_norm=options.get("query_norm"))
    else:
        y, routing = oracle.moe(
            p,
            x_TD,
            layer.k,
            router=case.router,
            activation=activation,
            router_input=tokens.get("router_input"),
            training=layer.training,
            noise_TE=routing_noise(layer, len(x_TD)) if case.router == "noisy_topk" and layer.training else None,
            bias_E=layer.router.bias.double() if options.get("balance") == "bias" else None,
            real=None if mask is None else mask.flatten().tolist(),
        )
        pools = oracle.pools(tuple(x.shape[:-1]), mask, options.get("balance_over", "batch"))
        if layer.training:
            aux = aux + oracle.aux_loss(options["balance"], options["balance_weight"], routing, pools)
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    ((y * weight).sum() + aux_weight * aux).backward()
    result = {"y": y, "aux": aux}
    for name, t in (inputs | p).items():
        result[f"d {name}"] = torch.zeros_like(t) if t.grad is None else t.grad
    return result


def routing_noise(layer: torch.nn.Module, n_tokens: int) -> Tensor:
    """What a noisy router draws after the seed of `compute_layer`: one standard normal per token and expert."""
    dtype = torch.promote_types(next(layer.parameters()).dtype, torch.float32)
    torch.manual_seed(3)
    return torch.randn(n_tokens, layer.router.weight.shape[0], dtype=dtype).double()


def exact(backend: str) -> torch.dtype:
    """The widest dtype that a backend itself computes in: the CPU core has no fp64."""
    return torch.float32 if backend == "auto" else torch.float64


def check(case: Case, dtype=None, shape=(2, 4), backend="torch", *, mask=None, router_input=False, **options):
    dtype = dtype or exact(backend)
    """Build, compute both ways, compare everything."""
    if case.router:
        options = {"balance": "none", "balance_weight": 0.0} | options
    layer = case.build(dtype, **options)
    draw_options = case.choices | options | ({"router_input": True} if router_input else {})
    x, r = clear_tokens(layer, (*shape, case.sizes["d_model"]), draw_options)
    compare(case, layer, x, r if router_input else None, mask, backend, options)


def compare(case: Case, layer, x, router_input=None, mask=None, backend="torch", options=None) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(*x.shape[:-1], layer.d_out, generator=generator, dtype=torch.float64).to(x.dtype).double()
    with sf.backend(backend):
        actual = compute_layer(layer, x, router_input, mask, weight)
    expected = compute_oracle(case, layer, x, router_input, mask, weight, options or {})
    assert actual["y"].dtype == x.dtype
    assert actual["aux"].dtype == torch.float32  # whatever the layer's dtype
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        value = value.to_dense() if value.is_sparse else value
        assert value.shape == expected[name].shape, name
        error = largest(value.double() - expected[name]) / max(largest(expected[name]), FLOOR)
        allowed = max(TOLERANCE[x.dtype], 1e-6) if name == "aux" else TOLERANCE[x.dtype]
        assert error <= allowed, f"{name}: relative error {error:.2e}"


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


# ------------------------------------------------------------------------------------------------ activations, options


@EACH_LAYER
@ACTIVATIONS
@DTYPES
@BACKENDS
def test_every_activation(case, activation, dtype, backend):
    check(case, dtype, backend=backend, activation=activation)


@DTYPES
@BACKENDS
@pytest.mark.parametrize("n_heads", [1, 3])
def test_product_keys_with_softmax_over_the_k_of_one_head(n_heads, dtype, backend):
    check(PRODUCT_KEYS["ProductKeyMemory"], dtype, backend=backend, activation="softmax", n_heads=n_heads)


@pytest.mark.parametrize("case", list(FFN.values()), ids=list(FFN))
@pytest.mark.parametrize(
    "options", [{"bias": False}, {"d_out": 9}, {"glu": True}, {"glu": True, "bias": False}], ids=str
)
@DTYPES
@BACKENDS
def test_options_of_dense_and_topk(case, options, dtype, backend):
    check(case, dtype, backend=backend, activation="silu" if "glu" in options else "relu", **options)


@pytest.mark.parametrize("options", [{"norm_aware": True}, {"norm_aware": True, "glu": True, "d_out": 3}], ids=str)
@ACTIVATIONS
@DTYPES
@BACKENDS
def test_norm_aware_topk(options, activation, dtype, backend):
    check(FFN["TopKFFN"], dtype, backend=backend, activation=activation, **options)


@pytest.mark.parametrize(
    "options", [{"activation": "silu"}, {"activation": "relu", "bias": False, "norm_aware": True, "d_out": 3}], ids=str
)
@DTYPES
@BACKENDS
def test_topk_by_gate(options, dtype, backend):
    check(FFN["TopKFFN"], dtype, backend=backend, glu=True, rank_by="gate", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"d_out": 5},
        {"sparse_grad": True},
        {"query_dim": 8},
        {"query_dim": 8, "query_norm": "layer"},
        {"query_dim": 8, "query_norm": "rms", "activation": "softmax"},
        {"query_dim": 4, "d_model": 7, "d_out": 2, "sparse_grad": True},
        {"query_norm": "layer", "norm_affine": True},
        {"query_dim": 8, "query_bias": True},
        {"query_dim": 8, "query_bias": True, "query_norm": "rms", "norm_affine": True},
        {"query_dim": 8, "query_bias": True, "query_norm": "layer", "norm_affine": True, "activation": "softmax"},
        {"experts": True, "activation": "gelu"},
        {"gated": True, "d_out": 5},
        {"experts": True, "gated": True, "query_dim": 8, "activation": "silu"},
    ],
    ids=str,
)
@DTYPES
@BACKENDS
def test_options_of_product_keys(options, dtype, backend):
    case = PRODUCT_KEYS["ProductKeyMemory"]
    case = Case(case.layer, case.sizes | {"d_model": options.get("d_model", 6)})
    check(case, dtype, backend=backend, **options)


@EACH_MOE
@pytest.mark.parametrize(
    "options",
    [
        {"glu": True, "activation": "silu"},
        {"bias": True},
        {"d_out": 4},
        {"glu": True, "bias": True, "d_out": 9},
        {"router_input": True},
        {"router_input": True, "balance": "entropy", "balance_weight": 0.5},
        {"mask": torch.tensor([[True, False, True, True], [False, False, True, True]])},
    ],
    ids=lambda options: "-".join(options),
)
@DTYPES
@BACKENDS
def test_options_of_the_moe_family(case, options, dtype, backend):
    check(case, dtype, backend=backend, **options)


@pytest.mark.parametrize("case", list(ROUTERS.values()), ids=list(ROUTERS))
@BACKENDS
def test_every_router_by_its_name(case, backend):
    check(case, backend=backend, balance="entropy", balance_weight=0.5)


@EACH_LAYER
@BACKENDS
def test_eval_mode(case, backend):
    options = {"balance": "entropy", "balance_weight": 0.5} if case.router else {}
    layer = case.build(exact(backend), **options).eval()
    x, _ = clear_tokens(layer, (2, 4, 6), case.choices | options)
    compare(case, layer, x, backend=backend, options=options)


# ------------------------------------------------------------------------------------------------------ balance losses


@EACH_MOE
@pytest.mark.parametrize(
    "balance", ["entropy", "switch", "cv2", "z", "none", "bias", ("entropy", "z"), ("switch", "cv2", "z")], ids=str
)
@pytest.mark.parametrize("balance_over", ["batch", "sequence"])
@pytest.mark.parametrize("masked", [False, True])
@WIDE_AND_NARROW  # the losses are computed in fp32 for a bf16 layer too
def test_every_balance_loss(case, balance, balance_over, masked, dtype):
    weights = {2: (0.5, 0.2), 3: (0.5, 0.4, 0.2)}[len(balance)] if isinstance(balance, tuple) else 0.5
    mask = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]]) if masked else None
    check(case, dtype, (3, 4), mask=mask, balance=balance, balance_weight=weights, balance_over=balance_over)


@pytest.mark.parametrize("router", list(ROUTERS))
@BACKENDS
def test_router_bias_steers_the_selection_and_not_the_gates(router, backend):
    case, options = ROUTERS[router], {"balance": "bias", "balance_weight": 1.0}
    layer = case.build(exact(backend), **options)
    x, _ = clear_tokens(layer, (2, 4, 6), case.choices | options)
    layer.router.bias.copy_(torch.tensor([0, 0, 9.0, 0, -9.0]))
    compare(case, layer, x, backend=backend, options=options)


# ---------------------------------------------------------------------------------------------------------- the edges

SHAPES = [(), (1,), (0,), (1, 1), (0, 3), (3, 0), (2, 1, 3), (13,)]


@EACH_LAYER
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@WIDE_AND_NARROW
@BACKENDS
def test_any_leading_shape_with_one_or_no_token(case, shape, dtype, backend):
    options = {"balance": ("entropy", "switch", "z"), "balance_weight": (0.5, 0.2, 0.1)} if case.router else {}
    if case.router == "sinkhorn":
        options["k"] = 5  # balancing one token makes all experts equally good: its choice of fewer would be arbitrary
    check(case, dtype, shape, backend, **options)


@EACH_MOE
@pytest.mark.parametrize("k", [1, 4, 5])
@DTYPES
@BACKENDS
def test_one_almost_all_and_all_experts(case, k, dtype, backend):
    check(case, dtype, backend=backend, k=k, balance="switch", balance_weight=0.5)


@pytest.mark.parametrize(("d_ff", "k"), [(1, 1), (11, 1), (11, 10), (11, 11), (7, 3)])
@DTYPES
@BACKENDS
def test_topk_from_one_unit_to_all(d_ff, k, dtype, backend):
    check(FFN["TopKFFN"], dtype, backend=backend, d_ff=d_ff, k=k, activation="gelu")


@pytest.mark.parametrize(("n_sub_keys", "k"), [(1, 1), (2, 1), (2, 4), (3, 2), (3, 3), (3, 5), (3, 9), (5, 4)])
@pytest.mark.parametrize("activation", ["relu", "identity", "softmax"])
@BACKENDS
def test_product_keys_from_one_value_to_all(n_sub_keys, k, activation, backend):
    case = PRODUCT_KEYS["ProductKeyMemory"]
    check(case, backend=backend, n_sub_keys=n_sub_keys, k=k, activation=activation)


@EACH_MOE
@pytest.mark.parametrize(
    "sizes",
    [
        {"d_model": 7, "n_experts": 1, "expert_size": 1, "k": 1},
        {"d_model": 1, "n_experts": 3, "expert_size": 5, "k": 2},
        {"d_model": 9, "n_experts": 13, "expert_size": 1, "k": 3},
        {"d_model": 5, "n_experts": 2, "expert_size": 17, "k": 1},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
@BACKENDS
def test_odd_sizes(case, sizes, backend):
    options = {"balance": "entropy", "balance_weight": 0.5}
    check(Case(case.layer, sizes, case.choices, case.router), shape=(3,), backend=backend, **options)


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "SBaseMoE"])
@pytest.mark.parametrize("expert", [0, 2, 4])
@DTYPES
@BACKENDS
def test_all_tokens_on_one_expert_leave_the_empty_ones_without_gradient(name, expert, dtype, backend):
    case, options = FAMILY[name], {"balance": "none", "balance_weight": 0.0, "k": 1, "bias": True, "glu": True}
    layer = case.build(dtype, **options)
    with torch.no_grad():  # feature 0, always 1, decides
        layer.router.weight.mul_(0.1)[:, 0] = torch.where(torch.arange(5) == expert, 8.0, -8.0)
        if case.router == "noisy_topk":
            layer.router.noise_weight.zero_()
    x, _ = clear_tokens(layer, (9, 6), options, x_0=1.0)
    others = [e for e in range(5) if e != expert]
    compare(case, layer, x, backend=backend, options=options)
    for name in ("keys", "values", "gate_keys", "key_bias"):
        assert torch.count_nonzero(getattr(layer, name).grad[others]) == 0


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "LowRankMoE": lambda: LowRankMoE(8, 4, 6, 3, 2, bias=True, glu=True, activation="silu"),
    "MixedMoE": lambda: MixedMoE(8, [(3, 2), (2, 5)], 3, glu=True, bias=True, activation="silu"),
    "LatentMoE": lambda: LatentMoE(8, 6, 4, 6, 2),
    "SwitchHeadAttention": lambda: SwitchHeadAttention(8, 2, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_fewer_bits_is_its_copy_in_fp64(name: str, dtype: torch.dtype) -> None:
    """By the backend that is chosen for it. Near-ties may be routed otherwise: of the other tokens all are right."""
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    layer = layer.to(dtype)
    x = torch.randn(40, 1, 8).to(dtype)
    with torch.no_grad(), sf.backend("reference"):
        expected = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        errors = (layer(x).double() - expected).abs().amax((1, 2)) / expected.abs().max()
    assert errors.sort().values[:36].max() <= {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
