"""Many processes in one: torch simulates 8 to 64 ranks; a group of 64 without the others counts what is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_ffn as sf
from benchmarks import simulated_ranks
from benchmarks.simulated_ranks import fake_group
from sparse_ffn.parallel import ExpertParallel, HiddenParallel, MemoryParallel, traffic

D = 8
simulates = pytest.mark.skipif(not simulated_ranks.available(), reason="newer versions of torch simulate ranks")


@simulates
@pytest.mark.parametrize("exchange", ["gather", "slots", "tokens"])
def test_eight_ranks(exchange: str) -> None:
    with fake_group(8):
        assert simulated_ranks.simulate(exchange, 8).error < 1e-12


@simulates
@pytest.mark.exhaustive
@pytest.mark.parametrize("exchange", ["gather", "slots", "tokens"])
@pytest.mark.parametrize("ranks", [16, 64])
def test_many_ranks(exchange: str, ranks: int) -> None:
    with fake_group(ranks):
        assert simulated_ranks.simulate(exchange, ranks).error < 1e-12


def test_one_rank_computes_as_the_layer_does() -> None:
    """To the bit and in one op, as long as its router is plain. On gloo: torch 2.9 scatters garbage in a fake group."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        found = [alone(rest) for rest in (None, "leave", "replicate")]
    finally:
        dist.destroy_process_group()
    for tensors in found[1:]:
        torch.testing.assert_close(tensors, found[0])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))


def alone(rest: str | None) -> list[Any]:
    """Output and gradients of a layer in a group of one, or without a group."""
    torch.manual_seed(2)
    layer, x = sf.SigmaMoE(D, 5, 4, 2, glu=True), torch.randn(7, D, requires_grad=True)
    if rest is not None:
        parallelize_module(layer, init_device_mesh("cpu", (1,)), ExpertParallel(rest=rest))
    y = layer(x)
    (y.square().sum() + sf.aux_loss(layer)).backward()
    assert ("routed_ffn" in str(y.grad_fn)) == (rest != "replicate")
    grads: list[Any] = [p.grad for p in layer.parameters()]
    return [y, x.grad, *(g.to_local() if isinstance(g, DTensor) else g for g in grads)]


# ------------------------------------------------------------------------------------------------ collectives

RANKS, TOKENS, D_OUT = 64, 2, 6
NAMES = {"all_to_all_single": "all_to_all", "all_gather_into_tensor": "all_gather",
         "reduce_scatter_tensor": "reduce_scatter", "all_reduce": "all_reduce"}  # fmt: skip


