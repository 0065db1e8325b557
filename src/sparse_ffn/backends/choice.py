"""Which backend computes an op: what there is, what is chosen and why, and how to force one.

``reference`` is the contract: plain differentiable torch, dense arithmetic, any device, any order of derivative.
``torch`` is sparse arithmetic out of torch's own matrix products; it runs on every device and needs no compiler.
On a GPU it waits for the device once in each pass of a MoE layer, to learn where each expert's rows begin.
``cpu`` is the CPU core, built from csrc/ when the package is installed.
``triton`` are the GPU kernels of sparse_ffn.backends.triton, compiled by Triton when they are first used.
``cuda`` are kernels for NVIDIA GPUs where Triton is missing, built from csrc/cuda on request at installation.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar

import torch
from torch import Tensor

from sparse_ffn.backends import cpu, cuda
from sparse_ffn.backends.libraries import DTYPES
from sparse_ffn.backends.warning import SparseFFNWarning, how_to_install

ENVIRONMENT_VARIABLE = "SPARSE_FFN_BACKEND"
BACKENDS = {
    "reference": "plain differentiable torch, dense arithmetic (double backward, forward mode, every device)",
    "torch": "sparse arithmetic with torch's matrix products, no compiler needed",
    "cpu": "CPU core, for tensors of fp32, bf16 and fp16",
    "triton": "GPU kernels for CUDA and ROCm tensors of fp32, bf16 and fp16",
    "cuda": "CUDA kernels without Triton, for CUDA tensors of fp32, bf16 and fp16",
}

_environment = os.environ.get(ENVIRONMENT_VARIABLE, "").strip() or "auto"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute with one backend inside a ``with`` block, in the thread or async task that runs the block.

    Wins over the environment variable ``SPARSE_FFN_BACKEND``. A backward pass uses the backend of its forward pass,
    wherever it runs. An async task or a thread with a copy of the block's context has the block until it ends; a plain
    ``threading.Thread`` begins without it.

    Args:
        name: ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: at the next op, if the backend cannot compute it.
    """
    _check(name, "backend name")
    block = _Block(name)
    _enter((*_blocks(), block))
    try:
        yield
    finally:
        block.open = False
        _enter(tuple(other for other in _blocks() if other.open))


class _Block:
    """A ``with`` block. Blocks may end in any order and in any thread: one that has ended counts nowhere."""

    def __init__(self, name: str) -> None:
        self.name, self.open = name, True


_context: ContextVar[tuple[_Block, ...]] = ContextVar("sparse_ffn.backend", default=())


class _Traced(threading.local):
    """The blocks as torch.compile sees them: it reads and guards a thread's attributes, but no context variables."""

    def __init__(self) -> None:  # in each thread; it would not guard a default of the class
        self.blocks: tuple[_Block, ...] = ()


_traced = _Traced()


def _enter(blocks: tuple[_Block, ...]) -> None:
    _traced.blocks = blocks
    if not torch.compiler.is_dynamo_compiling():
        _context.set(blocks)


def _blocks() -> tuple[_Block, ...]:
    if torch.compiler.is_dynamo_compiling():
        return _traced.blocks
    blocks = _context.get()
    if blocks or not torch._C._is_key_in_tls("context"):
        return blocks
    # autograd recomputes checkpoints on a GPU in threads of its own: torch 2.12 tells them of backward's caller
    caller: Context | None = torch._C._get_obj_in_tls("context")
    return blocks if caller is None else caller.get(_context, blocks)


def _forced() -> str | None:
    """The backend of the innermost block that has not ended."""
    blocks = _blocks()
    return next((block.name for block in reversed(blocks) if block.open), None) if blocks else None


def choose(x: Tensor) -> str:
    """The name of the backend for an op on x's device that computes in x's dtype."""
    name = _forced() or _environment
    if name == "auto":
        if x.is_cpu:
            if cpu.PROBLEM is None:
                return "cpu" if x.dtype in DTYPES else "torch"
            if x.dtype in DTYPES:
                _warn_once("cpu")
        fast = next((fast for fast in _fast(x.device) if not unavailable(fast, x.device, x.dtype)), None)
        if fast is None and x.dtype in DTYPES and x.is_cuda and torch.cuda.is_available():  # it is no fake one
            _warn_once("cuda")
        return fast or "torch"
    _check(name, f"environment variable {ENVIRONMENT_VARIABLE}")
    reason = unavailable(name, x.device, x.dtype)
    if reason:
        raise RuntimeError(f"backend {name!r} is forced, but {reason}")
    return name


