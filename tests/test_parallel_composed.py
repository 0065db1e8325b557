"""Split layers together with what else a training has: a shared expert, a scaler, checkpointing, a pipeline."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

import sparse_ffn as sf
from sparse_ffn.layers import LatentMoE, SharedExpertMoE
from sparse_ffn.parallel import ExpertParallel, HiddenParallel, clip_grad_norm_, plan
from sparse_ffn.parallel.exchange import EXCHANGES

pytestmark = [pytest.mark.timeout(900), pytest.mark.exhaustive]
D = 16


def tokens(rank: int, count: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def mixture(**options: Any) -> sf.MoE:
    torch.manual_seed(6)
    return sf.SigmaMoE(D, 5, 8, 2, glu=True, balance_weight=1.0, **{"dtype": torch.float64, **options})


def full(t: Any) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def gradients(net: nn.Module) -> list[Tensor]:
    return [full(p.grad) for p in net.parameters()]


# ------------------------------------------------------------------------------------------------ a shared expert

EVENTS: list[str] = []


def recording(exchange: str, wait: bool) -> Any:
    """The exchange that notes what happens; one that waits at once would leave the wire no time."""

    class Recording(EXCHANGES[exchange]):  # type: ignore[misc]
        def dispatch(self, *given: Any) -> Any:
            waiting = super().dispatch(*given)
            EVENTS.append("sent")

            def arrive() -> Any:
                EVENTS.append("arrived")
                return waiting()

            there = arrive() if wait else None
            return (lambda: there) if wait else arrive

    return Recording


def shared_expert(latent: bool = False, **options: Any) -> SharedExpertMoE:
    torch.manual_seed(7)
    double = {"dtype": torch.float64}
    routed = LatentMoE(D, 8, 5, 8, 2, **double) if latent else mixture(**options)
    return SharedExpertMoE(routed, sf.DenseFFN(D, 8, **double), gated=True)


def split(layer: SharedExpertMoE, mesh: Any, **options: Any) -> SharedExpertMoE:
    parallelize_module(layer._own_moe(), mesh, ExpertParallel(**options))
    return layer


def run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.square().mean() + sf.aux_loss(layer)).backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *gradients(layer)]


def overlapped(rank: int) -> None:
    mesh, x = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), tokens(rank, 6 + rank)
    for latent, exchange in ((False, "gather"), (False, "slots"), (False, "tokens"), (True, "tokens")):
        found = {}
        for wait in (False, True):
            layer = split(shared_expert(latent), mesh, exchange=recording(exchange, wait))
            layer.shared.register_forward_pre_hook(lambda *_: EVENTS.append("shared"))
            EVENTS.clear()
            found[wait] = run(layer, x)
            assert (["sent", "arrived", "shared"] if wait else ["sent", "shared", "arrived"]) == EVENTS, EVENTS
            again = layer.routed(x) + torch.sigmoid(layer.gate(x)) * layer.shared(x)
            assert torch.equal(found[wait][0], again)
        assert all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))
    # checkpointing may not take the shared expert's work for the routed experts'
    expected = run(split(shared_expert(), mesh), x)
    wrapped = split(shared_expert(), mesh)
    wrapped.routed = checkpoint_wrapper(wrapped.routed)
    torch.testing.assert_close(run(wrapped, x), expected, rtol=1e-12, atol=1e-14)


def expected_of(rank: int) -> Any:
    return pytest.raises((ValueError, RuntimeError), match="shape" if rank == 1 else "rank 1 raised an error")


def told(rank: int) -> None:
    """A part that is checked before tokens travel tells the others, who wait for these."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    wide, latent, broken = split(shared_expert(), mesh), shared_expert(latent=True).routed, split(shared_expert(), mesh)
    parallelize_module(latent.moe, mesh, ExpertParallel())
    if rank == 1:
        broken.shared.values = nn.Parameter(torch.zeros(3, D, dtype=torch.float64))
    for layer, width in ((wide, D + rank), (latent, D + rank), (broken, D)):
        with expected_of(rank):
            layer(torch.zeros(3, width, dtype=torch.float64))
        if layer is not broken:
            layer(tokens(rank))  # all goes on
    # the shared expert, with tokens that travel too, hears it first, and nobody is told again
    hooked = shared_expert()
    both = {"experts": ExpertParallel(), "hidden": HiddenParallel(input_layouts=Shard(0))}
    parallelize_module(hooked, mesh, plan(hooked, **both))
    handle = hooked.routed.register_forward_hook(lambda *_: None)
    for wrong in (True, False):
        with expected_of(rank) if wrong else contextlib.nullcontext():
            hooked(torch.zeros(3, D + rank, dtype=torch.float64) if wrong else tokens(rank))
    handle.remove()
    # what raises between the check and the experts tells too
    narrow = shared_expert(latent=True).routed
    parallelize_module(narrow.moe, mesh, ExpertParallel())
    if rank == 1:
        narrow.down.register_forward_pre_hook(lambda *_: torch.zeros(2).view(3))
    with expected_of(rank):
        narrow(tokens(rank))


# ------------------------------------------------------------------------------------------------ scaled, mixed


