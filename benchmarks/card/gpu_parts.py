"""What a card's proof consists of: the parts of each stage, at their real sizes, or at tiny ones on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.contenders.gpu_peers import TUNED
from benchmarks.shapes import GPU_FINE, GPU_WIDE

ROOT = Path(__file__).parents[2]
STAGES = ("tests", "bench", "tune")
LIBRARIES, KERNELS = "core", "triton"
"""Folders of what is compiled on the spot: of use on this machine only."""
POOLED = ("tests/gpu", "tests/test_cuda.py", "tests/test_offload.py", "tests/test_gpu_peers.py")
"""Where the tests are that need a GPU, or are of its kernels."""
PYTEST = ("-q", "-p", "no:cacheprovider", "-o", "addopts=", "--confcutdir", "tests")
"""Without what only the whole suite needs: options, plugins, the conftest for the documentation."""


@dataclass(frozen=True)
class Part:
    """A command, its share of the time, and what it needs to run at all.

    Attributes:
        name: its name; its log is ``<name>.log``.
        seconds: its share.
        command: what is run. Its exit status is 0 for success, 3 if the time was too short, else it has failed.
        needs: what must be there: "python:<module>" or the name of a program.
        environment: added to the environment.
        makes: what it leaves for others. Where that is gone, the part is not done.
        optional: whether the stage is whole without it where what it needs is missing.
        sums_up: whether it uses what those before it have made or found: it is done anew if one of them was run.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    makes: tuple[Path, ...] = ()
    optional: bool = False
    sums_up: bool = False


def parts(stage: str, work: Path, architecture: str | None) -> list[Part]:
    """The parts of a stage.

    Args:
        stage: one of ``STAGES``.
        work: where results go.
        architecture: of the card, the gate's name for it; None for a rehearsal.
    """
    return _Parts(work, architecture).of(stage)


