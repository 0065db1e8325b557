"""Layers whose parameters every process holds, or FSDP2 shards: what several processes must agree on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import sparse_ffn as sf
from sparse_ffn.compress import compress_experts_, map_experts_
from sparse_ffn.layers import LatentMoE, SwitchHeadAttention

WORLD = 2


def batch(rank: int) -> torch.Tensor:
    """Tokens whose favourites differ between the processes."""
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(rank))
    return x + 2 * rank


def mixture(**options: Any) -> sf.MoE:
    torch.manual_seed(1)
    return sf.SigmaMoE(8, 6, 4, 2, **{"balance": "bias", **options})


# ------------------------------------------------------------------------------------------------ balance="bias"


def drift(rank: int) -> dict[str, Any]:
    local, synced = mixture(), nn.Sequential(mixture(sync_balance=True), mixture(sync_balance=True))
    local(batch(rank))
    try:
        sf.update_router_bias(local)
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    for _ in range(3):
        synced(batch(rank))
        sf.update_router_bias(synced)
    calls, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: calls.append(1) or reduce(*a, **k)
    synced(batch(rank))
    sf.update_router_bias(synced)
    pooled = sf.routing_stats(synced, sync=True)["0"]["load"]
    return {
        "refused": refused, "untouched": bool((local.router.bias == 0).all() and local.router.load.any()),
        "biases": [layer.router.bias.tolist() for layer in synced], "collectives": len(calls), "pooled": pooled,
        "own": sf.routing_stats(synced)["0"]["load"],
    }  # fmt: skip


def test_biases_of_several_processes_cannot_drift_apart() -> None:
    """Each process used to move its own, though all share the weights: they then routed a token differently."""
    first, second = processes.run(drift, WORLD)
    for found in (first, second):
        assert "sync_balance=False among 2 processes" in found["refused"]
        assert found["untouched"]
        assert found["collectives"] == 2  # one for all layers' loads, one for the statistics
    assert first["biases"] == second["biases"]
    assert any(first["biases"][0])
    torch.testing.assert_close(first["pooled"], (first["own"] + second["own"]) / 2)
    torch.testing.assert_close(first["pooled"], second["pooled"])


def dropped(rank: int) -> dict[str, Any]:
    """The first layer ran in process 0 only, the second in 1 only, the third in both and the last nowhere."""
    layers = nn.ModuleList(mixture(sync_balance=True, null_experts=number) for number in range(4))
    with sf.RoutingMeter(layers) as meter:
        for number in (rank, 2):
            layers[number](batch(rank))
    return {"stats": sf.routing_stats(layers, sync=True), "metered": meter.stats(sync=True)}


def test_pooled_statistics_are_of_the_layers_that_ran_anywhere() -> None:
    """Each process pooled the layers that it had run: of other experts, or other numbers of them."""
    expected = {}
    for number, ranks in ((0, [0]), (1, [1]), (2, [0, 1])):
        layer = mixture(null_experts=number)
        layer(torch.cat([batch(rank) for rank in ranks]))
        expected[str(number)] = sf.routing_stats(layer)[""]
    for found in processes.run(dropped, WORLD):
        for stats in found.values():
            assert list(stats) == list(expected)
            for name, own in expected.items():
                torch.testing.assert_close(stats[name], own)


# ------------------------------------------------------------------------------------------------ groups by name


def stages(rank: int) -> dict[str, Any]:
    """Two stages of a pipeline: the second has more layers, and so more collectives."""
    groups = [dist.new_group([member]) for member in range(WORLD)]
    layers = [mixture(sync_balance=groups[rank], balance="entropy") for _ in range(1 + 2 * rank)]
    losses = []
    for layer in layers:
        layer(batch(rank))
        loss = sf.aux_loss(layer)
        loss.backward()
        losses.append((loss.item(), layer.router.weight.grad))
    sf.routing_stats(layers[0], sync=groups[rank])
    clone = copy.deepcopy(layers[0])
    try:
        pickle.dumps(layers[0])
        refused = ""
    except TypeError as error:
        refused = str(error)
    both = mixture(sync_balance=dist.group.WORLD, balance="entropy")
    both(batch(rank))
    return {
        "losses": losses, "kept": clone.sync_balance is groups[rank], "refused": refused,
        "both": sf.aux_loss(both).item(),
    }  # fmt: skip


def test_a_group_by_name_balances_its_own_processes_and_hangs_nobody() -> None:
    """With the default group only, the stages of a pipeline waited for each other's layers."""
    found = processes.run(stages, WORLD)
    for rank, results in enumerate(found):
        layer = mixture(balance="entropy")
        layer(batch(rank))
        loss = sf.aux_loss(layer)
        loss.backward()
        for value, grad in results["losses"]:
            assert value == pytest.approx(loss.item())
            torch.testing.assert_close(grad, layer.router.weight.grad)
        assert results["kept"]
        assert "sync_balance is a process group" in results["refused"]
    layer = mixture(balance="entropy")
    layer(torch.cat([batch(0), batch(1)]))
    assert [results["both"] for results in found] == pytest.approx([sf.aux_loss(layer).item()] * 2)


