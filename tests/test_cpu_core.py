"""The CPU core as a part of the process: threads, OpenMP, instruction sets, strides, and what happens without it."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flat
import processes
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_ffn as sf
from sparse_ffn import functional, ops
from sparse_ffn.backends import choice, cpu
from sparse_ffn.backends.choice import choose
from sparse_ffn.layers import LatentMoE, SwitchHeadAttention
from sparse_ffn.ops import products

WIDE = ("avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")
built = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


@built
def test_one_openmp_runtime_in_the_process() -> None:
    """In a process of its own: other packages of the test suite bring their own."""
    code = """
import os, torch, sparse_ffn as sf
sf.SigmaMoE(64, 8, 32, 2)(torch.randn(100, 64))
torch.randn(300, 300) @ torch.randn(300, 300)
maps = open("/proc/self/maps").read().split()
found = {os.path.realpath(p) for p in maps if any(n in os.path.basename(p) for n in ("gomp", "libomp", "iomp5"))}
print(len(found), *found)
"""
    result = run(code)
    assert result.stdout.split()[:1] == ["1"], result.stdout + result.stderr


def with_threads(layer: Callable[[], nn.Module], x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Output and gradients of a step with one, two and three threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            torch.manual_seed(1)
            module, leaf = layer(), x.clone().requires_grad_()
            y = module(leaf)
            (y.float().square().sum() + sf.aux_loss(module)).backward()
            found = {"output": y.detach(), "x": leaf.grad}
            results.append(found | {name: p.grad for name, p in module.named_parameters()})
    finally:
        torch.set_num_threads(threads)
    return results


WHATEVER_THE_THREADS: dict[str, Callable[..., nn.Module]] = {
    "SigmaMoE": lambda d, **o: sf.SigmaMoE(d, 8, 24, 3, bias=True, dropout=0.2, **o),
    "SoftmaxMoE, a GLU": lambda d, **o: sf.SoftmaxMoE(d, 8, 24, 3, glu=True, activation="silu", balance="cv2", **o),
    "SwitchMoE, by sequence": lambda d, **o: sf.SwitchMoE(d, 8, 24, balance_over="sequence", **o),
    "unweighted router, bias balancing": lambda d, **o: sf.MoE(d, 8, 24, 3, router="unweighted", balance="bias", **o),
    "ProductKeyMemory": lambda d, **o: sf.ProductKeyMemory(d, 16, 8, **o),
    "ProductKeyMemory, query": lambda d, **o: sf.ProductKeyMemory(d, 16, 8, n_heads=4, query_dim=32, **o),
    "ProductKeyMemory, normalised query": lambda d, **o: sf.ProductKeyMemory(
        d, 16, 8, n_heads=4, query_dim=32, query_norm="layer", activation="softmax", **o
    ),
}
# docs/backends.md says why
BUT_FOR_ROUNDING: dict[str, Callable[..., nn.Module]] = {
    "DenseFFN": lambda d: sf.DenseFFN(d, 4 * d),
    "TopKFFN": lambda d: sf.TopKFFN(d, 4 * d, d, glu=True, activation="silu"),
    "SBaseMoE": lambda d: sf.SBaseMoE(d, 8, 24, 3, balance="z"),
    "NoisyTopKMoE": lambda d: sf.NoisyTopKMoE(d, 8, 24, 3),
    "expert dropout": lambda d: sf.SigmaMoE(d, 8, 24, 3, expert_dropout=0.2),
    "ProductKeyMemory, gated": lambda d: sf.ProductKeyMemory(d, 16, 8, n_heads=2, gated=True),
    "LatentMoE": lambda d: LatentMoE(d, d // 2, 8, 24, 3),
}
SHAPES = ((24, 100), (40, 300), (64, 4100))


@built
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WHATEVER_THE_THREADS)
def test_results_do_not_depend_on_the_number_of_threads(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    d, n = shape
    first, *others = with_threads(
        lambda: WHATEVER_THE_THREADS[name](d, dtype=dtype), torch.randn(4, n // 4, d).to(dtype)
    )
    for other in others:
        assert [key for key in first if not torch.equal(first[key], other[key])] == []


@built
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BUT_FOR_ROUNDING)
def test_or_but_for_rounding_where_torch_computes(name: str, shape: tuple[int, int]) -> None:
    d, n = shape
    first, *others = with_threads(lambda: BUT_FOR_ROUNDING[name](d), torch.randn(n, d))
    for other in others:
        for key, expected in first.items():
            assert (other[key] - expected).norm() < 1e-5 * expected.norm(), key


@built
@pytest.mark.parametrize(
    ("where", "threads"),
    [
        ("main", 1),
        ("another", 4),
        *(
            pytest.param(*p, marks=pytest.mark.exhaustive)
            for p in (("main", 2), ("main", 4), ("another", 1), ("another", 2))
        ),
    ],
)
def test_the_core_takes_as_many_threads_as_torch_says(threads: int, where: str) -> None:
    """Also in another Python thread, where OpenMP's own default is another number."""
    code = f"""
import os, threading, torch, sparse_ffn as sf
torch.set_num_threads({threads})
values, index, weight = torch.randn(50, 8), torch.randint(0, 50, (900, 2)), torch.rand(900, 2)
def compute():
    before = len(os.listdir("/proc/self/task"))
    with sf.backend("cpu"):
        sf.functional.weighted_bag(values, index, weight)
    print(len(os.listdir("/proc/self/task")) - before + 1)
if {where == "main"}:
    compute()
else:
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
"""
    result = run(code)
    assert result.stdout.strip() == str(threads), result.stderr


