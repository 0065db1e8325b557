"""Results: what a run found, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.memory import Saved
from benchmarks.timing import Quartiles

STATUSES = ("timed", "wrong", "failed", "not importable", "too large")
MODES = {"fwd": "forward, no grad", "fwdbwd": "forward + backward"}


@dataclass(frozen=True)
class Result:
    """One contender in one row.

    Attributes:
        name: the contender's.
        kind: ``"ours"``, ``"baseline"`` or ``"peer"``.
        about: what it is.
        status: one of ``STATUSES``; only ``"timed"`` has times.
        note: why it has none.
        errors: relative errors of the check.
        seconds: of a call.
        ratio: to the row's baseline.
        slowdown: time over ours.
        saved: what a forward pass keeps for the backward pass.
        peak_bytes: the highest memory during the pass.
    """

    name: str
    kind: str
    about: str
    status: str
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    seconds: Quartiles | None = None
    ratio: Quartiles | None = None
    slowdown: Quartiles | None = None
    saved: Saved | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """All contenders at one shape, dtype and pass; ours is the first.

    Attributes:
        group: which table it belongs to.
        shape: the sizes, as text.
        dtype: ``"fp32"`` or ``"bf16"``.
        mode: one of ``MODES``.
        baseline: whose time the ratios are taken to.
        saved_bound: elements that ours may keep for the backward pass.
        results: of the contenders.
        device: ``"cpu"`` or ``"cuda"``.
        experts_kept: bytes that our experts by themselves, without a router, keep for the backward pass beyond x.
        experts_bound: what SonicMoE's experts keep, by their formula.
    """

    group: str
    shape: str
    dtype: str
    mode: str
    baseline: str
    saved_bound: int | None
    results: tuple[Result, ...]
    device: str = "cpu"
    experts_kept: int | None = None
    experts_bound: int | None = None

    def of(self, name: str) -> Result:
        """One contender's result."""
        return next(result for result in self.results if result.name == name)


@dataclass(frozen=True)
class Report:
    """A run: the machine, the command, the rows."""

    machine: dict[str, str]
    command: str
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """From the text of :meth:`to_json`."""
        data = json.loads(text)
        return cls(data["machine"], data["command"], tuple(map(_row, data["rows"])))

    def save(self, path: Path) -> None:
        """Write the JSON, folders included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a file of :meth:`save`."""
        return cls.from_json(path.read_text())

    def groups(self) -> Iterable[tuple[str, list[Row]]]:
        """The rows of each group, in their order."""
        for group in dict.fromkeys(row.group for row in self.rows):
            yield group, [row for row in self.rows if row.group == group]


def _row(data: dict[str, Any]) -> Row:
    return Row(**{**data, "results": tuple(map(_result, data["results"]))})


def _result(data: dict[str, Any]) -> Result:
    quartiles = {name: data[name] and Quartiles(**data[name]) for name in ("seconds", "ratio", "slowdown")}
    saved = data["saved"] and Saved(**data["saved"])
    return Result(**{**data, **quartiles, "saved": saved})
