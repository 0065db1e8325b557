"""Seconds of a call: on a GPU by its own clock, on a CPU by the host's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

CACHE = 256 << 20  # bytes, more than any second-level cache holds
AHEAD = 4_000_000  # cycles, some two milliseconds, in which the host launches a step


class GPUStopwatch:
    """Times calls with CUDA events.

    Before each, the second-level cache is overwritten, as the layers around it would do in a model, and the device is
    kept busy for a moment, so that the host's launching is hidden as long as it takes no more than that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(CACHE // 4, dtype=torch.int32, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds from the begin of the call's first kernel to the end of its last."""
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            self.cache.zero_()
            torch.cuda._sleep(AHEAD)  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end)) / 1e3


def on_the_host(call: Callable[[], object]) -> float:
    """Seconds of a call whose work has ended when it returns."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
