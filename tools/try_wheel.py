"""``make wheel``: builds sdist and wheel, and tries the wheel in an environment of its own, without a compiler.

    python tools/try_wheel.py [--out dist]
    python tools/try_wheel.py --installed   # only tries what this Python has installed

The environment gets what pip installs with the wheel, and is deleted afterwards.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The newest symbols that a wheel of the tag may ask for (PEP 600). PyTorch's own wheels are manylinux_2_28.
MANYLINUX = {
    "manylinux_2_17": {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7), "GCC": (4, 8)},
    "manylinux_2_28": {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0)},
}


def needs(library: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each system library's symbols that a library asks for."""
    listing = run("readelf", "--wide", "--version-info", library)
    newest: dict[str, tuple[int, ...]] = {}
    for name, numbers in re.findall(r"Name: ([A-Z]+)_([\d.]+) ", listing.partition("Version needs")[2]):
        version = tuple(int(number) for number in numbers.split("."))
        newest[name] = max(version, newest.get(name, version))
    return newest


def platforms(needed: dict[str, tuple[int, ...]]) -> list[str]:
    """The manylinux tags whose systems have all that."""
    return [
        tag
        for tag, limits in MANYLINUX.items()
        if all(needed.get(name, limit) <= limit for name, limit in limits.items())
    ]


def build(out: Path) -> Path:
    """The wheel, made from the sdist as pip and PyPI's users do; both are in the folder."""
    for old in (*out.glob("sparse_ffn-*.whl"), *out.glob("sparse_ffn-*.tar.gz")):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    (wheel,) = out.glob("sparse_ffn-*.whl")
    return wheel


def describe(wheel: Path, place: Path) -> str:
    """What the core asks of the system it is loaded on."""
    with zipfile.ZipFile(wheel) as archive:
        cores = [name for name in archive.namelist() if name.endswith(".so")]
        if not cores:
            return "a pure wheel: torch computes"
        needed = needs(Path(archive.extract(cores[0], place)))
    asked = ", ".join(f"{name} {'.'.join(map(str, version))}" for name, version in needed.items())
    return f"the core asks for {asked}: {', '.join(platforms(needed)) or 'newer than every tag known here'}"


def try_in_a_clean_environment(wheel: Path, place: Path) -> str:
    """Install the wheel as a user does, and use it where no compiler can be found."""
    run(sys.executable, "-m", "venv", place / "env")
    programs = place / "env" / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-compile", wheel)
    return run(programs / "python", __file__, "--installed", cwd=place, PATH=str(programs), CC="false", CXX="false")


def try_installed() -> None:
    """Print what is installed, train a layer one step against the reference, count the OpenMP runtimes."""
    import torch

    import sparse_ffn as sf
    from sparse_ffn import info

    pure = "Tag: py3-none-any" in str(importlib.metadata.distribution("sparse-ffn").read_text("WHEEL"))
    report = info.report()
    print(f"{report}\nloaded     {sf.__file__}")
    assert ("CPU core: loaded" in report) != pure, "a wheel for a platform brings the core, a pure one does not"
    with sf.backend("torch" if pure else "cpu"):
        layer, x = sf.SigmaMoE(24, 5, 8, 2), torch.randn(50, 24)
        y = layer(x)
        (y.square().sum() + sf.aux_loss(layer)).backward()
    with sf.backend("reference"):
        torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    if sys.platform == "linux":
        files = {Path(word).resolve() for word in Path("/proc/self/maps").read_text().split() if word.startswith("/")}
        runtimes = [str(file) for file in files if re.match(r"lib(g|i)?omp", file.name)]
        assert len(runtimes) == 1, f"one OpenMP runtime serves torch and the core; here are {runtimes}"
        print(f"OpenMP     {runtimes[0]}")


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """Run a command with nothing of this library in its environment; what it printed."""
    env = {n: v for n, v in os.environ.items() if not n.startswith(("SPARSE_FFN_", "PYTHON"))} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where sdist and wheel go (default: dist)")
    parser.add_argument("--installed", action="store_true", help="try what this Python has installed, build nothing")
    arguments = parser.parse_args()
    if arguments.installed:
        try_installed()
        return
    wheel = build(arguments.out)
    with tempfile.TemporaryDirectory() as place:
        print(f"{wheel}\n{describe(wheel, Path(place))}\n")
        print(try_in_a_clean_environment(wheel, Path(place)))


if __name__ == "__main__":
    main()