class Wire(TorchDispatchMode):
    """Adds up what is sent, and delivers what the fake group does not, where all ranks send the same."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "_c10d_functional" and name in NAMES:
            x, off = args[0], (RANKS - 1) / RANKS
            if name == "all_to_all_single":
                out.copy_(x)
            if x.dtype != torch.int64:  # those tell how many come
                self.sent += x.nbytes * {"all_gather": RANKS - 1, "all_reduce": 2 * off}.get(NAMES[name], off)
        return out


def counted(layer: Any, style: ParallelStyle) -> tuple[dict[str, int], float, float]:
    """Collectives of a step on one of 64 ranks, and the bytes that it sends in the forward and in the backward pass."""
    with fake_group(RANKS):
        parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), style)
        with CommDebugMode() as counts, Wire() as wire:
            y = layer(torch.randn(TOKENS, D, requires_grad=True))
            forward = wire.sent
            y.square().sum().backward()
    found = {NAMES[str(op).rpartition(".")[2]]: n for op, n in counts.get_comm_counts().items() if n}
    return found, forward, wire.sent - forward


EXCHANGED = {
    "gather": {"all_to_all": 1, "all_gather": 4, "reduce_scatter": 3},
    "slots": {"all_to_all": 7},
    "tokens": {"all_to_all": 8},
}


@pytest.mark.parametrize("exchange", EXCHANGED)
def test_collectives_and_bytes_of_exchanged_experts(exchange: str) -> None:
    """Each token has an expert on every rank, so that the even routing of ``traffic`` is no estimate."""
    layer = sf.SigmaMoE(D, RANKS, 4, RANKS, d_out=D_OUT)
    expected = traffic(layer, TOKENS, RANKS, dtype=torch.float32)
    counts, forward, backward = counted(layer, ExpertParallel(exchange=exchange))
    assert counts == EXCHANGED[exchange]
    assert forward == pytest.approx(expected.forward[exchange], rel=1e-12)
    indices = {"gather": RANKS - 1, "slots": 0, "tokens": RANKS - 1}[exchange] * TOKENS * RANKS * 4
    assert backward == pytest.approx(forward - indices, rel=1e-12)


SPLIT: dict[str, tuple[Any, ParallelStyle, dict[str, int]]] = {
    "experts of the same tokens": (
        lambda: sf.SigmaMoE(D, RANKS, 4, 2), ExpertParallel(input_layouts=Replicate()), {"all_reduce": 3},
    ),
    "units of the same tokens": (lambda: sf.DenseFFN(D, RANKS), HiddenParallel(), {"all_reduce": 2}),
    "units of own tokens": (
        lambda: sf.DenseFFN(D, RANKS), HiddenParallel(input_layouts=Shard(0)),
        {"all_to_all": 1, "all_gather": 2, "reduce_scatter": 2},
    ),
    "units of own tokens' experts": (
        lambda: sf.SigmaMoE(D, 4, RANKS, 2), HiddenParallel(input_layouts=Shard(0)), EXCHANGED["gather"],
    ),
    "best units of the same tokens": (
        lambda: sf.TopKFFN(D, RANKS, 4), HiddenParallel(), {"all_reduce": 2, "all_gather": 1},
    ),
    "columns": (
        lambda: sf.ProductKeyMemory(D, 4, 2, d_out=RANKS), MemoryParallel(shard="columns"),
        {"all_to_all": 3, "all_gather": 2, "reduce_scatter": 1},
    ),
    "rows": (lambda: sf.ProductKeyMemory(D, 8, 8, n_heads=1), MemoryParallel(shard="rows"), {"all_to_all": 7}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_collectives_of_other_splits(name: str) -> None:
    make, style, expected = SPLIT[name]
    layer = make()
    counts, forward, _ = counted(layer, style)
    assert counts == expected
    if name == "columns":
        assert forward == pytest.approx(traffic(layer, TOKENS, RANKS, dtype=torch.float32).forward[name], rel=1e-12)


# ------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_traffic_is_the_bytes_of_rows_that_leave_a_rank_of_evenly_drawn_experts(ranks: int) -> None:
    experts, k, tokens, d_out = 64, 4, 20000, 6
    with torch.device("meta"):
        found = traffic(sf.SigmaMoE(D, experts, 4, k, d_out=d_out), tokens, ranks, dtype=torch.float32)
    owner = torch.rand(tokens, experts).argsort(1)[:, :k] // (experts // ranks)  # rank 0 sends
    needs = torch.zeros(tokens, ranks, dtype=torch.bool).scatter(1, owner, True)
    row = (D + d_out) * 4
    counted = {
        "gather": (ranks - 1) * tokens * (row + k * 8),
        "slots": int((owner != 0).sum()) * (row + 4),
        "tokens": int(needs[:, 1:].sum()) * (row + k * 8),
    }
    assert found.forward == pytest.approx(counted, rel=0.02)


def test_traffic_is_of_layers_that_can_be_split() -> None:
    layer = sf.SigmaMoE(32, 4, 32, 2)
    sf.quantize_experts_(layer)
    with pytest.raises(ValueError, match="dequantize_experts_"):
        traffic(layer, 10, 2)


def test_traffic_of_more_slots_than_experts_is_that_of_the_experts() -> None:
    with torch.device("meta"):
        found = traffic(sf.MoE(D, 4, 4, 6, null_experts=4), 10, 2, dtype=torch.float32)
        every = traffic(sf.MoE(D, 4, 4, 4), 10, 2, dtype=torch.float32)
    assert found.auto == every.auto
    assert found.forward["slots"] == every.forward["slots"]
    assert found.forward["tokens"] == 10 * (D + D + 6 * 2) * 4  # all go to the other process


def test_traffic_says_when_not_to_split() -> None:
    with torch.device("meta"):
        few, many = (sf.SigmaMoE(1024, n, 128, 8, glu=True) for n in (8, 512))
    assert traffic(few, 16384, 8).step > traffic(few, 16384, 8).fsdp
    assert traffic(many, 4096, 8).step < traffic(many, 4096, 8).fsdp
    for layer in (few, many):
        found = traffic(layer, 16384, 8)
        even = traffic(layer, round(found.tokens_below), 8)
        split = 3 * sum(p.numel() for n, p in layer.named_parameters() if "router" not in n) * 2 * 7 / 8
        assert even.step == pytest.approx(split, rel=1e-2)
    one = traffic(few, 100, 1)
    assert one.step == one.fsdp == 0
    assert one.parameters == one.parameters_whole


def test_what_no_split_is_for_has_no_traffic() -> None:
    with pytest.raises(ValueError, match="experts = True, which MemoryParallel does not split"):
        traffic(sf.ProductKeyMemory(D, 4, 2, experts=True), 10, 2)


def test_of_16_processes_8_are_on_other_nodes() -> None:
    with torch.device("meta"):
        layer = sf.SigmaMoE(D, 64, 4, 4)
    found = traffic(layer, 100, 16)
    assert found.between_nodes["slots"] == pytest.approx(found.forward["slots"] * 8 / 15)
    assert not any(traffic(layer, 100, 8).between_nodes.values())
