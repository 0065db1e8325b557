"""The public contract: names, parameter layout, initialisation, sizes, arguments, inputs, words of the errors."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import sparse_ffn as sf
from sparse_ffn import compress, convert, layers, plot, routing
from sparse_ffn.layers import LatentMoE, SharedExpertMoE
from sparse_ffn.layers.variants import MoEOptions
from sparse_ffn.routing.base import RouterOptions

# What checkpoints and code of users depend on: changing a line here breaks them.
GOLDEN = {
    "DenseFFN": (
        sf.DenseFFN(4, 6),
        {"out_bias": [4], "keys": [6, 4], "key_bias": [6], "values": [6, 4]},
    ),
    "DenseFFN, GLU": (
        sf.DenseFFN(4, 6, glu=True, bias=False, d_out=3),
        {"keys": [6, 4], "gate_keys": [6, 4], "values": [6, 3]},
    ),
    "TopKFFN": (
        sf.TopKFFN(4, 6, 2, glu=True),
        {"out_bias": [4], "keys": [6, 4], "gate_keys": [6, 4], "key_bias": [6], "values": [6, 4]},
    ),
    "ProductKeyMemory": (
        sf.ProductKeyMemory(4, 3, 2, n_heads=2),
        {"sub_keys": [2, 2, 3, 2], "values": [9, 4]},
    ),
    "ProductKeyMemory, query": (
        sf.ProductKeyMemory(5, 3, 2, n_heads=2, query_dim=8, query_norm="layer", d_out=3),
        {"sub_keys": [2, 2, 3, 4], "values": [9, 3], "query.weight": [16, 5]},
    ),
    "ProductKeyMemory, query with a bias, norm with a scale": (
        sf.ProductKeyMemory(5, 3, 2, n_heads=2, query_dim=8, query_bias=True, query_norm="layer", norm_affine=True),
        {
            "sub_keys": [2, 2, 3, 4],
            "norm_weight": [4],
            "norm_bias": [4],
            "values": [9, 5],
            "query.weight": [16, 5],
            "query.bias": [16],
        },
    ),
    "ProductKeyMemory, rms norm with a scale": (
        sf.ProductKeyMemory(4, 3, 2, n_heads=2, query_norm="rms", norm_affine=True),
        {"sub_keys": [2, 2, 3, 2], "norm_weight": [2], "values": [9, 4]},
    ),
    "SigmaMoE": (
        sf.SigmaMoE(4, 6, 5, 2),
        {"keys": [6, 5, 4], "values": [6, 5, 4], "router.weight": [6, 4]},
    ),
    "MoE, everything": (
        sf.MoE(4, 6, 5, 2, router="noisy_topk", glu=True, bias=True, d_out=3, balance="bias"),
        {
            "out_bias": [3],
            "keys": [6, 5, 4],
            "gate_keys": [6, 5, 4],
            "key_bias": [6, 5],
            "values": [6, 5, 3],
            "router.weight": [6, 4],
            "router.noise_weight": [6, 4],
            "router.bias": [6],
        },
    ),
    "MoE, ReLU routing": (
        sf.MoE(4, 6, 5, 2, router="relu", balance="l1"),
        {"keys": [6, 5, 4], "values": [6, 5, 4], "router.weight": [6, 4], "router.l1": []},
    ),
    "MoE, constant null experts": (
        sf.MoE(4, 6, 5, 2, null_experts=2, null_kind="constant", d_out=3),
        {"keys": [6, 5, 4], "values": [6, 5, 3], "constants": [2, 3], "router.weight": [8, 4]},
    ),
    "ProductKeyMemory, experts": (
        sf.ProductKeyMemory(4, 3, 2, experts=True, d_out=3),
        {"sub_keys": [2, 1, 3, 2], "keys": [9, 4], "values": [9, 3]},
    ),
    "ProductKeyMemory, gated": (
        sf.ProductKeyMemory(4, 3, 2, gated=True, d_out=3),
        {"sub_keys": [2, 1, 3, 2], "values": [9, 3], "gate.weight": [3, 4], "out.weight": [3, 3]},
    ),
    "SharedExpertMoE, gated": (
        SharedExpertMoE(sf.SigmaMoE(4, 6, 5, 2), sf.DenseFFN(4, 7, bias=False), gated=True),
        {
            "routed.keys": [6, 5, 4],
            "routed.values": [6, 5, 4],
            "routed.router.weight": [6, 4],
            "shared.keys": [7, 4],
            "shared.values": [7, 4],
            "gate.weight": [1, 4],
        },
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_state_dict_is_frozen(name: str) -> None:
    layer, expected = GOLDEN[name]
    assert {n: list(t.shape) for n, t in layer.state_dict().items()} == expected


def test_public_names_are_frozen() -> None:
    public = {n for n, v in vars(sf).items() if not n.startswith("_") and type(v).__name__ != "module"}
    assert public == {
        *("DenseFFN", "TopKFFN", "ProductKeyMemory", "SparseFFN"),
        *("MoE", "SigmaMoE", "SoftmaxMoE", "SwitchMoE", "SBaseMoE", "NoisyTopKMoE"),
        *(
            "sparsify_",
            "from_dense",
            "to_dense",
            "calibrate",
            "expert_stats",
            "prune_experts_",
            "map_experts_",
            "offload_experts_",
            "offload_stats",
            "DenseFFNConfig",
            "TopKFFNConfig",
            "ProductKeyMemoryConfig",
        ),
        *("MoEConfig", "SigmaMoEConfig", "SoftmaxMoEConfig", "SwitchMoEConfig", "SBaseMoEConfig", "NoisyTopKMoEConfig"),
        *("pooled_balance", "RoutingMeter", "router_parameters", "routing_agreement"),
        *("quantize_experts_", "dequantize_experts_", "ExpertQuantization"),
        *("aux_loss", "routing_stats", "update_router_bias", "parameter_equal", "backend", "SparseFFNWarning"),
    }
    functions = {"cvmm", "expert_ffn", "weighted_bag", "product_key_topk", "topk_ffn"}
    assert functions <= set(vars(sf.functional))


def test_no_public_name_hides_a_module_of_the_package() -> None:
    """``import sparse_ffn.x as x`` gives the attribute of the package, whatever it is."""
    for module in pkgutil.iter_modules(sf.__path__):
        assert type(getattr(sf, module.name, sf)) is type(sf), module.name


def test_public_objects_are_documented() -> None:
    for name, value in vars(sf).items():
        if not name.startswith("_") and callable(value):
            assert value.__doc__, name


def test_everything_public_has_its_place_in_the_documentation() -> None:
    pages = (Path(__file__).parents[1] / "docs").glob("*.md")
    names = [name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]
    documented = [
        getattr(importlib.import_module(module), name) for module, _, name in (n.rpartition(".") for n in names)
    ]
    for package in (sf, sf.functional, routing, compress, convert, layers, plot):
        for name, value in vars(package).items():
            if not name.startswith("_") and callable(value) and _is_of(package, value):
                assert any(value is one for one in documented), f"{package.__name__}.{name}"


def test_code_of_the_pages_fits_its_column() -> None:
    """A window 1300 pixels wide has room for 92 columns: docs/stylesheets/extra.css."""
    root = Path(__file__).parents[1]
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        for block in re.findall(r"^```\w+\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                assert len(line) <= 92, f"{page.name}: {line}"


def _is_of(package: Any, value: Any) -> bool:
    """Whether a package has made this name public, and not only imported it for itself."""
    home = getattr(value, "__module__", "")
    return home.startswith("sparse_ffn") if hasattr(package, "__path__") else home == package.__name__


# ------------------------------------------------------------------------------------------------ initialisation


def std(x: torch.Tensor) -> float:
    return x.detach().double().std().item()


@pytest.mark.parametrize(("options", "c"), [({}, 1.0), ({"n_layers": 8}, 0.5), ({"init_scale": 0.3}, 0.3)])
def test_initial_standard_deviations(options: dict[str, Any], c: float) -> None:
    d = 64
    dense = sf.DenseFFN(d, 256, glu=True, **options)
    assert std(dense.keys) == pytest.approx(c / math.sqrt(d), rel=0.05)
    assert std(dense.gate_keys) == pytest.approx(c / math.sqrt(d), rel=0.05)
    assert std(dense.values) == pytest.approx(c / math.sqrt(256), rel=0.05)
    for split in ((4, 128), (32, 16)):
        moe = sf.SigmaMoE(d, *split, 2, **options)
        assert std(moe.keys) == pytest.approx(c / math.sqrt(d), rel=0.05)
        assert std(moe.values) == pytest.approx(c / math.sqrt(512), rel=0.05)  # however E·G is split
        assert moe.router.weight.norm(dim=1).tolist() == pytest.approx([c] * split[0], rel=1e-5)
        assert std(moe.router.weight) == pytest.approx(c / math.sqrt(d), rel=0.05)
    memory = sf.ProductKeyMemory(d, 32, 4, n_heads=2, query_dim=32, **options)
    assert std(memory.sub_keys) == pytest.approx(c / math.sqrt(32), rel=0.05)
    assert std(memory.query.weight) == pytest.approx(c / math.sqrt(d), rel=0.05)
    assert std(memory.values) == pytest.approx(c / 32, rel=0.05)
    memory = sf.ProductKeyMemory(d, 32, 4, value_init="standard", **options)
    assert std(memory.sub_keys) == pytest.approx(c / math.sqrt(d), rel=0.05)
    assert std(memory.values) == pytest.approx(c / math.sqrt(d), rel=0.05)


@pytest.mark.parametrize(
    "make",
    [
        partial(sf.MoE, 16, 6, 4, 2, router="unweighted"),
        partial(LatentMoE, 16, 8, 6, 4, 2, router="unweighted"),
        partial(sf.ProductKeyMemory, 16, 6, 4),
        partial(sf.ProductKeyMemory, 16, 6, 4, gated=True),
    ],
    ids=["MoE", "LatentMoE", "ProductKeyMemory", "gated"],
)
def test_the_scale_of_the_output_is_that_of_two_matrices_whatever_stands_around_these(make: Any) -> None:
    """c² = 2/n_layers: projections that had c as well made it c⁴."""
    x, found = torch.randn(30, 16, dtype=torch.float64), []
    for n_layers in (None, 64):
        torch.manual_seed(0)
        found.append(make(n_layers=n_layers, dtype=torch.float64)(x))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0] / 32)


def test_biases_and_noise_start_at_zero() -> None:
    layer = sf.NoisyTopKMoE(8, 4, 4, 2, bias=True)
    memory = sf.ProductKeyMemory(8, 4, 4, query_dim=6, query_bias=True, query_norm="layer", norm_affine=True)
    zeros = (layer.key_bias, layer.out_bias, layer.router.noise_weight, memory.query.bias, memory.norm_bias)
    for tensor in zeros:
        assert not tensor.any()
    assert (memory.norm_weight == 1).all()


# ------------------------------------------------------------------------------------------------------- sizes


def test_parameter_counts_of_the_paper() -> None:
    """Table in paper sections 5 and 6: the layers of WT-S, WT-B and Enwik8."""
    for d, d_ff, dense, experts, moe, n, memory in (
        (412, 2053, 1_694_137, 16, 1_694_144, 62, 1_685_904),
        (1024, 4110, 8_422_414, 32, 8_421_376, 89, 8_475_648),
        (512, 2053, 2_104_837, 16, 2_105_344, 62, 2_095_104),
    ):
        assert sf.DenseFFN(d, d_ff, device="meta").n_parameters == dense
        sizes = sf.parameter_equal(sf.SigmaMoE, d, d_ff, expert_size=128, k=4)
        assert sizes == {"d_model": d, "n_experts": experts, "expert_size": 128, "k": 4}
        assert sf.SigmaMoE(**sizes, device="meta").n_parameters == moe
        sizes = sf.parameter_equal(sf.ProductKeyMemory, d, d_ff, k=128, n_heads=4)
        assert sizes == {"d_model": d, "n_sub_keys": n, "k": 128, "n_heads": 4}
        assert sf.ProductKeyMemory(**sizes, device="meta").n_parameters == memory
        assert sf.parameter_equal(sf.TopKFFN, d, d_ff, k=64)["d_ff"] == d_ff


@pytest.mark.parametrize("cls", [sf.MoE, sf.SigmaMoE, sf.SoftmaxMoE, sf.SwitchMoE, sf.SBaseMoE, sf.NoisyTopKMoE])
def test_parameter_equal_is_the_nearest_size(cls: type[sf.MoE]) -> None:
    sizes = sf.parameter_equal(cls, 32, 500, expert_size=24, k=2, glu=True)
    target = sf.DenseFFN(32, 500).n_parameters

    def miss(n: int) -> int:
        return abs(cls(**{**sizes, "n_experts": n}).n_parameters - target)

    assert miss(sizes["n_experts"]) <= min(miss(sizes["n_experts"] - 1), miss(sizes["n_experts"] + 1))


def test_parameter_equal_never_goes_below_k() -> None:
    with pytest.warns(sf.SparseFFNWarning):
        assert sf.parameter_equal(sf.SigmaMoE, 16, 10, expert_size=64, k=6)["n_experts"] == 6
    with pytest.warns(sf.SparseFFNWarning):
        assert sf.parameter_equal(sf.ProductKeyMemory, 16, 10, k=50)["n_sub_keys"] == 8


def test_parameter_equal_knows_that_null_experts_are_among_the_k() -> None:
    options = {"expert_size": 64, "k": 6}
    assert sf.parameter_equal(sf.SigmaMoE, 64, 256, **options, null_experts=2)["n_experts"] == 4
    assert sf.parameter_equal(sf.SigmaMoE, 64, 256, **options, null_experts=9)["n_experts"] == 4


def test_parameter_equal_says_when_no_size_is_within_a_tenth() -> None:
    words = r"no n_experts of SigmaMoE comes near the 2557 parameters.* 2 is the nearest, with 3104 \(\+21%\)"
    with pytest.warns(sf.SparseFFNWarning, match=words):
        assert sf.parameter_equal(sf.SigmaMoE, 16, 77, expert_size=48, k=1)["n_experts"] == 2
    with pytest.warns(sf.SparseFFNWarning, match=r"no n_sub_keys of ProductKeyMemory .*\(-1\d%\)"):
        sf.parameter_equal(sf.ProductKeyMemory, 16, 11, k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.parameter_equal(sf.SigmaMoE, 16, 77, expert_size=12, k=1)
        sf.parameter_equal(sf.ProductKeyMemory, 16, 22, k=1)  # 9% less


def test_parameter_equal_refuses_what_it_cannot_answer() -> None:
    with pytest.raises(TypeError, match="needs expert_size and k"):
        sf.parameter_equal(sf.SigmaMoE, 16, 64)
    with pytest.raises(ValueError, match="n_experts = 4 is what parameter_equal chooses"):
        sf.parameter_equal(sf.SigmaMoE, 16, 64, n_experts=4, expert_size=8, k=2)
    for other in (nn.Linear, sf.layers.LowRankMoE):
        with pytest.raises(TypeError, match=f"layer_cls must be MoE or one of its forms, .* got .*{other.__name__}"):
            sf.parameter_equal(other, 16, 64)


def test_flops_and_active_share() -> None:
    d = 10
    assert sf.DenseFFN(d, 20).flops_per_token() == 4 * d * 20
    assert sf.DenseFFN(d, 20, glu=True, d_out=3).flops_per_token() == 2 * 20 * (2 * d + 3)
    assert sf.TopKFFN(d, 20, 5).flops_per_token() == 2 * d * 20 + 2 * d * 5
    assert sf.ProductKeyMemory(d, 6, 5, n_heads=2).flops_per_token() == 2 * d * 6 * 2 + 2 * 2 * 5 * d
    query = sf.ProductKeyMemory(d, 6, 5, n_heads=2, query_dim=8)
    assert query.flops_per_token() == 2 * d * 16 + 2 * 8 * 6 * 2 + 2 * 2 * 5 * d
    assert sf.SigmaMoE(d, 8, 4, 2).flops_per_token() == 4 * d * 2 * 4 + 2 * d * 8
    assert sf.NoisyTopKMoE(d, 8, 4, 2).flops_per_token() == 4 * d * 2 * 4 + 4 * d * 8
    assert sf.DenseFFN(d, 20).active_fraction == 1
    assert sf.TopKFFN(d, 20, 5).active_fraction == 0.25
    assert sf.SigmaMoE(d, 8, 4, 2).active_fraction == 0.25
    assert sf.ProductKeyMemory(d, 6, 3, n_heads=2).active_fraction == pytest.approx(1 / 6)
    assert (sf.SigmaMoE(d, 8, 4, 2).d_ff, sf.ProductKeyMemory(d, 6, 3).d_ff, sf.TopKFFN(d, 20, 5).k) == (32, 36, 5)


def test_sizes_of_a_shared_expert_beside_routed_ones() -> None:
    d, out = 10, 3
    for gated in (False, True):
        routed, shared = sf.SigmaMoE(d, 8, 4, 2, d_out=out), sf.DenseFFN(d, 20, d_out=out, glu=True, bias=False)
        layer = SharedExpertMoE(routed, shared, gated=gated)
        scores = 2 * d * 8 + (2 * d if gated else 0)
        assert layer.flops_per_token() == scores + 2 * 2 * 4 * (d + out) + 2 * 20 * (2 * d + out)
        assert layer.n_parameters == 8 * d + 8 * 4 * (d + out) + 20 * (2 * d + out) + (d if gated else 0)
        assert (layer.d_model, layer.d_out, layer.d_ff, layer.k) == (d, out, 8 * 4 + 20, 2)
        assert layer.active_fraction == (2 * 4 + 20) / 52
        layer.k = 3
        assert routed.k == 3
        assert layer.active_fraction == (3 * 4 + 20) / 52
    assert SharedExpertMoE(sf.SigmaMoE(d, 8, 4, 2), sf.TopKFFN(d, 20, 5)).active_fraction == (2 * 4 + 5) / 52


def test_a_shared_expert_made_on_meta_works_after_its_reset() -> None:
    parts = sf.SigmaMoE(4, 3, 5, 1, balance="bias", device="meta"), sf.DenseFFN(4, 6, device="meta")
    layer = SharedExpertMoE(*parts, gated=True).to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(math.nan)
    layer.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    assert layer(torch.randn(5, 4)).isfinite().all()


def test_what_is_no_router_cannot_stand_in_ones_place() -> None:
    layer, x = sf.SigmaMoE(4, 3, 5, 1), torch.randn(2, 4)
    layer.router = nn.Linear(4, 3)
    for use in (lambda: layer(x), lambda: layer.k, layer.reset_parameters, lambda: sf.update_router_bias(layer)):
        with pytest.raises(TypeError, match=r"router must be a Router or wrap one, got Linear"):
            use()


def test_the_usual_loop_over_modules_initialises_as_the_layers_do() -> None:
    options = {"query_dim": 64, "query_bias": True, "gated": True, "n_layers": 8}
    for layer in (
        layers.LatentMoE(64, 48, 4, 8, 2, projection_bias=True, n_layers=8),
        sf.ProductKeyMemory(64, 4, 3, **options),
        layers.SwitchHeadAttention(64, 4, 3, n_layers=8),
    ):
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for name, linear in linears.items():
            c = 0.5 if name in ("query", "key") else 1.0
            assert linear.weight.std().item() == pytest.approx(c / linear.in_features**0.5, rel=0.08)
            assert linear.bias is None or not linear.bias.any()


# ---------------------------------------------------------------------------------------------- bad arguments

BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (sf.DenseFFN, (0, 4), {}, ValueError, "d_model must be at least 1, got 0"),
    (sf.DenseFFN, (4, -1), {}, ValueError, "d_ff must be at least 1, got -1"),
    (sf.DenseFFN, (4, 6.0), {}, TypeError, "d_ff must be an int, got 6.0"),
    (sf.DenseFFN, (4, 6), {"d_out": 0}, ValueError, "d_out must be at least 1, got 0"),
    (sf.DenseFFN, (4, 6), {"activation": "tanh"}, ValueError, "activation must be one of 'relu', 'gelu'.*got 'tanh'"),
    (sf.DenseFFN, (4, 6), {"activation": "softmax"}, ValueError, "activation must be one of"),
    (sf.DenseFFN, (4, 6), {"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\], got 1.5"),
    (sf.DenseFFN, (4, 6), {"init_scale": 0.5, "n_layers": 2}, ValueError, "init_scale = 0.5 and n_layers = 2"),
    (sf.DenseFFN, (4, 6), {"init_scale": -1.0}, ValueError, "init_scale must be finite and >= 0"),
    (sf.DenseFFN, (4, 6), {"n_layers": 0}, ValueError, "n_layers must be at least 1, got 0"),
    (sf.TopKFFN, (4, 6, 7), {}, ValueError, "k must be at least 1 and at most d_ff = 6, got 7"),
    (sf.TopKFFN, (4, 6, 0), {}, ValueError, "k must be at least 1"),
    (sf.ProductKeyMemory, (5, 3, 2), {}, ValueError, "d_model must be even.*got 5; or give an even query_dim"),
    (sf.ProductKeyMemory, (4, 3, 2), {"query_dim": 3}, ValueError, "query_dim must be even.*got 3"),
    (sf.ProductKeyMemory, (4, 3, 10), {}, ValueError, "k must be at least 1 and at most n_sub_keys² = 9, got 10"),
    (sf.ProductKeyMemory, (4, 3, 2), {"query_bias": True}, ValueError, "query_bias = True needs query_dim"),
    (sf.ProductKeyMemory, (4, 3, 2), {"norm_affine": True}, ValueError, "norm_affine = True needs query_norm"),
    (sf.ProductKeyMemory, (4, 3, 2), {"n_heads": 0}, ValueError, "n_heads must be at least 1"),
    (sf.ProductKeyMemory, (4, 3, 2), {"value_init": "x"}, ValueError, "value_init must be one of 'paper', 'standard'"),
    (sf.ProductKeyMemory, (4, 3, 2), {"query_norm": "batch"}, ValueError, "query_norm must be one of 'layer', 'rms'"),
    (sf.MoE, (4, 3, 5, 4), {}, ValueError, "k must be at least 1 and at most n_experts = 3, got 4"),
    (sf.MoE, (4, 0, 5, 1), {}, ValueError, "n_experts must be at least 1, got 0"),
    (sf.MoE, (4, 3, 0, 1), {}, ValueError, "expert_size must be at least 1, got 0"),
    (sf.MoE, (4, 3, 5, 1), {"router": "hash"}, ValueError, "router must be one of 'sigmoid'.*got 'hash'"),
    (sf.MoE, (4, 3, 5, 1), {"expert_dropout": 1.0}, ValueError, r"expert_dropout must be in \[0, 1\), got 1.0"),
    (sf.MoE, (4, 3, 5, 1), {"balance": "l2"}, ValueError, "balance must be one of 'entropy'.*got 'l2'"),
    (sf.MoE, (4, 3, 5, 1), {"balance": ("entropy", "z")}, ValueError, "balance_weight must hold one weight for each"),
    (
        sf.MoE,
        (4, 3, 5, 1),
        {"balance": ("z", "none"), "balance_weight": (1.0, 1.0)},
        ValueError,
        "'none' only by itself",
    ),
    (sf.MoE, (4, 3, 5, 1), {"balance_weight": -1.0}, ValueError, "balance_weight must be finite and >= 0, got -1.0"),
    (sf.MoE, (4, 3, 5, 1), {"balance_over": "time"}, ValueError, "balance_over must be one of 'batch', 'sequence'"),
    (sf.MoE, (4, 3, 5, 1), {"aux": "return"}, ValueError, "aux must be one of 'attach', 'inject'"),
    (sf.MoE, (4, 3, 5, 1), {"router": routing.SigmoidRouter(4, 2, 1)}, ValueError, r"router has \(d_model, n_experts"),
    (
        sf.MoE,
        (4, 3, 5, 1),
        {"router": routing.SigmoidRouter(4, 3, 1), "expert_dropout": 0.1},
        ValueError,
        "give it to the router module instead",
    ),
    (
        sf.MoE,
        (4, 3, 5, 1),
        {"router": routing.SigmoidRouter(4, 3, 1), "balance": "bias"},
        ValueError,
        "a router with selection_bias=False do not fit",
    ),
    (
        sf.SoftmaxMoE,
        (4, 3, 5, 1),
        {"router": "sigmoid"},
        ValueError,
        "router must be one of 'softmax', 'softmax_topk'",
    ),
    (sf.SBaseMoE, (4, 3, 5, 1), {"n_iters": 0}, ValueError, "n_iters must be at least 1, got 0"),
    (sf.SBaseMoE, (4, 3, 5, 1), {"expert_dropuot": 0.1}, TypeError, r"SBaseMoE.*\(did you mean 'expert_dropout'\?\)"),
    (sf.MoE, (4, 3, 5, 1), {"router": nn.Linear(4, 3)}, ValueError, "router must be one of 'sigmoid'.*got Linear"),
    (sf.MoE, (4, 3, 5, 1), {"router": 3}, ValueError, "or a sparse_ffn.routing.Router, or a callable that makes one"),
    (routing.ReLURouter, (4, "8", 3), {"active": 2.0}, TypeError, "n_experts must be an int, got '8'"),
    (sf.SigmaMoE, (4, 3, 5, 1), {"router": "softmax"}, TypeError, r"SigmaMoE has no argument 'router' \(MoE has it\)"),
    (sf.SigmaMoE, (4, 3, 5, 1), {"gain": 1}, TypeError, "SigmaMoE has no argument 'gain'; it takes d_model, n_experts"),
    (sf.SigmaMoE, (4, 3, 5, 1), {"gain": 1}, TypeError, "balance_weight, activation, glu.*dtype, d_out, d_router$"),
    (sf.SigmaMoE, (4, 3, 5, 1), {"n_iters": 1}, TypeError, "SigmaMoE has no argument 'n_iters'"),
    (sf.SigmaMoE, (4, 3, 5), {"top_k": 1}, TypeError, r"SigmaMoE has no argument 'top_k' \(did you mean 'k'\?\)"),
    (sf.SigmaMoE, (4, 3, 5), {"num_experts_per_tok": 1}, TypeError, "did you mean 'k'"),
    (sf.TopKFFN, (4, 6, 2), {"moe_intermediate_size": 1}, TypeError, "'moe_intermediate_size'; it takes d_model, d_ff"),
    (sf.DenseFFN, (4, 6), {"activaton": "gelu"}, TypeError, r"DenseFFN.*'activaton' \(did you mean 'activation'\?\)"),
    (sf.TopKFFN, (4, 6, 2), {"key_bias": True}, TypeError, "TopKFFN has no argument 'key_bias'"),
    (sf.DenseFFN, (4, 6), {"dtype": torch.int64}, TypeError, "dtype must be one of torch.float32.*got torch.int64"),
    (sf.DenseFFN, (4, 6), {"dtype": "bf16"}, TypeError, "dtype must be one of .*torch.float64 or None, got 'bf16'"),
    (sf.SigmaMoE, (4, 3, 5, 1), {"dtype": torch.complex64}, TypeError, "dtype must be one of"),
    (routing.Router, (4, 3, 1), {"dtype": torch.float8_e4m3fn}, TypeError, "dtype must be one of"),
    (routing.SigmoidRouter, (4, 3, 1), {"init_scale": math.nan}, ValueError, "init_scale must be finite and >= 0"),
    (routing.SigmoidRouter, (4, 3, 1), {"init_scale": "1"}, TypeError, "init_scale must be finite.*got '1'"),
    (routing.SinkhornRouter, (4, 3, 1), {"iters": 3}, TypeError, "SinkhornRouter.*'iters'.*did you mean 'n_iters'"),
    (routing.DeepSeekRouter, (4, 3, 1), {"gates": "a"}, TypeError, "DeepSeekRouter has no argument 'gates'; it t"),
]


@pytest.mark.parametrize(("cls", "sizes", "options", "error", "words"), BAD)
def test_bad_constructor_arguments_are_named(
    cls: Any, sizes: tuple[Any, ...], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        cls(*sizes, **options)


def test_options_of_a_users_subclass_are_its_own_business() -> None:
    class Mine(sf.SigmaMoE):
        def __init__(self, *sizes: int, gain: float = 1.0, **options: Any) -> None:
            super().__init__(*sizes, **options)

    assert Mine(4, 3, 5, 1, gain=2.0, glu=True).gate_keys is not None
    with pytest.raises(TypeError, match="gian"):
        Mine(4, 3, 5, 1, gian=2.0)


@pytest.mark.parametrize("cls", [sf.SigmaMoE, sf.SoftmaxMoE, routing.SinkhornRouter, routing.DeepSeekRouter])
def test_options_can_be_asked_for(cls: type) -> None:
    assert "dtype" in get_type_hints(cls.__init__)["options"].__annotations__


@pytest.mark.parametrize("cls", [sf.MoE, sf.SigmaMoE, sf.SBaseMoE, LatentMoE, routing.Router, routing.SinkhornRouter])
def test_signatures_have_the_options_by_name(cls: Any) -> None:
    shown, own = (dict(inspect.signature(c).parameters) for c in (cls, cls.__init__.__get__(object())))
    options = own.pop("options", None)
    assert {name: shown[name] for name in own} == own
    if options is not None:
        base = inspect.signature(cls.__mro__[1]).parameters  # a part of LatentMoE has its options
        for name in get_type_hints(cls.__init__)["options"].__annotations__:
            assert shown[name].default == (... if cls is LatentMoE else base[name].default)
    assert "options" not in shown
    sizes = (8, 6, 2) if issubclass(cls, routing.Router) else (8, 4, 6, 5, 2) if cls is LatentMoE else (8, 6, 5, 2)
    assert not any(p.is_meta for p in nn.utils.skip_init(cls, *sizes).parameters())


@pytest.mark.parametrize("made", [sf.SigmaMoE(4, 3, 5, 1), routing.SigmoidRouter(4, 3, 1), sf.TopKFFN(4, 6, 2)])
def test_a_layer_is_called_with_what_its_forward_takes(made: nn.Module) -> None:
    inspect.signature(made).bind(torch.randn(2, 4))
    assert "d_model" not in inspect.signature(made).parameters
    assert "d_model" in inspect.signature(type(made)).parameters


def test_options_are_those_of_the_base() -> None:
    """What a layer takes by name, it takes as the base does: TypedDicts that fell behind would hide an option."""
    own = {"router", "balance", "balance_weight"}
    assert set(MoEOptions.__annotations__) | own == keywords(sf.MoE)
    assert set(RouterOptions.__annotations__) == keywords(routing.Router)


def keywords(cls: type) -> set[str]:
    return {n for n, p in inspect.signature(cls).parameters.items() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("rate", "error"),
    [*((rate, ValueError) for rate in (0, -1e-3, math.inf, math.nan)), ("1e-3", TypeError), (True, TypeError)],
)
def test_a_rate_that_moves_no_bias_is_refused(rate: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"rate must be finite and > 0, got {rate!r}"):
        sf.update_router_bias(sf.SigmaMoE(4, 3, 5, 1, balance="bias"), rate)


LAYERS = [
    sf.DenseFFN(4, 6),
    sf.TopKFFN(4, 6, 2),
    sf.ProductKeyMemory(4, 3, 2),
    sf.SigmaMoE(4, 3, 5, 2),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_bad_inputs_are_named_and_change_nothing(layer: sf.SparseFFN) -> None:
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    layer(x)
    before = sf.routing_stats(layer)
    for call, error, words in (
        (lambda: layer(x.long()), TypeError, "x must be a floating tensor, got int64"),
        (lambda: layer(x.double()), TypeError, "x has dtype torch.float64, the layer's parameters have torch.float32"),
        (lambda: layer(x[..., :3]), ValueError, r"x must have shape \[..., d_model = 4\], got \[2, 3, 3\]"),
        (lambda: layer(torch.tensor(1.0)), ValueError, "x must have shape"),
        (lambda: layer(x.to("meta")), ValueError, "x is on meta, the layer's parameters are on cpu"),
        (lambda: layer(x, mask=mask.float()), TypeError, "mask must be bool"),
        (lambda: layer(x, mask=mask[:1]), ValueError, r"mask must have x's shape without its last dimension, \[2, 3\]"),
        (lambda: layer(x, mask=mask.to("meta")), ValueError, "mask is on meta"),
    ):
        with pytest.raises(error, match=words):
            call()
    if isinstance(layer, sf.MoE):
        with pytest.raises(ValueError, match=r"router_input must have shape \[2, 3, 4\], d_router last, got \[2, 4\]"):
            layer(x, router_input=x[:, 0])
        with pytest.raises(TypeError, match="router_input must be a floating tensor"):
            layer(x, router_input=x.long())
    else:
        with pytest.raises(ValueError, match=f"router_input is for MoE layers; {type(layer).__name__} has no router"):
            layer(x, router_input=x)
    after = sf.routing_stats(layer)
    assert all(torch.equal(before[name]["load"], after[name]["load"]) for name in before)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("shape", [(4,), (1, 4), (0, 4), (2, 0, 4), (2, 3, 5, 4)])
def test_any_leading_shape(layer: sf.SparseFFN, shape: tuple[int, ...], on_backend: str) -> None:
    y = layer(torch.randn(shape))
    assert y.shape == shape
    assert y.isfinite().all()


def test_one_tensor_out_so_it_drops_into_sequential() -> None:
    model = nn.Sequential(nn.Linear(4, 4), sf.SigmaMoE(4, 3, 5, 2), sf.TopKFFN(4, 6, 2), nn.Linear(4, 2))
    assert model(torch.randn(5, 4)).shape == (5, 2)


def test_repr_shows_sizes_and_every_choice_that_is_not_the_default() -> None:
    assert repr(sf.DenseFFN(4, 6)) == "DenseFFN(4, d_ff=6)"
    text = repr(sf.TopKFFN(4, 6, 2, glu=True, activation="silu", norm_aware=True, dropout=0.1))
    assert text == "TopKFFN(4, d_ff=6, k=2, activation='silu', glu=True, dropout=0.1, norm_aware=True)"
    text = repr(sf.SigmaMoE(4, 3, 5, 2, expert_dropout=0.1, d_out=7))
    for words in ("n_experts=3", "expert_size=5", "k=2", "d_out=7", "balance='entropy'", "balance_weight=0.001"):
        assert words in text
    assert "expert_dropout=0.1" in text


def test_param_groups_give_the_value_table_its_own_learning_rate() -> None:
    memory = sf.ProductKeyMemory(4, 3, 2, query_dim=4)
    optimizer = torch.optim.Adam(memory.param_groups(values_lr=1e-2), lr=1e-3)
    assert [(g["lr"], len(g["params"])) for g in optimizer.param_groups] == [(1e-2, 1), (1e-3, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_is_called_as_a_module_takes_no_tokens(dtype: torch.dtype) -> None:
    """One with a bias, or with a hook: both are called."""
    biased = sf.ProductKeyMemory(8, 4, 3, query_dim=6, query_bias=True, dtype=dtype)
    hooked = sf.ProductKeyMemory(8, 4, 3, query_dim=6, dtype=dtype)
    hooked.query.register_forward_hook(lambda *called: None)
    for memory in (biased, hooked):
        for train in (True, False):
            assert memory.train(train)(torch.randn(2, 0, 8, dtype=dtype)).shape == (2, 0, 8)


def test_sparse_value_gradients_train_with_sparse_adam() -> None:
    memory = sf.ProductKeyMemory(4, 3, 2, sparse_grad=True)
    memory(torch.randn(2, 4)).sum().backward()
    assert memory.values.grad.is_sparse
    before = memory.values.detach().clone()
    torch.optim.SparseAdam([memory.values]).step()
    read = memory.values.grad.coalesce().indices()[0]
    changed = (memory.values != before).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= set(read.tolist())
    memory.zero_grad()
    memory(torch.randn(0, 4)).sum().backward()
    assert memory.values.grad.is_sparse
    assert memory.values.grad._nnz() == 0


# --------------------------------------------------------------------------------------------- framework calls


def test_aux_loss_and_stats_of_models_without_a_layer() -> None:
    for model in (nn.Linear(2, 2), sf.DenseFFN(2, 2)):
        loss = sf.aux_loss(model)
        assert loss.dtype == torch.float32
        assert loss.item() == 0.0
        assert sf.routing_stats(model) == {}


def test_stats_name_the_layers_that_have_run_and_are_bounded() -> None:
    model = nn.ModuleDict({"used": sf.SigmaMoE(4, 3, 5, 2), "idle": sf.SigmaMoE(4, 3, 5, 2)})
    model["used"](torch.randn(10, 4))
    stats = sf.routing_stats(model)
    assert list(stats) == ["used"]
    assert set(stats["used"]) == {"entropy", "busiest", "dead", "load"}
    assert stats["used"]["load"].sum().item() == pytest.approx(1)
    assert list(sf.routing_stats(model["used"])) == [""]


def test_stats_at_collapse_and_at_balance() -> None:
    layer = sf.SigmaMoE(3, 3, 5, 1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3))
    layer(torch.eye(3))
    balanced = sf.routing_stats(layer)[""]
    assert (balanced["entropy"], balanced["busiest"], balanced["dead"]) == pytest.approx((1, 1 / 3, 0))
    layer(torch.eye(3)[:1].repeat(4, 1))
    collapsed = sf.routing_stats(layer)[""]
    assert (collapsed["entropy"], collapsed["busiest"], collapsed["dead"]) == pytest.approx((0, 1, 2 / 3))


def test_masked_tokens_leave_no_trace_in_stats() -> None:
    layer, x = sf.SigmaMoE(4, 6, 5, 2), torch.randn(2, 5, 4)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    layer(x, mask=mask)
    with_padding = sf.routing_stats(layer)[""]["load"]
    layer(x[mask])
    assert torch.equal(with_padding, sf.routing_stats(layer)[""]["load"])


def test_backend_is_forced_restored_and_checked() -> None:
    from sparse_ffn.backends.choice import choose

    x = torch.zeros(1, dtype=torch.float64)
    assert choose(x) == "torch"
    with sf.backend("reference"):
        assert choose(x) == "reference"
        with sf.backend("auto"):
            assert choose(x) == "torch"
        assert choose(x) == "reference"
    with (
        pytest.raises(ValueError, match=r"'fast'; allowed are 'auto', 'reference', 'torch', 'cpu', 'triton'"),
        sf.backend("fast"),
    ):
        pass


def test_routing_picture_shows_load_and_coactivation() -> None:
    from sparse_ffn.plot import routing_figure

    model = nn.Sequential(sf.SigmaMoE(4, 6, 5, 2), sf.SigmaMoE(4, 3, 5, 2))
    with pytest.raises(ValueError, match="no MoE layer of this model has run"):
        routing_figure(model)
    model(torch.randn(30, 4))
    figure = routing_figure(model)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["0: load", "co-activation", "1: load", "co-activation"]
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    assert bars == pytest.approx(sf.routing_stats(model)["0"]["load"].tolist())


# ------------------------------------------------------------------------------------- what users stumble over


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_gradient_under_autocast(dtype: torch.dtype, on_backend: str) -> None:
    memory = sf.ProductKeyMemory(8, 4, 3, sparse_grad=True)
    with torch.autocast("cpu", dtype):
        y = memory(torch.randn(5, 8))
    y.sum().backward()
    assert y.dtype == dtype
    assert memory.values.grad.is_sparse
    assert memory.values.grad.dtype == torch.float32


def test_output_with_injected_loss_may_be_changed_in_place() -> None:
    layer, x = sf.SigmaMoE(8, 4, 4, 2, aux="inject"), torch.randn(5, 8)
    y = layer(x)
    y += x
    nn.Sequential(layer, nn.ReLU(inplace=True))(x).sum().backward()
    assert layer.router.weight.grad is not None


def test_a_given_router_keeps_its_weights_until_reset() -> None:
    router = routing.SigmoidRouter(8, 4, 2)
    before = router.weight.detach().clone()
    layer = sf.MoE(8, 4, 4, 2, router=router)
    assert torch.equal(router.weight, before)
    layer.reset_parameters()
    assert not torch.equal(router.weight, before)


def test_router_bias_stays_fp32_when_the_model_is_converted() -> None:
    layer = sf.SigmaMoE(8, 4, 4, 2, balance="bias")
    layer.router.bias.fill_(1.001)
    for method in ("bfloat16", "half"):
        getattr(layer, method)()
        assert layer.router.bias.dtype == torch.float32
        assert layer.router.bias[0].item() == pytest.approx(1.001)
    assert layer.double().router.bias.dtype == torch.float64
    assert sf.SigmaMoE(8, 4, 4, 2, balance="bias", dtype=torch.float64).router.bias.dtype == torch.float64


def test_slots_that_only_dropped_experts_could_fill_are_no_load() -> None:
    layer = sf.SigmaMoE(8, 6, 4, 3, balance="bias", expert_dropout=0.9)
    with torch.no_grad():
        layer.router.weight.zero_()
    layer(torch.randn(4000, 8))
    load = layer.router.load.double()
    assert load.sum().item() == pytest.approx(4000 * 6 * 0.1, rel=0.1)
    assert (load / load.mean() - 1).abs().max().item() < 0.25


def test_noisy_router_in_fp16_evaluates_to_finite_numbers() -> None:
    layer = sf.NoisyTopKMoE(1024, 64, 4, 2, dtype=torch.float16).eval()
    torch.nn.init.constant_(layer.router.noise_weight, 1.1)
    assert layer(torch.randn(2, 1024, dtype=torch.float16)).isfinite().all()


def test_an_expert_that_is_not_selected_cannot_spoil_the_output(on_backend: str) -> None:
    keys, values = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    keys[1] = float("inf")
    x, index = torch.ones(5, 4), torch.zeros(5, 1, dtype=torch.int64)
    keys.requires_grad_()
    y = sf.functional.expert_ffn(x, keys, values, index, torch.ones(5, 1), activation="squared_relu")
    y.sum().backward()
    assert y.isfinite().all()
    assert keys.grad[0].isfinite().all()
    assert not keys.grad[1].any()


@pytest.mark.parametrize("name", ["expert_ffn", "weighted_bag", "cvmm"])
def test_functional_refuses_weights_on_another_device(name: str) -> None:
    index, elsewhere = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, device="meta")
    calls = {
        "expert_ffn": lambda: sf.functional.expert_ffn(
            torch.ones(2, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4), index, elsewhere
        ),
        "weighted_bag": lambda: sf.functional.weighted_bag(torch.ones(4, 3), index, elsewhere),
        "cvmm": lambda: sf.functional.cvmm(
            torch.ones(2, 4), torch.ones(1, 4, 3), index[0], reduction_weight=elsewhere[0]
        ),
    }
    with pytest.raises(ValueError, match=r"is on meta, (x|values) is on cpu"):
        calls[name]()


def test_synced_bias_update_without_a_process_group_says_what_is_missing() -> None:
    layer = sf.SigmaMoE(8, 4, 4, 2, balance="bias", sync_balance=True)
    with pytest.raises(RuntimeError, match="init_process_group"):
        sf.update_router_bias(layer)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_fp64_does_not_mix_with_other_dtypes_even_under_autocast(layer: sf.SparseFFN) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        layer(torch.randn(3, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dropout": "0.1"}, TypeError, "dropout must be in"),
        ({"dropout": None}, TypeError, "dropout must be in"),
        ({"init_scale": "x"}, TypeError, "init_scale must be finite"),
        ({"balance": None}, ValueError, "balance must be one of 'entropy'"),
        ({"balance": (), "balance_weight": ()}, ValueError, "balance must be one of"),
        ({"balance_weight": float("inf")}, ValueError, "balance_weight must be finite and >= 0"),
    ],
)
def test_values_of_the_wrong_kind_are_named_too(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sf.SigmaMoE(4, 3, 5, 2, **options)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        sf.parameter_equal(sf.SigmaMoE, 16, 64, expert_size=4, k=0)


def test_functional_gradients_of_an_injecting_layer_on_the_reference_backend() -> None:
    layer, x = sf.SigmaMoE(8, 4, 4, 2, aux="inject"), torch.randn(5, 8)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    with sf.backend("reference"):
        grads = torch.func.grad(loss)(parameters)
        layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)
