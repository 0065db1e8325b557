"""Where a step of SigmaMoE or ProductKeyMemory spends its time: the CPU core's passes beside their floors.

Builds a core that times its passes (CMake and a C++ compiler needed) and runs it in a process of its own. The floor of
a pass is its arithmetic at the best rate of torch.mm on this machine, in fp32 or in its dtype, whichever is faster; of
decoding, where that takes longer, reading the weights as fast as torch.sum reads as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks import machine
from benchmarks.contenders.memories import PACKAGE_HALF, BagMemory
from benchmarks.measuring import report
from benchmarks.measuring.contender import DTYPES
from benchmarks.measuring.records import MODES, dump
from benchmarks.shapes import MOE_SHAPES, MemoryShape, MoEShape

ROOT = Path(__file__).parents[1]
ORDER = (
    *("query", "scores", "select", "bag", "route", "sort", "decode", "up", "down"),
    *("dh", "dscores", "dx", "dkeys", "dvalues", "drouter", "dbag", "dselect", "dnorm"),
)
PRODUCT = 2048  # the side of the matrices that torch.mm multiplies
WARM_UP = 3
MEMORY = MemoryShape()
DECODE = 32  # tokens up to which a call without gradient is a pass of its own


@dataclass(frozen=True)
class Passes:
    """One profile.

    Attributes:
        shape: of a SigmaMoE, T,D,E,G,k; or of a ProductKeyMemory with a learned query.
        mode: as in ``records.MODES``.
        step: seconds of a step of the layer, as Python sees it.
        baseline: what was measured in turns with it, and takes ``against`` seconds.
        rate: FLOP/s of torch.mm.
        seconds: of each pass of the core.
        flops: arithmetic of each pass, as far as it is arithmetic.
        weights: bytes of the weights that decoding reads; 0: no decoding.
        reading: bytes/s at which torch.sum reads as many.
    """

    shape: str
    dtype: str
    mode: str
    step: float
    baseline: str
    against: float
    rate: float
    seconds: dict[str, float]
    flops: dict[str, int]
    weights: int = 0
    reading: float = 0.0

    def floor(self, name: str) -> float:
        """Seconds of a pass that has no overhead."""
        read = self.weights / self.reading if name == "decode" and self.reading else 0.0
        return max(self.flops.get(name, 0) / self.rate, read)

    def title(self) -> str:
        """What it is a profile of."""
        return f"{self.shape}, {self.dtype}, {MODES[self.mode]}"

    def table(self) -> report.Table:
        """Pass, milliseconds, milliseconds of the floor, and their ratio; whole numbers of the step at the end."""
        known = [name for name in ORDER if name in self.seconds]
        body = [_line(name, self.seconds[name], self.floor(name)) for name in known]
        rest = self.step - sum(self.seconds[name] for name in known)
        return ("pass", "ms", "floor", "of floor"), [
            *body,
            _line("the rest", rest, self.floor("the rest")),
            _line("**step**", self.step, sum(map(self.floor, self.flops))),
            _line(self.baseline, self.against, 0),
        ]

    def gigabytes(self) -> tuple[str, str]:
        """GB/s of reading weights, ours and torch.sum's; empty where nothing is decoded."""
        if not self.reading:
            return "", ""
        return f"{self.weights / self.seconds['decode'] / 1e9:.0f}", f"{self.reading / 1e9:.0f}"


def _line(name: str, seconds: float, floor: float) -> list[str]:
    if not floor:
        return [name, f"{seconds * 1e3:.3f}", "", ""]
    return [name, f"{seconds * 1e3:.3f}", f"{floor * 1e3:.3f}", f"{seconds / floor:.2f}"]


def flops(shape: MoEShape | MemoryShape, mode: str) -> dict[str, int]:
    """Arithmetic of each pass: 2 for a multiply-add."""
    if isinstance(shape, MemoryShape):
        width = 2 * shape.H * PACKAGE_HALF
        query, scores = 2 * shape.T * shape.D * width, 2 * shape.T * width * shape.n
        return {"query": query, "scores": scores, "the rest": 2 * query + 2 * scores}
    experts, router = 2 * shape.T * shape.k * shape.G * shape.D, 2 * shape.T * shape.D * shape.E
    if mode == "fwd":
        return {"route": router, "decode": 2 * experts}
    products = dict.fromkeys(("up", "down", "dh", "dx", "dkeys", "dvalues"), experts)
    return {**products, "route": router, "dscores": router, "drouter": router, "dx": experts + router}


def build(folder: Path) -> Path:
    """The core with timers, built in a folder.

    Raises:
        SystemExit: CMake or the compiler fails or is missing.
    """
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    configure = [cmake, "-S", "csrc", "-B", str(folder), "-DSPARSE_FFN_PHASES=ON"]
    try:
        for command in (configure, [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())]):
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("the profile needs CMake: pip install cmake") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"the core with timers could not be built:\n{error.stderr}") from None
    return folder / "libsparse_ffn_cpu.so"


