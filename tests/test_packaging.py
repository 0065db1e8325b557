"""What users install: sdist and wheel made by the default tools, used in a clean environment away from the sources."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparse_ffn.backends import cpu, libraries
from tools import try_wheel

ROOT = Path(__file__).parent.parent
LIBRARY = f"sparse_ffn/{cpu.LIBRARY_NAME}"
built = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(900)]  # builds, on a busy machine


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command as a user would: nothing of this library in the environment, not in the source tree."""
    env = {n: v for n, v in os.environ.items() if not n.startswith(("SPARSE_FFN_", "PYTHON"))} | environment
    result = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@dataclass
class Distributions:
    """What ``python -m build`` leaves: the sdist, and the wheel built from it in an isolated environment.

    To save minutes the compiler does not optimise here, and compiles for one instruction set alone: what this package
    itself was installed with is optimised and has them all.
    """

    sdist: Path
    wheel: Path

    def sdist_files(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def wheel_files(self) -> set[str]:
        return set(zipfile.ZipFile(self.wheel).namelist())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    place = tmp_path_factory.mktemp("dist")
    quickly = "-DCMAKE_BUILD_TYPE=None" + " -DSPARSE_FFN_ISAS=generic" * (platform.machine() == "x86_64")
    run(sys.executable, "-m", "build", "--outdir", place, ROOT, cwd=place, CMAKE_ARGS=quickly)
    return Distributions(next(place.glob("*.tar.gz")), next(place.glob("*.whl")))


@pytest.fixture(params=["of the wheel", "installed"])
def library(request: pytest.FixtureRequest, distributions: Distributions, tmp_path: Path) -> str:
    """Each core by itself: the wheel's, and the one that this package was installed with."""
    if request.param == "installed":
        return str(libraries.find(cpu.LIBRARY_NAME, cpu.LIBRARY_VARIABLE))
    return zipfile.ZipFile(distributions.wheel).extract(LIBRARY, tmp_path)


def install(wheel: Path, place: Path) -> Path:
    """The Python of a new environment that holds the wheel, and this environment's packages but sparse_ffn."""
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=place)
    python = place / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=place)
    others = place / "others"
    others.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if "sparse_ffn" not in entry.name and not entry.name.endswith(".pth"):
            (others / entry.name).symlink_to(entry)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    (site / "others.pth").write_text(f"{others}\n")
    return python


def sources(folder: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


def test_sdist_holds_all_that_builds_and_tests_and_nothing_else(distributions: Distributions) -> None:
    files = distributions.sdist_files()
    needed = sources("src") | sources("csrc") | sources("tests")
    assert needed | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"} <= files
    foreign = (".ci", ".git", ".venv", "build", "dist", "runs", "site", "shared")
    assert not {f for f in files if f.split("/")[0] in foreign or "__pycache__" in f or f.endswith((".so", ".pyc"))}


def test_wheel_holds_the_package_its_typing_and_licence_and_nothing_else(distributions: Distributions) -> None:
    files = distributions.wheel_files()
    package = {f for f in files if f.startswith("sparse_ffn/")}
    assert package - {LIBRARY} == {f.removeprefix("src/") for f in sources("src")}
    assert "sparse_ffn/py.typed" in package
    information = files - package
    assert {f.partition("/")[0] for f in information} == {distributions.wheel.name.split("-py3")[0] + ".dist-info"}
    assert any(f.endswith(".dist-info/licenses/LICENSE") for f in information)
    metadata = next(f for f in information if f.endswith("/METADATA"))
    lines = zipfile.ZipFile(distributions.wheel).read(metadata).decode().splitlines()
    assert {"License-Expression: MIT", "License-File: LICENSE", "Requires-Python: >=3.10"} <= set(lines)
    assert "Classifier: Typing :: Typed" in lines
    assert not [line for line in lines if line.startswith("Classifier: License")]  # PEP 639: the expression says it


@built
def test_wheel_serves_every_python_and_torch_on_its_platform(
    distributions: Distributions, library: str, tmp_path: Path
) -> None:
    """The core is a plain C library: no symbol of torch or Python is needed, none but its own is offered."""
    tag = distributions.wheel.stem.split("-", 2)[2]
    assert tag.startswith("py3-none-")
    assert tag != "py3-none-any"
    wanted = run("nm", "--dynamic", "--undefined-only", library, cwd=tmp_path)
    assert not [word for word in ("torch", "c10", "aten", " Py", "_Py") if word in wanted], wanted
    offered = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library, cwd=tmp_path).splitlines()}
    assert {f"sparse_ffn_{name}" for name in cpu.OPTIONS} <= offered
    assert all(name.startswith("sparse_ffn_") for name in offered), offered
    code = f"import ctypes; print(ctypes.CDLL({library!r}).sparse_ffn_abi_version())"
    assert run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path).strip() == str(cpu.ABI_VERSION)


