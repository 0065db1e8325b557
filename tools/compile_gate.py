"""The compile gate: every kernel the library can launch, compiled for every target without a GPU, and judged.

    python tools/compile_gate.py [--quick | --candidates] [--table] [--target sm_90 ...] [--jobs N]

The library's own host code runs on CPU tensors under a driver that stands in for a GPU's: Triton then compiles what a
launch would have run, with the same block sizes, dtypes and specialisations, and launches nothing. Of each kernel the
gate reads registers, spills, shared memory and instructions from the assembly.

It fails on a spill that costs time, on more shared memory than the target has, on a missing tensor-core instruction
or a copy by TMA that is none, where a tile has fewer buffers or programs a processor than it promises, and where the
gradient of the matrices has fewer than three buffers on an NVIDIA target (two if the rows of both operands are found
by loads; in fp32 and with odd sizes it has two). Buffers are those that the compiler made, for loads that depend on
each other share a declared depth.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import gate_cases
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_ffn.backends.triton import candidates, config

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
MOST_SPILLED = 128  # bytes
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "int", torch.int64: "int"}


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: which table the library takes there, and the shared memory of a block."""

    gpu: GPUTarget
    table: str
    shared: int
    threads: int  # of a multiprocessor
    matrix: str  # the tensor-core instruction
    wide_matrix: str  # and that of tiles with at least 64 rows and 4 warps


