"""Conversion: exact where it says exact, honest where not, and a model that is as it was after any error."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import json
import random
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import sparse_ffn as sf
from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.convert import ConstantInput, LowRankMoEConfig, config, config_from_dict, config_of, places
from sparse_ffn.convert.budget import Judge
from sparse_ffn.convert.calibrate import Reservoir
from sparse_ffn.convert.init.partition import balanced_assignment, balanced_kmeans
from sparse_ffn.convert.outputs import tensors_in
from sparse_ffn.layers import LatentMoE, SharedExpertMoE, SwitchHeadAttention
from sparse_ffn.ops.activations import ACTIVATIONS, activate
from sparse_ffn.routing.routers import SigmoidRouter

pytestmark = pytest.mark.filterwarnings("ignore:no FFN was replaced")  # the reports say why

OPEN = sf.MoEConfig(router="unweighted", n_experts=4, k=4)


class Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if self.name == "quick_gelu" else activate(self.name, x)


class Mlp(nn.Module):
    def __init__(self, activation: str = "relu", *, d_model: int = 6, d_ff: int = 16, d_out: int = 6, bias: Any = True):
        super().__init__()
        first, second = bias if isinstance(bias, tuple) else (bias, bias)
        self.a = nn.Linear(d_model, d_ff, bias=first)
        self.f = Activation(activation)
        self.b = nn.Linear(d_ff, d_out, bias=second)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(x)))


class Gated(nn.Module):
    """A GLU, its gate first or second, in one linear map or two."""

    def __init__(self, activation: str = "silu", *, fused: str = "", bias: bool = False) -> None:
        super().__init__()
        self.fused, self.f = fused, Activation(activation)
        if fused:
            self.both = nn.Linear(6, 32, bias=bias)
        else:
            self.up, self.gate = nn.Linear(6, 16, bias=bias), nn.Linear(6, 16, bias=bias)
        self.out = nn.Linear(16, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return self.out(self.up(x) * self.f(self.gate(x)))
        y = self.both(x)
        a, b = (y[..., ::2], y[..., 1::2]) if self.fused in ("even", "odd") else y.chunk(2, -1)
        return self.out(self.f(a) * b if self.fused in ("first half", "even") else a * self.f(b))


def same(a: nn.Module, b: nn.Module, width: int = 6, rtol: float = 1e-5) -> None:
    x = torch.randn(2, 5, width)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = a(ours), b(theirs)
    torch.testing.assert_close(ya, yb, rtol=rtol, atol=1e-5)
    ya.square().sum().backward()
    yb.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("kind", config.CONFIGS)
def test_configs_have_the_layers_arguments_and_defaults(kind: type[config.FFNConfig]) -> None:
    of_the_ffn = {"d_model", "d_out", "d_router", "device", "dtype"}
    arguments: dict[str, Any] = {}
    for cls in kind.layer.__mro__:  # variants pass **options on to MoE
        if issubclass(cls, sf.SparseFFN) and cls is not sf.SparseFFN:
            arguments = {n: p.default for n, p in inspect.signature(cls).parameters.items()} | arguments
            if "options" not in arguments:
                break
            del arguments["options"]
    if kind not in (sf.MoEConfig, sf.SoftmaxMoEConfig, LowRankMoEConfig):
        arguments.pop("router", None)
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in config.OF_CONVERSION}
    assert fields.keys() == arguments.keys() - of_the_ffn
    for name, default in fields.items():
        assert default is None or default == arguments[name], name


@pytest.mark.parametrize("kind", config.CONFIGS)
def test_configs_survive_json(kind: type[config.FFNConfig]) -> None:
    chosen = kind(init=kind.inits[0], dropout=0.1)
    assert config_from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


SIZES = {"d_ff", "k", "n_sub_keys", "n_experts", "expert_size", "rank"}
CHOICES: dict[str, Any] = {
    "activation": "gelu", "dropout": 0.1, "init_scale": 0.5, "d_ff": 20, "k": 3, "glu": True, "norm_aware": True,
    "rank_by": "gate",
    "n_sub_keys": 5, "n_heads": 2, "query_dim": 4, "query_norm": "layer", "value_init": "standard", "sparse_grad": True,
    "query_bias": True, "norm_affine": True,
    "n_experts": 5, "expert_size": 8, "expert_dropout": 0.2, "balance": ("switch", "bias"),
    "balance_weight": (0.1, 0.2), "balance_over": "sequence", "aux": "inject", "sync_balance": True, "n_iters": 5,
    "router": "softmax", "bias": None, "rank": 2, "experts": True, "gated": True,
    "null_experts": 2, "null_kind": "constant", "null_share": 0.3,
}  # fmt: skip
"""A value for each option of a layer that is not its default."""
AFTERWARDS: dict[str, Any] = {
    "k": 2, "dropout": 0.3, "expert_dropout": 0.4, "activation": "silu", "balance": ("entropy", "bias"), "n_iters": 7,
    "balance_weight": (0.3, 0.4), "balance_over": "batch", "aux": "attach", "sync_balance": False, "norm_aware": False,
    "sparse_grad": False, "init_scale": 2.0,
}  # fmt: skip
"""Other values, of those that may be set on a layer."""


@pytest.mark.parametrize(
    ("kind", "left"), [*((kind, "experts") for kind in config.CONFIGS), (sf.ProductKeyMemoryConfig, "sparse_grad")]
)
def test_every_option_of_a_layer_is_read_back(kind: type[config.FFNConfig], left: str) -> None:
    """But one of two that no layer has together."""
    names = {f.name for f in dataclasses.fields(kind)} - config.OF_CONVERSION - {"n_layers", left}
    choices = {name: CHOICES[name] for name in names}
    default = config_of(kind.layer(6, d_out=7, **{name: choices[name] for name in names & SIZES}))
    if "bias" in names:
        choices["bias"] = not default.bias
    chosen = kind(init="fresh", **choices)
    assert {name for name in names if getattr(default, name) != choices[name]} == names - SIZES
    layer = chosen.layer(6, d_out=7, **chosen.arguments())
    assert config_of(layer) == chosen

    later = {name: value for name, value in AFTERWARDS.items() if name in names}
    for name, value in later.items():
        setattr(layer if hasattr(layer, name) else layer.router, name, value)
    assert config_of(layer) == dataclasses.replace(chosen, **later)
    made = dataclasses.replace(chosen, init_scale=1.0, n_layers=8)  # c = sqrt(2/8)
    assert config_of(made.layer(6, d_out=7, **made.arguments())) == dataclasses.replace(chosen, init_scale=0.5)


@pytest.mark.parametrize("router", ["sigmoid", "softmax", "softmax_topk", "sinkhorn", "noisy_topk", "unweighted"])
def test_routers_are_read_back_by_name(router: str) -> None:
    layer = sf.MoE(6, 4, 3, 2, router=router)
    assert config_of(layer).router == router
    for module, name in ((layer, "keys"), (layer.router, "weight")):  # torch gives both classes of their own
        parametrizations.weight_norm(module, name)
    assert config_of(layer).router == router


class Own(sf.SigmaMoE):
    """A user's layer."""


def test_what_no_config_can_say_is_an_error() -> None:
    with pytest.raises(TypeError, match="no config is for Own: there are DenseFFNConfig"):
        config_of(Own(6, 4, 3, 2))
    for ours in (LatentMoE(16, 8, 4, 8, 2), SwitchHeadAttention(16, 2, 4)):
        with pytest.raises(TypeError, match=f"no config is for {type(ours).__name__}: there are DenseFFNConfig"):
            config_of(ours)
    with pytest.raises(TypeError, match="layer must be a layer of sparse_ffn, got Linear"):
        config_of(nn.Linear(6, 6))
    layer = sf.SigmaMoE(6, 4, 3, 2)
    layer.router = OwnRouter(6, 4, 2)
    with pytest.raises(ValueError, match=r"no SigmaMoEConfig makes a layer with this router, OwnRouter\(6"):
        config_of(layer)
    layer = sf.MoE(6, 4, 3, 2, router="sinkhorn")
    layer.router.n_iters = 9
    with pytest.raises(ValueError, match=r"no MoEConfig makes .* n_iters=9"):
        config_of(layer)


@pytest.mark.parametrize("kind", config.CONFIGS)
def test_arguments_come_in_the_order_of_the_fields(kind: type[config.FFNConfig]) -> None:
    names = [f.name for f in dataclasses.fields(kind) if f.name not in config.OF_CONVERSION]
    assert list(kind().arguments()) == names


