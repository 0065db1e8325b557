"""torch's FlopCounterMode counts our ops as the layers count themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import sparse_ffn as sf
import sparse_ffn.integrations.flop_counter
from sparse_ffn import functional

TOKENS, D = 12, 32
LAYERS: dict[str, Callable[[], sf.SparseFFN]] = {
    "DenseFFN": lambda: sf.DenseFFN(D, 64),
    "SigmaMoE": lambda: sf.SigmaMoE(D, 8, 16, 2),
    "SigmaMoE, GLU": lambda: sf.SigmaMoE(D, 8, 16, 2, glu=True, d_out=24, bias=True),
    "SBaseMoE": lambda: sf.SBaseMoE(D, 8, 16, 2),
    "NoisyTopKMoE": lambda: sf.NoisyTopKMoE(D, 8, 16, 2),
    "TopKFFN": lambda: sf.TopKFFN(D, 64, k=8),
    "TopKFFN, GLU": lambda: sf.TopKFFN(D, 64, k=8, glu=True),
    "TopKFFN, by gate": lambda: sf.TopKFFN(D, 64, k=8, glu=True, rank_by="gate", d_out=24),
    "ProductKeyMemory": lambda: sf.ProductKeyMemory(D, 8, k=4, n_heads=2),
    "ProductKeyMemory, query": lambda: sf.ProductKeyMemory(D, 8, k=4, n_heads=2, query_dim=16, query_norm="layer"),
}


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as mode:
        run()
    return mode.get_total_flops()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_pass_has_the_flops_of_the_layer(name: str, backend: str) -> None:
    layer, x = LAYERS[name](), torch.randn(TOKENS, D, requires_grad=True)
    with sf.backend(backend):
        assert counted(lambda: layer(x)) == TOKENS * layer.flops_per_token()
        with torch.no_grad():
            noise = 2 * D * 8 if name == "NoisyTopKMoE" else 0  # for training alone
            assert counted(lambda: layer.eval()(x.detach())) == TOKENS * (layer.flops_per_token() - noise)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["DenseFFN", "SigmaMoE", "SigmaMoE, GLU", "SBaseMoE", "ProductKeyMemory"])
def test_a_step_has_three_times_those(name: str, backend: str) -> None:
    """Every product has two gradients that are products."""
    layer, x = LAYERS[name](), torch.randn(TOKENS, D, requires_grad=True)
    with sf.backend(backend):
        assert counted(lambda: layer(x).sum().backward()) == 3 * TOKENS * layer.flops_per_token()


def test_a_backward_pass_of_top_k_is_that_of_the_selected_units() -> None:
    layer, x = sf.TopKFFN(D, 64, k=8), torch.randn(TOKENS, D, requires_grad=True)
    selected = 2 * TOKENS * 8 * (D + D)
    assert counted(lambda: layer(x).sum().backward()) == TOKENS * layer.flops_per_token() + 2 * selected


def test_frozen_experts_cost_no_gradient_of_theirs() -> None:
    layer, x = sf.SigmaMoE(D, 8, 16, 2), torch.randn(TOKENS, D, requires_grad=True)
    for stack in (layer.keys, layer.values):
        stack.requires_grad_(False)
    experts, router = 2 * TOKENS * 2 * 16 * (D + D), 2 * TOKENS * 8 * D
    assert counted(lambda: layer(x).sum().backward()) == 2 * experts + 3 * router


def test_the_products_by_themselves() -> None:
    x, weight = torch.randn(TOKENS, D, requires_grad=True), torch.randn(4, D, 24, requires_grad=True)
    expert = torch.randint(0, 4, (TOKENS,))
    once = 2 * TOKENS * D * 24
    assert counted(lambda: functional.cvmm(x, weight, expert)) == once
    assert counted(lambda: functional.cvmm(x, weight, expert).sum().backward()) == 3 * once
    values, index, gate = (
        torch.randn(9, 24, requires_grad=True),
        torch.randint(0, 9, (TOKENS, 3)),
        torch.rand(TOKENS, 3),
    )
    assert counted(lambda: functional.weighted_bag(values, index, gate)) == 2 * TOKENS * 3 * 24


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("glu", [False, True])
def test_quantised_experts_infer_with_the_flops_of_what_they_stand_for(glu: bool, bits: int) -> None:
    layer = sf.SigmaMoE(D, 8, 32, 2, glu=glu, d_out=48).eval()
    flops = layer.flops_per_token()
    sf.quantize_experts_(layer, sf.ExpertQuantization(bits=bits, group_size=16))
    with torch.no_grad():
        assert counted(lambda: layer(torch.randn(TOKENS, D))) == TOKENS * flops


def test_every_op_has_a_formula_but_those_without_products() -> None:
    """One that the counter does not know is counted as none."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparse_ffn::")}
    without = ("checked_index", "negative_entropy", "product_key_topk")
    products = {name for name in names if not name.removeprefix("sparse_ffn::").startswith(without)}
    assert products == {str(op).replace(".", "::") for op in flop_registry if str(op).startswith("sparse_ffn.")}


def test_quantised_experts_have_the_flops_of_what_they_stand_for() -> None:
    layer = sf.SigmaMoE(D, 8, 32, 2)
    flops = layer.flops_per_token()
    sf.quantize_experts_(layer)
    x = torch.randn(TOKENS, D, requires_grad=True)
    experts, router = 2 * TOKENS * 2 * 32 * (D + D), 2 * TOKENS * 8 * D
    assert experts + router == TOKENS * flops
    assert counted(lambda: layer(x)) == TOKENS * flops
    assert counted(lambda: layer(x).sum().backward()) == 2 * experts + 3 * router


def test_our_import_does_not_bring_the_counter() -> None:
    script = "import sys, sparse_ffn, sparse_ffn.integrations; assert 'torch.utils.flop_counter' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_ranking_by_the_gate_computes_all_gates_and_the_keys_of_k_units() -> None:
    layer = sf.TopKFFN(10, 20, 5, glu=True, rank_by="gate", d_out=3)
    assert layer.flops_per_token() == 2 * (20 * 10 + 5 * 10 + 5 * 3)
