"""csrc/cuda compiled by nvcc, which needs no GPU: for every architecture, without spills, loadable without a driver."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sparse_ffn.backends import cuda

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX") or "c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_scheduling_keeps_its_promises(tmp_path: Path) -> None:
    program = tmp_path / "tiles_test"
    source = ROOT / "tests" / "cuda" / "tiles_test.cpp"
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    subprocess.run([str(COMPILER), *flags, source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.stdout == "ok\n", result.stderr


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_build_script_calls_no_old_library_a_new_one(tmp_path: Path) -> None:
    """Where CMake leaves the kernels out, because it cannot use the compiler."""
    for name in ("cmake", "nvcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / cuda.LIBRARY_NAME).touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith("SPARSE_FFN_")}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "CUDACXX": str(tmp_path / "nvcc")}
    result = subprocess.run([ROOT / "csrc" / "build.sh", tmp_path], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, f"{tmp_path / 'nvcc'} built nothing\n")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, and what the compiler said of each kernel."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    configure = ["cmake", "-S", ROOT / "csrc", "-B", folder, "-DSPARSE_FFN_CUDA=ON"]
    subprocess.run(configure, check=True, capture_output=True, timeout=120)
    build = ["cmake", "--build", folder, "--target", "sparse_ffn_cuda", "--parallel", "2"]
    result = subprocess.run(build, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "cuda" / cuda.LIBRARY_NAME, result.stdout + result.stderr


@pytest.mark.exhaustive
def test_compiles_for_every_architecture_without_spills(built: tuple[Path, str]) -> None:
    _, log = built
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", log)
    assert {arch for _, arch in kernels} == {"sm_80", "sm_90"}
    assert len(kernels) == 2 * len({name for name, _ in kernels})
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(kernels)
    assert set(spills) == {("0", "0", "0")}
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
    assert max(shared) <= 48 * 1024


@pytest.mark.exhaustive
def test_loads_without_a_driver(built: tuple[Path, str]) -> None:
    library = ctypes.CDLL(str(built[0]))
    library.sparse_ffn_cuda_status_text.restype = ctypes.c_char_p
    assert library.sparse_ffn_cuda_abi_version() == cuda.ABI_VERSION
    assert library.sparse_ffn_cuda_emulated() == 0
    if torch.cuda.is_available():
        return
    count = ctypes.c_int32(-1)
    status = library.sparse_ffn_cuda_device_count(ctypes.byref(count))
    assert status in (1035, 1100)  # the driver is missing, or sees no device
    assert count.value == 0
    assert b"driver" in library.sparse_ffn_cuda_status_text(1035).lower()
    assert library.sparse_ffn_cuda_usable(0) == status
    bag = cuda.Bag(1, 1, 1, 1, 0, 0, None, 1, 1, 1, 1)
    assert library.sparse_ffn_cuda_bag_sums(ctypes.byref(bag)) == status  # refused before any launch
