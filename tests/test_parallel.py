"""Layers that processes share, against one process with all tokens: outputs and all gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import sparse_ffn as sf
from sparse_ffn.parallel import ExpertParallel, HiddenParallel, MemoryParallel

pytestmark = pytest.mark.timeout(900)
D = 16
EXCHANGES = ("gather", "slots", "tokens")
MIXTURES: dict[str, Callable[..., sf.MoE]] = {
    "plain": lambda experts, **o: sf.SigmaMoE(D, experts, 8, 2, balance_weight=1.0, **o),
    "glu and biases": lambda experts, **o: sf.SoftmaxMoE(
        D, experts, 8, 3, glu=True, bias=True, activation="silu", balance="z", balance_weight=1.0, **o
    ),
    "injected": lambda experts, **o: sf.SigmaMoE(D, experts, 8, 2, aux="inject", balance_weight=1.0, **o),
    "one expert, other width": lambda experts, **o: sf.SwitchMoE(D, experts, 8, 1, d_out=6, balance_weight=1.0, **o),
    "null experts": lambda experts, **o: sf.SoftmaxMoE(
        D, experts, 8, 3, null_experts=3, null_kind="constant", balance_weight=1.0, **o
    ),
    "all losses": lambda experts, **o: sf.MoE(
        D, experts, 8, 2, router="softmax", balance=("entropy", "switch", "cv2", "z"), balance_weight=(1.0,) * 4, **o
    ),
}


def mixture(name: str, experts: int, **options: Any) -> sf.MoE:
    torch.manual_seed(1)
    layer = MIXTURES[name](experts, dtype=torch.float64, **options)
    for bias in (layer.key_bias, layer.out_bias, layer.constants):
        if bias is not None:
            nn.init.normal_(bias)
    return layer


def tokens(rank: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(10 + rank), dtype=torch.float64).to(dtype)


def trained(layer: nn.Module, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Output and the tokens' gradient of a step whose loss is a sum over tokens."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (scale * y.square().sum() + sf.aux_loss(layer)).backward()
    assert x.grad is not None
    return y.detach(), x.grad


def whole(layer: nn.Module, world: int) -> dict[str, Tensor]:
    """The gradients as DDP or FSDP would leave them: those that each process has are averaged."""
    found = {}
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        if isinstance(p, DTensor):
            assert isinstance(p.grad, DTensor), name
            found[name] = p.grad.full_tensor()
        else:
            found[name] = p.grad.clone()
            if world > 1:
                dist.all_reduce(found[name])
                found[name] /= world
    return found


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error relative to the largest number."""
    assert {n: t.shape for n, t in actual.items()} == {n: t.shape for n, t in expected.items()}
    errors = [(actual[n] - e).abs().max() / e.abs().max().clamp_min(1e-6) for n, e in expected.items() if e.numel()]
    return torch.stack(errors).max().item()  # NaN if any is


def error(rank: int, world: int, alone: nn.Module, layer: nn.Module, counts: tuple[int, ...]) -> float:
    """How far a split layer with this process's tokens is from one process that has the tokens of all."""
    all_x = [tokens(r, n) for r, n in enumerate(counts)]
    Y, X = trained(alone, torch.cat(all_x))
    y, x = trained(layer, all_x[rank], world)  # the mean over processes of what it sums to
    part = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in alone.named_parameters()}
    expected = {"y": Y[part], "x": X[part] * world, **{n: p.grad for n, p in alone.named_parameters()}}
    return worst({"y": y, "x": x, **whole(layer, world)}, expected)


def compared(
    rank: int, cases: list[tuple[str, str, int, tuple[int, ...]]], options: dict[str, Any]
) -> dict[Any, float]:
    """Errors of exchanged experts against one process that has the tokens of all."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    found = {}
    for case in cases:
        exchange, name, experts, counts = case
        layer = mixture(name, experts, sync_balance=True)
        parallelize_module(layer, mesh, ExpertParallel(exchange=exchange, **options))
        if options.get("rest") == "replicate":
            assert all(isinstance(p, DTensor) for p in layer.parameters())
        found[case] = error(rank, world, mixture(name, experts), layer, counts)
    return found


def check(found: list[dict[Any, float]], tolerance: float = 1e-12) -> None:
    bad = {case: error for results in found for case, error in results.items() if not error < tolerance}
    assert not bad, bad


def test_exchanged_experts_compute_what_one_process_computes() -> None:
    cases = [(exchange, "glu and biases", 5, (6, 3)) for exchange in EXCHANGES]
    cases += [("tokens", "plain", 4, (5, 0)), ("slots", "injected", 3, (0, 4)), ("gather", "plain", 1 + 3, (2, 5))]
    check(processes.run(compared, 2, cases, {}))


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("rest", ["leave", "replicate"])
def test_every_exchange_and_mixture_computes_what_one_process_computes(world: int, rest: str) -> None:
    """Experts that do not divide, fewer than processes, uneven and absent tokens."""
    counts = ((5, 5, 5, 5), (7, 0, 3, 1), (0, 0, 4, 0))
    cases = [
        (exchange, name, experts, count[-world:])
        for exchange in (*EXCHANGES, "auto")
        for name in MIXTURES
        for experts, count in zip((8, 5, 3), counts, strict=True)
    ]
    check(processes.run(compared, world, cases, {"rest": rest}))


def replicated(rank: int, names: list[str]) -> dict[Any, float]:
    """Tokens that all processes have: the group works as one process."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    found = {}
    for name in names:
        for dropout in (0.0, 0.5):
            options = {"dropout": dropout, "expert_dropout": dropout / 2}
            x, alone, layer = tokens(0, 9), mixture(name, 5, **options), mixture(name, 5, **options)
            parallelize_module(layer, mesh, ExpertParallel(input_layouts=Replicate()))
            torch.manual_seed(rank if dropout else 0)  # draws differ, decisions must not
            y, dx = trained(layer, x)
            assert layer._routed is not None
            index = layer._routed[0]
            same = [torch.empty_like(index) for _ in range(world)]
            dist.all_gather(same, index)
            assert all(torch.equal(index, other) for other in same), name
            everywhere = [torch.empty_like(y) for _ in range(world)]
            dist.all_gather(everywhere, y)
            assert all(torch.equal(y, other) for other in everywhere)
            if not dropout:
                Y, X = trained(alone, x)
                expected = {"y": Y, "x": X, **{n: p.grad for n, p in alone.named_parameters()}}
                grads = {
                    n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                    for n, p in layer.named_parameters()
                }
                found[name] = worst({"y": y, "x": dx, **grads}, expected)
    return found


