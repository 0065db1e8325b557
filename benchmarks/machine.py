"""The machine that the numbers belong to."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from sparse_ffn import info
from sparse_ffn.backends import cpu
from sparse_ffn.ops.products import supported


def describe(device: torch.device) -> dict[str, str]:
    """Processor, cores, versions, the library's backend, and how busy the machine is now."""
    facts = {
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} torch threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": info.version("triton"),
        "torch's CPU capability": torch.backends.cpu.get_cpu_capability(),
        "16-bit instructions": ", ".join(filter(supported, ("avx512_bf16", "amx_tile"))) or "none",
        "CPU core": cpu.PROBLEM or cpu.instruction_set(),
        "backend": info.chosen(device),
        LOAD: load_average(),
    }
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
        facts["CUDA"] = str(torch.version.cuda)
    return facts


LOAD = "load average before the run"


def load_average() -> str:
    """Of the last 1, 5 and 15 minutes."""
    try:
        return ", ".join(f"{load:.2f}" for load in os.getloadavg())
    except OSError:
        return "unknown"


def was_busy(facts: dict[str, str]) -> bool:
    """Whether other programs used more than half a core in the minute before the run."""
    return facts[LOAD] != "unknown" and float(facts[LOAD].split(",")[0]) > 0.5


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key: value for key, value in re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE)}
    name = found.get("model name", platform.machine())
    # virtual machines shorten the name: family and model tell the generation
    return f"{name}, family {found['cpu family']} model {found['model']}" if "model" in found else name
