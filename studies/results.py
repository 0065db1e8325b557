"""The results of finished runs: one small JSON each, kept in the repository."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
EMULATED = "emulated"
"""A folder within: runs of processors that emulate bfloat16, which others made again, to see what that changes."""
STOPPED = "stopped"
"""A folder within, of the curves of runs that were given up."""
Record = dict[str, Any]


def save(path: Path, record: Record) -> None:
    """A line for each entry: small files whose differences can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    dumps = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    lines = (f"{dumps(key)}: {dumps(value)}" for key, value in record.items())
    with part.open("w") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)  # an interruption, of the machine too, leaves a whole file or none


def machine_of(record: Record) -> tuple[str, int]:
    """The GPU, else the processor, and the threads: what times depend on most."""
    facts = record["machine"]
    return facts.get("GPU", facts["processor"]), record["threads"]


def emulated(record: Record) -> bool:
    """Whether `rounded.Rounded` multiplied: times are then not those of bfloat16."""
    return "GPU" not in record["machine"] and record["machine"]["16-bit instructions"] == "none"


def training_seconds(record: Record) -> float:
    """Of all training steps: computed by the processor, without waiting for a core; passed by where a GPU computes."""
    seconds: float = record["training_seconds" if "GPU" in record["machine"] else "training_cpu_seconds"]
    return seconds


def load(path: Path) -> Record | None:
    """None if the run has not finished."""
    try:
        record: Record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return record


def load_all(paths: Iterable[Path]) -> list[Record]:
    """Of the runs among them that have finished."""
    return [record for path in paths if (record := load(path)) is not None]
