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
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_ffn as sf
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


def test_a_wait_would_raise() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(1).item()


def test_the_hosts_numbers_would_raise(device: str) -> None:
    with FakeTensorMode(), NoHostNumbers(), pytest.raises(AssertionError, match="host's numbers"):
        torch.tensor([1, 2], device=device)