def contenders(shape: MoEShape | MemoryShape, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, str]:
    """The layer, what it is measured beside, and that one's name."""
    if isinstance(shape, MemoryShape):
        memory = sf.ProductKeyMemory(
            *(shape.D, shape.n, shape.k), n_heads=shape.H, query_dim=2 * PACKAGE_HALF, query_norm="layer",
            activation="softmax", dtype=dtype,
        )  # fmt: skip
        return memory, BagMemory(memory), "the same out of torch's ops"
    layer = sf.SigmaMoE(shape.D, shape.E, shape.G, shape.k, dtype=dtype)
    dense = sf.DenseFFN(shape.D, shape.k * shape.G, bias=False, dtype=dtype)
    return layer, dense, "dense FFN of equal compute"


def measure(shape: MoEShape | MemoryShape, dtype: str, mode: str, seconds: float) -> dict[str, Any]:
    """Step, the baseline's step and torch's rates of multiplying and reading in this process, in turns."""
    kind = DTYPES[dtype]
    layer, other, baseline = contenders(shape, kind)
    x, slope = torch.randn(shape.T, shape.D).to(kind).requires_grad_(), torch.randn(shape.T, shape.D).to(kind)

    def step(module: nn.Module) -> None:
        if mode == "fwd":
            with torch.no_grad():
                module(x)
            return
        y = module(x)
        loss = sf.aux_loss(module) if isinstance(module, sf.MoE) else None
        torch.autograd.backward([y] if loss is None else [y, loss], [slope] if loss is None else [slope, None])

    factors = [torch.randn(PRODUCT, PRODUCT).to(kind) for kind in {kind, torch.float32}]
    calls: list[Callable[[], object]] = [partial(step, layer), partial(step, other)]
    calls += [partial(torch.mm, factor, factor) for factor in factors]
    weights = 0
    if mode == "fwd" and isinstance(layer, sf.MoE):
        used = len(layer.router(x).index_TK.unique())
        weights = used * (layer.keys[0].nbytes + layer.values[0].nbytes)
        calls.append(torch.ones(weights // 4).sum)
    times: list[list[float]] = [[] for _ in calls]
    for module in (layer, other):
        module.train(mode != "fwd")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < WARM_UP + 3:
        for call, found in zip(calls, times, strict=True):
            for parameter in (x, *layer.parameters(), *other.parameters()):
                parameter.grad = None
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    of_layer, of_other, *rates = (statistics.median(found[WARM_UP:]) for found in times)
    read = {"weights": weights, "reading": weights / rates.pop()} if weights else {}
    return {"step": of_layer, "baseline": baseline, "against": of_other, "rate": 2 * PRODUCT**3 / min(rates), **read}


def read(lines: Iterable[str]) -> dict[str, float]:
    """Median seconds of each pass out of the core's lines, without the first steps."""
    found = defaultdict(list)
    for line in lines:
        name, seconds = line.split()
        found[name].append(float(seconds))
    return {name: statistics.median(times[WARM_UP:]) for name, times in found.items()}


def profile(shape: MoEShape | MemoryShape, dtype: str, mode: str, seconds: float, library: Path) -> Passes:
    """One shape, in a process that loads the core with timers."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "passes")
        environment = {**os.environ, "SPARSE_FFN_LIBRARY": str(library), "SPARSE_FFN_PHASES": str(record)}
        code = (
            "import json; from benchmarks.passes import *; "
            f"print(json.dumps(measure({shape!r}, {dtype!r}, {mode!r}, {seconds!r})))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE
        )
        passes = read(record.read_text().splitlines())
        return Passes(str(shape), dtype, mode, seconds=passes, flops=flops(shape, mode), **json.loads(done.stdout))


def save(path: Path, facts: dict[str, str], command: str, found: Iterable[Passes]) -> None:
    """Write profiles beside the machine and the command, as a :class:`records.Report` is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump({"machine": facts, "command": command, "passes": [asdict(passes) for passes in found]}))


def load(path: Path) -> list[Passes]:
    """Read a file of :func:`save`."""
    return [Passes(**found) for found in json.loads(path.read_text())["passes"]]


def main(argv: Sequence[str] | None = None) -> list[Passes]:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = arguments.add_argument
    add("--shapes", nargs="+", type=MoEShape.parse, default=list(MOE_SHAPES), metavar="T,D,E,G,k")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--seconds", type=float, default=3, help="for one shape, about; default 3")
    add("--json", type=Path, help="write all numbers to this file")
    options = arguments.parse_args(argv)
    facts = machine.describe(torch.device("cpu"))
    library = build(ROOT / "build" / "passes")
    found = []
    for dtype in options.dtype:
        for shape in (*options.shapes, MEMORY):
            for mode in MODES:
                if mode == "fwd" and (isinstance(shape, MemoryShape) or shape.T > DECODE):
                    continue  # the forward pass of a training step shows it
                found.append(profile(shape, dtype, mode, options.seconds, library))
                print(f"\n{found[-1].title()}\n\n{report.text(found[-1].table())}", flush=True)
                if found[-1].reading:
                    print("weights read at {} GB/s, torch.sum's {}".format(*found[-1].gigabytes()), flush=True)
    if options.json:
        command = f"python -m benchmarks.passes {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()
        save(options.json, facts, command, found)
    return found


if __name__ == "__main__":
    main()
