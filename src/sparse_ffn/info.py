"""``python -m sparse_ffn.info``: versions, devices, backends, and which one is chosen and why."""

from __future__ import annotations

import platform
import sys

import torch

from sparse_ffn.backends import cpu, crossovers, cuda
from sparse_ffn.backends.choice import BACKENDS, ENVIRONMENT_VARIABLE, explain, unavailable
from sparse_ffn.backends.versions import version_of
from sparse_ffn.checks import check_device, check_type
from sparse_ffn.ops.products import supported


def chosen(device: torch.device | str = "cpu") -> str:
    """One line: what computes the ops on this device."""
    check_type("device", device, (torch.device, str), "a torch.device or its name")
    check_device(device)
    return f"{torch.device(device).type}: {explain(device)}"


def report() -> str:
    """All of it as text: what an issue about this library should contain."""
    lines = [
        f"sparse-ffn {version('sparse-ffn')}",
        f"python     {platform.python_version()} ({sys.platform}, {platform.machine()})",
        f"torch      {torch.__version__} ({torch.get_num_threads()} CPU threads)",
        f"triton     {version('triton')}",
        f"einops     {version('einops')}",
        "",
        "devices",
        f"  cpu      {torch.backends.cpu.get_cpu_capability()}",
        *_accelerators(),
        "",
        "backends",
        *(f"  {name:10} {what}" for name, what in BACKENDS.items()),
        f"  CPU core: {cpu.PROBLEM or _core()}",
        f"  triton kernels: {unavailable('triton', torch.device('cuda')) or 'ready'}",
        f"  CUDA library: {cuda.library().problem or 'loaded'}",
        *(f"  crossovers: {line}" for line in _crossovers()),
        "",
        *(f"chosen     {chosen(device)}" for device in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))),
        f"to force   sparse_ffn.backend(name) or {ENVIRONMENT_VARIABLE}=name",
    ]
    return "\n".join(lines)


def _core() -> str:
    unused = supported("amx_tile") and "amx" not in cpu.instruction_sets()
    reason = f"{cpu.ISA_VARIABLE} forces another, Linux does not permit it, or a first product on it was wrong"
    return f"loaded, {cpu.instruction_set()}" + (f"; the processor's AMX is not used: {reason}" if unused else "")


def _crossovers() -> list[str]:
    """What was measured of the ways to compute expert FFNs."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        table = crossovers.table_of(device)
        command = f"python -m sparse_ffn.tune --crossovers --device {device}"
        found.append(f"{device}: {'measured' if table else f'built in; {command} measures them'}")
        found += [f"  {' '.join(map(str, layer))}: decoded up to {most} tokens" for layer, most in table.items()]
    return found


def version(package: str) -> str:
    """An installed package's version."""
    check_type("package", package, str, "a package's name")
    return version_of(package) or "not installed"


def _accelerators() -> list[str]:
    if not torch.cuda.is_available():
        return ["  cuda     none"]
    return [f"  cuda:{i}   {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]


if __name__ == "__main__":
    print(report())