@pytest.mark.parametrize(("d_ff", "n_experts"), [(32, 2), (64, 2), (128, 2), (256, 2), (512, 4), (1000, 8)])
@pytest.mark.parametrize("init", ["split", "fresh"])
def test_experts_have_the_largest_size_that_makes_two(d_ff: int, n_experts: int, init: str) -> None:
    layer = sf.from_dense(Mlp(d_ff=d_ff), sf.SigmaMoEConfig(init=init))
    assert (layer.n_experts, layer.expert_size) == (n_experts, d_ff // n_experts)


@pytest.mark.parametrize("d_ff", [1021, 2 * 509, 11 * 137, 17, 1])
def test_sizes_are_asked_for_where_none_is_sensible(d_ff: int) -> None:
    model = nn.Sequential(Mlp(d_ff=d_ff))
    before = model[0]
    with pytest.raises(ValueError, match=f"expert_size or n_experts must be given: d_ff = {d_ff} has no divisor"):
        sf.sparsify_(model, sf.SigmaMoEConfig())
    assert model[0] is before
    sf.sparsify_(model, sf.SigmaMoEConfig(expert_size=1))
    assert model[0].n_experts == d_ff
    upcycled = sf.from_dense(before, sf.SigmaMoEConfig(init="upcycle"))
    assert (upcycled.n_experts, upcycled.expert_size) == (8, d_ff)


def test_configs_refuse_what_does_not_fit() -> None:
    with pytest.raises(
        ValueError, match="init must be one of 'split', 'cluster', 'auto', 'upcycle', 'fresh', got 'topk'"
    ):
        sf.SigmaMoEConfig(init="topk")
    with pytest.raises(ValueError, match=r"activation = 'gelu' contradicts the FFN, which has 'relu'"):
        sf.from_dense(Mlp(), sf.MoEConfig(activation="gelu", expert_size=4))
    with pytest.raises(ValueError, match=r"d_ff = 16\): n_experts·expert_size = 3·5 must be d_ff = 16"):
        sf.from_dense(Mlp(), sf.MoEConfig(expert_size=5))
    with pytest.raises(ValueError, match='cluster_by = "coactivation" needs calibration'):
        sf.from_dense(Mlp(), sf.MoEConfig(expert_size=4, init="cluster", cluster_by="coactivation"))
    with pytest.raises(TypeError, match="config must be a config of sparse_ffn"):
        sf.sparsify_(Mlp(), sf.SigmaMoE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sf.sparsify_([Mlp()], OPEN), "model must be a torch.nn.Module, got a value of type list"),
        (lambda: sf.calibrate([Mlp()], []), "model must be a torch.nn.Module, got a value of type list"),
        (lambda: sf.sparsify_(Mlp(), OPEN, "0"), "filter_fn must be a function of module and name, got '0'"),
        (lambda: sf.sparsify_(Mlp(), OPEN, calibration=torch.ones(9, 6)), "calibration must map names to .* Tensor"),
        (lambda: sf.sparsify_(Mlp(), OPEN, calibration={"": [1.0]}), "calibration must map names to .* list"),
        (lambda: sf.from_dense("mlp", OPEN), "ffn must be a torch.nn.Module, got a value of type str"),
        (lambda: sf.from_dense(Mlp(), {}), r"config must be a config of sparse_ffn, .* got \{\}"),
        (lambda: sf.from_dense(Mlp(), OPEN, inputs=[1.0]), "inputs must be a tensor .* got a value of type list"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "split", "cluster_by": "keys"}, 'cluster_by = .keys. is for init = "cluster", not init = .split'),
        ({"init": "upcycle", "cluster_by": "keys"}, 'cluster_by = .keys. is for init = "cluster", not init = .upcycle'),
        ({"init": "upcycle", "router_init": "fitted"}, 'router_init = .fitted. is not for init = "upcycle"'),
    ],
)
def test_options_that_nothing_would_use_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.SigmaMoEConfig(**options)
    used = sf.SigmaMoEConfig(init="cluster", cluster_by="keys", router_init="fitted")
    dataclasses.replace(used, init="fresh")  # layers of the same shapes, for a checkpoint


