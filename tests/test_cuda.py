"""The kernels of csrc/cuda against float64, forward and all gradients: on the CPU by the emulator, and on a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import flat
import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import ops
from sparse_ffn.backends import cuda
from sparse_ffn.backends.choice import explain, unavailable
from sparse_ffn.ops.weighted_bag import cuda as weighted_bag

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from net import (
    ROUTINGS,
    TOLERANCE,
    VOID,
    Case,
    check,
    check_frozen,
    check_void,
    cvmm_case,
    expert_case,
    guarded,
    random,
)
from nobody import check_nobody

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
FORMS = ("plain", "gather", "scatter", "reduction", "transposed, reduction", "gather, scatter, reduction")

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
routings = pytest.mark.parametrize("routing", ROUTINGS)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that runs the kernels on the CPU."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    flags = ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")
    library = folder / "libemulated.so"
    source = CSRC / "cuda" / "api.cu"
    subprocess.run(
        [COMPILER, *flags, "-DSPARSE_FFN_CUDA_EMULATED", "-shared", "-x", "c++", source, "-o", library], check=True
    )
    return library


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cuda":
        reason = unavailable("cuda", torch.device("cuda"))
        if reason:
            pytest.skip(reason)
        yield "cuda"
        return
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, str(request.getfixturevalue("emulator")))
    cuda.library.cache_clear()
    yield "cpu"
    monkeypatch.undo()
    cuda.library.cache_clear()


@routings
@pytest.mark.parametrize(
    ("form", "dtype"),  # the parts of the last form in fp32 alone
    [*((form, torch.float32) for form in FORMS), *((FORMS[-1], dtype) for dtype in TOLERANCE if dtype.itemsize == 2)],
)
def test_cvmm(form: str, dtype: torch.dtype, routing: str, device: str) -> None:
    check(cvmm_case(routing, dtype, form=form), device, "cuda")


@dtypes
@pytest.mark.parametrize("sizes", [(1, 1), (32, 64), (48, 136), (130, 72)])
def test_cvmm_of_any_size(sizes: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check(cvmm_case("random", dtype, form=FORMS[-1], sizes=sizes), device, "cuda")


@dtypes
def test_long_segments(dtype: torch.dtype, device: str) -> None:
    """More slots of an expert than a tile has rows, and many of them for one row of x and of the output."""
    S = 1200
    tensors = {
        "x": random(5, 9),
        "weight": random(2, 9, 16),
        "expert": (torch.rand(S) < 0.3).long(),
        "gather": torch.randint(0, 5, (S,)),
        "scatter": torch.randint(0, 3, (S,)) * 2,
        "reduction": torch.rand(S, dtype=torch.float64),
    }
    case = Case(ops.cvmm, tensors, dtype, {"n_out": 6}, ("x", "weight", "reduction"))
    first, second = check(case, device, "cuda"), check(case, device, "cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tf32_where_torch_allows_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cvmm_case("random", form=FORMS[-1], sizes=(36, 20))
    monkeypatch.setitem(TOLERANCE, torch.float32, 2e-3)
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        rounded = check(case, device, "cuda")
        matmul.fp32_precision = "ieee"
        plain = check(case, device, "cuda")
    finally:
        matmul.fp32_precision = before
    assert all((rounded[name] != plain[name]).any() for name in plain)  # the tensor cores' path was taken


@dtypes
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("routing", ["random", "no token", "an expert named twice", "ragged"])
def test_expert_ffn(routing: str, form: str, dtype: torch.dtype, device: str) -> None:
    check(expert_case(routing, dtype, form=form, activation="silu"), device, "cuda")


@pytest.mark.parametrize("routing", VOID)
def test_what_belongs_to_void_slots_is_not_read(routing: str, device: str) -> None:
    check_void(expert_case(routing, form="everything"), device, "cuda")
    check_void(cvmm_case(routing, form="reduction"), device, "cuda")


@pytest.mark.parametrize("routing", VOID)
def test_slots_of_nobody_are_void(routing: str, device: str) -> None:
    check_nobody(expert_case(routing, form="everything"), device, "cuda")
    check_nobody(cvmm_case(routing, form="reduction"), device, "cuda")


def test_frozen_matrices_get_no_gradients(device: str) -> None:
    check_frozen(expert_case("one token", form="everything"), device, "cuda")
    check_frozen(cvmm_case("one token", form="reduction"), device, "cuda")
    check_frozen(bag_case(9, 4, 20, 33, torch.float32), device, "cuda")
    check_frozen(bag_case(9, 4, 20, 33, torch.float16), device, "cuda")


def test_indices_outside_of_the_table_touch_nothing(device: str) -> None:
    values, weight = guarded(random(4, 20).to(device).float()), torch.ones(1, 4, device=device)
    index = torch.tensor([[2, -1, 4, 10**6]], device=device)
    assert torch.equal(weighted_bag.forward(values, index, weight)[0], values[2])
    dvalues, dweight = weighted_bag.backward(values[:1], values, index, weight)
    assert (dweight[0, 1:] == 0).all()
    assert torch.equal(dvalues, torch.stack([values[0] * (r == 2) for r in range(4)]))


def test_inference(device: str) -> None:
    check(expert_case("random", form="everything", activation="relu", train=False), device, "cuda")


def test_strided_arguments_and_the_gradient_of_a_sum(device: str) -> None:
    case = cvmm_case("ragged", sizes=(24, 40))
    x, weight = case.tensors["x"], case.tensors["weight"]
    case.tensors["weight"] = weight.transpose(1, 2).contiguous().transpose(1, 2)
    wide = x.new_zeros(x.shape[0], 60)
    case.tensors["x"] = wide[:, 3:27].copy_(x)
    case.sum_gradient = True
    check(case, device, "cuda")


def bag_case(n_bags: int, k: int, rows: int, width: int, dtype: torch.dtype) -> Case:
    index = torch.randint(0, rows, (n_bags, k))
    index[: n_bags // 2] = rows - 1  # a hot row
    tensors = {"values": random(rows, width), "index": index}
    tensors["weight"] = random(n_bags, k).sign() * (0.5 + torch.rand(n_bags, k))  # products above fp16's subnormals
    return Case(ops.weighted_bag, tensors, dtype, {}, ("values", "weight"))


@dtypes
@pytest.mark.parametrize("sizes", [(150, 3, 40, 24), (7, 1, 1, 1), (34, 5, 300, 13), (0, 4, 9, 8), (2, 2, 5, 70)])
def test_weighted_bag(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    check(bag_case(*sizes, dtype), device, "cuda")


def test_row_sparse_gradient(device: str) -> None:
    tensors = {n: t.float().to(device) if t.is_floating_point() else t.to(device)
               for n, t in bag_case(90, 3, 200, 12, torch.float32).tensors.items()}  # fmt: skip

    def gradients(sparse: bool) -> tuple[Tensor, ...]:
        leaves = {n: tensors[n].clone().requires_grad_() for n in ("values", "weight")}
        y = ops.weighted_bag(**tensors | leaves, sparse_grad=sparse)
        return torch.autograd.grad(y.square().sum(), tuple(leaves.values()))

    with sf.backend("cuda"):
        (dense, dweight), (rows, same) = gradients(False), gradients(True)
    assert rows.is_sparse
    assert torch.equal(rows.to_dense(), dense)
    assert torch.equal(same, dweight)


WEIGHTS = ("keys", "values", "gate_keys", "key_bias", "weight")


def masters_cases() -> Iterator[tuple[Case, str]]:
    """16-bit tokens with fp32 weights, as under autocast, and the largest of the weights."""
    for case in (expert_case("ragged", form="everything", activation="silu"), cvmm_case("ragged", form=FORMS[-1])):
        yield case, "weight" if case.op is ops.cvmm else "values"
    tensors = {"x": random(6, 10), "keys": random(37, 10), "values": random(37, 19)}
    tensors |= {"gate_keys": random(37, 10), "key_bias": random(37)}
    yield Case(flat.topk_ffn, tensors, options={"k": 37, "activation": "silu"}, trained=tuple(tensors)), "values"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_weights_in_fp32_are_cast_in_each_pass(dtype: torch.dtype, device: str) -> None:
    for case, _ in masters_cases():
        wide = tuple(n for n in WEIGHTS if n in case.tensors)
        check(replace(case, dtype=dtype, wide=wide), device, "cuda")

    def op(**tensors: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return ops.weighted_bag(**tensors)

    check(replace(bag_case(34, 5, 300, 13, dtype), op=op, wide=("values",)), device, "cuda")


def test_no_copy_of_a_weight_is_kept(device: str) -> None:
    bag = bag_case(34, 5, 300, 13, torch.float32)
    for case, largest in (*masters_cases(), (bag, "values")):
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in case.tensors.items()}
        tensors = {n: t.to(device).requires_grad_(n in case.trained) for n, t in tensors.items()}
        kept: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t)
        with sf.backend("cuda"), torch.autocast(device, torch.bfloat16), hooks:
            out = case.op(**tensors, **case.options)
        assert out.dtype == torch.bfloat16
        found = [t for t in kept if t.shape == tensors[largest].shape]
        assert [t.data_ptr() for t in found] == [tensors[largest].data_ptr()]


def test_layers_train_on_it(device: str) -> None:
    for layer in (sf.SigmaMoE(16, 4, 8, 2), sf.ProductKeyMemory(16, 4, 4), sf.TopKFFN(16, 32, 4)):
        layer = layer.to(device)
        with sf.backend("cuda"):
            layer(torch.randn(5, 16, device=device)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_forcing_it_where_it_cannot_compute_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, "/nowhere/lib.so")
    cuda.library.cache_clear()
    words = "'cuda' is forced, but it computes on NVIDIA GPUs, not on cpu"
    with sf.backend("cuda"), pytest.raises(RuntimeError, match=words):
        sf.SigmaMoE(8, 4, 4, 2)(torch.randn(3, 8))
    if torch.version.hip is None:
        assert "the CUDA library is missing" in (unavailable("cuda", torch.device("cuda")) or "")
    assert "torch (automatic" in explain("meta")
    monkeypatch.undo()
    cuda.library.cache_clear()


def test_bad_arguments_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="bad argument"):
        cuda.call("product_rows", cuda.Product())
    too_many = cuda.Bag(1 << 20, 1 << 20)
    with pytest.raises(ValueError, match="more than 2"):
        cuda.call("bag_sums", too_many)


def test_tensors_that_do_not_fit_are_refused_by_name(device: str) -> None:
    """The ops of torch.ops.sparse_ffn check nothing themselves, and the kernels see pointers alone."""
    x, matrices, values = (torch.randn(*shape, device=device) for shape in ((3, 16), (2, 16, 8), (5, 8)))
    none, many = (torch.zeros(*shape, dtype=torch.int64, device=device) for shape in ((3,), (3, 4)))
    refused: dict[str, Callable[[], object]] = {
        "x must be torch.float32 [3, 16]": lambda: torch.ops.sparse_ffn.cvmm(
            x[:, :4], matrices, none, None, None, None, 3, "cuda"
        ),
        "x_rows must be torch.int64 [3]": lambda: torch.ops.sparse_ffn.cvmm(
            x, matrices, none, none.int(), None, None, 3, "cuda"
        ),
        "weight must be torch.float32 [3, 4]": lambda: torch.ops.sparse_ffn.weighted_bag(
            values, many, x[:, :1], "cuda"
        ),
        "index must be torch.int64 [3, 4]": lambda: torch.ops.sparse_ffn.weighted_bag(
            values, many.int(), x[:, :4], "cuda"
        ),
    }
    for words, call in refused.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_small_gates_and_inputs_keep_their_digits_in_fp16(backend: str, device: str) -> None:
    """Their product is below fp16's smallest normal number; that of a gate and a scaled loss's gradient is not."""
    x, grad = 1e-2 * torch.randn(64, 32), 100 * torch.randn(64, 32)
    expert, gate = torch.arange(64) % 2, torch.full((64,), 1e-4)
    half = [t.to(device, torch.float16) for t in (x, torch.randn(2, 32, 32), grad)]
    half[1].requires_grad_()
    with sf.backend(backend):
        y = sf.functional.cvmm(half[0], half[1], expert.to(device), reduction_weight=gate.to(device))
        (found,) = torch.autograd.grad(y, half[1], half[2])
    rows = [t.cpu().double() for t in (half[0], half[2])]
    wanted = torch.stack([1e-4 * rows[0][expert == e].T @ rows[1][expert == e] for e in range(2)])
    assert (found.cpu() - wanted).abs().max() < 2e-3 * wanted.abs().max()
