"""Split layers inside of what trains them: FSDP2, HSDP, DDP, optimizers, clipping, checkpoints, compilers, failures."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import sparse_ffn as sf
from sparse_ffn.layers import LowRankMoE, MixedMoE, SharedExpertMoE
from sparse_ffn.parallel import (
    ExpertParallel,
    HiddenParallel,
    MemoryParallel,
    clip_grad_norm_,
    ddp_ignore,
    plan,
    shard_placement_fn,
)

pytestmark = pytest.mark.timeout(900)
D = 16
TWO_MESHES = hasattr(_fsdp_common, "ShardPlacementResult")
"""Whether this version of torch shards parameters of one module over several meshes."""


def model(sync: bool = True) -> nn.Sequential:
    """Two layers to be split between others."""
    torch.manual_seed(5)
    double = {"dtype": torch.float64}
    routed = sf.SigmaMoE(D, 7, 8, 2, glu=True, bias=True, balance_weight=1.0, sync_balance=sync, **double)
    shared = SharedExpertMoE(routed, sf.DenseFFN(D, 8, **double), gated=True)
    memory = sf.ProductKeyMemory(D, 4, 3, query_dim=8, activation="softmax", **double)
    return nn.Sequential(nn.Linear(D, D, **double), shared, memory, nn.Linear(D, D, **double))


def tokens(rank: int, count: int = 6) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def split(net: nn.Module, mesh: Any, rest: str = "leave", **options: Any) -> nn.Module:
    styles = {"experts": ExpertParallel(rest=rest, **options), "memory": MemoryParallel()}
    return parallelize_module(net, mesh, plan(net, **styles))


def step(net: nn.Module, x: Tensor) -> Tensor:
    y = net(x)
    loss = y.square().mean() + sf.aux_loss(net)
    loss.backward()
    return y.detach()


def alone(world: int) -> dict[str, Tensor]:
    """Gradients of one process with the tokens of all."""
    net = model(sync=False)
    step(net, torch.cat([tokens(r) for r in range(world)]))
    return {name: p.grad for name, p in net.named_parameters()}  # type: ignore[misc]


def full(t: Any) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): full(p.grad) for name, p in net.named_parameters()}


def near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        torch.testing.assert_close(actual[name], e, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------ data parallel


def under_ddp(rank: int) -> None:
    for rest in ("leave", "replicate"):
        ddp_and_clipping(rank, rest)


def ddp_and_clipping(rank: int, rest: str) -> None:
    world = dist.get_world_size()
    net = split(model(), init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)), rest)
    ddp_ignore(net)
    wrapped = DistributedDataParallel(net)
    for _ in range(2):  # an unused parameter of the step before would raise here
        wrapped.zero_grad()
        step(wrapped, tokens(rank))
    near(gradients(wrapped), alone(world))
    reference = model(sync=False)
    step(reference, torch.cat([tokens(r) for r in range(world)]))
    for most, norm_type in ((float("inf"), 2.0), (0.05, 2.0), (0.05, 1.0), (0.05, float("inf"))):
        norm = clip_grad_norm_(wrapped.parameters(), most, norm_type)
        expected = nn.utils.clip_grad_norm_(reference.parameters(), most, norm_type)
        torch.testing.assert_close(norm, expected)
        near(gradients(wrapped), {n: p.grad for n, p in reference.named_parameters()})  # type: ignore[misc]


def test_ddp_with_split_layers_and_clipping() -> None:
    processes.run(under_ddp, 2)


def under_fsdp(rank: int, ep: int, rest: str, hybrid: bool) -> None:
    world = dist.get_world_size()
    flat = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    if hybrid:
        mesh = init_device_mesh("cpu", (2, world // ep // 2, ep), mesh_dim_names=("r", "s", "ep"))
        outer, inner = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s")), mesh["r", "s"]
    else:
        mesh = init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("edp", "ep"))
        outer, inner = flat, mesh["edp"]
    if rest == "replicate":  # a mesh for each module, which every version of torch knows
        net = model()
        parallelize_module(net, mesh["ep"], plan(net, experts=ExpertParallel(rest=rest)))
        fully_shard(net[1].routed, mesh=inner)
        fully_shard(net, mesh=outer)
    else:
        net = split(model(), mesh["ep"])
        fully_shard(net, mesh=outer, shard_placement_fn=shard_placement_fn(net, outer, inner))
    step(net, tokens(rank))
    near(gradients(net), alone(world))
    reference = model(sync=False)
    step(reference, torch.cat([tokens(r) for r in range(world)]))
    torch.testing.assert_close(
        clip_grad_norm_(net.parameters(), 0.1), nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    )
    near(gradients(net), {n: p.grad for n, p in reference.named_parameters()})  # type: ignore[misc]


@pytest.mark.exhaustive
def test_fsdp_with_split_layers() -> None:
    processes.run(under_fsdp, 2, 2, "leave" if TWO_MESHES else "replicate", False)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("rest", "ep"), [("leave", 1), ("leave", 2), ("replicate", 2), ("replicate", 4)])
def test_fsdp_in_two_dimensions_with_split_layers(ep: int, rest: str) -> None:
    if rest == "leave" and not TWO_MESHES:
        pytest.skip("this version of torch shards over one mesh")
    processes.run(under_fsdp, 4, ep, rest, False)


@pytest.mark.exhaustive
@pytest.mark.skipif(not TWO_MESHES, reason="this version of torch shards over one mesh")
def test_hsdp_with_split_layers() -> None:
    processes.run(under_fsdp, 4, 2, "leave", True)


def columns() -> nn.Sequential:
    """Layers that are split along their parameters' second dimension; of the first there is less than of processes."""
    torch.manual_seed(8)
    double = {"dtype": torch.float64}
    routed = sf.MoE(D, 1, 8, 1, bias=True, balance="none", **double)
    return nn.Sequential(nn.Linear(D, D, **double), routed, sf.ProductKeyMemory(D, 4, 3, **double))


