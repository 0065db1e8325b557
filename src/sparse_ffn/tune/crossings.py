"""Measures where the ways of an expert FFN cross, and chooses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sparse_ffn import ops
from sparse_ffn.backends.choice import backend
from sparse_ffn.backends.crossovers import using

Times = Mapping[str, Mapping[int, float]]
"""Seconds by way and number of tokens."""
MANY = 1 << 30
WAYS = {"decode": MANY, "sorted": 0}
"""The most tokens that are decoded, for either way to be the only one."""
ROUNDS, SECONDS = 20, 0.2  # most rounds for a number of tokens, and about how long they may take


def tokens(device: torch.device) -> Iterator[int]:
    """The numbers of tokens to measure; beyond some hundreds nothing is decoded on a CPU."""
    most = 512 if device.type == "cpu" else 32768
    n = 1
    while n <= most:
        yield n
        n *= 2


def measure(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    stopwatch: Callable[[Callable[[], object]], float],
    end: float,
    clock: Callable[[], float] = time.monotonic,
) -> Times:
    """Times of inference by each way, taken in turn.

    Args:
        sizes: D, E, G and K of the layer.
        dtype: of all tensors.
        device: where to run.
        stopwatch: seconds of a call.
        end: when to begin with no more tokens, by the clock.
        clock: seconds.
    """
    D, E, G, K = sizes
    random = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "generator": random}
    keys, values = ((torch.randn(E, G, D, **options) * n**-0.5).to(dtype) for n in (D, G))
    units = ops.Units(keys, values, None, None)
    found: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    with torch.no_grad(), backend("cpu" if device.type == "cpu" else "triton"):
        for n in tokens(device):
            if clock() > end:
                break
            x = torch.randn(n, D, **options).to(dtype)
            index, gate = torch.rand(n, E, **options).topk(K).indices, torch.rand(n, K, **options)

            def call(x: torch.Tensor = x, index: torch.Tensor = index, gate: torch.Tensor = gate) -> None:
                ops.expert_ffn(x, units, index, gate, activation="silu")

            samples: dict[str, list[float]] = {way: [] for way in found}
            begin = clock()
            for i in range(ROUNDS + 1):
                for way in found:
                    with using(WAYS[way]):
                        samples[way].append(stopwatch(call))
                if i > 2 and clock() - begin > SECONDS:
                    break
            for way, times in samples.items():
                found[way][n] = statistics.median(times[1:])  # the first one allocates and compiles
    return found


def choose(times: Times) -> int:
    """The most tokens to decode: the choice that is nearest to the best way at each number of tokens measured."""
    measured = sorted(times["decode"])

    def losses(most: int) -> list[float]:
        best = [min(of[n] for of in times.values()) for n in measured]
        return [times[way_of(most, n)][n] / b for n, b in zip(measured, best, strict=True)]

    return min((0, *measured), key=lambda most: (max(losses(most)), sum(losses(most))))


def tell(times: Times, device: torch.device) -> bool:
    """Whether times that may have been cut short say where the ways cross."""
    last = max(times["decode"])
    return len(times["decode"]) == len(list(tokens(device))) or times["sorted"][last] < times["decode"][last]


def way_of(most: int, tokens: int) -> str:
    """What inference takes."""
    return "decode" if tokens <= most else "sorted"
