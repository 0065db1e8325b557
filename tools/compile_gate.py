"""The compile gate: every kernel the library can launch, compiled for every target without a GPU, and judged.

    python tools/compile_gate.py [--quick | --candidates] [--table] [--target sm_90 ...] [--jobs N]

The library's own host code runs on CPU tensors under a driver that stands in for a GPU's: Triton then compiles what a
launch would have run, with the same block sizes, dtypes and specialisations, and launches nothing. Of each kernel the
gate reads registers, spills, shared memory and instructions from the assembly.

It fails on a spill, on more shared memory than the target has, on a missing tensor-core instruction, and where the
gradient of the matrices has fewer than three buffers on an NVIDIA target, or a tile fewer buffers or programs a
processor than it promises: those that the compiler made, for loads that depend on each other share a declared depth.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sparse_ffn.backends.triton import candidates, config, routing, tuned
from sparse_ffn.ops import Codes, Units
from sparse_ffn.ops.cvmm import triton as cvmm
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.expert_ffn import triton as expert_ffn
from sparse_ffn.ops.product_key_topk import triton as product_key_topk
from sparse_ffn.ops.quantized_cvmm import triton as quantized_cvmm
from sparse_ffn.ops.route import triton as route
from sparse_ffn.ops.route.op import MAX_ROWS
from sparse_ffn.ops.topk_ffn import triton as topk_ffn
from sparse_ffn.ops.weighted_bag import triton as weighted_bag

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
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


def cases(target: str, quick: bool) -> Iterator[Callable[[], None]]:
    """Calls that together launch every kernel in every configuration.

    Quick: every tile of the tables with the form that fuses most, and every form with the highest tiles; the smallest
    and the largest blocks; sizes of 1 in bf16. Without fp16, which takes bf16's tables, and of the newer and rarer
    targets only the forms that fuse most.
    """
    every = [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"), (torch.float16, "ieee")]
    plain = ["relu"] if target in ("sm_80", "sm_90") or not quick else []
    for dtype, switch in every[: 3 if quick else 4]:
        for block_m in (16, 32, 64, 128):
            for width in (64, 256, 100):  # the last is off every grid
                yield partial(experts, dtype, switch, block_m, width, "full")
            if quick and block_m < 128:
                continue
            for width in (64, 256):
                for form in plain:
                    yield partial(experts, dtype, switch, block_m, width, form)
                yield partial(cvmms, dtype, switch, block_m, width)
            for form in ("full", *plain):
                yield partial(experts, dtype, switch, block_m, 256, form, gap=1)  # strides off every grid
            yield partial(cvmms, dtype, switch, block_m, 256, gap=1)
        for form in ("gelu", "dropout"):
            yield partial(experts, dtype, switch, 128, 256, form)
        for width, depth in ((64, 256), (256, 64), (32, 64)):
            yield partial(experts, dtype, switch, 128, width, "relu", depth)
        if dtype == torch.float32:
            yield partial(experts, dtype, switch, 128, 32, "full")  # the smallest tile of the matrices' gradient
        yield partial(experts, dtype, switch, 512, 64, "relu")  # weight gradients in parts
        yield partial(experts, dtype, switch, 128, 100, "relu")
        yield partial(cvmms, dtype, switch, 128, 100)
        if dtype != torch.float32:  # fp32 weights under autocast
            for width, depth in ((256, 256), (64, 256), (256, 64), (64, 64), (100, 100)):
                yield partial(experts, dtype, switch, 128, width, "full", depth, weights=torch.float32)
            yield partial(experts, dtype, switch, 512, 64, "relu", weights=torch.float32)
            yield partial(cvmms, dtype, switch, 128, 256, torch.float32)
        codes = ((4, False, 32), (8, True, 256), (4, True, 2), (8, False, 1))
        for block_m, form in zip((16, 64), codes, strict=False) if quick else product((16, 32, 64), codes):
            yield partial(coded, dtype, switch, block_m, *form)
    for n_experts in (1, 64, 1024, config.SORT.experts, config.SORT.experts - 1):
        yield partial(sorts, n_experts)
    for dtype, weights in (
        (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)
    ):  # fmt: skip
        gates = (("sigmoid", "plain"), ("softmax", "full"), ("softmax_topk", "full"))
        most = MAX_ROWS[dtype]
        for rows in (64, most) if quick else sorted({8, 64, 128, min(256, most), most}):
            for gate, form in gates[: 2 if quick else 3]:
                yield partial(routes, dtype, weights, rows, 8, gate, form)
        yield partial(routes, dtype, weights, 64, 1, "unweighted", "plain", 1)
        yield partial(routes, dtype, weights, 1, 1, "softmax", "full", 4096, 1)
        yield partial(routes, dtype, weights, 60, 3, "softmax", "full", 4096, 100)
    for dtype in (torch.bfloat16, torch.float32) if quick else (torch.bfloat16, torch.float32, torch.float16):
        for width in (1, 1024) if quick else (1, 100, 256, 1024):
            yield partial(bags, dtype, width, dtype)
            if dtype != torch.float32:
                yield partial(bags, dtype, width, torch.float32)
        for n, k in (
            *((20, 1), (20, 2), (20, 4), (64, 8), (128, 16)),
            *((256, 32), (512, 32), (1024, 64), (2000, 1), (2000, 64)),
        ):
            yield partial(product_keys, dtype, n, k)
        for n_units in (100, 8192) if quick else (100, 1024, 4096, 8192):
            for activation, form in (("relu", "plain"), ("gelu", "full"), ("gelu_tanh", "full")):
                yield partial(selections, dtype, n_units, activation, form, dtype)
            if dtype != torch.float32:
                yield partial(selections, dtype, n_units, "gelu", "full", torch.float32)
        if dtype == torch.bfloat16 or not quick:
            yield from ones(dtype)


def ones(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Calls with sizes of 1, which Triton makes constants: they have not all the methods of other arguments.

    Each size by itself, all of them, and matrices of one number whose gradient is split.
    """
    usual: dict[str, Any] = {"dtype": dtype, "switch": "ieee", "block_m": 16, "width": 64}
    for form in ("relu", "full"):
        for size in ({"tokens": 1}, {"n_experts": 1}, {"k": 1}, {"width": 1}, {"depth": 1}):
            yield partial(experts, **usual | {"form": form} | size)
        yield partial(experts, dtype, "ieee", 16, 1, form, 1, k=1, n_experts=1, tokens=1)
        yield partial(experts, dtype, "ieee", 16, 1, form, 1, k=1, tokens=1)
    alone = {"n_experts": 1, "width": 1}
    for size in ({"slots": 1}, {"n_experts": 1}, {"width": 1}, {**alone, "slots": 1}, {**alone, "slots": 1024}):
        yield partial(cvmms, **usual | size)
    for size in ({"rows": 1}, {"bags": 1}, {"k": 1}, {"rows": 1, "bags": 1, "k": 1, "width": 1}):
        yield partial(bags, **{"dtype": dtype, "width": 64, "table": dtype} | size)
    yield partial(coded, dtype, "ieee", 16, 4, False, 32, slots=1)
    yield partial(product_keys, dtype, 1, 1)
    for k, n_units in ((1, 100), (1, 1)):
        yield partial(selections, dtype, n_units, "gelu", "full", dtype, k)