def under_fsdp_by_columns(rank: int) -> dict[str, Tensor]:
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    net = columns()
    styles = {"hidden": HiddenParallel(input_layouts=Shard(0)), "memory": MemoryParallel(shard="columns")}
    parallelize_module(net, mesh["ep"], plan(net, **styles))
    fully_shard(net, mesh=flat, shard_placement_fn=shard_placement_fn(net, flat, mesh["edp"]))
    step(net, tokens(rank))
    return gradients(net)


@pytest.mark.exhaustive
@pytest.mark.skipif(not TWO_MESHES, reason="this version of torch shards over one mesh")
def test_fsdp_with_layers_that_are_split_by_units_and_columns() -> None:
    net = columns()
    step(net, torch.cat([tokens(rank) for rank in range(4)]))
    for found in processes.run(under_fsdp_by_columns, 4):
        near(found, {name: p.grad for name, p in net.named_parameters()})  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------ optimizers


def under_optimizers(rank: int) -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        layer, reference = mixture(True), mixture(False)
        parallelize_module(layer, mesh, ExpertParallel(rest="replicate"))
        for net, x in ((layer, tokens(rank)), (reference, torch.cat([tokens(r) for r in range(world)]))):
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, **options)
            for _ in range(3):
                optimizer.zero_grad()
                step(net, x)
                optimizer.step()
        near(
            {n: full(p) for n, p in layer.named_parameters()}, {n: p.detach() for n, p in reference.named_parameters()}
        )


def mixture(sync: bool, **options: Any) -> sf.MoE:
    torch.manual_seed(6)
    return sf.SigmaMoE(
        D, 7, 8, 2, glu=True, bias=True, balance_weight=1.0, sync_balance=sync, **{"dtype": torch.float64, **options}
    )


@pytest.mark.exhaustive
def test_optimizers_take_all_parameters_of_a_replicated_layer_in_one_group() -> None:
    processes.run(under_optimizers, 2)


# ------------------------------------------------------------------------------------------------ the same again


