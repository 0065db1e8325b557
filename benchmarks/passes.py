"""Where a training step of SigmaMoE spends its time: the passes of the native core beside the floor of their work.

Builds a core that times its passes (CMake and a C++ compiler needed) and runs it in a process of its own. The floor of
a pass is its arithmetic at the best rate of torch.mm on this machine, in fp32 or in its dtype, whichever is faster.
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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks import machine, report
from benchmarks.contender import DTYPES
from benchmarks.shapes import MOE_SHAPES, MoEShape

ROOT = Path(__file__).parents[1]
ORDER = ("route", "sort", "up", "down", "dh", "dscores", "dx", "dkeys", "dvalues", "drouter")
PRODUCT = 2048  # the side of the matrices that torch.mm multiplies
WARM_UP = 3


@dataclass(frozen=True)
class Passes:
    """One shape's profile.

    Attributes:
        step: seconds of a step of the layer, forward and backward, as Python sees it.
        dense: the same of the dense FFN of equal compute, measured in turns with it.
        rate: FLOP/s of torch.mm.
        seconds: of each pass of the core.
    """

    shape: str
    dtype: str
    step: float
    dense: float
    rate: float
    seconds: dict[str, float]

    def floor(self, name: str) -> float:
        """Seconds that the arithmetic of a pass takes at ``rate``."""
        return flops(MoEShape.parse(self.shape)).get(name, 0) / self.rate

    def table(self) -> report.Table:
        """Pass, milliseconds, milliseconds of the floor, and their ratio; whole numbers of the step at the end."""
        known = [name for name in ORDER if name in self.seconds]
        body = [_line(name, self.seconds[name], self.floor(name)) for name in known]
        rest = self.step - sum(self.seconds[name] for name in known)
        total = sum(self.floor(name) for name in known)
        return ("pass", "ms", "floor", "of floor"), [
            *body,
            _line("Python, autograd, balance loss", rest, 0),
            _line("**step**", self.step, total),
            _line("dense FFN of equal compute", self.dense, dense_flops(MoEShape.parse(self.shape)) / self.rate),
        ]


def _line(name: str, seconds: float, floor: float) -> list[str]:
    return [
        name,
        f"{seconds * 1e3:.2f}",
        f"{floor * 1e3:.2f}" if floor else "",
        f"{seconds / floor:.2f}" if floor else "",
    ]


def flops(shape: MoEShape) -> dict[str, int]:
    """Arithmetic of each pass: 2 for a multiply-add."""
    experts, router = 2 * shape.T * shape.k * shape.G * shape.D, 2 * shape.T * shape.D * shape.E
    products = dict.fromkeys(("up", "down", "dh", "dx", "dkeys", "dvalues"), experts)
    return {**products, "route": router, "dscores": router, "drouter": router, "dx": experts + router}


def dense_flops(shape: MoEShape) -> int:
    """Of a step of the dense FFN with k·G units."""
    return 6 * 2 * shape.T * shape.k * shape.G * shape.D


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


def measure(shape: MoEShape, dtype: str, seconds: float) -> dict[str, float]:
    """Step, dense step and torch.mm's rate in this process, in turns."""
    kind = DTYPES[dtype]
    moe = sf.SigmaMoE(shape.D, shape.E, shape.G, shape.k, dtype=kind)
    dense = sf.DenseFFN(shape.D, shape.k * shape.G, bias=False, dtype=kind)
    x, slope = torch.randn(shape.T, shape.D).to(kind).requires_grad_(), torch.randn(shape.T, shape.D).to(kind)

    def step(layer: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.backward([layer(x), sf.aux_loss(layer)], [slope, None] if layer is moe else [slope])

        return run

    def run_dense() -> None:
        dense(x).backward(slope)

    factors = [torch.randn(PRODUCT, PRODUCT).to(kind) for kind in {kind, torch.float32}]
    products = [lambda a=a: torch.mm(a, a) for a in factors]
    calls: list[Callable[[], object]] = [step(moe), run_dense, *products]
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < WARM_UP + 3:
        for call, found in zip(calls, times, strict=True):
            for parameter in (x, *moe.parameters(), *dense.parameters()):
                parameter.grad = None
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    of_moe, of_dense, *of_products = (statistics.median(found[WARM_UP:]) for found in times)
    return {"step": of_moe, "dense": of_dense, "rate": 2 * PRODUCT**3 / min(of_products)}


def read(lines: Iterable[str]) -> dict[str, float]:
    """Median seconds of each pass out of the core's lines, without the first steps."""
    found = defaultdict(list)
    for line in lines:
        name, seconds = line.split()
        found[name].append(float(seconds))
    return {name: statistics.median(times[WARM_UP:]) for name, times in found.items()}


def profile(shape: MoEShape, dtype: str, seconds: float, library: Path) -> Passes:
    """One shape, in a process that loads the core with timers."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "passes")
        environment = {**os.environ, "SPARSE_FFN_LIBRARY": str(library), "SPARSE_FFN_PHASES": str(record)}
        code = (
            "import json; from benchmarks.passes import MoEShape, measure; "
            f"print(json.dumps(measure(MoEShape.parse({str(shape)!r}), {dtype!r}, {seconds!r})))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE
        )
        return Passes(str(shape), dtype, seconds=read(record.read_text().splitlines()), **json.loads(done.stdout))


def load(path: Path) -> list[Passes]:
    """What ``main`` wrote."""
    return [Passes(**found) for found in json.loads(path.read_text())["passes"]]


def main(argv: Sequence[str] | None = None) -> list[Passes]:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    training = [shape for shape in MOE_SHAPES if shape.T >= 512]
    add = arguments.add_argument
    add("--shapes", nargs="+", type=MoEShape.parse, default=training, metavar="T,D,E,G,k")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--seconds", type=float, default=6, help="for one shape, about; default 6")
    add("--json", type=Path, help="write all numbers to this file")
    options = arguments.parse_args(argv)
    facts = machine.describe(torch.device("cpu"))
    library = build(ROOT / "build" / "passes")
    found = []
    for dtype in options.dtype:
        for shape in options.shapes:
            found.append(profile(shape, dtype, options.seconds, library))
            print(f"\n{shape} {dtype}\n\n{report.text(found[-1].table())}", flush=True)
    if options.json:
        command = f"python -m benchmarks.passes {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": facts, "command": command, "passes": [asdict(passes) for passes in found]}
        options.json.write_text(json.dumps(content, indent=1))
    return found


if __name__ == "__main__":
    main()