@built
def test_calls_end_no_thread_and_start_none() -> None:
    """Whatever the share of the threads that a pass has work for: libgomp ends those that a smaller team leaves out."""
    code = """
import os, torch, sparse_ffn as sf
torch.set_num_threads(4)
def new_threads(call):
    call()
    before = set(os.listdir("/proc/self/task"))
    for _ in range(5):
        call()
    return len(set(os.listdir("/proc/self/task")) - before)
moe, x = sf.SigmaMoE(64, 8, 32, 2), torch.randn(129, 64)
values, index, weight = torch.randn(5, 16, requires_grad=True), torch.randint(0, 5, (60, 2)), torch.rand(60, 2)
found = {f"SigmaMoE of {T}": new_threads(lambda: moe(x[:T]).sum().backward()) for T in (16, 33, 65, 129)}
found["bag"] = new_threads(lambda: sf.functional.weighted_bag(values, index, weight).sum().backward())
sf.quantize_experts_(moe.eval(), sf.ExpertQuantization(group_size=32))
found["codes"] = new_threads(lambda: moe(x[:3]))
print({name: new for name, new in found.items() if new})
"""
    result = run(code)
    assert result.stdout == "{}\n", result.stdout + result.stderr


@built
@pytest.mark.parametrize("isa", ["generic", *(pytest.param(isa, marks=pytest.mark.exhaustive) for isa in WIDE)])
def test_every_instruction_set_gives_the_reference_result(isa: str) -> None:
    """One that this CPU lacks is refused: see test_supply_chain.py."""
    code = """
import torch, sparse_ffn as sf
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
    torch.manual_seed(0)
    layer = sf.SigmaMoE(33, 5, 17, 2, bias=True, glu=True, activation="silu", dtype=dtype)
    x = torch.randn(47, 33, dtype=dtype, requires_grad=True)
    results = []
    for backend in ("cpu", "reference"):
        with sf.backend(backend):
            y = layer(x)
            loss = y.float().square().sum()
            results.append([y, *torch.autograd.grad(loss, (x, *layer.parameters()))])
    for a, b in zip(*results):
        scale = b.float().abs().max().clamp_min(1)
        assert ((a - b).float().abs().max() / scale) < tolerance, (dtype, a.shape)
print("equal")
"""
    result = run(code, SPARSE_FFN_ISA=isa)
    if isa in cpu.instruction_sets():
        assert result.stdout.strip() == "equal", result.stderr
    else:
        assert f"RuntimeError: SPARSE_FFN_ISA is {isa!r}" in result.stderr


