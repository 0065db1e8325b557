"""fp32 weights with 16-bit tokens, as under autocast: cast by the kernels' side, gradients in fp32, no copy kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flat
import pytest
import test_bag
import test_topk
import torch
from net import Case, check, cvmm_case, expert_case
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import ops
from sparse_ffn.ops.expert_ffn import triton as expert_ffn

WEIGHTS = ("keys", "values", "gate_keys", "key_bias", "weight")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
pytestmark = pytest.mark.usefixtures("small_blocks")


def masters(case: Case) -> Case:
    return replace(case, wide=tuple(n for n in WEIGHTS if n in case.tensors))


def not_rounded(gradient: Tensor, dtype: torch.dtype) -> bool:
    return bool((gradient.to(dtype).float() != gradient).any())


@dtypes
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_expert_ffn(form: str, dtype: torch.dtype, device: str) -> None:
    actual = check(masters(expert_case("ragged", dtype, form=form, activation="silu", sizes=(24, 20, 17))), device)
    assert all(not_rounded(actual[n], dtype) for n in ("dkeys", "dvalues"))


@dtypes
def test_decoding(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_ffn, "use_decode", lambda n_slots, n_experts: True)
    check(masters(expert_case("one token", dtype, form="everything", train=False)), device)


@dtypes
def test_cvmm(dtype: torch.dtype, device: str) -> None:
    actual = check(masters(cvmm_case("ragged", dtype, form="gather, scatter, reduction")), device)
    assert not_rounded(actual["dweight"], dtype)


@dtypes
@pytest.mark.parametrize("sparse", [True, False], ids=["gathered", "dense"])
def test_topk_ffn(sparse: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_topk.choose(sparse, monkeypatch)
    check(masters(test_topk.topk_case((5, 10, 37, 19, 6), dtype, form="everything")), device)


@dtypes
def test_weighted_bag(dtype: torch.dtype, device: str) -> None:
    """Here it is autocast that says in what dtype to answer; the table itself is never cast."""

    def op(**tensors: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return ops.weighted_bag(**tensors)

    actual = check(replace(masters(test_bag.bag_case("one hot row", dtype)), op=op), device)
    assert not_rounded(actual["dvalues"], dtype)


def test_row_sparse_gradient(device: str) -> None:
    values, index, weight = (t.to(device) for t in test_bag.bag_case("random").tensors.values())
    gradients = []
    for sparse in (True, False):
        table = values.float().clone().requires_grad_()
        with sf.backend("triton"), torch.autocast(device, torch.bfloat16):
            out = ops.weighted_bag(table, index, weight.float(), sparse_grad=sparse)
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16
        assert table.grad is not None
        gradients.append(table.grad.to_dense())
    assert torch.equal(*gradients)


LAYERS: dict[str, tuple[Callable[..., torch.nn.Module], int]] = {  # and the bytes that a token of 16 numbers may keep
    # x, the hidden units of 3 experts, and for each slot gate, index, sorted slot
    "moe": (lambda **o: sf.SigmaMoE(16, 9, 20, 3, balance="none", **o), 2 * 16 + 2 * 3 * 20 + 3 * (4 + 8 + 4)),
    "topk": (lambda **o: sf.TopKFFN(16, 40, 5, **o), 2 * 16 + 5 * (2 + 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_kept_for_the_backward_pass(name: str, device: str) -> None:
    """No copy of a weight, nothing of the size [tokens, k, d_model]."""
    make, bytes_of_a_token = LAYERS[name]
    layer = make(device=device)
    parameters = {p.data_ptr() for p in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    x = torch.randn(64, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with sf.backend("triton"), torch.autocast(device, torch.bfloat16), saving:
        core(layer, x)
    own = [t for t in kept.values() if t.untyped_storage().data_ptr() not in parameters]
    assert sum(t.numel() * t.element_size() for t in own) <= 64 * bytes_of_a_token + 4 * 10  # offsets of the experts
    assert len(own) < len(kept)


def core(layer: Any, x: Tensor) -> Tensor:
    """The layer without its router, whose scores are no part of the kernels."""
    if isinstance(layer, sf.TopKFFN):
        return flat.topk_ffn(x, layer.keys, layer.values, layer.k)
    index = torch.rand(x.shape[0], layer.n_experts, device=x.device).topk(layer.k).indices
    gate = torch.rand(x.shape[0], layer.k, device=x.device)
    return flat.expert_ffn(x, layer.keys, layer.values, index, gate)