def unavailable(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot compute on this device in this dtype, or None if it can."""
    if name not in ("cpu", "triton", "cuda"):
        return None
    missing = {"cpu": _no_cpu, "triton": _no_triton, "cuda": _no_cuda}[name]
    return missing(device) or (None if dtype in DTYPES else f"it has no {str(dtype).removeprefix('torch.')}")


def explain(device: torch.device | str = "cpu") -> str:
    """One sentence: which backend computes on this device and why."""
    device = torch.device(device)
    forced = _forced()
    name, how = (_environment, ENVIRONMENT_VARIABLE) if forced is None else (forced, "sparse_ffn.backend")
    if name != "auto":
        try:
            _check(name, f"environment variable {ENVIRONMENT_VARIABLE}")
        except ValueError as error:
            return f"none: {error}"
        reason = unavailable(name, device)
        return f"none: backend {name!r} is forced, but {reason}" if reason else f"{name} (forced by {how})"
    reasons = {name: unavailable(name, device) for name in _fast(device)}
    fast = next((name for name, reason in reasons.items() if not reason), None)
    if fast is None:
        why = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items())
        return f"torch (automatic: {BACKENDS['torch']}; {why})"
    how = f", here with {cpu.instruction_set()}" if fast == "cpu" else ""
    return f"{fast} (automatic: {BACKENDS[fast]}{how}; torch for fp64)"


def _fast(device: torch.device) -> tuple[str, ...]:
    """The backends made for a kind of device, the best one first."""
    return ("cpu",) if device.type == "cpu" else ("triton", "cuda")


def _no_cpu(device: torch.device) -> str | None:
    """Why the CPU core cannot compute on a device, or None if it can."""
    if device.type != "cpu":
        return f"it computes on the CPU, not on {device.type}"
    return None if cpu.PROBLEM is None else f"the CPU core is missing: {cpu.PROBLEM}"


def _no_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, or None if they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return (
            f"it computes on CUDA and ROCm devices, not on {device.type} (there only with TRITON_INTERPRET=1, slowly)"
        )
    return _triton_missing() or (None if device.type == "cpu" else _too_old(device) or _triton_fails())


@functools.cache
def _triton_missing() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:
        found = False
    return None if found else "triton is not installed"


def _triton_fails() -> str | None:
    # not traced by torch.compile: a step that ran before has found it, and else the first launch does
    return None if torch.compiler.is_dynamo_compiling() else _start_triton()


@functools.cache
def _start_triton() -> str | None:
    """Why Triton's driver does not start, or None: 3.5 and 3.6 compile a part of it, in C."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # a compiler's, a loader's or CUDA's: it is what Triton says
        return f"Triton does not start: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


def _no_cuda(device: torch.device) -> str | None:
    """Why the kernels of csrc/cuda cannot run on a device, or None if they can."""
    library = cuda.library()
    if device.type == "cpu" and library.emulated:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it computes on NVIDIA GPUs, not on {'ROCm' if device.type == 'cuda' else device.type}"
    if library.problem is not None:
        return f"the CUDA library is missing: {library.problem}"
    if library.emulated:
        return "the library was built to emulate a GPU on the CPU"
    return _too_old(device) or cuda.driver_problem() or cuda.device_problem(device)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"  # for a fake tensor of one
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def _check(name: str, origin: str) -> None:
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"{origin} is {name!r}; allowed are 'auto', {', '.join(map(repr, BACKENDS))}")


_warned: set[str] = set()


def _warn_once(device: str) -> None:
    """That torch computes on a kind of device, why, and what to do."""
    if device in _warned or torch.compiler.is_dynamo_compiling():  # which does not trace warnings
        return
    _warned.add(device)
    if device == "cpu":
        why = f"the CPU core is missing ({cpu.PROBLEM})"
        remedy = _how_to_get_the_core()
    else:
        reasons = (f"{name}: {unavailable(name, torch.device(device))}" for name in _fast(torch.device(device)))
        why = f"the GPU kernels cannot run ({'; '.join(reasons)})"
        remedy = (
            "Install Triton 3.5 or later, which may need a C compiler, on a GPU of compute capability 8.0 or later, or "
            "ROCm."
        )
    warnings.warn(
        f"{why}; computing with torch instead, more slowly. {remedy} To silence this, set "
        f"{ENVIRONMENT_VARIABLE}=torch.",
        SparseFFNWarning,
        stacklevel=2,
    )


def _how_to_get_the_core() -> str:
    if os.environ.get(cpu.LIBRARY_VARIABLE):
        return f"Unset {cpu.LIBRARY_VARIABLE}, or name a library that csrc/build.sh has made of these sources."
    if sys.platform not in ("linux", "darwin"):
        return "It is for Linux and macOS."
    return f"Install a C++ compiler and reinstall: {how_to_install(options='--force-reinstall --no-deps')}."
