"""No layer waits for the device, in training or inference; the ops' own host code is tested beside each op.

Under FakeTensorMode tensors have no numbers: whatever would ask the device for one (.item(), a boolean of a tensor, a
shape that depends on data) raises. So does here a tensor made of the host's numbers: copying them waits, too, and is an
error while a CUDA graph is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_ffn as sf
from sparse_ffn.backends.triton import combine, decode, entropy, grouped, hidden, outer, router, routing
from sparse_ffn.backends.triton.launch import launch
from sparse_ffn.routing import routers

BALANCE = ("entropy", "switch", "cv2", "z")


def moe(**options: object) -> nn.Module:
    return sf.MoE(16, 6, 8, 2, **options)  # type: ignore[arg-type]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{f"moe, {name}": lambda name=name: moe(router=name, expert_dropout=0.1) for name in routers.ROUTERS},
    "moe, all parts": lambda: moe(glu=True, bias=True, dropout=0.1, activation="gelu"),
    "moe, every balance": lambda: moe(router="softmax", balance=BALANCE, balance_weight=(1e-3,) * 4),
    "moe, balance over sequences": lambda: moe(router="softmax", balance_over="sequence", aux="inject"),
    "moe, selection bias": lambda: moe(balance="bias"),
    "moe, k near E": lambda: sf.SigmaMoE(16, 5, 8, 2),
    "product keys": lambda: sf.ProductKeyMemory(16, 6, 4, n_heads=2),
    "product keys, learned query": lambda: sf.ProductKeyMemory(16, 6, 4, query_dim=8, query_norm="layer", dropout=0.1),
    "product keys, softmax": lambda: sf.ProductKeyMemory(16, 6, 4, activation="softmax", query_norm="rms"),
    "topk": lambda: sf.TopKFFN(16, 40, 5),
    "topk, all parts": lambda: sf.TopKFFN(16, 40, 5, glu=True, bias=True, dropout=0.1, norm_aware=True),
    "dense": lambda: sf.DenseFFN(16, 32),
}


class NoHostNumbers(TorchDispatchMode):
    """Refuses torch.tensor([...]) and torch.from_numpy()."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor of the host's numbers"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_layer_never_waits_for_the_device(name: str, masked: bool, device: str) -> None:
    with FakeTensorMode(), torch.device(device), sf.backend("triton"):
        layer = LAYERS[name]()
        x = torch.randn(2, 7, 16, requires_grad=True)
        mask = torch.ones(2, 7, dtype=torch.bool) if masked else None
        for dtype in (None, torch.bfloat16):
            with NoHostNumbers(), torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
                y = layer(x, mask=mask)
            (y.float().square().sum() + sf.aux_loss(layer)).backward()
            assert x.grad is not None
            assert all(p.grad is not None for p in layer.parameters())
        with NoHostNumbers(), torch.no_grad():
            assert layer.eval()(x, mask=mask).shape == x.shape


@pytest.mark.parametrize(("tokens", "train"), [(1, False), (9, True)], ids=["one token", "training"])
def test_a_cuda_graph_may_route_anew(
    tokens: int, train: bool, device: str, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    """A replay launches what was recorded: nothing in a launch depends on where tokens go, or on the step before."""
    launches: list[tuple[Any, ...]] = []

    def recorded(kernel: Any, grid: int, *arguments: Any, **meta: Any) -> None:
        sizes = [(a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else a for a in arguments]
        launches.append((kernel.fn.__name__, grid, sizes, meta))
        launch(kernel, grid, *arguments, **meta)

    for module in (combine, decode, entropy, grouped, hidden, outer, router, routing):
        monkeypatch.setattr(module, "launch", recorded)
    layer, found = sf.SigmaMoE(16, 6, 16, 2, device=device).train(train), []
    for x in (torch.randn(tokens, 16), torch.ones(tokens, 16)):  # the second goes to the same experts, all of it
        leaf = x.to(device).requires_grad_(train)
        with sf.backend("triton"), torch.set_grad_enabled(train):
            y = layer(leaf)
            if train:
                (y.sum() + sf.aux_loss(layer)).backward()
                layer.zero_grad()
        found.append((launches.copy(), sf.routing_stats(layer)[""]["busiest"]))
        launches.clear()
    (first, busiest), (second, busiest_of_all) = found
    assert len(first) >= 4
    assert first == second
    assert tokens == 1 or busiest < busiest_of_all


def test_a_wait_would_raise() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(1).item()


def test_the_hosts_numbers_would_raise(device: str) -> None:
    with FakeTensorMode(), NoHostNumbers(), pytest.raises(AssertionError, match="host's numbers"):
        torch.tensor([1, 2], device=device)
