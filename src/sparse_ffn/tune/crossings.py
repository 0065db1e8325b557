"""Measures where the ways of an expert FFN cross, and chooses."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sparse_ffn import ops
from sparse_ffn.backends.choice import backend
from sparse_ffn.backends.crossovers import Crossover, using

Times = Mapping[str, Mapping[int, float]]
"""Seconds by way and number of tokens."""
MANY = 1 << 30
WAYS = {"decode": Crossover(MANY, None), "sorted": Crossover(0, None), "dense": Crossover(0, 0)}
ROUNDS, SECONDS = 20, 0.2  # most rounds for a number of tokens, and about how long they may take


def ways(device: torch.device) -> tuple[str, ...]:
    """What a device can do."""
    return ("decode", "sorted") if device.type == "cpu" else ("decode", "sorted", "dense")


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
    found: dict[str, dict[int, float]] = {way: {} for way in ways(device)}
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


def choose(times: Times) -> Crossover:
    """The crossings whose choice is nearest to the best way at each number of tokens that was measured."""
    measured = sorted(next(iter(times.values())))

    def losses(crossover: Crossover) -> list[float]:
        best = [min(of[n] for of in times.values()) for n in measured]
        return [times[way_of(crossover, n)][n] / b for n, b in zip(measured, best, strict=True)]

    dense: Sequence[int | None] = (None, *reversed(measured)) if "dense" in times else (None,)
    candidates = (Crossover(*pair) for pair in itertools.product((0, *measured), dense))
    return min(candidates, key=lambda crossover: (max(losses(crossover)), sum(losses(crossover))))


def way_of(crossover: Crossover, tokens: int) -> str:
    """What inference takes."""
    if tokens <= crossover.decode:
        return "decode"
    return "dense" if crossover.dense is not None and tokens >= crossover.dense else "sorted"