def attention(sync: bool, over: str) -> SwitchHeadAttention:
    torch.manual_seed(2)
    losses = ("entropy", "switch", "bias")
    return SwitchHeadAttention(
        8,
        2,
        4,
        balance=losses,
        balance_weight=(1.0, 0.5, 0.0),
        balance_over=over,
        sync_balance=sync,
        dtype=torch.float64,
    )


def sequences(rank: int) -> torch.Tensor:
    return batch(rank).double().view(4, 10, 8)


def heads(rank: int, over: str) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    layer = attention(True, over)
    layer(sequences(rank))
    loss = sf.aux_loss(layer)
    loss.backward()
    routers = [layer.values.router, layer.outputs.router]
    for router in routers:
        dist.all_reduce(router.weight.grad)
    sf.update_router_bias(layer)
    return loss.item(), [router.weight.grad / WORLD for router in routers], [router.bias for router in routers]


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_the_heads_of_attention_are_balanced_over_all_processes(over: str) -> None:
    """Heads were pooled as sequences are: each process balanced its own tokens, and averaged the losses."""
    layer = attention(False, over)
    layer(torch.cat([sequences(rank) for rank in range(WORLD)]))
    expected = sf.aux_loss(layer)
    expected.backward()
    sf.update_router_bias(layer)
    for loss, gradients, biases in processes.run(heads, WORLD, over):
        assert loss == pytest.approx(expected.item())
        for router, gradient, bias in zip((layer.values.router, layer.outputs.router), gradients, biases, strict=True):
            torch.testing.assert_close(gradient, router.weight.grad)
            assert torch.equal(bias, router.bias)


# ------------------------------------------------------------------------------------------------ fresh weights


def fresh(rank: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        layer = sf.SigmaMoE(8, 5, 4, 2, glu=True)
        memory = sf.ProductKeyMemory(8, 3, 2, query_dim=4)
        latent = LatentMoE(8, 6, 4, 3, 2)
    model = nn.Sequential(layer, memory, latent)
    fully_shard(layer.router)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for part in (layer, memory, latent):
        part.reset_parameters()
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


@pytest.mark.exhaustive
def test_sharded_layers_on_the_cpu_start_with_the_weights_of_one_process() -> None:
    """With one seed torch drew the same numbers for each process's shard: expert 0 was expert 3."""
    memory = sf.ProductKeyMemory(8, 3, 2, query_dim=4)
    layers = (sf.SigmaMoE(8, 5, 4, 2, glu=True), memory, LatentMoE(8, 6, 4, 3, 2))
    torch.manual_seed(3)
    expected = {}
    for number, layer in enumerate(layers):
        layer.reset_parameters()
        expected |= {f"{number}.{name}": p for name, p in layer.named_parameters()}
    for found in processes.run(fresh, WORLD):
        assert found.keys() == expected.keys()
        assert len({tuple(row.flatten().tolist()) for row in found["0.keys"]}) == 5
        for name, p in expected.items():
            torch.testing.assert_close(found[name], p.detach())


# ------------------------------------------------------------------------------------------------ sparse gradients


def memory(sparse_grad: bool) -> sf.ProductKeyMemory:
    torch.manual_seed(4)
    return sf.ProductKeyMemory(8, 4, 2, sparse_grad=sparse_grad)


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def sparse_tables(rank: int) -> dict[str, Any]:
    x = batch(rank)
    ddp = DistributedDataParallel(memory(True))
    with torch.no_grad():
        ddp(x)  # has no gradient to reduce
    ignoring = nn.Sequential(memory(True))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["0.values"])
    DistributedDataParallel(ignoring)(x).square().mean().backward()
    refused = said(lambda: fully_shard(memory(True)))
    aside = memory(True)
    fully_shard(aside, ignored_params={aside.values})
    aside(x).square().mean().backward()
    return {
        "ddp": said(lambda: ddp(x)), "sparse": ignoring[0].values.grad.is_sparse and aside.values.grad.is_sparse,
        "fsdp": refused,
    }  # fmt: skip


