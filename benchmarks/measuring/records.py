"""Records of a run: what each contender did in each row, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring.memory import Saved
from benchmarks.measuring.timing import Quartiles

STATUSES = ("timed", "wrong", "failed", "not importable", "too large", "inference only")
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
        seconds: of a call; on a GPU the device's.
        ratio: to the row's baseline.
        slowdown: time over ours.
        saved: what a forward pass keeps for the backward pass.
        peak_bytes: the highest memory during the pass.
        clock: on a GPU ``"graph"`` where a captured call was replayed, ``"events"`` where the host launched it, since
            it waits for the device or cannot be captured: there the device's time includes gaps that the host left.
        host: on a GPU the host's seconds until a call returns.
    """

    name: str
    kind: str
    about: str = ""
    status: str = "timed"
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    seconds: Quartiles | None = None
    ratio: Quartiles | None = None
    slowdown: Quartiles | None = None
    saved: Saved | None = None
    peak_bytes: int | None = None
    clock: str = ""
    host: Quartiles | None = None


@dataclass(frozen=True)
class Row:
    """All contenders at one shape, dtype and pass; ours is the first.

    Attributes:
        group: which table it belongs to.
        shape: the sizes, as text.
        dtype: ``"fp32"`` or ``"bf16"``.
        mode: one of ``MODES``.
        baseline: whose time the ratios are taken to.
        results: of the contenders.
        saved_bound: elements that ours may keep for the backward pass.
        device: ``"cpu"`` or ``"cuda"``.
        experts_kept: bytes that our experts by themselves, without a router, keep for the backward pass beyond x.
        experts_bound: what SonicMoE's experts keep, by their formula.
    """

    group: str
    shape: str
    dtype: str
    mode: str
    baseline: str
    results: tuple[Result, ...]
    saved_bound: int | None = None
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
        return dump({"machine": self.machine, "command": self.command, "rows": [_short(row) for row in self.rows]})

    @classmethod
    def from_json(cls, text: str) -> Report:
        """From the text of :meth:`to_json`."""
        data = json.loads(text)
        return cls(data["machine"], data["command"], tuple(map(_row, data["rows"])))

    def save(self, path: Path) -> None:
        """Write the JSON, folders included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")  # whole or not at all: a run may be stopped at any time
        partial.write_text(self.to_json())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a file of :meth:`save`."""
        return cls.from_json(path.read_text())

    def groups(self) -> Iterable[tuple[str, list[Row]]]:
        """The rows of each group, in their order."""
        for group in dict.fromkeys(row.group for row in self.rows):
            yield group, [row for row in self.rows if row.group == group]


def dump(data: dict[str, Any]) -> str:
    """JSON text that is short and that a diff can follow: each entry of a list has a line of its own."""

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def part(value: Any) -> str:
        return "[\n" + ",\n".join(map(text, value)) + "\n]" if isinstance(value, list) else text(value)

    return "{" + ",\n".join(f"{text(key)}:{part(value)}" for key, value in data.items()) + "}\n"


def _short(value: Any) -> Any:
    """A record as JSON's types, without what is empty; quartiles and counts as lists."""
    if isinstance(value, (Quartiles, Saved)):
        return astuple(value)
    if isinstance(value, tuple):
        return [_short(entry) for entry in value]
    if is_dataclass(value):
        entries = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        return {name: _short(entry) for name, entry in entries.items() if entry not in (None, "", {})}
    return value


def _row(data: dict[str, Any]) -> Row:
    return Row(**{**data, "results": tuple(map(_result, data["results"]))})


def _result(data: dict[str, Any]) -> Result:
    kinds = {"seconds": Quartiles, "host": Quartiles, "ratio": Quartiles, "slowdown": Quartiles, "saved": Saved}
    return Result(**{name: kinds[name](*value) if name in kinds else value for name, value in data.items()})
