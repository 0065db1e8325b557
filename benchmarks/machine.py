"""The machine that the numbers belong to."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from benchmarks.contenders import gpu_peers
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
        "sparse-ffn": f"{info.version('sparse-ffn')}, commit {commit(*TIMED)}",
        OTHERS: used_by_others(),
    }
    found = {name: info.version(name) for name in PEERS}
    facts["peers"] = ", ".join(f"{name} {version}" for name, version in found.items() if version != "not installed")
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
        facts["CUDA"] = str(torch.version.cuda)
        facts["peers"] = ", ".join(filter(None, (facts["peers"], gpu_peers.versions())))
    return facts


SAME = ("processor", "cores", "GPU", "torch", "CPU core", "sparse-ffn")
"""Facts that the parts of a run have in common."""
PEERS = ("transformers", "st-moe-pytorch", "PEER-pytorch", "product-key-memory")
TIMED = ("src", "csrc", "benchmarks/contenders", "benchmarks/measuring")
ROOT = Path(__file__).parents[1]


@cache
def commit(*paths: str) -> str:
    """Of this checkout, "-dirty" if a file below these paths differs from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--", *paths)
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


def has_amx(facts: Mapping[str, str]) -> bool:
    """Whether the machine of these facts multiplies 16 bits on matrix units."""
    return "amx_tile" in facts.get("16-bit instructions", "")


OTHERS = "processors that others used"


def used_by_others(seconds: float = 1.0) -> str:
    """How many processors are busy while this process sleeps.

    The load average would not do: an installation or a benchmark that has just ended keeps it up for minutes.
    """
    try:
        (idle, total), _, (idle_after, total_after) = _ticks(), time.sleep(seconds), _ticks()
    except OSError:
        return "unknown"
    share = 1 - (idle_after - idle) / max(total_after - total, 1)
    return f"{share * (os.cpu_count() or 1):.2f} before the run"


def was_busy(facts: dict[str, str]) -> bool:
    """Whether other programs used more than half a processor just before the run."""
    used = facts.get(OTHERS, "unknown").partition(" ")[0]
    return used != "unknown" and float(used) > 0.5


def _ticks() -> tuple[int, int]:
    """Clock ticks of all processors since the machine started: those without work, and all."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key: value for key, value in re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE)}
    name = found.get("model name", platform.machine())
    # virtual machines shorten the name: family and model tell the generation
    return f"{name}, family {found['cpu family']} model {found['model']}" if "model" in found else name