def again(rank: int) -> None:
    """Two runs, recomputation, a copy, a compiler: the same bits."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    x = tokens(rank, 7 + rank)
    for exchange in ("gather", "slots", "tokens"):
        layer = mixture(True, dropout=0.3)
        parallelize_module(layer, mesh, ExpertParallel(exchange=exchange))
        runs = []
        for call in (
            layer,
            layer,
            lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False),
            copy.deepcopy(layer),
        ):
            net = call if isinstance(call, nn.Module) else layer
            net.zero_grad()
            torch.manual_seed(rank)
            given = x.clone().requires_grad_()
            y = call(given)
            (y.square().mean() + sf.aux_loss(net)).backward()
            runs.append([y.detach(), given.grad, *(full(p.grad) for p in net.parameters())])
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True)), exchange
        with torch.no_grad():
            evaluated = layer.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert mixture_fp32(mesh, exchange)(x.float()).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).detach(), evaluated)


def mixture_fp32(mesh: Any, exchange: str) -> nn.Module:
    return parallelize_module(mixture(True, dtype=torch.float32), mesh, ExpertParallel(exchange=exchange))


@pytest.mark.exhaustive
def test_two_runs_a_recomputation_and_a_copy_agree_to_the_bit() -> None:
    processes.run(again, 2)


def compiled(rank: int, exchange: str) -> int:
    from torch._dynamo import testing  # takes seconds to import, in each process

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    torch._dynamo.config.capture_scalar_outputs = True
    layer: nn.Module = parallelize_module(mixture(False), mesh, ExpertParallel(exchange=exchange))
    if exchange == "tokens":  # with a shared expert, which is computed while these travel
        layer = SharedExpertMoE(layer, sf.DenseFFN(D, 8, dtype=torch.float64))
    counter = testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for count in (6, 9, 11, 5):
        found = []
        for function in (call, layer):
            layer.zero_grad()
            x = tokens(rank, count + rank).requires_grad_()
            y = function(x)
            y.square().mean().backward()
            found.append([y.detach(), x.grad, *(full(p.grad) for p in layer.parameters())])
        torch.testing.assert_close(*found)
    return counter.frame_count


@pytest.mark.exhaustive
@pytest.mark.parametrize("exchange", ["gather", "slots", "tokens"])
def test_an_exchange_is_one_graph_and_after_two_token_counts_others_compile_nothing(exchange: str) -> None:
    assert max(processes.run(compiled, 2, exchange, timeout=800)) <= 2


# ------------------------------------------------------------------------------------------------ checkpoints


def trained(ep: int, x: Tensor, folder: str | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("edp", "ep"))
    net = mixture(dist.is_initialized())
    parallelize_module(net, mesh["ep"], ExpertParallel(rest="replicate"))
    fully_shard(net, mesh=mesh["edp"])
    return net, torch.optim.AdamW(net.parameters(), lr=0.01)


def states(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(net, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found[prefix + key] = full(value)
    return found


def save(rank: int, folder: str, ep: int) -> dict[str, Tensor]:
    net, optimizer = trained(ep, tokens(rank))
    for _ in range(2):
        optimizer.zero_grad()
        step(net, tokens(rank))
        optimizer.step()
    state = states(net, optimizer)
    dcp.save(state, checkpoint_id=folder)
    return flat(state)


def save_and_load(rank: int, folder: str, saved: int, *loaded: int) -> tuple[dict[str, Tensor], ...]:
    return save(rank, folder, saved), *(load(rank, folder, ep) for ep in loaded)


def load(rank: int, folder: str, ep: int) -> dict[str, Tensor]:
    net, optimizer = trained(ep, tokens(rank))
    step(net, tokens(rank))
    optimizer.step()  # so that there is a state to fill
    state = states(net, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return flat(states(net, optimizer))


@pytest.mark.exhaustive
def test_a_checkpoint_of_any_layout_loads_into_any_other(tmp_path: Path) -> None:
    """Weights and the optimizer's state, to the bit, on other numbers of processes too."""
    of_four = processes.run(save_and_load, 4, str(tmp_path), 2, 4, 1)
    saved, found = of_four[0][0], [state for results in of_four for state in results[1:]]
    for world in (1, 2, 3):
        found += processes.run(load, world, str(tmp_path), world)
    for state in found:
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], t) for name, t in saved.items())


# ------------------------------------------------------------------------------------------------ what goes wrong


def one_fails(rank: int) -> float:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    for exchange, sync in itertools.product(("gather", "slots", "tokens"), (True, False)):
        layer = mixture(sync)
        parallelize_module(layer, mesh, ExpertParallel(exchange=exchange))
        words = "x must have shape" if rank == 1 else "rank 1 raised an error before it sent its tokens"
        with pytest.raises((ValueError, RuntimeError), match=words):
            layer(torch.zeros(3, D + rank, dtype=torch.float64))
        layer(tokens(rank))  # all goes on
    memory = sf.ProductKeyMemory(D, 4, 3)
    parallelize_module(memory, mesh, MemoryParallel())
    with pytest.raises((TypeError, RuntimeError), match="dtype" if rank == 1 else "rank 1 raised"):
        memory(torch.zeros(3, D, dtype=torch.float64 if rank == 1 else torch.float32))
    start = time.monotonic()
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # gone without a word: the others must not wait for the timeout
    with pytest.raises(RuntimeError, match=r"(?i)connection|peer|rank|abort"):
        layer(tokens(rank))
    print(time.monotonic() - start)
    raise AssertionError("survived")


