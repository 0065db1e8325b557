"""A pass as a CUDA graph, so that the device is timed and not Python; and the host's time of a pass by itself.

A call whose host waits for the device, or reads what it computed, cannot be captured: it is timed as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch

from benchmarks.measuring.timing import Quartiles, Run

WARM_UPS, SAMPLES, SECONDS = 3, 10, 0.2


def leave_the_default_stream(device: torch.device) -> None:
    """Go on in a stream of one's own: leaves of autograd that were first used on the default one cannot be captured."""
    torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def waits(call: Callable[[], object]) -> bool:
    """Whether torch waits for the device during a call."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def graphs(runs: Mapping[str, Run], peaks: Mapping[str, int], free: Callable[[], int]) -> dict[str, Run]:
    """The same passes, replayed from graphs, of those that can be captured.

    A graph keeps the memory of its pass. So much of it stays free that any pass can still run by itself.

    Args:
        runs: the passes.
        peaks: bytes that each takes.
        free: how many bytes are free now.
    """
    found, largest = {}, max(peaks.values(), default=0)
    for name, run in runs.items():
        torch.cuda.empty_cache()
        graph = captured(run) if free() > 2 * largest + peaks[name] else None
        if graph is not None:
            found[name] = graph
    return found


def captured(run: Run) -> Run | None:
    """The same, replayed from a graph, in the stream that is current; None if it cannot be.

    Gradients of a replay lie in the graph's own memory and are written anew by each.
    """
    run.prepare()
    if waits(run.call):
        return None
    try:
        for _ in range(WARM_UPS):
            run.prepare()
            run.call()
        run.prepare()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run.call()
    except RuntimeError:  # a library that waits in a way of its own; or there is no memory for the graph
        torch.cuda.synchronize()
        _end_capturing()
        return None
    return Run(lambda: None, graph.replay)


def _end_capturing() -> None:
    """Capture nothing: a capture that failed leaves torch's random numbers in its mode, one that ends takes them out.

    By torch's source; no card has shown it.
    """
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
        pass


def host_seconds(run: Run, samples: int = SAMPLES) -> Quartiles:
    """Seconds until a call returns, with the device idle before it: launching, and what waiting the call does."""
    found = []
    for _ in range(samples):
        run.prepare()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run.call()
        found.append(time.perf_counter() - begin)
        if sum(found) > SECONDS:
            break
    torch.cuda.synchronize()
    return Quartiles.of(found)