@built
@pytest.mark.parametrize("rows", [1, 4, 8, 12, 15, 16, 17, 20, 24, 33, 40])
def test_routers_of_any_number_of_rows_rank_ties_by_index(rows: int) -> None:
    x, weight = torch.randint(-2, 3, (30, rows)).float(), torch.eye(rows)
    bias = torch.zeros(rows)
    bias[:: max(rows // 3, 2)] = -torch.inf
    keys, values = torch.randn(rows, 1, rows), torch.randn(rows, 1, 2)
    for k in {1, min(rows, 3), rows}:
        for router_bias in (None, bias):
            ranked = x if router_bias is None else x + router_bias
            expected = ranked.sort(dim=1, descending=True, stable=True).indices[:, :k]
            found = flat.routed_ffn(
                x, weight, keys, values, k=k, gate_function="sigmoid", router_bias=router_bias,
                mask=None, dropout_mask=None, groups=1, activation="relu",
            )  # fmt: skip
            assert torch.equal(found[1], expected)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_and_expanded_tensors_are_read_as_they_are(dtype: torch.dtype) -> None:
    keys, values = torch.randn(5, 6, 9).to(dtype).transpose(1, 2), torch.randn(5, 7, 9).to(dtype).transpose(1, 2)
    index, gate = torch.rand(11, 5).topk(2).indices, torch.rand(11, 4)[:, ::2]
    for x in (
        torch.randn(11, 20).to(dtype)[:, 3:9],
        torch.randn(22, 6).to(dtype)[::2],
        torch.randn(6, 11).to(dtype).t(),
        torch.randn(1, 6).to(dtype).expand(11, 6),
        torch.randn(11, 1).to(dtype).expand(11, 6),
    ):
        y = flat.expert_ffn(x, keys, values, index, gate)
        with sf.backend("reference"):
            expected = flat.expert_ffn(x.double(), keys.double(), values.double(), index, gate.double())
        torch.testing.assert_close(y.double(), expected, rtol=4e-2, atol=4e-2)


@built
def test_indices_out_of_range_are_refused_and_not_read() -> None:
    x, keys, values = torch.randn(3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    for bad in (3, -1, 2**40):
        index = torch.tensor([[0], [bad], [1]])
        with pytest.raises(IndexError):
            functional.expert_ffn(x, keys, values, index, torch.ones(3, 1))
        with pytest.raises(IndexError):  # the unchecked op, too
            flat.expert_ffn(x, keys, values, index, torch.ones(3, 1))
        with pytest.raises(IndexError):
            ops.weighted_bag(values[0, :3], index, torch.ones(3, 1))


@built
def test_without_experts_outputs_and_gradients_are_zero() -> None:
    """Of so many numbers that the work would be divided among experts."""
    none, x = torch.zeros(0, dtype=torch.int64), torch.randn(5000, 512, requires_grad=True)
    weight, keys, values = torch.randn(0, 512, 512), torch.randn(0, 3, 512), torch.randn(0, 3, 512)
    for y in (
        functional.expert_ffn(x, keys, values, none.view(1, 0).expand(5000, 0), torch.zeros(5000, 0)),
        functional.cvmm(x, weight, none, gather_index=none, scatter_index=none, n_out=5000),
    ):
        y.sum().backward()
        assert not y.any()
        assert not x.grad.any()


@built
@pytest.mark.parametrize("tokens", [5, 40])
def test_a_glu_of_inputs_without_features_is_a_glu(tokens: int) -> None:
    keys, values, bias = torch.randn(3, 4, 0), torch.randn(3, 4, 5), torch.randn(3, 4)
    index, gate = torch.arange(tokens).view(-1, 1) % 3, torch.rand(tokens, 1)
    y = functional.expert_ffn(torch.randn(tokens, 0), keys, values, index, gate, gate_keys=keys, key_bias=bias)
    assert y.shape == (tokens, 5)
    assert not y.any()  # relu(0) * bias


LAYERS = {
    "topk": lambda: sf.TopKFFN(8, 20, 5, glu=True, norm_aware=True),
    "product_key": lambda: sf.ProductKeyMemory(8, 5, 7, n_heads=2),
    "sigma": lambda: sf.SigmaMoE(8, 9, 4, 3, bias=True),
    "softmax": lambda: sf.SoftmaxMoE(8, 9, 4, 3, glu=True, activation="gelu"),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def backends_of(graph: torch.fx.Graph) -> set[str]:
    """Which backends the sparse ops of a graph compute with: their last argument, or the core for its own op."""
    targets = [(str(node.target), node) for node in graph.nodes if str(node.target).startswith("sparse_ffn")]
    own = ("routed_ffn", "wide_product", "normalised_product")
    return {"cpu" if any(n in target for n in own) else node.args[-1] for target, node in targets}


@built
def test_the_core_is_what_computes_unless_told_otherwise() -> None:
    assert {d: choose(torch.zeros(1, dtype=d)) for d in cpu.DTYPES} == dict.fromkeys(cpu.DTYPES, "cpu")
    assert choose(torch.zeros(1, dtype=torch.float64)) == "torch"


@built
@every_layer
def test_compiled_and_exported_graphs_call_the_core(name: str) -> None:
    torch._dynamo.reset()
    layer, x, seen = LAYERS[name](), torch.randn(6, 8), set()

    def look(module: torch.fx.GraphModule, inputs: object) -> object:
        seen.update(backends_of(module.graph))
        return module.forward

    with sf.backend("cpu"):
        y = torch.compile(layer, fullgraph=True, backend=look)(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()
        assert seen == {"cpu"}
        program = torch.export.export(layer.eval(), (x,))
        assert backends_of(program.graph) == {"cpu"}
        torch.testing.assert_close(program.module()(x), layer(x))
    assert all(p.grad is not None for p in layer.parameters())


@built
@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_on_the_core_in_its_own_dtype(name: str, dtype: torch.dtype) -> None:
    layer, x = LAYERS[name](), torch.randn(60, 8)
    with sf.backend("cpu"):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)
        (y.float().square().sum() + sf.aux_loss(layer)).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


class Copied(TorchDispatchMode):
    """The sizes of the tensors that were copied in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten._to_copy.default:
            self.sizes.add(args[0].numel())
        return op(*args, **(kwargs or {}))


def memory(**options: Any) -> nn.Module:
    return sf.ProductKeyMemory(8, 10, 3, **options)


STORES: dict[str, Callable[[], nn.Module]] = {
    "SigmaMoE": lambda: sf.SigmaMoE(8, 20, 4, 2),
    "SigmaMoE, GLU": lambda: sf.SigmaMoE(8, 20, 4, 2, activation="silu", glu=True, dropout=0.5),
    "TopKFFN": lambda: sf.TopKFFN(8, 100, 10),
    "TopKFFN, GLU": lambda: sf.TopKFFN(8, 100, 10, activation="silu", glu=True, rank_by="gate"),
    "SwitchHeadAttention": lambda: SwitchHeadAttention(8, 2, 20, d_head=4),
    "ProductKeyMemory, experts": lambda: memory(experts=True),
    "ProductKeyMemory": memory,
    "ProductKeyMemory, sparse": lambda: memory(sparse_grad=True),
}
"""Layers with parameters that few tokens read a small part of."""


@built
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STORES)
def test_autocast_copies_no_store_for_few_tokens(
    name: str, dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products are in the parameters' own dtype, and on processors without instructions for 16 bits all are.

    Rows that are only added up are so for any number of tokens.
    """
    monkeypatch.setattr(products, "slow_dtypes", lambda: (dtype,) if slow else ())
    layer = STORES[name]()
    stores = {p.numel() for p in layer.parameters() if p.numel() >= 600}
    added = name.startswith("ProductKeyMemory") and "experts" not in name
    for tokens, training in itertools.product((3, 500), (True, False)):
        layer.train(training)
        x = torch.randn(1, tokens, 8, requires_grad=training)
        with sf.backend("cpu"), torch.autocast("cpu", dtype), Copied() as copied:
            y = layer(x)
        assert y.dtype == dtype
        assert bool(copied.sizes & stores) == (tokens == 500 and not added and not slow)
        if training:
            y.float().square().sum().backward()
    assert stores
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(make() for make in LAYERS.values()))


def train(model: nn.Module, x: torch.Tensor) -> None:
    with sf.backend("cpu"):
        model(x).square().mean().backward()


def rank_of_two(rank: int, batch: torch.Tensor) -> list[torch.Tensor | None]:
    model = DistributedDataParallel(stack())
    for _ in range(2):  # the second step fails if the first left a parameter without a gradient
        model.zero_grad()
        train(model, batch[rank])
    return [p.grad for p in model.parameters()]


@built
def test_distributed_data_parallel_on_the_core_gives_the_gradient_of_both_batches() -> None:
    """Without find_unused_parameters, though either rank leaves experts and value rows unused."""
    x = torch.randn(2, 5, 8)
    first, second = processes.run(rank_of_two, 2, x)
    model = stack()
    train(model, x.flatten(0, 1))
    for p, a, b in zip(model.parameters(), first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


@built
def test_forcing_the_core_where_it_cannot_compute_is_an_error() -> None:
    with sf.backend("cpu"):
        layer = sf.SigmaMoE(8, 4, 4, 2, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="'cpu' is forced, but it has no float64"):
            layer(torch.randn(3, 8, dtype=torch.float64))
        layer = sf.SigmaMoE(8, 4, 4, 2, device="meta")
        with pytest.raises(RuntimeError, match="it computes on the CPU, not on meta"):
            layer(torch.randn(3, 8, device="meta"))


@pytest.mark.parametrize(
    ("system", "remedy"),
    [
        ("linux", "Install a C++ compiler and reinstall"),
        ("darwin", "Install a C++ compiler and reinstall"),
        ("win32", "It is for Linux and macOS"),
    ],
)
def test_a_missing_core_is_told_of_in_the_dtypes_that_it_has(
    system: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cpu.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "PROBLEM", "it was not built")
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(choice, "sys", SimpleNamespace(platform=system))
    assert choose(torch.zeros(1, dtype=torch.float64)) == "torch"  # a warning is an error here
    with pytest.warns(sf.SparseFFNWarning, match=rf"the CPU core is missing \(it was not built\).*{re.escape(remedy)}"):
        assert choose(torch.zeros(1)) == "torch"


@pytest.mark.exhaustive
def test_without_the_core_torch_computes_after_one_warning_that_says_what_to_do() -> None:
    code = """
import warnings, torch, sparse_ffn as sf
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer = sf.SigmaMoE(8, 4, 4, 2)
    for _ in range(3):
        layer(torch.randn(5, 8)).sum().backward()
print([str(w.message) for w in caught if w.category is sf.SparseFFNWarning])
try:
    with sf.backend("cpu"):
        layer(torch.randn(5, 8))
except RuntimeError as error:
    print(error)
"""
    result = run(code, SPARSE_FFN_LIBRARY="/nowhere/lib.so")
    warning, error = result.stdout.splitlines()
    assert warning.count("the CPU core is missing") == 1
    assert "Unset SPARSE_FFN_LIBRARY, or name a library that csrc/build.sh has made of these sources" in warning
    assert "backend 'cpu' is forced, but the CPU core is missing" in error
    info = subprocess.run(
        [sys.executable, "-m", "sparse_ffn.info"],
        env={**os.environ, "SPARSE_FFN_LIBRARY": "/nowhere/lib.so"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "torch (automatic" in info
    assert "cannot be loaded" in info


@pytest.mark.exhaustive
def test_a_forced_torch_backend_never_warns_of_the_missing_core() -> None:
    code = "import torch, sparse_ffn as sf; sf.SigmaMoE(8, 4, 4, 2)(torch.randn(5, 8))"
    result = run(code, SPARSE_FFN_LIBRARY="/nowhere/lib.so", SPARSE_FFN_BACKEND="torch", PYTHONWARNINGS="error")
    assert result.returncode == 0, result.stderr


@built
def test_memory_of_a_freed_output_serves_the_next_one_of_its_size() -> None:
    rows = cpu.HUGE_PAGE // 4
    kept = cpu.empty(rows, 3, dtype=torch.float32).fill_(1.0)
    freed = cpu.empty(rows, 3, dtype=torch.float32)
    assert freed.data_ptr() % cpu.HUGE_PAGE == 0
    address = freed.data_ptr()
    del freed
    assert cpu.empty(rows, 5, dtype=torch.float32).data_ptr() != address
    assert cpu.empty(rows, 3, dtype=torch.float32).data_ptr() == address
    assert kept.eq(1).all()


@built
def test_large_outputs_and_gradients_can_be_changed_in_place() -> None:
    layer, x = sf.SigmaMoE(64, 4, 2, 1), torch.randn(cpu.HUGE_PAGE // 4 // 64, 64, requires_grad=True)
    y = layer(x)
    y += x
    y.mul_(2)
    [dx] = torch.autograd.grad(y.sum(), x)
    [expected] = torch.autograd.grad(((layer(x) + x) * 2).sum(), x)
    assert torch.equal(dx, expected)
    factor = torch.tensor(3.0, requires_grad=True)
    assert torch.autograd.grad(dx.mul_(factor).sum(), factor)[0].isclose(expected.sum())


@built
def test_a_row_sparse_gradient_holds_the_rows_that_were_read_and_no_more() -> None:
    values, index = torch.randn(3000, 4, requires_grad=True), torch.tensor([[7, 2999], [7, 0]]).expand(500, 2, 2)
    y = functional.weighted_bag(values, index.flatten(0, 1), torch.ones(1000, 2), sparse_grad=True)
    [dvalues] = torch.autograd.grad(y.sum(), values)
    assert dvalues.indices().tolist() == [[0, 7, 2999]]
    assert dvalues.values().untyped_storage().nbytes() == 3 * 4 * 4
    assert dvalues.values().tolist() == [[500.0] * 4, [1000.0] * 4, [500.0] * 4]


@built
def test_no_more_than_256_mib_of_freed_outputs_are_kept() -> None:
    code = """
from pathlib import Path
import torch
from sparse_ffn.backends import cpu
def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20
cpu.empty(2 << 20, dtype=torch.uint8).zero_()
before = resident()
tensors = [cpu.empty((16 << 20) + 4096 * i, dtype=torch.uint8).zero_() for i in range(40)]
assert resident() > before + 600, resident() - before
del tensors
print(resident() - before)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert 100 < float(done.stdout) < 290


@built
def test_scratch_of_a_call_of_many_tokens_is_given_back() -> None:
    """It holds the hidden units; those of void slots are not touched."""

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    keys, values, tokens = torch.zeros(1, 4096, 1), torch.zeros(1, 4096, 1), (256 << 20) // 4096 // 4 + 1
    void, gate = torch.ones(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    with torch.no_grad():
        flat.expert_ffn(torch.ones(99, 1), keys, values, void[:99], gate[:99])  # threads map memory when they begin
        before = mapped()
        assert not flat.expert_ffn(torch.ones(tokens, 1), keys, values, void, gate).any()
    assert mapped() - before < 64 << 20


@built
def test_so_is_that_of_each_thread() -> None:
    """In the gradient of a bag it grows with the tokens: here by 100 MiB each."""
    code = """
from pathlib import Path
import torch, sparse_ffn as sf
torch.set_num_threads(2)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
def step(tokens):
    values, index = torch.randn(100, 8, requires_grad=True), torch.randint(100, (tokens, 1))
    sf.functional.weighted_bag(values, index, torch.ones(tokens, 1)).sum().backward()
step(100)
before = resident()
step(400_000)
print(resident() - before)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100


@built
@pytest.mark.exhaustive
def test_memory_that_is_kept_is_given_back_before_there_is_none() -> None:
    code = """
import resource, torch
from pathlib import Path
from sparse_ffn import functional
from sparse_ffn.backends import cpu
def keep(mib):
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    cpu.empty(mib << 20, dtype=torch.uint8)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (20 << 20), resource.RLIM_INFINITY))
torch.set_num_threads(1)
keys, values = torch.zeros(1, 4096, 1), torch.zeros(1, 4096, 1)
void, gate = torch.ones(5000, 1, dtype=torch.int64), torch.ones(5000, 1)
with torch.no_grad():
    functional.expert_ffn(gate[:100], keys, values, void[:100], gate[:100])
    keep(90)
    functional.expert_ffn(gate, keys, values, void, gate)
keep(64)
assert cpu.empty(80 << 20, dtype=torch.uint8).data_ptr() % cpu.HUGE_PAGE == 0
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@built
@pytest.mark.exhaustive
def test_a_child_takes_memory_whatever_the_parents_threads_were_doing() -> None:
    code = """
import os, threading, time, torch
from sparse_ffn.backends import cpu
torch.set_num_threads(1)
def churn():
    while not stop:
        for i in range(40):
            cpu.empty((8 << 20) + i * (2 << 20), dtype=torch.uint8)
stop, thread = False, threading.Thread(target=churn)
thread.start()
for _ in range(12):
    child = os.fork()
    if not child:
        cpu.empty(4 << 20, dtype=torch.uint8)
        os._exit(0)
    for _ in range(20_000):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.001)
    else:
        os.kill(child, 9)
        stop = True
        raise SystemExit("a child hangs")
stop = True
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@built
def test_an_exported_program_says_that_it_wants_the_core(tmp_path: Path) -> None:
    """It keeps the backend that it was made with."""
    code = f"""
import torch, sparse_ffn as sf
path = {str(tmp_path / "layer.pt2")!r}
"""
    make = "torch.export.save(torch.export.export(sf.TopKFFN(8, 16, 4).eval(), (torch.randn(5, 8),)), path)"
    use = "torch.export.load(path).module()(torch.randn(5, 8))"
    assert not run(code + make).returncode
    assert not run(code + use).returncode
    error = run(code + use, SPARSE_FFN_LIBRARY="/nowhere/lib.so").stderr
    assert "keeps its backend, here cpu: make one inside of sparse_ffn.backend('torch')" in error
    with_torch = f"with sf.backend('torch'): {make}"
    assert not run(code + with_torch).returncode
    assert not run(code + use, SPARSE_FFN_LIBRARY="/nowhere/lib.so").returncode
