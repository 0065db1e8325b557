"""Numbers for tests of selections and activations, NaN and infinities among them, and what is right for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

INF, NAN = math.inf, math.nan
SMOOTH = ("gelu", "gelu_tanh", "silu")


def strange(rows: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of everything that has a place in a ranking, often; NaNs of both signs and of several payloads."""
    info = torch.finfo(dtype)
    small = info.tiny if dtype == torch.bfloat16 else info.tiny / 4  # of bf16 torch's own products may lose these
    numbers = [INF, info.max, 5.0, 1.0, small, 0.0]
    pool = torch.tensor([NAN, *numbers, *(-x for x in numbers)])
    scores = pool[torch.randint(0, len(pool), (rows, n))]
    scores[: rows // 4] = torch.randn(rows // 4, n)
    scores[: rows // 8, :: max(n // 3, 1)] = NAN
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7FC12345, -1], dtype=torch.int32)[torch.randint(0, 4, scores.shape)]
    return torch.where(scores.isnan(), nans, scores.view(torch.int32)).view(torch.float32).to(dtype)


def stable(scores: Tensor, k: int) -> Tensor:
    """The contract, in Python: NaN first, then by value, equal ones by the lower index."""
    order = [
        sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), -row[i] if row[i] == row[i] else 0, i))[:k]
        for row in scores.tolist()
    ]
    return torch.tensor(order, dtype=torch.int64).view(len(scores), k)


def numbers(dtype: torch.dtype) -> Tensor:
    """Arguments of activations: where they bend, and every power of ten that the dtype has."""
    far = torch.tensor([10.0**e for e in range(-40, 39)], dtype=torch.float64)
    dense = torch.cat([torch.linspace(0, 12, 97), torch.linspace(80, 110, 61)]).double()
    z = torch.cat([far, dense, -far, -dense]).to(dtype)
    return torch.cat([z[z.isfinite()], torch.tensor([INF, -INF, NAN], dtype=dtype)])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": lambda z: 0.5 * z * torch.erfc(-z / math.sqrt(2)),
    "gelu_tanh": lambda z: z * torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3)),
    "silu": lambda z: z * torch.sigmoid(z),
    "identity": lambda z: 1 * z,
    "squared_relu": lambda z: torch.relu(z).square(),
    "square": lambda z: z.square(),
}


def activation(name: str, z: Tensor) -> Tensor:
    """Of a float64 z, differentiable; at infinity its limit."""
    if name not in SMOOTH:
        return ACTIVATIONS[name](z)
    far = z.isinf()
    return torch.where(far, torch.relu(z), ACTIVATIONS[name](z.masked_fill(far, 0)))


def exact(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative in float64."""
    z = z.double().requires_grad_()
    value = activation(name, z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_near(name: str, z: Tensor, actual: Tensor, expected: Tensor) -> None:
    """To a rounding of what is at least 1 (some, in fp32); beyond the largest number is infinity, of the same sign."""
    most = torch.finfo(actual.dtype).max
    narrow = torch.where(expected.abs() > most, expected.sign() * INF, expected)
    same = (narrow.isnan() & actual.isnan()) | (narrow == actual.double())
    error = (actual.double() - narrow).abs() / narrow.abs().clamp_min(1)
    bad = ~same & ~(error <= TOLERANCE[actual.dtype])
    assert not bad.any(), f"{name} at {z[bad].tolist()}: {actual[bad].tolist()}, not {narrow[bad].tolist()}"