@pytest.mark.parametrize("name", ["k", "n_experts", "expert_size"])
def test_a_size_of_zero_is_not_taken_for_one_left_out(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        sf.SigmaMoEConfig(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        sf.SigmaMoEConfig(**{name: "4"})


def test_zero_sub_keys_and_hidden_units_are_refused() -> None:
    with pytest.raises(ValueError, match="n_sub_keys must be at least 1, got 0"):
        sf.ProductKeyMemoryConfig(n_sub_keys=0)
    with pytest.raises(ValueError, match="d_ff must be at least 1, got 0"):
        sf.DenseFFNConfig(d_ff=0, init="fresh")


def test_sizes_left_out_come_from_the_ffn() -> None:
    layer = sf.from_dense(Mlp(d_ff=512), sf.SigmaMoEConfig())
    assert (layer.n_experts, layer.expert_size, layer.k) == (4, 128, 1)
    layer = sf.from_dense(Mlp(d_ff=96), sf.SigmaMoEConfig(n_experts=8))
    assert (layer.n_experts, layer.expert_size, layer.k) == (8, 12, 2)


# --------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "identity"])
@pytest.mark.parametrize("bias", [True, False, (True, False), (False, True)])
def test_split_is_exact_for_every_activation_and_bias(activation: str, bias: Any) -> None:
    dense = Mlp(activation, d_out=7, bias=bias)
    same(sf.from_dense(dense, OPEN), dense)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fused", ["", "first half", "second half", "even", "odd"])
def test_split_is_exact_for_glus(activation: str, fused: str) -> None:
    dense = Gated(activation, fused=fused)
    layer = sf.from_dense(dense, OPEN)
    assert isinstance(layer, sf.MoE)
    same(layer, dense, rtol=1e-4)


@pytest.mark.parametrize("dense", [Mlp("quick_gelu"), Mlp("quick_gelu", bias=False), Gated("quick_gelu", fused="odd")])
def test_quick_gelu_is_silu_with_other_weights(dense: nn.Module) -> None:
    layer = sf.from_dense(dense, OPEN)
    assert layer.activation == "silu"
    same(layer, dense, rtol=1e-4)
    report = sf.sparsify_(nn.Sequential(copy.deepcopy(dense)), OPEN)
    assert "silu(1.702·z)/1.702" in str(report)


def test_quick_gelu_with_a_bias_of_the_gate() -> None:
    dense = Gated("quick_gelu", bias=True)
    same(sf.from_dense(dense, OPEN), dense, rtol=1e-4)


@pytest.mark.parametrize("fused", ["", "first half", "odd"])
def test_a_gate_with_a_bias_takes_a_constant_input(fused: str) -> None:
    dense = Gated(fused=fused, bias=True)
    layer = sf.from_dense(dense, OPEN)
    assert isinstance(layer[0], ConstantInput)
    same(layer, dense, rtol=1e-4)


@pytest.mark.parametrize("kind", [sf.MoEConfig, sf.SigmaMoEConfig, sf.SoftmaxMoEConfig, sf.SwitchMoEConfig,
                                  sf.SBaseMoEConfig, sf.NoisyTopKMoEConfig])  # fmt: skip
@pytest.mark.parametrize("init", ["split", "cluster"])
def test_every_mixture_is_exact_at_all_experts(kind: type[Any], init: str) -> None:
    dense = Mlp("gelu")
    layer = sf.from_dense(dense, kind(n_experts=4, k=4, init=init)).eval()
    same(layer, dense)
    if kind is not sf.SwitchMoEConfig:
        same(sf.from_dense(dense, sf.SoftmaxMoEConfig(n_experts=4, k=4, router="softmax")), dense)


@pytest.mark.parametrize(
    "chosen",
    [
        *(kind(n_experts=5, k=5) for kind in config.CONFIGS if issubclass(kind, config.ExpertsConfig)),
        sf.SoftmaxMoEConfig(n_experts=5, k=5, router="softmax"),
        sf.TopKFFNConfig(k=15),
        sf.DenseFFNConfig(),
    ],
    ids=lambda chosen: type(chosen).__name__,
)
def test_fp64_stays_fp64(chosen: config.FFNConfig) -> None:
    dense = Mlp("gelu", d_ff=15).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    layer = sf.from_dense(dense, chosen).eval()
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(sf.to_dense(layer)(x), dense(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [sf.SigmaMoEConfig, sf.SwitchMoEConfig, sf.NoisyTopKMoEConfig])
def test_copies_of_an_fp64_ffn_are_scaled_in_fp64(kind: type[Any]) -> None:
    dense = Mlp("gelu").double()
    x = torch.randn(9, 6, dtype=torch.float64)
    layer = sf.from_dense(dense, kind(n_experts=7, k=3, init="upcycle")).eval()
    nn.init.zeros_(layer.router.weight)  # what the values were divided for
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [sf.MoEConfig, sf.SigmaMoEConfig, sf.SoftmaxMoEConfig])
def test_the_mean_that_calibration_corrects_is_that_of_fp64(kind: type[Any]) -> None:
    dense = Mlp("gelu").double()
    x = torch.randn(50, 6, dtype=torch.float64)
    layer = sf.from_dense(dense, kind(n_experts=4, k=1), inputs=x).eval()
    assert (layer(x) - dense(x)).abs().max() > 1e-3
    torch.testing.assert_close(layer(x).mean(0), dense(x).mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["split", "cluster", "upcycle"])
@pytest.mark.parametrize("bias", [False, (True, False), (False, True)])
def test_biases_that_an_ffn_lacks_are_zeros(init: str, bias: Any) -> None:
    dense = Mlp("gelu", bias=bias)
    k = 2 if init == "upcycle" else 4
    layer = sf.from_dense(dense, sf.MoEConfig(router="unweighted", n_experts=4, k=k, init=init, bias=True))
    assert layer.key_bias is not None
    assert layer.out_bias is not None
    same(layer, dense)


def test_a_glu_without_biases_takes_zeros_too() -> None:
    dense = Gated()
    for kind in (dataclasses.replace(OPEN, bias=True), sf.TopKFFNConfig(k=16, bias=True), sf.DenseFFNConfig(bias=True)):
        layer = sf.from_dense(dense, kind)
        assert not layer.key_bias.any()
        same(layer, dense)
    with pytest.raises(ValueError, match="bias = False contradicts the FFN, which has True"):
        sf.from_dense(Mlp(), dataclasses.replace(OPEN, bias=False))  # its biases would be lost


def test_topk_is_exact_at_all_units_and_keeps_the_largest_below() -> None:
    dense = Mlp(bias=(True, True))
    same(sf.from_dense(dense, sf.TopKFFNConfig(k=16)), dense)
    x = torch.randn(9, 6)
    h = dense.f(dense.a(x))
    kept = h * (h >= h.topk(3).values[:, -1:])
    torch.testing.assert_close(sf.from_dense(dense, sf.TopKFFNConfig(k=3))(x), dense.b(kept))


def test_dense_and_fresh_and_upcycled() -> None:
    dense = Mlp("silu")
    same(sf.from_dense(dense, sf.DenseFFNConfig()), dense)
    fresh = sf.from_dense(dense, sf.SigmaMoEConfig(init="fresh", n_experts=3, expert_size=8, k=2, activation="relu"))
    assert (fresh.n_experts, fresh.activation) == (3, "relu")
    # copies with gates that sum to 1 give the dense output whatever the router says
    same(sf.from_dense(dense, sf.SoftmaxMoEConfig(init="upcycle", n_experts=3, k=2)), dense)
    same(sf.from_dense(dense, sf.MoEConfig(router="unweighted", init="upcycle", n_experts=3, k=2)), dense)


def test_upcycling_may_draw_a_share_of_each_experts_units_anew() -> None:
    dense = sf.DenseFFN(40, 100, glu=True)
    for parameter, scale in ((dense.keys, 0.5), (dense.gate_keys, 2.0), (dense.values, 1.0)):
        nn.init.normal_(parameter, scale / 4, scale)
    config = sf.SoftmaxMoEConfig(init="upcycle", n_experts=5, k=2, reinit=0.3)
    layer, again = made_twice(dense, config)
    kept = (layer.keys == dense.keys).all(2)
    assert (~kept).sum(1).tolist() == [30] * 5
    assert len({tuple(row.tolist()) for row in kept}) == 5  # a draw of its own for each expert
    for ours, theirs in ((layer.keys, dense.keys), (layer.gate_keys, dense.gate_keys), (layer.values, dense.values)):
        assert torch.equal((ours == theirs).all(2), kept)
        drawn = ours[~kept]
        assert drawn.mean().item() == pytest.approx(theirs.mean().item(), abs=0.05 * theirs.std().item())
        assert drawn.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert torch.equal(again.keys, layer.keys)  # as torch is seeded
    report = sf.sparsify_(nn.Sequential(Mlp("relu", d_ff=20)), sf.SigmaMoEConfig(init="upcycle", k=2, reinit=0.5))
    assert "8 copies, 10 of 20 units of each drawn anew" in str(report)
    with pytest.raises(ValueError, match=r'reinit = 0\.5 is for init = "upcycle"'):
        sf.SigmaMoEConfig(reinit=0.5)


def made_twice(dense: nn.Module, config: Any) -> list[nn.Module]:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(sf.from_dense(dense, config))
    return made


def test_product_keys_are_recovered_where_the_keys_are_products() -> None:
    memory = sf.ProductKeyMemory(6, 4, 16)
    dense = sf.to_dense(memory)
    shuffled = Mlp(d_ff=16, bias=False)
    order = torch.randperm(16)
    with torch.no_grad():
        shuffled.a.weight.copy_(dense.keys[order])
        shuffled.b.weight.copy_(dense.values[order].t())
    same(sf.from_dense(shuffled, sf.ProductKeyMemoryConfig(init="pkm", k=16)), memory)


@pytest.mark.parametrize(
    ("dense", "options", "why"),
    [
        (Mlp(bias=(False, True)), {}, "nowhere to keep a non-zero out_bias"),
        (Mlp(bias=(True, False)), {}, "nowhere to keep a non-zero key_bias"),
        (Gated(), {}, "this one is a GLU"),
        (Mlp(bias=False), {"n_sub_keys": 3}, "n_sub_keys² = 9 must be d_ff = 16"),
        (Mlp(bias=False), {"n_heads": 2}, "needs n_heads = 1"),
    ],
)
def test_product_keys_refuse_what_they_cannot_keep(dense: nn.Module, options: dict[str, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        sf.from_dense(dense, sf.ProductKeyMemoryConfig(init="pkm", **options))
    assert isinstance(sf.from_dense(dense, sf.ProductKeyMemoryConfig(**options)), sf.ProductKeyMemory)


# ---------------------------------------------------------------------------------------------------------- back


@pytest.mark.parametrize(
    "layer",
    [
        sf.DenseFFN(6, 8, activation="gelu"),
        sf.TopKFFN(6, 8, 8, glu=True),
        sf.MoE(6, 4, 3, 4, router="unweighted", bias=True, glu=True, activation="silu", d_out=5),
        sf.ProductKeyMemory(6, 3, 9, n_heads=2),
        sf.ProductKeyMemory(6, 3, 9, n_heads=2, query_dim=4, activation="gelu", d_out=5),
        sf.ProductKeyMemory(6, 3, 9, n_heads=2, query_dim=4, query_bias=True),
    ],
)
def test_back_to_dense(layer: sf.SparseFFN) -> None:
    for parameter in layer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)  # biases
    dense = sf.to_dense(layer)
    assert type(dense) is sf.DenseFFN
    same(dense, layer, rtol=1e-4)


def test_the_way_back_is_computed_in_the_layers_dtype_under_autocast() -> None:
    layer = sf.ProductKeyMemory(6, 3, 9, n_heads=2, query_dim=4, query_bias=True)
    dense = sf.to_dense(layer)
    with torch.autocast("cpu", torch.bfloat16):
        back = sf.to_dense(layer)
    assert torch.equal(back.keys, dense.keys)
    assert torch.equal(back.key_bias, dense.key_bias)


@pytest.mark.parametrize("kind", [sf.SigmaMoEConfig, sf.SoftmaxMoEConfig, sf.NoisyTopKMoEConfig])
def test_there_and_back(kind: type[Any]) -> None:
    dense = Mlp("gelu")
    same(sf.to_dense(sf.from_dense(dense, kind(n_experts=4, k=4)).eval()), dense)


@pytest.mark.parametrize(
    "dense",
    [
        sf.DenseFFN(6, 16, activation="gelu", dropout=0.25),
        sf.DenseFFN(6, 16, activation="identity", bias=False),
        sf.DenseFFN(6, 16, glu=True, activation="silu", d_out=5),
    ],
)
def test_our_own_dense_layer_is_an_ffn_too(dense: sf.DenseFFN) -> None:
    dense.eval()
    for bias in (dense.key_bias, dense.out_bias):
        if bias is not None:
            nn.init.normal_(bias)
    layer = sf.from_dense(dense, OPEN)
    assert layer.dropout == dense.dropout
    same(layer, dense)
    same(sf.from_dense(sf.to_dense(layer), OPEN), dense)
    model = nn.Sequential(nn.Identity(), *[dense] * (2 if dense.d_out == 6 else 1))  # also where it hangs twice
    before = copy.deepcopy(model)
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["1"]
    assert isinstance(model[-1], sf.MoE)
    same(model, before)
    assert "from_dense" in sf.sparsify_(dense, OPEN).unknown[""]
    dense.register_forward_hook(lambda *_: None)
    assert "forward hooks" in sf.sparsify_(nn.Sequential(dense), OPEN).unknown["0"]


def test_a_shared_expert_stays_what_it_is() -> None:
    moe = SharedExpertMoE(sf.MoE(6, 4, 3, 2), sf.DenseFFN(6, 8))
    assert not sf.sparsify_(nn.Sequential(moe), OPEN).replacements


@pytest.mark.parametrize("frozen", ["keys", "values", "out_bias"])
@pytest.mark.parametrize("kind", [sf.MoEConfig, sf.TopKFFNConfig])
def test_what_is_frozen_stays_frozen_on_the_way_back(kind: type[Any], frozen: str) -> None:
    layer = sf.from_dense(Mlp(), OPEN if kind is sf.MoEConfig else sf.TopKFFNConfig(k=16))
    getattr(layer, frozen).requires_grad_(False)
    assert {n for n, p in sf.to_dense(layer).named_parameters() if not p.requires_grad} == {frozen}


def test_frozen_product_keys_are_frozen_keys() -> None:
    memory = sf.ProductKeyMemory(6, 3, 9)
    memory.sub_keys.requires_grad_(False)
    assert {n for n, p in sf.to_dense(memory).named_parameters() if not p.requires_grad} == {"keys"}


class OwnRouter(SigmoidRouter):
    """A user's, which may do anything."""


def test_the_layer_within_is_named_where_to_dense_gets_what_holds_it() -> None:
    layer = sf.from_dense(nn.Sequential(Mlp(), nn.Dropout(0.1)), OPEN)
    with pytest.raises(
        TypeError, match=r"must be a SparseFFN or SharedExpertMoE, got Sequential: give the layer in it, at '0'"
    ):
        sf.to_dense(layer)
    with pytest.raises(TypeError, match=r"got Linear$"):
        sf.to_dense(nn.Linear(3, 3))
    assert isinstance(sf.to_dense(layer[0]), sf.DenseFFN)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (sf.TopKFFN(6, 8, 3), "k = 3 of d_ff = 8"),
        (sf.MoE(6, 4, 3, 2, router="unweighted"), "k = 2 of n_experts = 4"),
        (sf.SigmaMoE(6, 4, 3, 4), "its gates depend on the token"),
        (sf.MoE(6, 4, 3, 4, router=OwnRouter(6, 4, 4)), "gates of its OwnRouter are unknown"),
        (sf.ProductKeyMemory(6, 3, 4), "k = 4 of 9 values"),
        (sf.ProductKeyMemory(6, 3, 9, activation="softmax"), "normalised"),
    ],
)
def test_no_way_back_is_said(layer: sf.SparseFFN, why: str) -> None:
    with pytest.raises(ValueError, match=f"no dense FFN computes what this {type(layer).__name__} does: .*{why}"):
        sf.to_dense(layer)


class OwnMask(Mlp):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else y * mask.unsqueeze(-1)


class Skipping(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.3:
            return torch.zeros_like(x)
        return super().forward(x)


class SkippingByPython(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.3:
            return torch.zeros_like(x)
        return super().forward(x)


class Frozen(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Cut(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OwnMask, "its forward has an argument 'mask' of its own"),
        (Skipping, "in training it does more than dropout"),
        (SkippingByPython, "in training it does more than dropout"),
        (Frozen, "its gradient is not that of an FFN"),
        (Cut, "its gradient is not that of an FFN"),
    ],
)
def test_what_one_run_does_not_show_is_no_ffn(kind: type[Mlp], why: str) -> None:
    """The probe passes no mask, draws one number and needs no gradients; the layer would do something else then."""
    state = random.getstate()
    with pytest.raises(ValueError, match=why):
        sf.from_dense(kind("relu"), OPEN)
    assert random.getstate() == state


class TwoWays(nn.Module):
    """The branch for a memory uses the activation and the dropout rate of the FFN, too."""

    def __init__(self, rate: float, activation: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.query = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 6)
        self.dropout, self.activation, self.both = rate, torch.relu, activation

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if memory is not None:
            seen = self.query(memory)
            seen = self.activation(seen) if self.both else seen
            x = x + F.dropout(seen, self.dropout, self.training)
        return x + self.fc2(F.dropout(self.activation(self.fc1(x)), self.dropout, self.training))


@pytest.mark.parametrize(("rate", "activation", "n_found"), [(0.0, False, 1), (0.0, True, 0), (0.1, False, 0)])
def test_edits_reach_no_branch_that_the_first_probe_does_not_enter(rate: float, activation: bool, n_found: int) -> None:
    model, memory = nn.ModuleList([TwoWays(rate, activation)]), torch.randn(2, 3, 6)
    dense = copy.deepcopy(model)
    report = sf.sparsify_(model, OPEN)
    assert len(report.names) == n_found
    if not n_found:
        assert "does not compute the same with the FFN replaced, called otherwise" in report.unknown["0.fc1"]
    for given in ((memory,), (memory, memory)):
        torch.testing.assert_close(model.eval()[0](*given), dense.eval()[0](*given), rtol=1e-4, atol=1e-5)
    assert model[0].dropout == rate


@pytest.mark.parametrize("kept", [lambda m: [("a", m)], lambda m: m.forward, lambda m: {"x": (m,)}])
def test_an_ffn_that_an_attribute_holds_elsewhere_is_left(kept: Callable[[nn.Module], Any]) -> None:
    """A grandparent's list would go on with the FFN."""
    model = nn.Sequential(Block(Mlp("relu")))
    vars(model[0].ffn.a)["parent"] = [model[0].ffn]  # this one goes with it
    vars(model)["flat"] = kept(model[0].ffn)
    with pytest.warns(SparseFFNWarning):
        report = sf.sparsify_(model, OPEN)
    assert report.names == []
    assert report.unknown["0.ffn"] == "Sequential's attribute flat holds it, too, and would go on with it"


@pytest.mark.parametrize("made", [lambda: sf.DenseFFN(6, 8), lambda: sf.ProductKeyMemory(6, 3, 9)])
def test_what_may_be_a_step_old_is_not_made_dense(made: Callable[[], sf.SparseFFN]) -> None:
    """A mask's product is of the last forward: after the optimizer's step it is stale."""
    layer = made()
    prune.random_unstructured(layer, "values", 0.5)
    with pytest.raises(ValueError, match="values is masked or normalised by a hook, and may be a step old"):
        sf.to_dense(layer)
    prune.remove(layer, "values")
    same(sf.to_dense(layer), layer)


def test_what_is_made_dense_in_inference_mode_trains() -> None:
    with torch.inference_mode():
        dense = sf.to_dense(sf.DenseFFN(6, 8))
    dense(torch.randn(2, 6)).sum().backward()
    assert dense.keys.grad is not None


# --------------------------------------------------------------------------------------- the model's own properties


class Block(nn.Module):
    def __init__(self, ffn: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.ffn = Mlp() if ffn is None else ffn
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.ffn(self.norm(x))


def state(model: nn.Module) -> list[tuple[str, int]]:
    modules = [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]
    return modules + [(name, id(t)) for name, t in (*model.named_parameters(), *model.named_buffers())]


def test_dtype_mode_frozen_parameters_and_buffers_are_kept() -> None:
    model = nn.Sequential(Block(), Block()).to(torch.bfloat16)
    model[0].eval()
    model[1].ffn.requires_grad_(False)
    model[0].ffn.b.bias.requires_grad_(False)
    scale = model[0].scale
    sf.sparsify_(model, OPEN)
    first, second = model[0].ffn, model[1].ffn
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (first.training, first.router.training, second.training) == (False, False, True)
    assert model[0].scale is scale
    assert not any(p.requires_grad for p in second.parameters())
    assert {n for n, p in first.named_parameters() if not p.requires_grad} == {"out_bias"}


def test_meta_models_are_converted_without_data() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Block(), Block())
    report = sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2))
    assert len(report.replacements) == 2
    assert model[0].ffn.keys.is_meta
    with torch.device("meta"):
        model = nn.Sequential(Block())
    for needs in ({"init": "cluster"}, {"router_init": "fitted"}):
        with pytest.raises(ValueError, match=r"0\.ffn .* need numbers"):
            sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, **needs))
    with pytest.raises(ValueError, match=r"0\.ffn: calibration needs numbers"):
        sf.sparsify_(model, OPEN, calibration={"0.ffn": torch.randn(9, 6)})