TARGETS = {
    # 99 KiB, not an A100's 163: the table also serves sm_86, sm_89 and sm_120
    "sm_80": Target(GPUTarget("cuda", 80, 32), "sm_80", 99 * KIB, 1536, "mma.sync", "mma.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "sm_90", 227 * KIB, 2048, "mma.sync", "wgmma.mma_async"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "sm_100", 227 * KIB, 2048, "mma.sync", "tcgen05.mma"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "gfx942", 64 * KIB, 2048, "v_mfma", "v_mfma"),
}


# buffers and programs a processor of the tiles that do most of the work, as the tables' tiles are meant to have them
PROMISED = {
    ("sm_90", "outer", "128x128x64, 8 warps, 5 stages"): (3, 2),
    ("sm_90", "pair", "128x128x64, 8 warps, 5 stages"): (3, 1),
    ("sm_90", "rows", "128x128x64, 8 warps, 3 stages"): (3, 2),
    ("sm_90", "rows", "128x256x64, 8 warps, 3 stages"): (3, 1),
    ("sm_90", "up", "128x128x64, 8 warps, 3 stages"): (3, 1),
    ("sm_90", "hidden_gradient", "128x64x64, 8 warps, 3 stages"): (3, 2),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as it came out of the compiler."""

    target: str
    kernel: str
    form: str
    dtype: str
    tile: str
    registers: int
    spilled: int
    shared: int
    buffers: int
    programs: int
    instruction: str
    problem: str


class Driver:
    """Stands in for a GPU's driver: a target, and a device number of its own, since kernels are cached by number."""

    def __init__(self, number: int, target: GPUTarget) -> None:
        self.number, self.target = number, target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None


@contextlib.contextmanager
def compiling(number: int, target: Target, seen: dict[int, tuple[JITFunction, dict[str, Any], Any]]) -> Iterator[None]:
    """Launches inside compile for the target, and are written down in ``seen`` instead of being run."""
    run, new_empty = JITFunction.run, Tensor.new_empty

    def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen[id(kernel)] = (self, dict(zip(self.arg_names, args, strict=False)) | kwargs, kernel)

    driver.set_active(Driver(number, target.gpu))
    JITFunction.run = record
    Tensor.new_empty = Tensor.new_zeros  # no kernel writes the indices that torch's own ops then read
    try:
        with config.fixed(architecture=target.table):
            yield
    finally:
        JITFunction.run, Tensor.new_empty = run, new_empty


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spilled: int
    """Bytes that move between registers and the stack."""
    costs: bool
    """Whether that costs time: it is much, or more than a thirtieth of a loop's instructions."""
    assembly: str


def usage(kernel: Any) -> Usage:
    """As the assembly says it."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spilled = (re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count"))
        return Usage(int(registers[1]), 4 * int(spilled[1]), int(spilled[1]) > 0, text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _output(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        registers, stack = (int(re.search(rf"{name}:(\d+)", resources)[1]) for name in ("REG", "STACK"))
        spilled, costs = 0, False
        if stack:  # a stack frame may be there for another reason
            spilled, costs = spills(_output(TOOLS / "nvdisasm", "-c", file.name))
    return Usage(registers, spilled, costs, kernel.asm["ptx"])


def spills(assembly: str) -> tuple[int, bool]:
    """Bytes that move between registers and the stack, and whether that costs time.

    A few are put away before a loop, and read in it or after it, so that one more program fits on a processor.
    """
    lines = assembly.splitlines()
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L")}
    moves = [i for i, line in enumerate(lines) if re.search(r"\b(?:STL|LDL)\b", line)]
    back = [
        (labels.get(to[1], i), i) for i, line in enumerate(lines) if (to := re.search(r"\bBRA `\((\.L\w+)\)", line))
    ]
    dense = any(30 * sum(begin <= move <= end for move in moves) > end - begin for begin, end in back if begin < end)
    return 4 * len(moves), dense or 4 * len(moves) > MOST_SPILLED


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def judge(name: str, function: JITFunction, arguments: dict[str, Any], kernel: Any) -> Compiled:
    """What came out, and what is wrong with it."""
    target = TARGETS[name]
    registers, spilled, costs, text = usage(kernel)
    operands = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments.values()]
    dtype = next(DTYPES[a.dtype] for a in operands if isinstance(a, Tensor) and a.dtype in DTYPES)
    if arguments.get("PRECISION") == "tf32":
        dtype = "tf32"
    blocks = [arguments[b] for b in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if "BLOCK_K" in arguments]
    warps, stages = kernel.metadata.num_warps, kernel.metadata.num_stages
    tile = f"{'x'.join(map(str, blocks))}, {warps} warps, {stages} stages" if blocks else f"{warps} warps"
    flags = [
        str(v) if n == "ACTIVATION" else n.lower()
        for n, v in arguments.items()
        if n.isupper() and (v is True or n == "ACTIVATION")
    ]
    problems = []
    instruction = ""
    if blocks and dtype != "fp32":
        wide = blocks[0] >= 64 and warps >= 4
        instruction = next(iter(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma", text)), "none")
        if instruction != (target.wide_matrix if wide else target.matrix):
            problems.append(f"{instruction} instead of {target.wide_matrix if wide else target.matrix}")
    if any(isinstance(a, TensorDescriptor) for a in arguments.values()):
        if "cp.async.bulk.tensor" not in text:
            problems.append("descriptors, but no copy by TMA")
        instruction += ", TMA"
    if costs:
        problems.append("spills")
    if kernel.metadata.shared > target.shared:
        problems.append("too much shared memory")
    buffers, programs = buffers_of(kernel), programs_of(target, registers, kernel.metadata)
    found = Compiled(
        name, function.__name__.removesuffix("_kernel"), " ".join(flags), dtype, tile, registers, spilled,
        kernel.metadata.shared, buffers, programs, instruction, "",
    )  # fmt: skip
    least = PROMISED.get((name, _kind(found) or found.kernel, tile), (1, 1))
    if "dot" in flags:  # partners take registers, too
        least = (least[0], 1)
    if found.kernel == "outer" and stages > 2 and target.gpu.backend == "cuda":
        # where the rows of both operands are found by loads, each of these takes stages
        least = (2, 1) if {"left", "right"} <= set(flags) else (max(least[0], 3), least[1])
    if buffers < least[0] or (programs < least[1] and target.gpu.backend == "cuda"):
        problems.append(f"{buffers} buffers, {programs} programs a processor instead of {least[0]}, {least[1]}")
    return replace(found, problem=", ".join(problems))


def buffers_of(kernel: Any) -> int:
    """The fewest buffers that an operand of a pipelined loop has in shared memory; 1 without such a loop."""
    depths = re.findall(r"local_alloc[^\n]*memdesc<(\d+)x\d+x\d+x", kernel.asm["ttgir"])
    return min(map(int, depths), default=1)


def programs_of(target: Target, registers: int, metadata: Any) -> int:
    """Programs that are on an NVIDIA multiprocessor at once; 0 elsewhere."""
    if target.gpu.backend != "cuda":
        return 0
    threads = 32 * metadata.num_warps
    by_registers = (1 << 16) // (-(-registers // 8) * 8 * threads)
    by_memory = (target.shared + KIB) // (metadata.shared + KIB)  # the system takes 1 KiB of each
    return min(by_registers, by_memory, target.threads // threads)


def work(job: tuple[int, str, str, int, int]) -> list[Compiled]:
    """Every ``step``-th case of a target from ``first`` on."""
    number, name, what, first, step = job
    torch.set_num_threads(1)
    seen: dict[int, tuple[JITFunction, dict[str, Any], Any]] = {}
    with compiling(number, TARGETS[name], seen):
        calls = [] if what == "candidates" else list(gate_cases.cases(name, what == "quick"))
        calls += [] if what == "quick" else list(gate_cases.tuning(TARGETS[name].table))
        for case in calls[first::step]:
            case()
    return [judge(name, *launch) for launch in seen.values()]


def table(results: set[Compiled]) -> str:
    """One line for each kernel, dtype and tile of a target: the largest numbers of all its forms."""
    groups: dict[tuple[str, ...], list[Compiled]] = {}
    for r in results:
        groups.setdefault(
            (r.kernel, "fp16, bf16" if r.dtype in ("fp16", "bf16") else r.dtype, r.tile, r.target), []
        ).append(r)
    header = ("kernel", "operands", "tile", "target", "forms", "registers", "spilled", "shared, KiB", "buffers")
    lines = [f"| {' | '.join((*header, 'programs a processor', 'instruction'))} |", "|---" * 11 + "|"]
    for (kernel, dtype, tile, target), rs in sorted(
        groups.items(), key=lambda g: (g[0][:2], _numbers(g[0][2]), g[0][3])
    ):
        shared = max(r.shared for r in rs) / KIB
        spilled, registers = max(r.spilled for r in rs), max(r.registers for r in rs)
        lines.append(
            f"| `{kernel}` | {dtype} | {tile} | {target} | {len(rs)} | {registers} | {spilled} | {shared:.4g} "
            f"| {min(r.buffers for r in rs)} | {min(r.programs for r in rs)} | {rs[0].instruction or '-'} |"
        )
    return "\n".join(lines)


def unlaunched(results: set[Compiled], targets: list[str], what: str) -> list[str]:
    """The tiles that no case took: nothing that may be launched may go unseen."""
    seen = {(r.target, _kind(r), r.dtype, r.tile) for r in results}
    missing = []
    for target in targets:
        present = config.launchable(TARGETS[target].table)
        if what == "quick":
            present = config.entries(config.TABLES[TARGETS[target].table])
        elif what == "candidates":
            present = config.entries(candidates.TABLES.get(TARGETS[target].table, {}))
        for kernel, kind, t in present:
            dtype = {"half": "bf16", "odd": "bf16"}.get(kind, kind)
            text = f"{t.m}x{t.n}x{t.k}, {t.warps} warps, {t.stages} stages"
            if (target, kernel if kernel in ("outer", "pair") else "", dtype, text) not in seen:
                missing.append(f"never launched: {kernel} {kind} {text} for {target}")
    return missing


def _kind(r: Compiled) -> str:
    """Which rows of the tables a kernel takes, as far as its name says."""
    return "" if r.kernel != "outer" else "pair" if "second" in r.form.split() else "outer"


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def main() -> int:
    """Compile, print what is wrong, and the table if asked to; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    quick = "every tile and every form, not each with each; without fp16, which takes bf16's, and the tiles for tuning"
    parser.add_argument("--quick", dest="what", action="store_const", const="quick", default="all", help=quick)
    tuning = "only the tiles for tuning"
    parser.add_argument("--candidates", dest="what", action="store_const", const="candidates", help=tuning)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--table", action="store_true", help="print registers, shared memory, instruction of each")
    arguments = parser.parse_args()
    start, parts = time.perf_counter(), max(8, arguments.jobs)
    names = arguments.target
    jobs = [(i, name, arguments.what, part, parts) for i, name in enumerate(names) for part in range(parts)]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        results = {r for chunk in pool.imap_unordered(work, jobs) for r in chunk}
    bad = [*sorted((r for r in results if r.problem), key=str), *unlaunched(results, names, arguments.what)]
    for r in bad:
        print(r)
    seconds = time.perf_counter() - start
    print(f"{len(results)} kernels for {', '.join(names)}, {len(bad)} bad, {seconds:.0f} s")
    if arguments.table:
        print(table(results))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