def scaled(rank: int) -> None:
    """GradScaler, autocast, a fused or foreach optimizer, clipping: the bits of a run without a scaler."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    for options in ({"fused": True}, {"foreach": True}):
        weights = []
        for scale in (1.0, 2.0**10):
            layer = mixture(dtype=torch.float32, sync_balance=True)
            parallelize_module(layer, mesh, ExpertParallel(rest="replicate"))
            optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, **options)
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
            for step in range(2):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = layer(tokens(rank + 2 * step, dtype=torch.float32)).float().square().mean()
                scaler.scale(loss + sf.aux_loss(layer)).backward()
                scaler.unscale_(optimizer)
                assert clip_grad_norm_(layer.parameters(), 0.1).isfinite()
                scaler.step(optimizer)
                scaler.update()
            weights.append([full(p) for p in layer.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    # one process's expert overflows: no process steps, and all scale down
    optimizer.zero_grad()
    scaler.scale(layer(tokens(rank, dtype=torch.float32)).square().mean()).backward()
    if rank == 1:
        layer.keys.grad.to_local()[0, 0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(full(p), before) for p, before in zip(layer.parameters(), weights[1], strict=True))


# ------------------------------------------------------------------------------------------------ files


def saved(rank: int, path: str) -> None:
    from safetensors.torch import save_file

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    net = nn.Sequential(mixture(), sf.DenseFFN(D, 7, dtype=torch.float64))
    parallelize_module(net[0], mesh, ExpertParallel())
    parallelize_module(net[1], mesh, HiddenParallel())
    state = {name: full(t) for name, t in net.state_dict().items()}
    if rank == 0:
        save_file(state, path)


def two(rank: int, path: str) -> None:
    for part in (overlapped, told, scaled):
        part(rank)
    saved(rank, path)


def test_a_shared_expert_a_scaler_errors_and_files_in_two_processes(tmp_path: Path) -> None:
    """One pair of processes for all of it; what was saved from two loads into one."""
    from safetensors.torch import load_file

    path = str(tmp_path / "weights.safetensors")
    processes.run(two, 2, path)
    state = load_file(path)
    net = nn.Sequential(mixture(), sf.DenseFFN(D, 7, dtype=torch.float64))
    for name, whole in net.state_dict().items():  # of the same seed: what was split and saved is what was never split
        assert torch.equal(state.pop(name), whole), name
    assert not state


# ------------------------------------------------------------------------------------------------ a pipeline

STAGES, EP, MICROBATCHES, ROWS = 2, 2, 4, 3


def stage(number: int, sync: Any) -> nn.Sequential:
    torch.manual_seed(20 + number)
    options = {"balance": ("entropy", "bias"), "balance_weight": (1.0, 1.0), "aux": "inject", "dtype": torch.float64}
    # the second has more layers, and so more collectives
    layers = [sf.SigmaMoE(D, 5, 8, 2, sync_balance=sync, **options) for _ in range(1 + number)]
    return nn.Sequential(nn.Linear(D, D, dtype=torch.float64), *layers)


def batch(column: int) -> tuple[Tensor, Tensor]:
    return tokens(column, MICROBATCHES * ROWS), tokens(50 + column, MICROBATCHES * ROWS)


def squares(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum()


def pipelined(rank: int) -> dict[str, Tensor]:
    # torch 2.9's schedules send an int64 into a buffer of the default dtype, at which gloo aborts unless it has 8 bytes
    torch.set_default_dtype(torch.float64)
    mesh = init_device_mesh("cpu", (STAGES, EP), mesh_dim_names=("pp", "ep"))
    number, column = mesh["pp"].get_local_rank(), mesh["ep"].get_local_rank()
    net = stage(number, mesh["ep"].get_group())
    for layer in list(net)[1:]:
        parallelize_module(layer, mesh["ep"], ExpertParallel())
    x, target = batch(column)
    shape = torch.empty(ROWS, D, dtype=torch.float64, device="meta", requires_grad=True)
    part = PipelineStage(
        net, number, STAGES, torch.device("cpu"), input_args=shape, output_args=shape, group=mesh["pp"].get_group()
    )
    schedule = Schedule1F1B(part, MICROBATCHES, loss_fn=lambda y, t: EP * squares(y, t), scale_grads=False)
    schedule.step(*([x] if number == 0 else []), target=target if number == STAGES - 1 else None)
    sf.update_router_bias(net)
    found = {}
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        found[name] = full(p.grad)
        if not isinstance(p, DTensor):
            dist.all_reduce(found[name], group=mesh["ep"].get_group())
            found[name] /= EP
    return {**found, **{name: b for name, b in net.named_buffers() if name.endswith("bias")}}


def test_a_pipeline_of_split_layers_with_synchronised_balance_hangs_nobody() -> None:
    """1F1B over two stages of two processes: gradients and biases are those of one process."""
    found = processes.run(pipelined, STAGES * EP)
    alone = [stage(number, False) for number in range(STAGES)]
    columns = [batch(column) for column in range(EP)]
    for m in range(MICROBATCHES):
        x, target = (torch.cat([c[i][m * ROWS : (m + 1) * ROWS] for c in columns]) for i in range(2))
        squares(alone[1](alone[0](x)), target).backward()
    for number, net in enumerate(alone):
        sf.update_router_bias(net)
        expected = {n: p.grad for n, p in net.named_parameters()}
        expected |= {name: b for name, b in net.named_buffers() if name.endswith("bias")}
        assert any(b.any() for name, b in expected.items() if name.endswith("router.bias"))
        for results in found[number * EP : (number + 1) * EP]:
            torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-12)