def test_shared_modules_stay_shared_and_tied_parameters_stay_tied() -> None:
    shared = Mlp()
    twin = Mlp()
    twin.a.weight, twin.a.bias = shared.a.weight, shared.a.bias
    twin.b.weight, twin.b.bias = shared.b.weight, shared.b.bias
    model = nn.Sequential(Block(shared), Block(shared), Block(twin))
    dense = copy.deepcopy(model)
    report = sf.sparsify_(model, OPEN)
    assert model[0].ffn is model[1].ffn is model[2].ffn
    assert report.replacements[0].shared == ("1.ffn",)
    same(model, dense)


def test_tied_ffns_are_one_layer_from_the_calibration_of_all_of_them() -> None:
    model = twins(*ALL)
    with torch.no_grad():
        model[1].norm.weight.mul_(torch.tensor([9.0, 1, 1, 1, 1, 1]))  # the two see different tokens
    dense = copy.deepcopy(model)
    calibration = sf.calibrate(model, [torch.randn(20, 6)])
    config = sf.MoEConfig(router="unweighted", n_experts=4, k=1, init="cluster")
    report = sf.sparsify_(model, config, calibration=calibration)
    layer, both = model[0].ffn, torch.cat([calibration["0.ffn"], calibration["1.ffn"]])
    assert layer is model[1].ffn
    torch.testing.assert_close(layer.eval()(both), sf.from_dense(dense[0].ffn, config, inputs=both).eval()(both))
    for name, new in zip(("0.ffn", "1.ffn"), report.replacements, strict=True):
        wanted = dense[0].ffn(calibration[name])
        error = (layer(calibration[name]) - wanted).norm() / wanted.norm()
        assert new.relative_error == pytest.approx(error.item(), rel=1e-3)
    assert [new.tied for new in report.replacements] == [None, "0.ffn"]
    assert "the layer of 0.ffn" in str(report)


def test_the_report_counts_parameters_once_and_flops_in_each_place() -> None:
    one = sf.sparsify_(nn.Sequential(Block()), OPEN).replacements[0]
    shared, block = Mlp(), Block()
    for model in (nn.Sequential(Block(shared), Block(shared)), nn.Sequential(block, block), twins(*ALL)):
        first = str(sf.sparsify_(model, OPEN)).partition("\n")[0]
        assert f"parameters {one.parameters[0]} -> {one.parameters[1]}" in first
        assert f"FLOPs/token {2 * one.flops[0]} -> {2 * one.flops[1]}" in first


def test_what_is_tied_to_something_else_is_left_and_listed() -> None:
    model = nn.Sequential(Block(), nn.Linear(6, 16), Block(), Block(), Block())
    model[1].weight = model[0].ffn.a.weight
    model[3].ffn.a.weight = model[2].ffn.a.weight  # but not the other parameters
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["4.ffn"]
    assert set(report.unknown) == {"0.ffn", "2.ffn", "3.ffn"}
    assert "tied to something that is not replaced alike" in report.unknown["0.ffn"]
    assert isinstance(model[0].ffn, Mlp)


def test_a_linear_map_that_is_used_elsewhere_too_is_left_and_listed() -> None:
    model = nn.ModuleDict({"a_long_name_before_the_ffns": nn.Linear(6, 16), "a": Block(), "b": Block()})
    model["a"].ffn.a = model["a_long_name_before_the_ffns"]
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["b.ffn"]
    assert "used in several places: a_long_name_before_the_ffns, a.ffn.a" in report.unknown["a.ffn"]


def twins(*tied: str) -> nn.Sequential:
    model = nn.Sequential(Block(), Block())
    for name in tied:
        linear, _, parameter = name.partition(".")
        setattr(getattr(model[1].ffn, linear), parameter, getattr(getattr(model[0].ffn, linear), parameter))
    return model


ALL = ("a.weight", "a.bias", "b.weight", "b.bias")


