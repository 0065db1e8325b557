"""What code is loaded, and what users are told to install: nothing that someone else can put in the way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_ffn
from sparse_ffn.backends import cpu, cuda

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sparse_ffn.__file__).parent
COMPILER = shutil.which(os.environ.get("CC") or "cc")
compiled = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
built = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")


def run(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that knows no variable of this library but those given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SPARSE_FFN_")} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def library(path: Path, source: str) -> Path:
    """A shared library of a few lines of C."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [str(COMPILER), "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture
def coreless(tmp_path: Path) -> Path:
    """A folder for sys.path with the package as it is without a compiler."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "coreless" / "sparse_ffn", ignore=ignored)
    return tmp_path / "coreless"


# ----------------------------------------------------------------------------------------- where libraries are found


@compiled
@pytest.mark.parametrize("name", [cpu.LIBRARY_NAME, pytest.param(cuda.LIBRARY_NAME, marks=pytest.mark.exhaustive)])
def test_a_library_planted_on_the_path_or_in_the_current_folder_is_not_loaded(
    name: str, coreless: Path, tmp_path: Path
) -> None:
    """A folder sparse_ffn without an __init__.py does not hide the package, and was searched all the same."""
    trace = tmp_path / "was-loaded"
    source = f"""
    #include <stdio.h>
    __attribute__((constructor)) static void run(void) {{ fclose(fopen("{trace}", "w")); }}
    """
    for folder in ("elsewhere", "current"):
        library(tmp_path / folder / "sparse_ffn" / name, source)
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]  # the path decides
import sparse_ffn.backends.cpu, sparse_ffn.backends.cuda
print(sparse_ffn.backends.cpu.PROBLEM, sparse_ffn.backends.cuda.library().problem)
"""
    path = os.pathsep.join(map(str, (tmp_path / "elsewhere", coreless, tmp_path / "current")))
    result = run(code, cwd=tmp_path / "current", PYTHONPATH=path)
    assert result.stdout.count("it was not built") == 2, result.stderr
    assert not trace.exists()


@pytest.mark.exhaustive
@built
def test_a_library_beside_the_package_or_in_the_folder_of_an_editable_install_is_loaded(
    coreless: Path, tmp_path: Path
) -> None:
    """An editable install leaves the sources where they are; what it builds is in a second folder of the package."""
    wheel = tmp_path / "site-packages" / "sparse_ffn"
    wheel.mkdir(parents=True)
    (wheel / cpu.LIBRARY_NAME).symlink_to(loaded())
    code = f"""
import importlib.util, sys
folders = [{str(wheel)!r}, {str(coreless / "sparse_ffn")!r}]
where = {{"submodule_search_locations": folders}}
spec = importlib.util.spec_from_file_location("sparse_ffn", folders[1] + "/__init__.py", **where)
sys.modules["sparse_ffn"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
print(package.backends.cpu.PROBLEM, package.backends.cpu.instruction_set())
"""
    assert run(code).stdout.split() == ["None", cpu.instruction_set()]


def loaded() -> Path:
    """Where this process's core is."""
    maps = Path("/proc/self/maps").read_text()
    return Path(next(word for word in maps.split() if word.endswith(cpu.LIBRARY_NAME)))


# -------------------------------------------------------------------------------------------- libraries of no use

STEP = """
import warnings, torch, sparse_ffn as sf
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer = sf.SigmaMoE(8, 4, 4, 2)
    for _ in range(3):
        layer(torch.randn(5, 8)).sum().backward()
print(*[w.message for w in caught if w.category is sf.SparseFFNWarning], sep="\\n")
"""


@pytest.mark.exhaustive
@compiled
@pytest.mark.parametrize("missing", ["sparse_ffn_moe_forward", "sparse_ffn_isa", "sparse_ffn_allocate"])
def test_a_library_without_all_symbols_is_not_used_and_the_reason_is_told(missing: str, tmp_path: Path) -> None:
    names = {f"sparse_ffn_{name}" for name in (*cpu.OPTIONS, "isa", "isas", "error", "allocate", "free")} - {missing}
    source = f"int sparse_ffn_abi_version(void) {{ return {cpu.ABI_VERSION}; }}\n"
    path = library(tmp_path / "old.so", source + "\n".join(f"int {name}(void) {{ return 0; }}" for name in names))
    result = run(STEP + "from sparse_ffn.info import report; print('then', report())", SPARSE_FFN_LIBRARY=str(path))
    warnings, _, report = result.stdout.partition("then ")
    (warning,) = warnings.splitlines() or [result.stderr]
    assert f"{path} cannot be loaded: " in warning
    assert missing in warning
    assert f"CPU core: {path} cannot be loaded" in report


