"""The host's time of a MoE layer's step on a GPU, measured without one: `python -m benchmarks.host`.

The library's own Python and Triton's launcher run on CPU tensors, under a driver that stands in for a GPU's: what is
missing of a launch is the driver's own call. torch's ops compute on the CPU, at sizes where that takes hardly longer
than their dispatch. So these are the times to compare before and after a change, not those of a machine with a GPU.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import sparse_ffn as sf
from benchmarks.measuring import report
from benchmarks.shapes import MoEShape
from sparse_ffn.backends import choice
from sparse_ffn.backends.triton import (
    columns,
    combine,
    config,
    decode,
    entropy,
    grouped,
    hidden,
    outer,
    router,
    routing,
    schedule,
)
from sparse_ffn.ops.expert_ffn import op as expert_ffn

MODULES = (combine, decode, entropy, grouped, hidden, outer, router, routing)
# what depends on sizes alone, and might be kept from call to call
OF_SIZES = (
    *((config, name) for name in ("arithmetic", "block_m", "tile")),
    *((schedule, name) for name in ("grid", "registers")),
    *((columns, "width"), (outer, "n_parts")),
)
SHAPE = MoEShape(64, 64, 16, 32, 2)
REPEATS = 300


class Driver:
    """Stands in for a GPU's driver: it compiles for sm_90 and launches nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *kernel: (kernel, None, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *launch: None


@contextmanager
def stand_in(launched: list[str] | None, *, call: bool) -> Iterator[None]:
    """Launches inside go to the driver that does nothing or, without ``call``, nowhere; their names into a list."""
    real = routing.launch

    def launch(kernel: Any, grid: int, *arguments: Any, **meta: Any) -> None:
        if launched is not None:
            launched.append(kernel.__name__)
        if call:
            real(kernel, grid, *arguments, **meta)

    driver.set_active(Driver())
    with ExitStack() as stack, sf.backend("triton"):
        if launched is not None or not call:
            for module in MODULES:
                stack.enter_context(patch.object(module, "launch", launch))
        stack.enter_context(patch.object(choice, "unavailable", lambda *asked: None))
        # nothing writes the indices, and on a GPU nothing checks them
        stack.enter_context(patch.dict(expert_ffn._op._names, check_indices=lambda *indices: None))
        yield


def microseconds(step: Callable[[], None], *, call: bool) -> float:
    """Of a step, the median."""
    times = []
    with stand_in(None, call=call):
        for _ in range(REPEATS):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def of_sizes(step: Callable[[], None]) -> float:
    """Microseconds of a step in which tiles, grids and widths are found, the median."""
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            found = function(*arguments, **named)
            spent += time.perf_counter() - start
            return found

        return call

    times = []
    with ExitStack() as stack:
        for module, name in OF_SIZES:
            stack.enter_context(patch.object(module, name, timed(getattr(module, name))))
        stack.enter_context(stand_in(None, call=True))
        for _ in range(REPEATS):
            spent = 0.0
            step()
            times.append(spent)
    return 1e6 * statistics.median(times)


def steps(glu: bool) -> dict[str, Callable[[], None]]:
    """What is measured: of one layer."""
    layer = sf.SigmaMoE(SHAPE.D, SHAPE.E, SHAPE.G, SHAPE.k, glu=glu, dtype=torch.bfloat16)
    x = torch.zeros(SHAPE.T, SHAPE.D, dtype=torch.bfloat16, requires_grad=True)

    def forward() -> None:
        layer.train()(x)

    def both() -> None:
        layer.zero_grad()
        y = layer.train()(x)
        torch.autograd.backward((y, sf.aux_loss(layer)), (y.detach(), None))

    @torch.no_grad()
    def inference(tokens: int) -> None:
        layer.eval()(x[:tokens])

    return {
        "forward": forward,
        "forward and backward": both,
        "inference": lambda: inference(SHAPE.T),
        "inference, one token": lambda: inference(1),
    }


def table() -> report.Table:
    """Of a layer with and without a GLU."""
    header = ("", "", "our launches", "µs", "µs without launching", "µs for tiles and grids")
    body = []
    for glu in (False, True):
        for name, step in steps(glu).items():
            launched: list[str] = []
            step_in(step, launched)
            times = (*(microseconds(step, call=call) for call in (True, False)), of_sizes(step))
            body.append(["GLU" if glu else "ReLU", name, str(len(launched)), *(f"{t:.0f}" for t in times)])
    return header, body


def step_in(step: Callable[[], None], launched: list[str]) -> None:
    """Run a step once: its kernels are compiled, their names written down."""
    with stand_in(launched, call=True):
        step()


def main() -> int:
    """Run from the command line."""
    torch.set_num_threads(1)
    print(f"T,D,E,G,k = {SHAPE}, bf16; medians of {REPEATS}, one thread; no GPU: see the first lines of this file\n")
    print(report.markdown(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