class Twice(nn.Module):
    """An FFN that a larger module calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.fc2(self.act(self.fc1(x)))
        return x


def test_linear_maps_that_are_called_twice_are_left_and_listed() -> None:
    model = nn.Sequential(nn.LayerNorm(8), Twice(), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)))
    report = sf.sparsify_(model, sf.DenseFFNConfig())
    assert report.names == ["2"]
    assert "are not called once each" in report.unknown["1.fc1"]


def test_no_parameter_is_untied() -> None:
    both = {"0.ffn", "1.ffn"}
    assert set(sf.sparsify_(twins("a.weight", "b.weight"), OPEN).unknown) == both  # their biases differ
    assert set(sf.sparsify_(twins(*ALL), OPEN, lambda module, name: name == "0.ffn").unknown) == {"0.ffn"}
    configs = {"0.ffn": OPEN, "1.ffn": sf.SigmaMoEConfig(n_experts=4)}
    with pytest.raises(ValueError, match=r"cannot be replaced: 0\.ffn: parameters of .* are tied to .*; 1\.ffn: "):
        sf.sparsify_(twins(*ALL), configs)
    elsewhere = nn.ModuleList([Block(), nn.Linear(6, 16, bias=False), nn.Linear(16, 6, bias=False)])
    elsewhere[1].weight, elsewhere[2].weight = elsewhere[0].ffn.a.weight, elsewhere[0].ffn.b.weight
    assert set(sf.sparsify_(elsewhere, OPEN).unknown) == {"0.ffn", "1"}  # the list's own maps look like an FFN too
    square = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    square[2].weight = square[0].weight
    assert set(sf.sparsify_(square, OPEN).unknown) == {"0"}


def test_lists_are_taken_where_tuples_are() -> None:
    config = sf.SigmaMoEConfig(n_experts=4, balance=["entropy", "z"], balance_weight=[1e-3, 1e-4])
    assert len(sf.sparsify_(nn.Sequential(Block()), config).replacements) == 1


def test_an_ffn_that_is_named_and_cannot_be_replaced_is_an_error() -> None:
    model = nn.Sequential(Block(), Block())
    model[0].ffn.register_forward_hook(lambda *_: None)
    before = state(model)
    with pytest.raises(
        ValueError, match=r"no FFN is at '0\.ffn' of config; there are \['1\.ffn'\]; 0\.ffn: .*forward hooks"
    ):
        sf.sparsify_(model, {"0.ffn": OPEN, "1.ffn": OPEN})
    assert state(model) == before
    assert sf.sparsify_(model, OPEN).names == ["1.ffn"]


def test_nothing_replaced_is_a_warning_that_says_why() -> None:
    model = nn.Sequential(*(Block() for _ in range(5)))
    for block in model:
        block.ffn.register_forward_hook(lambda *_: None)
    words = r"^no FFN was replaced; what looked like one was left: 0\.ffn: .*hooks.*1\.ffn.*2\.ffn.*\(and 2 more"
    with pytest.warns(sf.SparseFFNWarning, match=words) as caught:
        sf.sparsify_(model, OPEN)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.sparsify_(nn.Sequential(nn.Linear(6, 6)), OPEN)  # nothing looked like one
        sf.sparsify_(nn.Sequential(Block()), OPEN, lambda module, name: False)  # as asked


@pytest.mark.parametrize("inside", [False, True])
def test_what_accelerate_holds_is_left_and_listed_with_the_way_out(inside: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(Block(), nn.TransformerEncoderLayer(6, 2, 16)).eval()
    classes = ["Block", "TransformerEncoderLayer"] if inside else None  # then the hooks are around these
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=classes)
    report = sf.sparsify_(model, OPEN)
    assert not report.replacements
    assert len(report.unknown) == 2
    for why in report.unknown.values():
        assert "accelerate.hooks.remove_hook_from_submodules(model), or load without offload, first" in why
    accelerate.hooks.remove_hook_from_submodules(model)
    assert len(sf.sparsify_(model, OPEN).replacements) == 2


@pytest.mark.parametrize("made_in_it", [False, True])
@pytest.mark.parametrize("chosen", [sf.SigmaMoEConfig(n_experts=4), sf.TopKFFNConfig(k=4)], ids=["MoE", "TopKFFN"])
def test_layers_that_are_made_in_inference_mode_train(chosen: config.FFNConfig, made_in_it: bool) -> None:
    x = torch.randn(3, 6)
    with torch.inference_mode(made_in_it):
        model = nn.Sequential(Block(), Block()).eval()
    with torch.inference_mode():
        sf.sparsify_(model, chosen, calibration=[x])
        layer = sf.from_dense(Mlp(), chosen)
    for new in (model[0].ffn, layer):
        new.train()(x).square().sum().backward()
        assert new.values.grad is not None


@pytest.mark.parametrize("where", ["ffn", "ffn.a"])
def test_hooks_are_not_thrown_away(where: str) -> None:
    model = nn.Sequential(Block())
    model[0].get_submodule(where).register_forward_hook(lambda *_: None)
    report = sf.sparsify_(model, OPEN)
    assert not report.replacements
    assert "forward hooks" in str(report)


def test_what_is_compiled_by_itself_is_left_and_listed() -> None:
    model = nn.Sequential(nn.LayerNorm(6), torch.compile(Mlp(), backend="eager"))
    report = sf.sparsify_(model, OPEN)
    assert not report.replacements
    assert "convert first, then compile" in report.unknown["1._orig_mod"]
    whole: nn.Module = torch.compile(nn.Sequential(Block()), backend="eager")
    before = whole(torch.ones(1, 6))
    assert sf.sparsify_(whole, sf.MoEConfig(router="unweighted", n_experts=4, k=1)).names == ["_orig_mod.0.ffn"]
    assert not torch.equal(whole(torch.ones(1, 6)), before)


def test_a_compiled_model_that_has_run_is_watched_too() -> None:
    """torch looks for hooks when it compiles, and not again."""
    torch.compiler.reset()
    x = torch.randn(2, 5, 6)
    model = torch.compile(nn.Sequential(Block(), sf.SigmaMoE(6, 4, 2, 2)).eval(), backend="eager")
    with torch.no_grad():
        model(x)
    assert sf.expert_stats(model, [x])["_orig_mod.1"].tokens == 10
    assert sf.calibrate(model, [x])["_orig_mod.0.ffn"].shape == (10, 6)
    report = sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2, init="cluster"), calibration=[x])
    assert report.names == ["_orig_mod.0.ffn"]


def test_a_compiled_function_of_a_model_that_is_not_compiled_runs() -> None:
    """Of attention's the eager form takes memory for all pairs of tokens."""
    torch.compiler.reset()
    runs = []

    def counting(graph: Any, inputs: Any) -> Any:
        return lambda *args: runs.append(1) or graph(*args)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.function = sf.SigmaMoE(6, 4, 2, 2), torch.compile(torch.sin, backend=counting)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.function(x))

    sf.expert_stats(Calls(), [torch.randn(2, 5, 6)])
    assert runs == [1]


class Quantised(torch.Tensor):
    """Stands for the tensors of torchao, bitsandbytes and FSDP."""


def test_special_kinds_of_parameters_are_left_and_listed() -> None:
    model = nn.Sequential(Block(), Block())
    special = model[0].ffn.a.weight.detach().as_subclass(Quantised)
    model[0].ffn.a.weight = nn.Parameter(special)
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["1.ffn"]
    assert "weight of Linear is a Quantised" in report.unknown["0.ffn"]


def test_ffns_of_mixed_dtypes_are_left_and_listed() -> None:
    model = nn.Sequential(Block(), Block(), nn.TransformerEncoderLayer(6, 2, 16))
    model[0].ffn.b.double()  # as transformers keeps T5's wo in fp32 when the rest is in fp16
    model[2].linear2.double()
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["1.ffn"]
    for name in ("0.ffn", "2.linear1"):
        assert report.unknown[name] == (
            "its parameters differ in dtype or device: torch.float32 on cpu, torch.float64 on cpu"
        )
    with pytest.raises(ValueError, match="its parameters differ in dtype"):
        sf.from_dense(model[0].ffn, OPEN)


class Adapted(nn.Module):
    """A linear map as LoRA wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def adapted(ffn: Mlp) -> Mlp:
    ffn.a, ffn.b = Adapted(ffn.a), Adapted(ffn.b)
    return ffn


def weight_normed(ffn: Mlp) -> Mlp:
    parametrizations.weight_norm(ffn.a)
    return ffn


def pruned(ffn: Mlp) -> Mlp:
    prune.l1_unstructured(ffn.b, "weight", 0.5)
    return ffn


class Packed(nn.Module):
    """A linear map as quantisation leaves it: no parameter, widths and packed numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = linear.weight.detach().tolist()

    def forward(self, x: Tensor) -> Tensor:
        return x @ x.new_tensor(self.packed).t()


def packed(ffn: Mlp) -> Mlp:
    ffn.a, ffn.b = Packed(ffn.a), Packed(ffn.b)
    return ffn


