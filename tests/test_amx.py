"""The core's bf16 products on matrix tiles (AMX), their instructions emulated in plain C++: csrc/cpu/amx_emulated.h.

``make sanitize`` builds the core with them and runs the tests of the ops and layers on it, and tests/test_tiles.py.
What the emulation cannot show is whether a processor does what the manual says. The core asks that of each processor
that has AMX, before it uses it: csrc/cpu/amx_check.h.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
compiled = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([*map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)


# -------------------------------------------------------------------------------------------- the check of a processor


CHECK = """
#include "amx_check.h"
#include <cstdio>
namespace sparse_ffn { void* scratch(Buffer, unsigned long) { return nullptr; } }
using namespace sparse_ffn::SPARSE_FFN_ISA_NAME;
int main() { printf("%d %d", tiles_work(), tiles_multiply_fp16()); }
"""
FAULTS = {
    "none": ("", ""),
    "half of each pair is left out": ("(low + high)", "(low + low)"),
    "of bf16 pairs are the other way round in one operand": ("low = fma(low_half(pair)", "low = fma(high_half(pair)"),
    "of fp16 pairs are the other way round in one operand": ("fma(low_half_fp16(pair),",
                                                             "fma(low_half_fp16(pair >> 16),"),
    "of fp16 the subnormal numbers count as zero": ("to_float(fp16{static_cast<uint16_t>(pairs[i])})",
                                                    "pairs[i] & 0x7c00 ? to_float(fp16{uint16_t(pairs[i])}) : 0"),
    "the stride of loads is in words": ("reinterpret_cast<const char*>(p) + r * stride", "p + r * stride"),
    "stores have one row too few": ("for (int r = 0; r < kTileSide; r++) memcpy(reinterpret_cast<char*>(p)",
                                    "for (int r = 1; r < kTileSide; r++) memcpy(reinterpret_cast<char*>(p)"),
    "sums are not added up": ("c[m] + (low + high)", "low + high"),
    "A and B are exchanged": ("tile_dot<kFp16, 0, 4, 6>", "tile_dot<kFp16, 0, 6, 4>"),
    "a tile is taken for another": ("tile_dot<kFp16, 2, 5, 6>", "tile_dot<kFp16, 2, 5, 7>"),
}  # fmt: skip


@pytest.mark.exhaustive
@compiled
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_of_a_processor_sees_every_fault(fault: str, tmp_path: Path) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    folder = tmp_path / "csrc" / "cpu"
    before, after = FAULTS[fault]
    changed = 0
    for name in ("amx_emulated.h", "tile.cpp"):
        text = (folder / name).read_text()
        changed += text.count(before) if before else 1
        (folder / name).write_text(text.replace(before, after) if before else text)
    assert changed
    (folder / "check.cpp").write_text(CHECK)
    flags = ("-std=c++17", "-O0", "-Wno-psabi", "-DSPARSE_FFN_AMX=1", "-DSPARSE_FFN_AMX_EMULATED=1")
    name = "-DSPARSE_FFN_ISA_NAME=amx_emulated"
    result = run(COMPILER, *flags, name, folder / "check.cpp", folder / "tile.cpp", "-o", tmp_path / "check")
    assert result.returncode == 0, result.stderr
    bf16, fp16 = fault == "none" or "fp16" in fault, fault == "none" or "bf16" in fault
    assert run(tmp_path / "check").stdout.split() == [str(int(bf16)), str(int(fp16))]


# ---------------------------------------------------------------------------------------------- the real instructions


@pytest.mark.exhaustive
@compiled
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_inner_loop_is_four_loads_and_four_products(tmp_path: Path) -> None:
    """Of the build for AMX, which this test does not run: no memory is touched but the operands'."""
    text = (CSRC / "CMakeLists.txt").read_text()
    values = dict(re.findall(r"set\((flags_\w+) ([^)]*)\)", text))
    flags = "${flags_amx}"
    while "$" in flags:
        flags = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], flags)
    options = ("-std=c++17", "-O2", *flags.split(), "-DSPARSE_FFN_ISA_NAME=amx")
    result = run(COMPILER, *options, "-c", CSRC / "cpu/tile.cpp", "-o", tmp_path / "t.o")
    if "no such instruction" in result.stderr:
        pytest.skip("the assembler does not know AMX")
    assert result.returncode == 0, result.stderr
    code = run("objdump", "-d", "--no-show-raw-insn", tmp_path / "t.o").stdout
    functions = [f for f in code.split("\n\n") if f.count("tdpbf16ps") == 4]
    assert functions
    for function in functions:
        lines = [line.split("\t")[1] for line in function.splitlines() if "\t" in line]
        first, last = (f(i for i, line in enumerate(lines) if "tdpbf16ps" in line) for f in (min, max))
        loop = lines[first - 2 : last + 1]
        memory = [line.split()[0] for line in loop if "(" in line and not line.startswith("lea")]
        assert memory == ["tileloadd"] * 4, loop
