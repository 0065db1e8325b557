"""Memory: what autograd keeps for the backward pass, and the peak of one pass.

Kept for backward is counted exactly, with torch's saved-tensor hooks: every storage once, parameters and the input
left out. The peak on a GPU is torch's own counter. On a CPU it is the operating system's: the process's resident
memory is brought down to what is in use, its high-water mark reset, and read after the pass. That sees scratch memory
of native code too, which a profiler of torch's allocator does not; scratch that a library keeps from call to call is
not seen.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measuring.timing import Run

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Saved:
    """What a forward pass keeps for the backward pass, beyond the input and the parameters."""

    elements: int
    bytes: int | None = None  # not known of runs whose JSON is gone


def saved_for_backward(module: nn.Module, x: Tensor) -> Saved:
    """Run the module forward and count the storages that autograd keeps."""
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
    kept: dict[int, tuple[int, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes():
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size(), storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)  # alive until counted: a freed storage's address could come again
    elements = sum(count for count, _ in kept.values())
    del y
    return Saved(elements, sum(size for _, size in kept.values()))


def peak_bytes(run: Run, device: torch.device) -> tuple[int | None, float]:
    """Highest memory during one call, above what was in use before (None where it cannot be told), and its seconds."""
    run.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        begin = time.perf_counter()
        run.call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, time.perf_counter() - begin
    told = _reset_peak()
    begin = time.perf_counter()
    run.call()
    seconds = time.perf_counter() - begin
    return (None if told is None else max(0, _status("VmHWM") - told)), seconds


def _reset_peak() -> int | None:
    """Resident memory now, with the high-water mark brought down to it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the call would reuse it unseen
        CLEAR.write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def available_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 1 << 62