def scripted(ffn: Mlp) -> Any:
    return torch.jit.script(nn.Sequential(ffn.a, nn.ReLU(), ffn.b))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (adapted, "0.ffn.a has no plain weight: it is a .*Adapted with base_layer.weight, base_layer.bias, down"),
        (weight_normed, "0.ffn.a has no plain weight: it is a .*ParametrizedLinear with bias, parametrizations.weight"),
        (pruned, "0.ffn.b has no plain weight: it is a torch.nn.modules.linear.Linear with bias, weight_orig"),
        (packed, "0.ffn.a has no plain weight: it is a .*Packed with no parameters"),
        (scripted, "0.ffn.0 has no plain weight: it is a .*RecursiveScriptModule with weight, bias"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_linear_maps_that_are_more_than_a_weight_are_left_and_listed(change: Any, seen: str) -> None:
    model = nn.Sequential(Block(change(Mlp())), Block())
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["1.ffn"]
    assert list(report.unknown) == ["0.ffn"]
    assert re.search(seen, report.unknown["0.ffn"])
    assert any(name.startswith("*.ffn") for name in report.others)
    with pytest.raises(ValueError, match=re.sub(r"0\.ffn\.", "", seen)):
        sf.from_dense(model[0].ffn, OPEN)


def test_linear_maps_in_a_list_are_listed_unless_what_holds_them_is_the_ffn() -> None:
    class Listed(nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            self.steps = nn.ModuleList([nn.Linear(6, 16), act, nn.Linear(16, 6)])

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    model = nn.ModuleList([Listed(nn.ReLU()), nn.Linear(6, 16), nn.Linear(16, 6)])
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["0"]
    assert list(report.unknown) == ["1"]
    assert "lie in a ModuleList, which computes nothing" in report.unknown["1"]


def test_an_ffn_that_states_its_widths_is_no_wrapped_linear_map() -> None:
    ffn = Mlp(d_out=5)
    ffn.in_features, ffn.out_features = 6, 5
    assert sf.sparsify_(nn.Sequential(ffn, nn.Linear(5, 5)), OPEN).names == ["0"]


def test_lazy_modules_must_have_run() -> None:
    model = nn.Sequential(Block(), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet: run the model once"):
        sf.sparsify_(model, OPEN)
    assert isinstance(model[0].ffn, Mlp)
    model(torch.ones(1, 6))
    assert sf.sparsify_(model, OPEN).names == ["0.ffn"]


class Scaled(Mlp):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Parent(nn.Module):
    """Holds an FFN and uses it in one of several ways."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.ffn = self.again = Scaled()
        self.steps = [self.ffn]

    def forward(self, x: Tensor) -> Tensor:
        uses = {
            "plain": lambda: self.ffn(x),
            "adds in place": lambda: self.ffn(x).add_(x),
            "twice": lambda: self.ffn(x) + self.again(x),
            "never": lambda: x,
            "keyword": lambda: self.ffn(x=x, scale=2.0),
            "more": lambda: self.ffn(x, 2.0),
            "second reference": lambda: self.steps[0](x),
            "weight": lambda: self.ffn(x.to(self.ffn.a.weight.dtype)),
            "parts": lambda: self.ffn.b(self.ffn.f(self.ffn.a(x))),
            "children": lambda: nn.Sequential(*self.ffn.children())(x),
            "needs more": lambda: self.ffn(x[0], self.nothing),
        }
        y: Tensor = uses[self.use]()
        return y


@pytest.mark.parametrize("use", ["plain", "adds in place", "twice", "never", "needs more"])
def test_a_parent_that_only_calls_its_ffn_or_cannot_be_probed_gets_a_layer(use: str) -> None:
    model = nn.Sequential(Parent(use), nn.Tanh())
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["0.ffn"]
    assert isinstance(model[0].ffn, sf.MoE)


@pytest.mark.parametrize(
    ("use", "why"),
    [
        ("keyword", "Parent does not run with a layer in its place (TypeError: "),
        ("more", "Parent does not run with a layer in its place (TypeError: "),
        ("weight", "Parent does not run with a layer in its place (AttributeError: "),
        ("parts", "Parent does not run with a layer in its place (AttributeError: "),
        ("children", "Parent does not call a layer in its place"),
        ("second reference", "Parent does not call a layer in its place: it calls its parts, or holds it elsewhere"),
    ],
)
def test_a_parent_that_a_layer_does_not_suit_keeps_its_ffn(use: str, why: str) -> None:
    model = nn.Sequential(Parent(use), Block())
    before = model(torch.ones(2, 6))
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["1.ffn"]
    assert report.unknown["0.ffn"].startswith(why)
    torch.testing.assert_close(model(torch.ones(2, 6)), before, rtol=1e-4, atol=1e-5)


def test_dropouts_are_kept() -> None:
    inner = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 6), nn.Dropout(0.5))
    model = nn.Sequential(Block(inner))
    sf.sparsify_(model, OPEN)
    layer, after = model[0].ffn
    assert (layer.dropout, after.p) == (0.25, 0.5)


class Rates(nn.Module):
    """Two dropouts whose rates are numbers, before the FFN and on its hidden units."""

    def __init__(self, first: str, second: str, hidden: str) -> None:
        super().__init__()
        self.a, self.f, self.b = nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)
        setattr(self, first, 0.25)
        setattr(self, second, 0.25)
        self.before, self.hidden = {first, second} - {hidden}, hidden

    def forward(self, x: Tensor) -> Tensor:
        (before,) = self.before
        h = self.f(self.a(F.dropout(x, getattr(self, before), self.training)))
        return x + self.b(F.dropout(h, getattr(self, self.hidden), self.training))


@pytest.mark.parametrize(("before", "hidden"), [*itertools.permutations(["dropout", "activation_dropout", "rate"], 2)])
def test_of_two_rates_that_are_equal_the_hidden_units_is_taken(before: str, hidden: str) -> None:
    for first, second in ((before, hidden), (hidden, before)):
        model = nn.Sequential(Rates(first, second, hidden))
        assert sf.sparsify_(model, OPEN).names == ["0.a"]
        assert (getattr(model[0], before), getattr(model[0], hidden), model[0].a.dropout) == (0.25, 0.0, 0.25)


def test_an_ffn_whose_hidden_units_are_dropped_from_twice_is_left() -> None:
    class Twice(Inline):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.first, self.second = nn.ReLU(), nn.Dropout(0.25), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.second(self.first(self.f(self.a(self.norm(x))))))

    report = sf.sparsify_(nn.Sequential(Twice()), OPEN)
    assert not report.names
    assert "Twice does not compute the same with the FFN replaced" in report.unknown["0.a"]


@pytest.mark.parametrize("between", [[nn.ReLU()], [nn.ReLU(), nn.Dropout(0.25)]], ids=["activation", "dropout too"])
def test_what_stands_at_several_places_of_a_sequential_goes_from_those_of_the_ffn(between: list[nn.Module]) -> None:
    after = [nn.LayerNorm(6), *between[1:]]
    model = nn.Sequential(
        nn.Linear(6, 16), *between, nn.Linear(16, 6), *after, nn.Linear(6, 16), *between, nn.Linear(16, 6), *after
    ).eval()
    dense = copy.deepcopy(model)
    second = len(between) + 2 + len(after)
    assert sf.sparsify_(model, OPEN).names == ["0", str(second)]
    assert [type(m) for m in model[second + 1 :]] == [nn.Identity] * (len(between) + 1) + [type(m) for m in after]
    same(model, dense)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Block(), Block(Mlp(d_ff=10)), nn.TransformerEncoderLayer(6, 2, 16))
    before = state(model)
    plain = {name: dict(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"1\.ffn"):
        sf.sparsify_(model, sf.MoEConfig(expert_size=4))  # the second FFN does not divide
    assert state(model) == before

    def fails(*args: Any) -> Any:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(places, "apply", fails)  # the first two are in place by then
    with pytest.raises(RuntimeError, match="in the middle"):
        sf.sparsify_(model, sf.MoEConfig(n_experts=2))
    assert state(model) == before
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == plain


def test_probing_touches_neither_random_state_nor_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Block(), nn.TransformerEncoderLayer(6, 2, 16))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # of GPUs, where there are some
    sf.sparsify_(model, OPEN, lambda module, name: False)
    assert not seeded
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())


# -------------------------------------------------------------------------------------------------------- the report


class Inline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(self.norm(x))))


def test_what_is_unknown_is_listed_with_what_was_seen() -> None:
    mish = Mlp()
    mish.f = nn.Mish()
    normed = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 6))
    model = nn.Sequential(nn.Embedding(9, 6), Block(mish), Inline(), normed, nn.Linear(6, 3))
    report = sf.sparsify_(model, OPEN)
    assert not report.replacements
    assert set(report.unknown) == {"1.ffn.a", "2.a", "3.0"}
    assert "not one of relu" in report.unknown["1.ffn.a"]
    assert "Mish" in report.unknown["1.ffn.a"]
    assert "the activation is written into forward of Inline" in report.unknown["2.a"]
    assert report.others == {
        "* (Embedding 9x6)": 1, "*.ffn.a (Linear 16x6)": 1, "*.ffn.b (Linear 6x16)": 1, "*.a (Linear 16x6)": 1,
        "*.b (Linear 6x16)": 1, "*.* (Linear 16x6)": 1, "*.* (Linear 6x16)": 1, "* (Linear 3x6)": 1,
    }  # fmt: skip


class Wrapped(nn.Module):
    """An activation as a module of its own with another inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.BatchNorm1d(3)], ids=["LayerNorm", "BatchNorm"])
@pytest.mark.parametrize(
    "act", [Wrapped(), nn.Sequential(nn.GELU()), nn.GELU(), F.gelu], ids=["wrapped", "Sequential", "module", "function"]
)
def test_an_activation_that_is_an_attribute_is_found(act: Any, norm: nn.Module) -> None:
    class Outside(Inline):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.norm = act, norm

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.f(self.a(self.norm(x))))

    model = nn.Sequential(Outside()).eval()
    x, dense = torch.randn(2, 3, 6), copy.deepcopy(model)
    assert sf.sparsify_(model, OPEN).names == ["0.a"]
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


class Receptance(nn.Module):
    """RWKV's channel mix: a gate on the output, of a width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.ones(6))
        self.key, self.receptance, self.value = nn.Linear(6, 16), nn.Linear(6, 6), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.receptance(x * self.mix)) * self.value(self.key(x).relu().square())


class LowRank(Gated):
    """Zamba2's: low-rank adapters beside the first linear map, chosen by an argument."""

    def __init__(self) -> None:
        super().__init__(fused="first half")
        self.adapters = nn.ModuleList([nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 32)) for _ in range(3)])

    def forward(self, x: Tensor, which: int) -> Tensor:  # type: ignore[override]
        a, b = (self.both(x) + self.adapters[which](x)).chunk(2, -1)
        return self.out(self.f(a) * b)


class Rescaled(Gated):
    def __init__(self) -> None:
        super().__init__(fused="odd")
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.scale * x)


class Heads(nn.Module):
    """Attention whose heads together are wider than the model: no FFN, nor like one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 6)

    def forward(self, x: Tensor, heads: int) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def test_an_ffn_with_more_than_two_linear_maps_is_listed_with_what_is_more() -> None:
    model = nn.Sequential(Block(Receptance()), Block(LowRank()), Block(Rescaled()), Heads(), Block())
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["4.ffn"]
    assert set(report.unknown) == {"0.ffn.key", "1.ffn.both", "2.ffn.both"}
    more = "more than key, value and an activation: it has mix, receptance.weight, receptance.bias"
    assert report.unknown["0.ffn.key"] == f"{more}; seen in Receptance: Linear"
    assert (
        "more than both, out and an activation: it has adapters.*.*.weight, adapters.*.*.bias; seen in LowRank"
        in (report.unknown["1.ffn.both"])
    )
    assert "more than both, out and an activation: it has scale" in report.unknown["2.ffn.both"]
    with pytest.raises(ValueError, match=re.escape(more)):
        sf.from_dense(Receptance(), OPEN)


def test_hidden_units_that_are_not_finite_are_said_to_be() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    dense = Mlp()
    dense.f = Log()
    with pytest.raises(ValueError, match="hidden units are not finite on the probe"):
        sf.from_dense(dense, OPEN)


def test_what_no_choice_of_arguments_runs_is_listed_with_every_reason() -> None:
    class Picky(Mlp):
        def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
            if rest and rest[0] is None:
                raise KeyError("no mask")
            raise ValueError(f"{len(rest)} more")

    unknown = sf.sparsify_(nn.Sequential(Picky(), nn.Tanh()), OPEN).unknown
    (why,) = unknown.values()
    assert "ValueError: 0 more; KeyError: 'no mask'" in why


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x).clamp(-10, 10)


@pytest.mark.parametrize("act", [nn.ReLU6, Clipped])
@pytest.mark.parametrize("inside", [Block, nn.Sequential])  # an FFN of its own, and a pair in a larger module
def test_a_clamp_that_only_large_values_show_is_seen(act: Any, inside: Any) -> None:
    ffn = nn.Sequential(nn.Linear(6, 16), act(), nn.Linear(16, 6))
    report = sf.sparsify_(nn.Sequential(Block(ffn)) if inside is Block else ffn, OPEN)
    assert not report.replacements
    assert "clamps" in str(report.unknown)


class Around(Mlp):
    """Changes what goes into an FFN and what comes out of it."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(self.before(x)))


