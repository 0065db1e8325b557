"""The CPU core compiled for aarch64 with its NEON tiles, and run by an emulator: no machine here has them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSTEM = Path("/usr/aarch64-linux-gnu")

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR) and shutil.which("cmake") and SYSTEM.exists()),
        reason=f"{COMPILER}, {EMULATOR} or cmake is not installed",
    ),
]


@pytest.mark.parametrize("openmp", [True, False])
def test_the_core_is_right_on_aarch64_with_and_without_openmp(openmp: bool, tmp_path: Path) -> None:
    """Without OpenMP is how macOS's own compiler builds it, for one thread; to save time it is not optimised here."""

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}")
    optimised = f"-DCMAKE_BUILD_TYPE={'Release' if openmp else 'None'}"
    options = ("-DSPARSE_FFN_WERROR=ON", "-DSPARSE_FFN_CUDA=OFF", optimised)
    with_openmp = f"-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP={'OFF' if openmp else 'ON'}"
    run("cmake", "-S", ROOT / "csrc", "-B", tmp_path, *target, *options, with_openmp)
    run("cmake", "--build", tmp_path, "--parallel", "2")
    program, source = tmp_path / "core_test", ROOT / "tests" / "emulated" / "core_test.cpp"
    library = (f"-L{tmp_path}", "-lsparse_ffn_cpu", f"-Wl,-rpath,{tmp_path}")
    run(COMPILER, "-std=c++17", "-O1", f"-I{ROOT / 'csrc' / 'include'}", source, "-o", program, *library)
    needed = run("aarch64-linux-gnu-readelf", "-d", tmp_path / "libsparse_ffn_cpu.so")
    assert ("libgomp" in needed) == openmp
    said = run(EMULATOR, "-L", SYSTEM, program, "neon")
    assert said.splitlines() == ["neon", "0 failures"], said
