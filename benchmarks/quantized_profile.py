"""Where the time of a layer with quantised experts goes, and the floor that the bytes of its codes set."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparse_ffn as sf
from benchmarks.measuring.timing import Run, race
from sparse_ffn.layers.rows import QuantizedRows


@dataclass(frozen=True)
class Profile:
    """Medians in seconds, of a call and of its parts each called for itself, with as many slots for each expert."""

    call: float
    products: float
    """The three products with codes."""
    arithmetic: float
    """The same where all experts are one, which lies in the caches."""
    numbers: float
    """The share of ``arithmetic`` that makes numbers of codes: what a second slot for each slot does not take again."""
    n_bytes: int
    """That the products read."""

    @property
    def rest(self) -> float:
        """Router, activation, sorting, Python, less what one call saves of three."""
        return self.call - self.products

    def line(self, bandwidth: float) -> str:
        """A row of the table, milliseconds and shares of the call."""
        parts = (self.products, self.arithmetic, self.numbers, self.rest)
        shares = "".join(f"{part / self.call:9.0%}" for part in parts)
        floor = self.n_bytes / bandwidth
        return f"{self.call * 1e3:8.3f} {shares} {self.n_bytes / 1e6:8.1f} {floor * 1e3:9.3f}"


HEAD = "T     form     call  products arithm.  numbers     rest       MB     floor"


def bandwidth(n_bytes: int = 1 << 29) -> float:
    """Bytes that the machine reads in a second: of a sum, the fastest of ten."""
    numbers, best = torch.ones(n_bytes // 4), float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - begin)
    return numbers.nbytes / best


def products(layer: sf.MoE, tokens: int, *, alike: bool = False, times: int = 1) -> Callable[[], Tensor]:
    """The three products with a GLU's stored rows.

    Args:
        layer: their owner.
        tokens: take the experts in turn.
        alike: all experts are the first one.
        times: slots for each slot.
    """
    stacks: Any = (layer.gate_keys, layer.keys, layer.values)
    if alike:
        stacks = [QuantizedRows(stack.codes.each(lambda t: t[:1].expand_as(t))) for stack in stacks]
    gate_keys, keys, values = stacks
    slots = tokens * layer.k
    expert = (torch.arange(slots) % layer.n_experts).repeat(times)
    token = torch.arange(slots * times) // layer.k
    x = torch.randn(tokens * times, layer.d_model, dtype=keys.dtype)
    h = torch.randn(slots * times, layer.expert_size, dtype=keys.dtype)
    gate = torch.rand(slots * times)

    def call() -> Tensor:
        gate_keys.up(x, expert, token)
        keys.up(x, expert, token)
        y: Tensor = values.down(h, expert, token, gate, tokens * times)
        return y

    return call


@torch.inference_mode()
def profile(layer: sf.MoE, tokens: int, seconds: float) -> Profile:
    """Of a GLU with stored rows."""
    x = torch.randn(tokens, layer.d_model, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {
        "call": lambda: layer(x),
        "products": products(layer, tokens),
        "arithmetic": products(layer, tokens, alike=True),
        "twice": products(layer, tokens, alike=True, times=2),
    }
    samples = race({name: Run(lambda: None, call) for name, call in calls.items()}, seconds)
    found = {name: samples.time(name).median for name in calls}
    stacks: Any = (layer.gate_keys, layer.keys, layer.values)
    touched = min(tokens * layer.k, layer.n_experts)
    n_bytes = sum(stack.n_bytes() for stack in stacks) * touched // layer.n_experts
    numbers = max(0.0, 2 * found["arithmetic"] - found.pop("twice"))
    return Profile(**found, numbers=numbers, n_bytes=n_bytes)