def unchanged(x: Tensor) -> Tensor:
    return x


def clamped(x: Tensor) -> Tensor:
    return x.clamp(-20, 20)


@pytest.mark.parametrize(("before", "after"), [(unchanged, clamped), (clamped, unchanged)], ids=["output", "tokens"])
def test_a_clamp_around_an_ffn_stays(before: Any, after: Any) -> None:
    model = nn.Sequential(Block(Around(before, after))).eval()
    x, dense = 1000 * torch.randn(2, 5, 6), copy.deepcopy(model)
    assert sf.sparsify_(model, OPEN).names == ["0.ffn.a"]  # the maps alone
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)


def test_an_ffn_that_casts_its_tokens_is_left() -> None:
    class Casts(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.a.weight.dtype)).to(x.dtype)

    model = nn.Sequential(Block(Casts().bfloat16()))
    report = sf.sparsify_(model, OPEN)
    assert not report.names
    assert "it changes the dtype of its tokens or of its output" in report.unknown["0.ffn.a"]


def test_a_cast_of_an_ffns_output_stays() -> None:
    class Casts(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()

    model = nn.Sequential(Casts(), nn.Identity()).bfloat16()
    assert sf.sparsify_(model, OPEN).names == ["0.a"]  # the maps alone
    assert model(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("part", ["a", "f"])
def test_an_ffn_whose_parts_have_buffers_is_left(part: str) -> None:
    model = nn.Sequential(Block())
    model[0].ffn.get_submodule(part).register_buffer("seen", torch.zeros(1))
    report = sf.sparsify_(model, OPEN)
    assert not report.names
    assert "it has buffers: seen" in str(report.unknown)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_gate_of_which_only_a_part_trains_is_left(frozen: str) -> None:
    model = nn.Sequential(Block(Gated(bias=True)))
    model[0].ffn.gate.get_parameter(frozen).requires_grad_(False)
    assert "only one of them trains" in sf.sparsify_(model, OPEN).unknown["0.ffn"]


class Pair(Mlp):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class First(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn(x)[0]
        return y


def test_an_ffn_that_returns_a_tuple_goes_on_returning_one() -> None:
    model = First(Pair())
    dense = copy.deepcopy(model)
    assert sf.sparsify_(model, OPEN).names == ["ffn.a"]  # within the module, not in its place
    same(model, dense)


class Beside(Inline):
    """Returns more than its output, in one way or another."""

    def __init__(self, returned: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.f, self.returned = nn.ReLU(), returned

    def forward(self, x: Tensor) -> Any:
        h = self.f(self.a(x))
        return self.returned(self.norm(x + self.b(h)), x, h)


@dataclasses.dataclass
class Output:
    y: Tensor
    h: Any


@dataclasses.dataclass
class Slots:
    __slots__ = ("h", "y")
    y: Tensor
    h: Any


class Fields(dict[str, Any]):
    """A mapping that pytree does not know."""


@pytest.mark.parametrize(
    "returned",
    [
        lambda y, x, h: (y, h),
        lambda y, x, h: Output(y, h),
        lambda y, x, h: Slots(y, h),
        lambda y, x, h: SimpleNamespace(y=y, more=[Output(y, {"h": h})]),
        lambda y, x, h: Fields(y=y, h=h),
    ],
    ids=["tuple", "dataclass", "slots", "object", "mapping"],
)
def test_hidden_units_that_are_returned_in_any_way_stay(returned: Any) -> None:
    report = sf.sparsify_(nn.Sequential(Beside(returned)), OPEN)
    assert not report.names
    assert "Beside does not compute the same with the FFN replaced" in report.unknown["0.a"]


def test_an_ffn_in_a_module_that_returns_no_tensor_is_left() -> None:
    report = sf.sparsify_(nn.Sequential(Beside(lambda y, x, h: None)), OPEN)
    assert not report.names
    assert "Beside returns no tensor that would show whether it computes the same" in report.unknown["0.a"]


@pytest.mark.parametrize(
    "more",
    [
        lambda x: x.ne(0).any(-1),
        lambda x: torch.full(x.shape[:1], x.shape[1]),
        lambda x: (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -torch.inf),
    ],
    ids=["flags", "counts", "scores"],
)
@pytest.mark.parametrize("kind", [tuple, Output])
def test_what_is_returned_beside_the_output_need_not_be_finite_numbers(more: Any, kind: Any) -> None:
    def returned(y: Tensor, x: Tensor, h: Tensor) -> Any:
        return (y, more(x)) if kind is tuple else Output(y, more(x))

    assert sf.sparsify_(nn.Sequential(Beside(returned)), OPEN).names == ["0.a"]


def test_tensors_are_seen_once_each_in_what_holds_itself() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    inner = SimpleNamespace(y=y, name="inner", kind=Output, owner=nn.Linear(2, 2))
    outer = SimpleNamespace(x=x, parts=[inner, {"again": inner}])
    inner.outer = outer
    assert [id(t) for t in tensors_in((outer, None))] == [id(x), id(y)]


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class Skipped(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else super().forward(x)


@pytest.mark.parametrize("other", [nn.AlphaDropout, nn.Dropout1d, Noise])
def test_what_only_training_does_is_not_lost(other: Any) -> None:
    inner = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), other(), nn.Linear(16, 6))
    after = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6), other())
    model = nn.Sequential(Block(inner), Block(after), Block(Skipped()))
    report = sf.sparsify_(model, OPEN)
    assert report.names == ["1.ffn.0"]
    assert isinstance(model[1].ffn[3], other)
    assert "in training" in report.unknown["0.ffn.0"]
    assert "in training" in report.unknown["2.ffn.a"]


class Backwards(Mlp):
    """Its second linear map is registered first."""

    def __init__(self, d_ff: int) -> None:
        super().__init__(d_ff=d_ff)
        self._modules = dict(reversed(self._modules.items()))


@pytest.mark.parametrize("d_ff", [16, 6, 4])
def test_the_order_of_registration_does_not_matter(d_ff: int) -> None:
    model = nn.Sequential(Block(Backwards(d_ff)))
    dense = copy.deepcopy(model)
    assert sf.sparsify_(model, sf.MoEConfig(router="unweighted", n_experts=2, k=2)).names == ["0.ffn"]
    same(model, dense)


def test_the_report_prints_and_rebuilds() -> None:
    model = nn.Sequential(Block(), Block(), Block())
    dense = copy.deepcopy(model)
    report = sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=1), lambda module, name: name != "1.ffn")
    text = str(report)
    assert "2 FFNs replaced: parameters 428 -> 476 (111%)" in text
    assert "a, b: relu" in text
    assert "SigmaMoE E=4 G=4 k=1" in text
    assert "left: not selected:\n  1.ffn" in text
    again = copy.deepcopy(dense)
    configs = {name: config_from_dict(values) for name, values in json.loads(json.dumps(report.to_dict())).items()}
    sf.sparsify_(again, {name: dataclasses.replace(c, init="fresh") for name, c in configs.items()})
    again.load_state_dict(model.state_dict())
    same(again, model)
    with pytest.raises(ValueError, match="no FFN is at 'nowhere'"):
        sf.sparsify_(dense, {"nowhere": sf.SigmaMoEConfig()})


