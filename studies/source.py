"""What a run's numbers come from in this checkout: its checkpoints go on from the same source only."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from benchmarks import machine

ROOT = Path(__file__).parent.parent
PARTS = ("src/sparse_ffn", "csrc", "examples/language_model")
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".sh", ".txt"}
OWN = ("rounded.py", "training.py", "variants.py")  # sizes are in a run's config; the rest trains nothing


@cache
def source() -> str:
    """A digest of the files that this process has loaded, unless they were changed in its first moments."""
    found = hashlib.sha256()
    for path in files():
        found.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:12]


def files() -> list[Path]:
    """In order."""
    parts = [path for part in PARTS for path in (ROOT / part).rglob("*") if path.suffix in SUFFIXES]
    return sorted([*parts, *(ROOT / "studies" / name for name in OWN)])


def commit() -> str:
    """The commit, "-dirty" if a file of the source differs from it."""
    return machine.commit(*PARTS, *(f"studies/{name}" for name in OWN))