class _Parts:
    def __init__(self, work: Path, architecture: str | None) -> None:
        self.work, self.architecture = work, architecture
        self.rehearsal = architecture is None
        # no file of the user's is read or written: built-in block sizes, or those measured here
        kernels = {"TRITON_CACHE_DIR": str(work / KERNELS)}
        self.untuned = kernels | {"SPARSE_FFN_TUNED": str(work / "none")}
        self.tuned = kernels | {"SPARSE_FFN_TUNED": str(work)}
        self.libraries = {
            "SPARSE_FFN_LIBRARY": str(work / LIBRARIES / "libsparse_ffn_cpu.so"),
            "SPARSE_FFN_CUDA_LIBRARY": str(work / LIBRARIES / "libsparse_ffn_cuda.so"),
        }

    def of(self, stage: str) -> list[Part]:
        whole = {"tests": self.tests, "bench": self.bench, "tune": self.tune}
        rehearsed = {"tests": self.tests_rehearsed, "bench": self.bench_rehearsed, "tune": self.tune_rehearsed}
        return (rehearsed if self.rehearsal else whole)[stage]()

    def tests(self) -> list[Part]:
        """What is compiled comes first, on all cores; then all tests on the card; then NVIDIA's checkers on some."""
        chosen = "test_cvmm_of_any_size or test_expert_ffn_of_any_size or test_weighted_bag or stable_topk"
        chosen += " or of_nobody or outside_of_the_table"
        some = ("tests/gpu", "tests/test_cuda.py", "-k", f"({chosen}) and not emulated")
        needs = ("compute-sanitizer", "python:pytest")

        def checked(seconds: float, tool: str, *options: str, **environment: str) -> Part:
            program = ("compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9")
            own = self.untuned | self.libraries | environment
            return Part(tool, seconds, (*program, *module("pytest", *PYTEST, *some)), needs, own, optional=True)

        # else what is just past a tensor lies in its own margin, or in torch's pool
        bare = {"SPARSE_FFN_TEST_MARGIN": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            Part("info", 60, module("sparse_ffn.info")),
            self.build(60),
            self.gate("gate", 80, "--quick"),
            self.pool(215, *POOLED),
            checked(55, "memcheck", "--report-api-errors", "no", **bare),  # torch asks for what a driver may lack
            checked(45, "racecheck"),
        ]

    def tests_rehearsed(self) -> list[Part]:
        """With ample shares, here and in the other stages: the machine may be one that does much else."""
        some = ("tests/gpu/test_routing_kernels.py", "tests/gpu/test_on_a_gpu.py", "-k", "too_many or compiles_whole")
        return [
            Part("info", 150, module("sparse_ffn.info")),
            self.build(50),
            self.pool(300, *some),
        ]

    def bench(self) -> list[Part]:
        """The layers first, in bf16, with the libraries to compare with; those that tune themselves last."""
        both, authors = ("--dtype", "bf16", "fp32"), ("--shapes", str(GPU_WIDE), "--dtype", "bf16", "--peers", *TUNED)
        moe = ("--layers", "moe", "moe-glu")
        return [
            self.gate("gate", 40, "--quick"),
            self.timed("layers", "bench_layers", 200, "--seconds", "1", *both, "--without", *TUNED),
            self.timed("cvmm", "bench_cvmm", 55, "--seconds", "0.7", *both, "--without", *TUNED),
            self.timed("sweeps", "sweeps", 75, "--seconds", "0.7", "--dtype", "bf16"),
            self.timed("authors", "bench_layers", 85, "--seconds", "1", *authors, *moe),
            self.timed("authors-cvmm", "bench_cvmm", 20, "--seconds", "0.7", *authors),  # by what has been tuned now
            *self.shown(),
        ]

    def bench_rehearsed(self) -> list[Part]:
        tiny = ("--shapes", "16,8,4,8,2", "--dtype", "fp32", "--pass", "fwdbwd")
        return [
            self.timed("layers", "bench_layers", 170, *tiny, "--layers", "moe"),
            self.timed("cvmm", "bench_cvmm", 120, *tiny),
            self.timed("sweeps", "sweeps", 120, "--tokens", "8", "--points", "1", "--sweeps", "e"),
            *self.shown(),
        ]

    def tune(self) -> list[Part]:
        """Block sizes, where the ways cross, and what the two give the layers of the targets."""
        tune = module("sparse_ffn.tune", "--dtype", "bf16")
        return [
            self.gate("candidates", 80, "--candidates"),
            Part("tune", 240, (*tune, "--seconds", "215", "--resume"), (), self.tuned),
            Part("crossovers", 70, (*tune, "--crossovers", "--seconds", "45"), (), self.tuned),
            self.tuned_layers(80),
            self.page(),
        ]

    def tune_rehearsed(self) -> list[Part]:
        return [Part("tune", 400, module("sparse_ffn.tune", "--dry-run", "--dtype", "bf16"), (), self.tuned)]

    def build(self, seconds: float) -> Part:
        """The CUDA kernels, where nvcc is."""
        command = ("csrc/build.sh", *(["--dry-run"] if self.rehearsal else []), str(self.work / LIBRARIES))
        own = {} if self.rehearsal else {"SPARSE_FFN_CPU": "0"}
        return Part("build", seconds, command, ("g++",), own, (self.work / LIBRARIES,), optional=True)

    def gate(self, name: str, seconds: float, what: str) -> Part:
        """Compiles the kernels on all cores into the cache that the other parts read."""
        command = (sys.executable, "tools/compile_gate.py", what, "--target", str(self.architecture))
        return Part(name, seconds, command, (), self.untuned, (self.work / KERNELS,))

    def pool(self, seconds: float, *what: str) -> Part:
        """Tests on all cores."""
        command = module("benchmarks.card.pool", "--folder", str(self.work / "tests"))
        environment = self.untuned | self.libraries
        if self.rehearsal:
            command, environment = (*command, "--jobs", "2"), environment | {"TRITON_INTERPRET": "1"}
        return Part("tests", seconds, (*command, "--", *PYTEST, *what), ("python:pytest",), environment, sums_up=True)

    def timed(self, name: str, program: str, seconds: float, *arguments: str) -> Part:
        """A benchmark, which goes on where it was stopped."""
        where = ("--device", "cpu", "--seconds", "0.01", "--peers", "none") if self.rehearsal else ("--device", "cuda")
        into = ("--json", str(self.work / f"{name}.json"), "--resume")
        return Part(name, seconds, module(f"benchmarks.{program}", *where, *arguments, *into), (), self.untuned)

    def tuned_layers(self, seconds: float) -> Part:
        """The layers of the targets by what was tuned, all of it in one go."""
        what = ("--shapes", str(GPU_WIDE), str(GPU_FINE), "--dtype", "bf16", "--layers", "moe", "--peers", "none")
        into = ("--device", "cuda", "--seconds", "1", "--json", str(self.work / "tuned.json"))
        command = module("benchmarks.bench_layers", *what, *into)
        return Part("tuned", seconds, command, (), self.tuned, sums_up=True)

    def shown(self) -> list[Part]:
        """The pictures and the pages of what was measured."""
        draw = module("benchmarks.plot", str(self.work))
        return [Part("pictures", 15, draw, ("python:matplotlib",), optional=True, sums_up=True), self.page()]

    def page(self) -> Part:
        """The documentation's pages with these results beside the published ones."""
        folders = ("--results", str(ROOT / "benchmarks" / "results"), str(self.work), "--docs", str(self.work / "page"))
        write = module("benchmarks.document", *folders)
        return Part("page", 25, write, ("python:matplotlib",), optional=True, sums_up=True)


def module(name: str, *arguments: str) -> tuple[str, ...]:
    """A command that runs a module."""
    return (sys.executable, "-m", name, *arguments)