@pytest.mark.exhaustive
def test_a_process_that_raises_or_dies_ends_the_others_before_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(processes.Failed) as failed:
        processes.run(one_fails, 2)
    assert failed.value.problems.keys() == {0, 1}
    assert "AssertionError: survived" in failed.value.problems[0]
    assert "without a result" in failed.value.problems[1]
    assert time.monotonic() - start < 100


def telling(rank: int) -> list[str]:
    """What a process raises, and whether it told the others, before its tokens travel and after."""
    layer, said = mixture(False), []
    parallelize_module(layer, init_device_mesh("cpu", (1,)), ExpertParallel(exchange="slots"))
    x = tokens(rank)

    def fail() -> None:
        said.append("told")
        raise RuntimeError("Connection closed by peer")

    layer._split.exchange.fail = fail
    with pytest.raises(ValueError, match="x must have shape"):
        layer(x[:, 1:])
    layer(x)
    with pytest.raises(ValueError, match="x must have shape"):
        layer(x[:, 1:])

    def wrong(*given: Any) -> None:
        said.append("travelled")
        raise ArithmeticError

    layer._balance_loss = wrong
    with pytest.raises(ArithmeticError):
        layer(x)
    return said


def injected(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    found = []
    for divided in (False, True):
        layer = mixture(False, aux="inject")
        if divided:
            parallelize_module(layer, init_device_mesh("cpu", (1,)), ExpertParallel(exchange="slots"))
        y = layer(tokens(rank))
        y += 1  # as a residual stream may do
        y.square().mean().backward()
        found.append([full(p.grad) for p in layer.parameters()])
    return found[0], found[1]


def test_an_injected_loss_of_a_split_layer_is_the_same() -> None:
    ((expected, found),) = processes.run(injected, 1)
    torch.testing.assert_close(found, expected)


def test_a_process_tells_of_its_error_while_others_wait_for_its_tokens_and_raises_its_own() -> None:
    (said,) = processes.run(telling, 1)
    assert said == ["told", "told", "travelled"]


def test_a_plan_names_the_mixtures_that_no_style_splits() -> None:
    mixed, low = MixedMoE(D, [(2, 4), (2, 8)], 2), LowRankMoE(D, 4, 8, 2, 2)
    net = nn.Sequential(mixture(False), mixed, low)
    words = r"no style splits '1' \(MixedMoE\), '2' \(LowRankMoE\): every process holds all of it"
    for styles in ({"experts": ExpertParallel()}, {"hidden": HiddenParallel()}):
        with pytest.warns(sf.SparseFFNWarning, match=words):
            assert list(plan(net, **styles)) == ["0"]
    with pytest.raises(ValueError, match="experts = ExpertParallel, but the model has no layer for it"):
        plan(mixed, experts=ExpertParallel())


def test_a_plan_gives_both_parts_of_a_shared_expert_the_same_tokens() -> None:
    net = nn.Sequential(SharedExpertMoE(mixture(False), sf.DenseFFN(D, 8)))
    with pytest.raises(ValueError, match="both parts of '0', a SharedExpertMoE, get the same tokens"):
        plan(net, experts=ExpertParallel(), hidden=HiddenParallel())
    styles = {"experts": ExpertParallel(), "hidden": HiddenParallel(input_layouts=Shard(0))}
    assert list(plan(net, **styles)) == ["0.routed", "0.shared"]


def test_a_plan_unties_nothing() -> None:
    net = nn.Sequential(mixture(False), mixture(False), sf.DenseFFN(D, 8), nn.Linear(D, 8))
    net[1].router.weight = net[0].router.weight  # is not split
    assert list(plan(net, experts=ExpertParallel())) == ["0", "1"]
    net[1].values = net[0].values
    with pytest.raises(ValueError, match="values of '0' is another module's too: to split it would untie them"):
        plan(net, experts=ExpertParallel())
    net[3].weight = net[2].keys
    assert list(plan(nn.Sequential(net[0], net[2], net[0]), hidden=HiddenParallel())) == ["0", "1"]
    with pytest.raises(ValueError, match="keys of '2' is another module's too"):
        plan(net[2:], hidden=HiddenParallel())


def test_without_a_bound_nothing_is_clipped() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 1e25)
    assert clip_grad_norm_([parameter], math.inf) == math.inf
    assert torch.equal(parameter.grad, torch.full((4,), 1e25))


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return ""