def tuning(target: str) -> Iterator[Callable[[], None]]:
    """Calls that launch each tile which tuning may choose beside those of the tables."""
    for (kernel, kind), tiles in candidates.TABLES.get(target, {}).items():
        dtype, switch = (torch.bfloat16, "ieee") if kind == "half" else (torch.float32, "tf32")
        for tile in tiles:
            rows = tuned.WIDTHS if kernel == "outer" else (tile.m,)
            measured = tuned.Tuned(
                {} if kernel == "outer" else {(kind, r): tile.m for r in tuned.ROWS},
                {(kernel, kind, m, n): tile for m in rows for n in tuned.WIDTHS},
            )
            for form in {"one": ("relu", "gelu", "full"), "two": ("full", "dropout"), "outer": ("relu",)}[kernel]:
                yield partial(with_tile, measured, experts, dtype, switch, tile.m, 256, form)
            if kernel != "two":
                yield partial(with_tile, measured, cvmms, dtype, switch, tile.m, 256)


def with_tile(measured: tuned.Tuned, case: Callable[..., None], *arguments: Any) -> None:
    """A case by a table of measurements."""
    with config.using(measured):
        case(*arguments)


def experts(
    dtype: torch.dtype,
    switch: str,
    block_m: int,
    width: int,
    form: str,
    depth: int | None = None,
    *,
    k: int = 2,
    weights: torch.dtype | None = None,
    n_experts: int = 8,
    tokens: int | None = None,
    gap: int = 0,
) -> None:
    """Expert FFN, training, inference, decode and backward.

    Form "full" has all that can be fused; ``gap`` numbers lie between the rows of tokens and matrices.
    """
    torch.backends.cuda.matmul.fp32_precision = switch
    E, K, G, D = n_experts, k, width, depth or (width if width % 16 == 0 else width + 1)
    T = tokens or E * block_m // K

    def empty(*shape: int) -> Tensor:
        return torch.zeros((*shape[:-1], shape[-1] + gap), dtype=dtype)[..., : shape[-1]]

    x, keys, values = empty(T, D), empty(E, G, D).to(dtype=weights), empty(E, G, D).to(dtype=weights)
    index, gate = torch.zeros(T, K, dtype=torch.int64), torch.empty(T, K)
    extra = (empty(E, G, D).to(dtype=weights), empty(E, G).to(dtype=weights)) if form == "full" else (None, None)
    units = Units(keys, values, *extra)
    scale = empty(T, K, G) if form in ("full", "dropout") else None
    activation = "gelu" if form in ("full", "dropout") else form
    _, saved = expert_ffn.forward(x, units, index, gate, scale, activation)
    expert_ffn.inference(x, units, index, gate, scale, activation)
    expert_ffn.inference(x[:1], units, index[:1], gate[:1], None if scale is None else scale[:1], activation)
    expert_ffn.backward(empty(T, D), x, units, gate, scale, saved, activation)