@built
def test_the_core_is_built_without_cmake_too(tmp_path: Path) -> None:
    """To save time not optimised, for one instruction set: the next test compares what is compiled for all of them."""
    without = {"SPARSE_FFN_NO_CMAKE": "1", "SPARSE_FFN_CUDA": "0", "SPARSE_FFN_ISAS": "generic", "CXXFLAGS": "-O0"}
    folder = tmp_path / "a folder"
    run(ROOT / "csrc" / "build.sh", folder, cwd=tmp_path, **without)
    step = """
import torch, sparse_ffn as sf
layer, x = sf.SigmaMoE(24, 5, 8, 2), torch.randn(50, 24)
with sf.backend("cpu"):
    y = layer(x)
    (y.square().sum() + sf.aux_loss(layer)).backward()
with sf.backend("reference"):
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
assert all(p.grad.isfinite().all() for p in layer.parameters())
from sparse_ffn.backends import cpu
print(*cpu.instruction_sets())
"""
    report = run(sys.executable, "-c", step, cwd=tmp_path, SPARSE_FFN_LIBRARY=str(folder / cpu.LIBRARY_NAME))
    assert report.splitlines()[-1].split() == cpu.instruction_sets()[-1:]


def test_without_cmake_the_same_sources_are_compiled_with_the_same_flags(tmp_path: Path) -> None:
    cmake = shutil.which("cmake") or Path(sys.executable).with_name("cmake")
    options = ("-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_BUILD_TYPE=Release")
    run(cmake, "-S", ROOT / "csrc", "-B", tmp_path, *options, cwd=tmp_path, SPARSE_FFN_CUDA="0")
    by_cmake = [entry["command"] for entry in json.loads((tmp_path / "compile_commands.json").read_text())]
    without = {"SPARSE_FFN_NO_CMAKE": "1", "SPARSE_FFN_CUDA": "0", "CXXFLAGS": ""}
    by_hand = run(ROOT / "csrc" / "build.sh", "--dry-run", tmp_path / "out", cwd=tmp_path, **without).splitlines()[:-1]
    assert sorted(map(compilation, by_hand)) == sorted(map(compilation, by_cmake))


@pytest.mark.parametrize("options", [(), ("-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON",)], ids=["with", "without"])
def test_a_build_without_openmp_says_that_the_core_will_not_use_torchs_threads(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    cmake = shutil.which("cmake") or Path(sys.executable).with_name("cmake")
    result = subprocess.run([cmake, "-S", ROOT / "csrc", "-B", tmp_path, *options], capture_output=True, text=True)
    assert ("uses torch's threads" in " ".join(result.stderr.split())) == bool(options)


def compilation(command: str) -> tuple[str, list[str]]:
    """The source file of a compiler's command, and all options that say what comes out of it."""
    words = shlex.split(command)
    source = words[words.index("-c") + 1]
    options = {word for word in words if word.startswith("-") and not word.startswith(("-I", "-c", "-o"))}
    return Path(source).name, sorted(options - {"-Dsparse_ffn_cpu_EXPORTS"})


@built
def test_installed_wheel_trains_on_the_core_outside_the_source_tree(
    distributions: Distributions, tmp_path: Path
) -> None:
    python = install(distributions.wheel, tmp_path)
    report = run(python, ROOT / "tools" / "try_wheel.py", "--installed", cwd=tmp_path)
    assert "chosen     cpu: cpu (automatic" in report
    assert f"loaded     {tmp_path}" in report


@built
def test_the_core_loads_wherever_torch_does(library: str) -> None:
    """Of glibc and the compiler's libraries it asks for no more than torch's own wheels, which are manylinux_2_28."""
    assert "manylinux_2_28" in try_wheel.platforms(try_wheel.needs(Path(library)))


def test_without_a_compiler_a_pure_wheel_installs_warns_once_and_computes_with_torch(
    distributions: Distributions, tmp_path: Path
) -> None:
    none = shutil.which("false")
    assert none is not None
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "wheels")
    run(*pip, distributions.sdist, cwd=tmp_path, CC=none, CXX=none)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    python = install(wheel, tmp_path)
    code = """
import warnings, torch, sparse_ffn as sf
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer = sf.SigmaMoE(8, 4, 4, 2)
    for _ in range(3):
        layer(torch.randn(5, 8)).sum().backward()
print(*[w.message for w in caught if w.category is sf.SparseFFNWarning], sep="\\n")
"""
    (warning,) = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert "it was not built when sparse-ffn was installed" in warning
    assert "Install a C++ compiler and reinstall: pip install" in warning
    report = run(python, "-m", "sparse_ffn.info", cwd=tmp_path)
    assert "CPU core: it was not built when sparse-ffn was installed" in report
    assert "chosen     cpu: torch (automatic" in report