def test_sparse_gradients_that_nobody_can_reduce_are_refused_in_a_sentence() -> None:
    """DDP and FSDP2 failed inside torch, in the backward pass."""
    for found in processes.run(sparse_tables, WORLD):
        assert "sparse_grad=True under DistributedDataParallel" in found["ddp"]
        assert "values cannot be sharded by FSDP2 with sparse_grad=True" in found["fsdp"]
        assert found["sparse"]


# ------------------------------------------------------------------------------------------------ changed models


def changed(rank: int) -> list[str]:
    inner = nn.Sequential(mixture(), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    stats = sf.expert_stats(inner, [batch(rank)])
    model = DistributedDataParallel(inner)
    before = list(model.parameters())
    changes = [
        lambda: sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2)),
        lambda: sf.prune_experts_(model, stats, 0.5),
        lambda: sf.quantize_experts_(model),
        lambda: sf.dequantize_experts_(model),
        lambda: sf.offload_experts_(model, cache=4),
        lambda: compress_experts_(model, 2),
        lambda: map_experts_(model, "no such file"),
    ]
    found = [said(change) for change in changes]
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    return found


def test_parameters_that_a_reducer_holds_are_not_replaced() -> None:
    """It went on with those of before: each process trained experts of its own, without a word."""
    (found,) = processes.run(changed, 1)
    said = "ValueError: model holds a DistributedDataParallel, which would average the parameters of before"
    assert [text[: len(said)] for text in found] == [said] * 7


# ------------------------------------------------------------------------------------------------ DTensors


def given_dtensors(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (WORLD,))
    layers = [mixture(), memory(False), sf.DenseFFN(8, 6), sf.TopKFFN(8, 6, 2)]
    x = DTensor.from_local(batch(rank), mesh, [Shard(0)])
    found = [said(lambda layer=layer: layer(x)) for layer in layers]
    layer = mixture(d_router=8)
    found.append(said(lambda: layer(batch(rank), router_input=x)))
    for layer in layers:
        layer.values = nn.Parameter(distribute_tensor(layer.values.detach(), mesh, [Shard(0)]))
    mixed = mixture()
    mixed.router.weight = nn.Parameter(distribute_tensor(mixed.router.weight.detach(), mesh, [Replicate()]))
    return found + [said(lambda layer=layer: layer(batch(rank))) for layer in (*layers, mixed)]


def test_dtensors_are_refused_in_a_sentence_where_no_style_was_applied() -> None:
    """They failed inside torch: mixed torch.Tensor and DTensor."""
    for sentences in processes.run(given_dtensors, WORLD):
        assert all(sentence.startswith("TypeError: x is a DTensor") for sentence in sentences[:4]), sentences
        assert sentences[4].startswith("TypeError: router_input is a DTensor")
        assert all("is a DTensor, which this layer does not compute" in s for s in sentences[5:]), sentences