@pytest.mark.exhaustive
def test_experts_of_tokens_that_all_processes_have() -> None:
    check(processes.run(replicated, 2, ["glu and biases"]))


@pytest.mark.exhaustive
def test_experts_of_tokens_that_all_processes_have_in_every_mixture() -> None:
    check(processes.run(replicated, 3, list(MIXTURES)))


# ------------------------------------------------------------------------------------------------ units


def dense(name: str, units: int, **options: Any) -> sf.SparseFFN:
    torch.manual_seed(2)
    options = {"dtype": torch.float64, "bias": True, **options}
    layer: Any = {
        "dense": lambda: sf.DenseFFN(D, units, **options),
        "dense glu": lambda: sf.DenseFFN(D, units, glu=True, activation="silu", d_out=6, **options),
        "topk": lambda: sf.TopKFFN(D, units, units // 2, **options),
        "topk norms": lambda: sf.TopKFFN(D, units, 3, glu=True, activation="gelu", norm_aware=True, **options),
        "topk gates": lambda: sf.TopKFFN(D, units, 3, glu=True, activation="gelu", rank_by="gate", **options),
        "experts": lambda: sf.SoftmaxMoE(D, 4, units, 2, glu=True, activation="silu", balance_weight=1.0, **options),
    }[name]()
    for bias in (layer.key_bias, layer.out_bias):
        nn.init.normal_(bias)
    return layer


def by_units(rank: int, cases: list[tuple[str, int, float]]) -> dict[Any, float]:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    found = {}
    for name, units, dropout in cases:
        alone, layer, x = dense(name, units, dropout=dropout), dense(name, units, dropout=dropout), tokens(0, 7)
        parallelize_module(layer, mesh, HiddenParallel())
        torch.manual_seed(3)
        Y, X = trained(alone, x)
        torch.manual_seed(3)
        y, dx = trained(layer, x)
        grads = {
            n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in layer.named_parameters()
        }
        expected = {"y": Y, "x": X, **{n: p.grad for n, p in alone.named_parameters()}}
        found[name, units, dropout] = worst({"y": y, "x": dx, **grads}, expected)
    return found


NAMES = ("dense", "dense glu", "topk", "topk norms", "topk gates", "experts")


def test_units_of_several_processes_compute_what_one_computes() -> None:
    check(processes.run(by_units, 2, [("dense glu", 7, 0.0), ("topk norms", 7, 0.5), ("experts", 5, 0.5)]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [2, 4])
def test_units_of_every_layer(world: int) -> None:
    """Uneven units, fewer candidates than k, and dropout, whose draws are those of one process."""
    check(processes.run(by_units, world, [(n, units, p) for n in NAMES for units in (8, 7) for p in (0.0, 0.5)]))


def by_units_of_own_tokens(rank: int, cases: list[tuple[str, int, tuple[int, ...]]]) -> dict[Any, float]:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    found = {}
    for case in cases:
        name, units, counts = case
        layer = dense(name, units, **({"sync_balance": True} if name == "experts" else {}))
        parallelize_module(layer, mesh, HiddenParallel(input_layouts=Shard(0)))
        found[case] = error(rank, world, dense(name, units), layer, counts)
    return found


@pytest.mark.exhaustive
def test_units_of_several_processes_for_tokens_of_each() -> None:
    """As one process with the tokens of all; a process may have none."""
    counts = ((3, 3, 3), (4, 0, 2))
    check(processes.run(by_units_of_own_tokens, 3, [(name, 7, count) for name in NAMES for count in counts]))


# ------------------------------------------------------------------------------------------------ memory


def memory(d_out: int = 6, **options: Any) -> sf.ProductKeyMemory:
    torch.manual_seed(4)
    return sf.ProductKeyMemory(
        D, 5, 4, n_heads=2, query_dim=8, activation="softmax", d_out=d_out, dtype=torch.float64, **options
    )


def by_values(rank: int, cases: list[tuple[str, int, tuple[int, ...]]]) -> dict[Any, float]:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    found = {}
    for case in cases:
        shard, d_out, counts = case
        layer = memory(d_out)
        parallelize_module(layer, mesh, MemoryParallel(shard=shard))
        found[case] = error(rank, world, memory(d_out), layer, counts)
    return found


def test_values_of_several_processes_compute_what_one_computes() -> None:
    check(processes.run(by_values, 2, [("columns", 5, (3, 0)), ("rows", 6, (4, 2))]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [2, 3, 4])
def test_values_by_rows_and_columns(world: int) -> None:
    counts = ((3, 3, 3, 3), (4, 0, 1, 2), (0, 0, 0, 0))
    check(
        processes.run(
            by_values, world,
            [(s, d_out, c[:world]) for s in ("columns", "rows", "auto") for d_out in (8, 7) for c in counts],
        )
    )  # fmt: skip