@pytest.mark.exhaustive
@compiled
@pytest.mark.parametrize(
    ("abi", "why"),
    [
        (cuda.ABI_VERSION, "cannot be loaded: "),
        (cuda.ABI_VERSION - 1, f"has ABI version {cuda.ABI_VERSION - 1}, this package needs {cuda.ABI_VERSION}"),
    ],
    ids=["of this version", "of an older one"],
)
def test_a_cuda_library_without_all_symbols_is_not_used_and_the_reason_is_told(
    abi: int, why: str, tmp_path: Path
) -> None:
    source = f"int sparse_ffn_cuda_abi_version(void) {{ return {abi}; }}"
    path = library(tmp_path / "old.so", source)
    report = run("from sparse_ffn.info import report; print(report())", SPARSE_FFN_CUDA_LIBRARY=str(path))
    assert f"CUDA library: {path} {why}" in report.stdout, report.stderr


@pytest.mark.exhaustive
def test_a_library_that_is_named_is_that_file_and_no_other(tmp_path: Path) -> None:
    """The loader looks for a bare name in the system's folders, where this one would be found."""
    for name in ("libm.so.6", "./libm.so.6"):
        result = run("from sparse_ffn.backends import cpu; print(cpu.PROBLEM)", cwd=tmp_path, SPARSE_FFN_LIBRARY=name)
        assert f"{tmp_path / 'libm.so.6'} cannot be loaded" in result.stdout, result.stderr


# ------------------------------------------------------------------------------------------ environment variables


@pytest.mark.exhaustive
def test_empty_variables_are_as_good_as_none() -> None:
    code = "import torch; from sparse_ffn.backends import choice, cpu; print(choice.explain(), cpu.PROBLEM)"
    names = ("SPARSE_FFN_BACKEND", "SPARSE_FFN_LIBRARY", "SPARSE_FFN_CUDA_LIBRARY", "SPARSE_FFN_ISA")
    empty, none = run(code, **dict.fromkeys(names, "")), run(code)
    assert empty.stdout == none.stdout != "", empty.stderr
    assert "(automatic" in run(code, SPARSE_FFN_BACKEND="  ").stdout
    assert "torch (forced" in run(code, SPARSE_FFN_BACKEND=" torch ").stdout


@built
@pytest.mark.parametrize(
    "name",
    ["avx2 ", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("garbage", "AVX2", "avx512_bf1", "sve"))],
)
def test_an_instruction_set_that_is_not_there_is_an_error(name: str) -> None:
    result = run("import sparse_ffn", SPARSE_FFN_ISA=name)
    assert result.returncode
    allowed = ", ".join(map(repr, cpu.instruction_sets()))
    assert f"RuntimeError: SPARSE_FFN_ISA is {name!r}; allowed on this processor are {allowed}\n" in result.stderr


@built
def test_the_instruction_sets_of_this_processor_end_with_the_one_of_every_processor() -> None:
    names = cpu.instruction_sets()
    assert cpu.instruction_set() in names
    assert names[-1] in ("generic", "neon")
    assert set(names) <= {"generic", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"} or names == ["neon"]


# --------------------------------------------------------------------------------------------- what users are told


def test_nobody_is_told_to_install_a_name_that_the_package_index_does_not_have() -> None:
    """What that name would install, its first taker decides."""
    told = re.compile(
        r"pip3? install[^\n`]*\bsparse[-_]ffn|(pip3? download|uv add|uv pip install)[^\n]*\bsparse[-_]ffn"
    )
    for folder in ("src", "docs", "examples", "benchmarks", "csrc", "tools", ".github"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".sh", ".txt", ".yml", ".cpp", ".h"):
                assert not told.search(path.read_text()), path
    for path in ROOT.glob("*.md"):
        assert not told.search(path.read_text()), path


def test_security_names_every_way_to_have_code_loaded() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    for name in (cpu.LIBRARY_VARIABLE, cuda.LIBRARY_VARIABLE, "TRITON_CACHE_DIR", "SPARSE_FFN_TUNED", "enwik8"):
        assert name in text