class Written(Mlp):
    """Its activation is no attribute."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


def test_a_root_that_is_an_ffn() -> None:
    report = sf.sparsify_(Gated(), OPEN)
    assert "the model itself is the FFN: from_dense" in report.unknown[""]
    report = sf.sparsify_(Written(), OPEN)
    assert report.unknown["a"].startswith("the model itself is the FFN: from_dense makes a layer of it; the activation")
    same(sf.from_dense(dense := Written(), OPEN), dense)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
    dense = copy.deepcopy(model)
    assert sf.sparsify_(model, OPEN).names == ["0"]
    same(model, dense)


def test_converted_transformer_layers_copy_train_and_evaluate() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    dense = copy.deepcopy(model)
    sf.sparsify_(model, OPEN)
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    for training in (True, False):
        model.train(training)
        dense.train(training)
        with torch.no_grad():  # evaluation without gradients: the fast path's conditions
            y = copy.deepcopy(model)(x, src_key_padding_mask=padding)
            torch.testing.assert_close(y, dense(x, src_key_padding_mask=padding), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- calibration


def test_the_reservoir_is_a_uniform_sample_in_bounded_memory() -> None:
    reservoir = Reservoir(500)
    for start in range(0, 20000, 250):
        reservoir.add(torch.arange(start, start + 250).unsqueeze(1))
        assert len(reservoir.rows) <= 500
    rows = reservoir.rows.flatten()
    assert len(rows.unique()) == 500
    assert rows.tolist() == sorted(rows.tolist())
    assert rows.float().mean().item() == pytest.approx(10000, rel=0.08)
    quarters = torch.bincount(rows // 5000, minlength=4)
    assert quarters.min() > 80


def test_calibrate_runs_batches_leaves_padding_out_and_puts_everything_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 6)))

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.block(x)

    model = Model()
    x = torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = sf.calibrate(model, [{"x": x, "attention_mask": mask}, (x,), x])
    expected = model.block.norm(x).detach().flatten(0, 1)
    torch.testing.assert_close(found["block.ffn"], torch.cat([expected[[0, 1, 3]], expected, expected]))
    assert model.training
    assert not model.block.ffn[0]._forward_pre_hooks
    assert len(sf.calibrate(model, [x] * 9, max_tokens=7)["block.ffn"]) == 7
    with pytest.raises(ValueError, match=r"no FFN saw a token of the batches: block\.ffn"):
        sf.calibrate(model, [])
    with pytest.raises(
        TypeError, match=r"2 do not fit its forward .*: of pairs of inputs and labels give \(x for x, label"
    ):
        sf.calibrate(nn.Sequential(model), [(x, torch.ones(20))])
    with pytest.raises(ValueError, match="has no FFN"):
        sf.calibrate(nn.Linear(3, 3), [torch.randn(1, 3)])


@pytest.mark.parametrize(
    "mask",
    [torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[0.0, 0.0, -1e9], [0.0, -1e9, -1e9]]), torch.zeros(2, 3)],
    ids=["1 for tokens", "added to scores", "added, no padding"],
)
def test_calibrate_leaves_padding_out_in_any_order_that_the_shapes_tell(mask: Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.turned, self.others = Mlp(), Mlp(), Mlp()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            turned = self.turned(x.transpose(0, 1)).transpose(0, 1).flatten(0, 1)
            return self.rows(x.flatten(0, 1)) + turned + self.others(x[:, 1:]).sum()

    x, tokens = torch.randn(2, 3, 6), torch.tensor([[True, True, False], [True, False, False]]) | ~mask.any()
    found = sf.calibrate(Model(), [{"x": x, "attention_mask": mask}])
    assert torch.equal(found["rows"], x[tokens])
    assert torch.equal(found["turned"], x.transpose(0, 1)[tokens.t()])
    assert torch.equal(found["others"], x[:, 1:].flatten(0, 1))  # another's mask: no row is taken for padding


def test_encoders_of_torch_calibrate_on_padded_batches() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=attention_mask == 0)

    model, x = Model().eval(), torch.randn(2, 3, 8)
    assert model.encoder.use_nested_tensor
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert {len(rows) for rows in sf.calibrate(model, [batch]).values()} == {3}
    assert model.encoder.use_nested_tensor
    config = sf.MoEConfig(router="unweighted", expert_size=4, active=0.5)
    assert len(sf.sparsify_(model, config, calibration=[batch]).names) == 2


@pytest.mark.parametrize("one", [{"x": torch.zeros(2, 6)}, torch.zeros(2, 6), "x"], ids=["dict", "tensor", "str"])
def test_one_batch_is_not_taken_for_many(one: Any) -> None:
    model = nn.Sequential(Mlp(), sf.SigmaMoE(6, 3, 4, 2))
    for ask in (sf.calibrate, sf.expert_stats):
        with pytest.raises(TypeError, match=r"to iterate over, got one, .+: put it into a list"):
            ask(model, one)


def test_an_ffn_that_saw_no_token_is_left_out_and_then_missed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.busy, self.idle = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.busy(x)

    model, calibrated = Model(), dataclasses.replace(OPEN, init="cluster")
    calibration = sf.calibrate(model, [torch.randn(2, 3, 6)])
    assert list(calibration) == ["busy.ffn"]
    with pytest.raises(ValueError, match=r"nothing for 'idle\.ffn'.*batches that reach it and the same filter_fn"):
        sf.sparsify_(model, calibrated, calibration=calibration)
    report = sf.sparsify_(model, calibrated, lambda module, name: name in calibration, calibration=calibration)
    assert report.skipped == ("idle.ffn",)


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]
)
def test_the_default_dtype_and_device_do_not_matter(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(2, 3, 6)
    dense = nn.Sequential(Block(), Block(Gated())).eval()
    config = sf.SoftmaxMoEConfig(n_experts=4, k=3, init="cluster")
    plain, other, whole = copy.deepcopy(dense), copy.deepcopy(dense), copy.deepcopy(dense)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            calibration = sf.calibrate(other, [x])
            sf.sparsify_(other, config, calibration=calibration)
            sf.sparsify_(whole, dataclasses.replace(config, k=4))
            back = sf.to_dense(whole[0].ffn)
    finally:
        torch.set_default_dtype(usual)
    sf.sparsify_(plain, config, calibration=sf.calibrate(plain, [x]))
    assert torch.equal(calibration["0.ffn"], dense[0].norm(x).flatten(0, 1))
    assert torch.equal(other(x), plain(x))
    torch.testing.assert_close(whole(x), dense(x))
    torch.testing.assert_close(back(x), whole[0].ffn(x))


def test_calibrate_takes_what_a_linear_map_gets_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=torch.relu(self.a(input=x)))

    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(sf.calibrate(nn.Sequential(Named()), [x])["0"], x.flatten(0, 1))


def test_a_token_without_a_batch_is_a_row() -> None:
    model, x = nn.Sequential(nn.LayerNorm(6), Mlp()), torch.randn(6)
    assert torch.equal(sf.calibrate(model, [x, x.view(1, 6)])["1"], model[0](x).detach().expand(2, 6))
    report = sf.sparsify_(model, dataclasses.replace(OPEN, k=2), calibration=[x])
    assert report.replacements[0].relative_error is not None


def test_calibrate_knows_that_a_decoder_has_a_mask_of_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=6, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    )
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "decoder_input_ids": ids}
    given = {name: len(rows) for name, rows in sf.calibrate(model, [batch]).items()}
    assert [n for name, n in given.items() if name.startswith("encoder")] == [5]
    assert [n for name, n in given.items() if name.startswith("decoder")] == [8]
    batch["decoder_attention_mask"] = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])
    given = {name: len(rows) for name, rows in sf.calibrate(model, [batch]).items()}
    assert [n for name, n in given.items() if name.startswith("decoder")] == [3]
    (logits,) = Judge(model, [batch]).before
    assert logits.shape == (3, 20)


def clustered(n_groups: int = 4, size: int = 4) -> tuple[Mlp, Tensor, Tensor]:
    """An FFN whose units work in groups, each on tokens of its own; inputs; and the group of each unit."""
    d = 8
    group = torch.randperm(n_groups * size) % n_groups
    dense = Mlp(d_model=d, d_ff=n_groups * size, d_out=d)
    with torch.no_grad():
        dense.a.weight.copy_(F.one_hot(group, d) * 2.0 + 0.1 * torch.randn(len(group), d))
        dense.a.bias.fill_(-0.5)
    x = 0.1 * torch.randn(400, d)
    x[torch.arange(400), torch.arange(400) % n_groups] += 2.0
    return dense, x, group


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"elsewhere.ffn": torch.randn(9, 6)}, r"calibration has nothing for '0\.ffn', only for \['elsewhere\.ffn'\]"),
        ({"0.ffn": torch.randn(9, 7)}, r"0\.ffn: its calibration must be .*d_model = 6\], got \[9, 7\]"),
        ({"0.ffn": torch.full((9, 6), torch.nan)}, r"0\.ffn: its calibration must be finite"),
        ({"0.ffn": torch.empty(0, 6)}, r"at least 1 token.*got \[0, 6\]"),
    ],
)
def test_a_calibration_that_does_not_fit_is_an_error(given: dict[str, Tensor], message: str) -> None:
    model = nn.Sequential(Block())
    with pytest.raises(ValueError, match=message):
        sf.sparsify_(model, OPEN, calibration=given)
    assert isinstance(model[0].ffn, Mlp)


@pytest.mark.parametrize("by", ["keys", "coactivation"])
def test_clusters_find_units_that_work_together(by: str) -> None:
    dense, x, group = clustered()
    config = sf.MoEConfig(router="unweighted", n_experts=4, k=1, init="cluster", cluster_by=by)
    layer = sf.from_dense(dense, config, inputs=x)
    for keys in layer.keys:
        unit = torch.cdist(keys, dense.a.weight).argmin(1)
        assert len(group[unit].unique()) == 1
    error = (layer.eval()(x) - dense(x)).norm() / dense(x).norm()
    assert error < 0.05
    split = sf.from_dense(dense, dataclasses.replace(config, init="split", cluster_by=None), inputs=x)
    assert (split.eval()(x) - dense(x)).norm() / dense(x).norm() > 5 * error


def test_without_calibration_the_report_says_the_error_on_noise() -> None:
    for k, init in ((4, "split"), (1, "split"), (1, "fresh")):
        model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        dense, x = copy.deepcopy(model), torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        report = sf.sparsify_(model, sf.MoEConfig(router="unweighted", n_experts=4, k=k, init=init))
        (new,) = report.replacements
        if init == "fresh":
            assert (new.relative_error, new.on_noise) == (None, False)
            assert "error" not in str(report)
            continue
        error = ((model.eval()(x) - dense(x)).norm() / dense(x).norm()).item()
        assert new.on_noise
        assert new.relative_error == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert (error < 1e-6) == (k == 4)
        assert f"{new.relative_error:.2%}" in str(report)
        assert "error on noise" in str(report)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    assert sf.sparsify_(model, sf.MoEConfig(n_experts=4, k=1)).replacements[0].relative_error is None


@pytest.mark.parametrize("kind", [sf.SigmaMoEConfig, sf.SoftmaxMoEConfig, sf.SwitchMoEConfig])
def test_calibrated_gates_are_rescaled_and_the_report_says_the_error(kind: type[Any]) -> None:
    dense, x, _ = clustered()
    model = nn.Sequential(dense, nn.Tanh())
    calibration = sf.calibrate(model, [x])
    report = sf.sparsify_(model, kind(n_experts=4, k=1, init="cluster"), calibration=calibration)
    assert "rescaled by mean gates" in report.replacements[0].note
    error = ((model[0].eval()(x) - dense(x)).norm() / dense(x).norm()).item()
    assert report.replacements[0].relative_error == pytest.approx(error, rel=1e-3)
    assert error < 0.15
    assert f"{error:.2%}" in str(report)


def test_balanced_assignment_is_balanced_and_good() -> None:
    similarity = torch.randn(60, 5)
    cluster = balanced_assignment(similarity)
    assert torch.bincount(cluster).tolist() == [12] * 5
    value = similarity.gather(1, cluster.unsqueeze(1)).mean().item()
    assert value > 0.85 * similarity.max(1).values.mean().item()
    assert balanced_assignment(torch.zeros(12, 3)).bincount().tolist() == [4, 4, 4]


def test_clusters_are_a_partition_and_the_same_each_time() -> None:
    points = torch.randn(64, 8)
    units = balanced_kmeans(points, 8)
    assert units.shape == (8, 8)
    assert torch.equal(units.flatten().sort().values, torch.arange(64))
    assert torch.equal(units, balanced_kmeans(points, 8))
    assert balanced_kmeans(torch.zeros(8, 3), 4).shape == (4, 2)


def test_build_needs_no_gradient_graph() -> None:
    dense, x, _ = clustered()
    layer = sf.from_dense(dense, sf.MoEConfig(n_experts=4, init="cluster"), inputs=x)
    assert all(p.grad_fn is None and p.grad is None for p in layer.parameters())
    assert sf.routing_stats(layer) == {}
