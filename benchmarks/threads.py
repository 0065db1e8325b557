"""How evenly the CPU core's passes share their work out: the slowest thread's share over the mean, by simulation.

Any number of threads can be asked for: nothing is timed, and the machine needs a C++ compiler and no more. The splits
are those of the core's own code (csrc/cpu/split.h), which benchmarks/threads.cpp includes.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import report
from benchmarks.measuring.contender import DTYPES
from benchmarks.shapes import MOE_SHAPES, MoEShape
from sparse_ffn.backends import cpu

CSRC = Path(__file__).parents[1] / "csrc"
COUNTS = (1, 2, 4, 8, 16, 64)
ROUTINGS = {"uniform": 0.0, "skewed": 1.0}
"""The r-th of the experts, which are in no order, is chosen as often as r to the power of minus this."""


def flags(instruction_set: str) -> list[str]:
    """The compiler's, by which the core's code for an instruction set is built."""
    values = dict(re.findall(r"set\((flags_\w+) ([^)]*)\)", (CSRC / "CMakeLists.txt").read_text().replace('""', "")))
    found = values.get(f"flags_{instruction_set}", "")
    while "${" in found:
        found = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], found)
    return [*found.split(), f"-DSPARSE_FFN_ISA_NAME={instruction_set}"]


def build(folder: Path, instruction_set: str) -> Path:
    """The program that simulates.

    Raises:
        SystemExit: the compiler fails or is missing.
    """
    compiler, program = os.environ.get("CXX", "c++"), folder / "threads"
    if shutil.which(compiler) is None:
        raise SystemExit(f"the simulation needs a C++ compiler; {compiler!r} is not here")
    options = ("-std=c++17", "-O1", "-w", *flags(instruction_set))
    command = (compiler, *options, str(Path(__file__).with_suffix(".cpp")), "-o", str(program))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the simulation could not be built:\n{done.stderr}")
    return program


def routed(shape: MoEShape, skew: float, seed: int = 0) -> list[int]:
    """The experts of all slots: for each token k different ones."""
    draw = random.Random(seed)
    weights = [-skew * math.log(rank) for rank in range(1, shape.E + 1)]
    draw.shuffle(weights)
    slots: list[int] = []
    for _ in range(shape.T):
        keys = [weight - math.log(draw.expovariate(1.0)) for weight in weights]  # Gumbel: as if drawn one after another
        slots += sorted(range(shape.E), key=keys.__getitem__)[-shape.k :]
    return slots


def balance(
    program: Path, shape: MoEShape, dtype: str, slots: Sequence[int], counts: Sequence[int]
) -> dict[str, list[float]]:
    """Of each pass the slowest thread's share over the mean, for each number of threads."""
    sizes = (str(n) for n in (shape.T, shape.D, shape.E, shape.G, shape.k))
    text = " ".join(map(str, (*slots, *counts)))
    done = subprocess.run((str(program), *sizes, dtype), input=text, stdout=subprocess.PIPE, text=True, check=True)
    lines = (re.fullmatch(r"(.*?)((?: [\d.]+)+)", line) for line in done.stdout.splitlines())
    return {line[1]: [float(ratio) for ratio in line[2].split()] for line in lines if line}


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, str, str], dict[str, list[float]]]:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = arguments.add_argument
    add("--shapes", nargs="+", type=MoEShape.parse, default=list(MOE_SHAPES), metavar="T,D,E,G,k")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--threads", nargs="+", type=int, default=list(COUNTS), metavar="N")
    add(
        "--isa", default=None if cpu.PROBLEM else cpu.instruction_set(), help="default: the one that the core runs here"
    )
    options = arguments.parse_args(argv)
    if options.isa is None:
        raise SystemExit(f"name an instruction set with --isa: {cpu.PROBLEM}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder), options.isa)
        for shape in options.shapes:
            for name, skew in ROUTINGS.items():
                slots = routed(shape, skew)
                for dtype in options.dtype:
                    passes = balance(program, shape, dtype, slots, options.threads)
                    found[str(shape), dtype, name] = passes
                    header = ("slowest thread over the mean", *(f"{n} threads" for n in options.threads))
                    body = [[pass_, *(f"{ratio:.2f}" for ratio in ratios)] for pass_, ratios in passes.items()]
                    print(f"\n{shape}, {dtype}, {name} routing\n\n{report.text((header, body))}", flush=True)
    return found


if __name__ == "__main__":
    main()