def refused(rank: int) -> list[tuple[str, str, bool]]:
    """What does not fit: words, the sentence, and whether the layer is as it was."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("edp", "ep"))
    small, odd = sf.SigmaMoE(D, 4, 1, 2), sf.ProductKeyMemory(D, 4, 3, sparse_grad=True)
    split, sharded = mixture(False), fully_shard(mixture(False))
    parallelize_module(split, mesh, ExpertParallel())
    parametrized = sf.SigmaMoE(D, 4, 2, 2)
    parametrize.register_parametrization(parametrized, "keys", nn.Identity())
    shared = SharedExpertMoE(sf.SigmaMoE(D, 4, 2, 2), sf.DenseFFN(D, 8))
    cases: list[tuple[str, Any, Any, Any]] = [
        ("mesh must have one dimension", mixture(False), ExpertParallel(), both),
        ("splits MoE, got module Linear", nn.Linear(2, 2), ExpertParallel(), mesh),
        ("a SharedExpertMoE's experts are its 'routed'", shared, ExpertParallel(), mesh),
        ("splits DenseFFN and MoE, got module ProductKeyMemory", odd, HiddenParallel(), mesh),
        ("expert_size = 1", small, HiddenParallel(), mesh),
        ("sparse_grad = True and MemoryParallel", odd, MemoryParallel(), mesh),
        ("d_out = 1", sf.ProductKeyMemory(D, 4, 3, d_out=1), MemoryParallel(shard="columns"), mesh),
        ("is split already, by ExchangedExperts", split, ExpertParallel(), mesh),
        ("is a DTensor: split it before fully_shard", sharded, ExpertParallel(), mesh),
        ("keys of module", parametrized, ExpertParallel(), mesh),
    ]
    found = []
    for words, layer, style, where in cases:
        before = {name: (id(p), type(p)) for name, p in layer.named_parameters()}
        sentence = said(lambda layer=layer, style=style, where=where: style._apply(layer, where))
        found.append((words, sentence, {n: (id(p), type(p)) for n, p in layer.named_parameters()} == before))
    net = nn.Sequential(mixture(False))
    found.append(("no layer that is split", said(lambda: ddp_ignore(net)), True))
    found.append(("experts = ExpertParallel, but", said(lambda: plan(nn.Linear(2, 2), experts=ExpertParallel())), True))
    if TWO_MESHES:
        flat = both["edp"]
        found.append(("no layer that is split", said(lambda: shard_placement_fn(net, mesh, flat)), True))
        found.append(("dp_mesh must be a DeviceMesh", said(lambda: shard_placement_fn(net, "dp", flat)), True))  # type: ignore[arg-type]
    few = nn.Sequential(sf.SigmaMoE(D, 4, 8, 2))
    parallelize_module(few, both["edp"], plan(few, experts=ExpertParallel()))
    found.append(("among 1 of 2 processes", said(lambda: ddp_ignore(few)), True))
    whole = sf.SigmaMoE(D, 4, 8, 2)
    weights = {name: p.detach() for name, p in sf.SigmaMoE(D, 4, 8, 2).named_parameters()}
    parallelize_module(whole, mesh, ExpertParallel())
    call = partial(torch.func.functional_call, whole, weights, (torch.randn(3, D),))
    found.append(("must be the DTensor that the layer's style has made of it", said(call), True))
    return found


@pytest.mark.exhaustive
def test_what_does_not_fit_is_refused_in_a_sentence_before_anything_changes() -> None:
    for found in processes.run(refused, 2):
        assert not [(words, sentence) for words, sentence, same in found if words not in sentence or not same]


# ------------------------------------------------------------------------------------------------ fresh weights


def fresh(rank: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    with torch.device("meta"):
        layer = sf.SigmaMoE(D, 5, 4, 2, glu=True)
    parallelize_module(layer, mesh, ExpertParallel(rest="replicate"))
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    return {name: full(p) for name, p in layer.named_parameters()}


@pytest.mark.exhaustive
def test_split_layers_made_on_meta_start_with_the_weights_of_one_process() -> None:
    expected = sf.SigmaMoE(D, 5, 4, 2, glu=True)
    torch.manual_seed(3)
    expected.reset_parameters()
    for found in processes.run(fresh, 2):
        for name, p in expected.named_parameters():
            assert torch.equal(found[name], p.detach())