def cvmms(
    dtype: torch.dtype,
    switch: str,
    block_m: int,
    width: int,
    weights: torch.dtype | None = None,
    *,
    n_experts: int = 8,
    slots: int | None = None,
    gap: int = 0,
) -> None:
    """CVMM with and without gather, scatter and reduction, forward and backward."""
    torch.backends.cuda.matmul.fp32_precision = switch
    E, M, L = n_experts, width, width
    S = slots or E * block_m
    shapes = ((S, M), (E, M, L), (S, L))
    x, weight, grad = (torch.empty((*s[:-1], s[-1] + gap), dtype=dtype)[..., : s[-1]] for s in shapes)
    slot, weight = torch.zeros(S, dtype=torch.int64), weight.to(dtype=weights)
    for every in (Slots(slot), Slots(slot, slot, slot, torch.empty(S))):
        cvmm.forward(x, weight, every, S)
        cvmm.backward(grad, x, weight, every)


def coded(
    dtype: torch.dtype, switch: str, block_m: int, bits: int, symmetric: bool, group: int, *, slots: int | None = None
) -> None:
    """Products with rows of codes, up and down, of many slots and of few, with their gradients."""
    torch.backends.cuda.matmul.fp32_precision = switch
    E, G, C = 8, 256, 256
    S = slots or E * block_m
    qdata = torch.zeros(E, G, C * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scale = torch.zeros(E, G, C // group, dtype=dtype)
    codes = Codes(qdata, scale, None if symmetric else scale.to(torch.uint8))
    x, slot = torch.zeros(S, C, dtype=dtype), torch.zeros(S, dtype=torch.int64)
    for every, down in ((Slots(slot), False), (Slots(slot, slot, slot, torch.empty(S)), True)):
        quantized_cvmm.forward(x, codes, every, down, S)
        quantized_cvmm.forward(x[:8], codes, Slots(*(None if t is None else t[:8] for t in every)), down, 8)
        quantized_cvmm.backward(x, x, codes, every, down)


def bags(dtype: torch.dtype, width: int, table: torch.dtype, *, rows: int = 512, bags: int = 64, k: int = 32) -> None:
    """Weighted bag, forward and both backwards."""
    values, index = torch.empty(rows, width, dtype=table), torch.zeros(bags, k, dtype=torch.int64)
    weight, grad = torch.empty(bags, k, dtype=dtype), torch.empty(bags, width, dtype=dtype)
    weighted_bag.forward(values, index, weight, dtype)
    weighted_bag.backward(grad, values, index, weight)
    weighted_bag.backward_rows(grad, values, index, weight)


def product_keys(dtype: torch.dtype, n: int, k: int) -> None:
    """Product-key top-k of tables of n scores, forward and backward."""
    scores = torch.empty(16, 1, 2, n, dtype=dtype)
    product_key_topk.product_key_topk(*scores.unbind(2), k)
    index = torch.zeros(16, 1, k, dtype=torch.int64)
    product_key_topk.backward(scores.new_empty(16, 1, k), index, scores.shape, scores.stride())


def routes(
    dtype: torch.dtype,
    weights: torch.dtype,
    rows: int,
    k: int,
    gate: str,
    form: str,
    tokens: int = 4096,
    depth: int = 1024,
) -> None:
    """Route, training, inference and backward; form "full" has a bias, a mask and several groups."""
    x, weight = torch.empty(tokens, depth, dtype=dtype), torch.empty(rows, depth, dtype=weights)
    bias, mask, groups = None, None, 1
    if form == "full":
        bias, mask, groups = torch.empty(rows), torch.zeros(tokens, dtype=torch.bool), 2 if tokens > 1 else 1
    gates, selected, sums, logits = route.forward(x, weight, bias, mask, k, gate, groups)
    route.inference(x, weight, bias, mask, k, gate, groups)
    route.inference(x[:1], weight, bias, mask, k, gate, groups)
    route.backward(gates, sums, x, weight, mask, gates, selected, logits, gate)


def sorts(n_experts: int) -> None:
    """The sort of slots by that many experts."""
    routing.sort_slots(torch.zeros(1000, dtype=torch.int64), n_experts, 2, 128, inverse=True)


def selections(dtype: torch.dtype, n_units: int, activation: str, form: str, weights: torch.dtype, k: int = 32) -> None:
    """Top-k FFN, gathered and dense; form "full" has all that can be fused."""
    T, D = 4, 64

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    x, keys, values = empty(T, D), empty(n_units, D).to(dtype=weights), empty(n_units, D).to(dtype=weights)
    units, scale = Units(keys, values), None
    if form == "full":
        units = Units(keys, values, empty(n_units, D).to(dtype=weights), empty(n_units).to(dtype=weights))
        scale = empty(T, n_units)
    for sparse, rank_by in ((True, "gate" if form == "full" else "hidden"), (False, "hidden")):
        topk_ffn.use_gather = lambda *sizes, sparse=sparse: sparse
        _, saved = topk_ffn.forward(x, units, k, scale, activation, form == "full", rank_by)
        topk_ffn.backward(empty(T, D), x, units, scale, saved, activation)


def usage(kernel: Any) -> tuple[int, int, str]:
    """Registers, bytes spilled and assembly of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spilled = (re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count"))
        return int(registers[1]), 4 * int(spilled[1]), text
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _output(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        registers, stack = (int(re.search(rf"{name}:(\d+)", resources)[1]) for name in ("REG", "STACK"))
        if stack:  # a stack frame may be there for another reason: look for what moves registers to and from it
            stack = 4 * len(re.findall(r"\b(?:STL|LDL)\b", _output(TOOLS / "nvdisasm", "-c", file.name)))
    return registers, stack, kernel.asm["ptx"]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def judge(name: str, function: JITFunction, arguments: dict[str, Any], kernel: Any) -> Compiled:
    """What came out, and what is wrong with it."""
    target = TARGETS[name]
    registers, spilled, text = usage(kernel)
    dtype = next(DTYPES[a.dtype] for a in arguments.values() if isinstance(a, Tensor) and a.dtype in DTYPES)
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
    if spilled:
        problems.append("spills")
    if kernel.metadata.shared > target.shared:
        problems.append("too much shared memory")
    buffers, programs = buffers_of(kernel), programs_of(target, registers, kernel.metadata)
    found = Compiled(
        name, function.__name__.removesuffix("_kernel"), " ".join(flags), dtype, tile, registers, spilled,
        kernel.metadata.shared, buffers, programs, instruction, "",
    )  # fmt: skip
    least = PROMISED.get((name, _kind(found), tile), (1, 1))
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
        calls = [] if what == "candidates" else list(cases(name, what == "quick"))
        calls += [] if what == "quick" else list(tuning(name))
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
            present = config.entries(candidates.TABLES.get(target, {}))
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
    start, parts = time.perf_counter(), 8
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
