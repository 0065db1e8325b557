"""Runs all parts of a GPU's proof and measurement, each with its own share of the time, and keeps what each has found.

Tests come first. A part that takes longer than its share is stopped, what it has written by then stays, and the others
go on; what a part leaves of its share goes to those after it. ``summary.json`` says how each ended.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
CARD = """
import torch
from sparse_ffn.backends.triton.tuned import Card
print(Card.of(torch.device("cuda")).path.stem, end="")
"""


@dataclass(frozen=True)
class Part:
    """A command, its share of the time, and what it needs to run at all.

    Attributes:
        name: its name; its log is ``<name>.log``.
        seconds: its share.
        command: what is run.
        needs: what must be there: "python:<module>" or the name of a program.
        environment: added to the environment.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "ok", "failed", "out of time" or "skipped"."""

    name: str
    status: str
    seconds: float
    note: str = ""


def missing(needs: Iterable[str]) -> str | None:
    """What of these is not there."""
    for need in needs:
        kind, _, module = need.partition(":")
        if kind == "python" and importlib.util.find_spec(module) is None:
            return f"{module} cannot be imported"
        if kind != "python" and shutil.which(need) is None:
            return f"{need} is not here"
    return None


def run(
    parts: Sequence[Part], out: Path, start: Callable[[Part, float, Path], int | None], clock: Callable[[], float]
) -> list[Outcome]:
    """Run the parts one after the other.

    Args:
        parts: what to run.
        out: where the logs and the summary go.
        start: runs a part for at most so many seconds with its log in a file: its exit status, None if it was stopped.
        clock: seconds.
    """
    outcomes: list[Outcome] = []
    end = begin = clock()
    for part in parts:
        end += part.seconds  # by then this part is over, however long those before took
        lacking = missing(part.needs)
        if lacking is not None:
            outcomes.append(Outcome(part.name, "skipped", 0.0, lacking))
        else:
            print(f"[{clock() - begin:5.0f} s] {part.name}, at most {end - clock():.0f} s", flush=True)
            since, log = clock(), out / f"{part.name}.log"
            code = start(part, max(end - clock(), 1.0), log)
            status = "out of time" if code is None else "ok" if code == 0 else "failed"
            note = "" if code == 0 else f"{'stopped' if code is None else f'exit status {code}'}, see {log.name}"
            outcomes.append(Outcome(part.name, status, round(clock() - since, 1), note))
        (out / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    return outcomes


def start(part: Part, seconds: float, log: Path) -> int | None:
    """Run a part as a process of its own, its children included when it is stopped."""
    # a library that could not be built must not stand before one that is installed
    added = {n: v for n, v in part.environment.items() if not v.endswith(".so") or Path(v).is_file()}
    environment = os.environ | added
    with log.open("wb") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(part.command, cwd=ROOT, env=environment, **options)  # type: ignore[call-overload]
        try:
            return int(process.wait(seconds))
        except subprocess.TimeoutExpired:
            for how in (signal.SIGTERM, signal.SIGKILL):  # the second one for whoever is left of the group
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, how)
                    process.wait(5)
            return None


def parts(out: Path, *, rehearse: bool) -> list[Part]:
    """All parts: on a GPU at their real sizes, in a rehearsal at tiny ones on the CPU."""
    python, untuned, tuned = sys.executable, {"SPARSE_FFN_TUNED": str(out / "none")}, {"SPARSE_FFN_TUNED": str(out)}
    libraries = {
        "SPARSE_FFN_LIBRARY": str(out / "core" / "libsparse_ffn_cpu.so"),
        "SPARSE_FFN_CUDA_LIBRARY": str(out / "core" / "libsparse_ffn_cuda.so"),
    }
    # without what only the whole suite needs: options, plugins, the conftest for the documentation
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--confcutdir", "tests")
    workers = ("-n", "8") if importlib.util.find_spec("xdist") and not rehearse else ()

    def bench(name: str, program: str, *arguments: str) -> tuple[str, ...]:
        where = ("--device", "cpu", "--seconds", "0.01", "--peers", "none") if rehearse else ("--device", "cuda")
        return (python, "-m", f"benchmarks.{program}", *where, *arguments, "--json", str(out / f"{name}.json"))

    if rehearse:
        tiny = ("--shapes", "16,8,4,8,2", "--dtype", "fp32", "--pass", "fwdbwd")
        interpreted = {"TRITON_INTERPRET": "1"}
        routing = ("tests/gpu/test_routing_kernels.py", "-k", "too_many or (covers or cover) and one and 16")
        return [
            Part("info", 200, (python, "-m", "sparse_ffn.info")),
            Part("build", 200, ("csrc/build.sh", "--dry-run", str(out / "core"))),
            Part("tests-gpu", 200, (*pytest, "tests/gpu", "-m", "gpu"), ("python:pytest",), interpreted),
            Part("tests-compiled", 200, (*pytest, *routing), ("python:pytest",), interpreted),
            Part("layers", 200, bench("layers", "bench_layers", *tiny, "--layers", "moe")),
            Part("cvmm", 200, bench("cvmm", "bench_cvmm", *tiny)),
            Part("sweeps", 200, bench("sweeps", "sweeps", "--tokens", "8", "--points", "1", "--sweeps", "e")),
            Part("tune", 200, (python, "-m", "sparse_ffn.tune", "--dry-run", "--dtype", "bf16"), (), tuned),
            Part("page", 200, _page(out), ("python:matplotlib",)),
        ]
    chosen = "test_cvmm_of_any_size or test_expert_ffn_of_any_size or test_weighted_bag or stable_topk"
    chosen += " or of_nobody or outside_of_the_table"

    def checked(tool: str) -> tuple[str, ...]:
        return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *pytest, "tests/gpu", "-k", chosen)

    targets = ("--shapes", "16384,1024,64,256,8", "16384,1024,64,128,8", "--dtype", "bf16", "--layers", "moe")
    marked, built = ("tests/gpu", "tests/test_cuda.py", "-m", "gpu"), untuned | libraries
    uncached = untuned | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a write past a tensor lands in torch's own pool
    both = ("--dtype", "bf16", "fp32")  # if the time is up, the half that counts is there
    return [
        Part("info", 15, (python, "-m", "sparse_ffn.info")),
        Part("build", 60, ("csrc/build.sh", str(out / "core"))),
        Part("tests-gpu", 60, (*pytest, *marked), ("python:pytest",), built),
        Part("tests-compiled", 90, (*pytest, *workers, "tests/gpu", "-m", "not gpu"), ("python:pytest",), untuned),
        Part("layers", 130, bench("layers", "bench_layers", "--seconds", "1", *both), (), built),
        Part("cvmm", 50, bench("cvmm", "bench_cvmm", "--seconds", "0.7", *both), (), untuned),
        Part("sweeps", 60, bench("sweeps", "sweeps", "--seconds", "0.7", "--dtype", "bf16"), (), untuned),
        Part("tune", 50, (python, "-m", "sparse_ffn.tune", "--seconds", "40", "--dtype", "bf16"), (), tuned),
        Part("tuned", 20, bench("tuned", "bench_layers", "--seconds", "1", "--peers", "none", *targets), (), tuned),
        Part("sanitizer", 25, checked("memcheck"), ("compute-sanitizer", "python:pytest"), uncached),
        Part("races", 20, checked("racecheck"), ("compute-sanitizer", "python:pytest"), untuned),
        Part("page", 15, _page(out), ("python:matplotlib",)),
    ]


def _page(out: Path) -> tuple[str, ...]:
    """The documentation's pages with these results beside the published ones."""
    folders = ("--results", str(ROOT / "benchmarks" / "results"), str(out), "--docs", str(out / "page"))
    return (sys.executable, "-m", "benchmarks.document", *folders)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 if a part failed (out of time is no failure), 2 if there is no GPU."""
    arguments = argparse.ArgumentParser(prog="benchmarks/run_gpu.sh", description=__doc__)
    arguments.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, for a machine without a GPU")
    options = arguments.parse_args(argv)
    base = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu").resolve()
    name = "rehearsal"
    if not options.rehearse:
        found = subprocess.run((sys.executable, "-c", CARD), capture_output=True, text=True)
        if found.returncode:
            reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"no GPU that torch can use: {reason}. --rehearse needs none.", file=sys.stderr)
            return 2
        name = found.stdout
    out = base / name
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run(parts(out, rehearse=options.rehearse), out, start, time.monotonic)
    for o in outcomes:
        print(f"{o.name:15} {o.status:12} {o.seconds:6.1f} s  {o.note}")
    print(f"results in {out}")
    return int(any(o.status == "failed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
