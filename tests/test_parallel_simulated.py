"""Many processes in one: torch's LocalTensorMode runs the exchanges for 8 to 64 simulated ranks, all at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import sparse_ffn as sf
from sparse_ffn.parallel import ExpertParallel, traffic

local_tensor = pytest.importorskip("torch.distributed._local_tensor", reason="newer versions of torch simulate ranks")
D, TOKENS = 8, 6


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[int]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def layer(ranks: int) -> sf.MoE:
    torch.manual_seed(0)
    return sf.SigmaMoE(D, 2 * ranks, 4, 2, dtype=torch.float64)


def simulated(exchange: str, ranks: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and its gradient for the router, which all ranks must have alike."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    with local_tensor.LocalTensorMode(ranks):
        split = layer(ranks)
        parallelize_module(split, mesh, ExpertParallel(exchange=exchange))
        y: Any = split(x)
        y.square().sum().backward()
        grad: Any = split.router.weight.grad
        return y.reconcile().detach(), grad.reconcile()


def check(exchange: str, ranks: int) -> None:
    x = torch.randn(TOKENS, D, dtype=torch.float64)
    y, grad = simulated(exchange, ranks, x)
    alone = layer(ranks)
    expected = alone(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, alone.router.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exchange", ["gather", "slots", "tokens"])
@pytest.mark.parametrize("group", [8], indirect=True)
def test_eight_ranks(exchange: str, group: int) -> None:
    check(exchange, group)


@pytest.mark.exhaustive
@pytest.mark.parametrize("exchange", ["gather", "slots", "tokens"])
@pytest.mark.parametrize("group", [16, 64], indirect=True)
def test_many_ranks(exchange: str, group: int) -> None:
    check(exchange, group)


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
