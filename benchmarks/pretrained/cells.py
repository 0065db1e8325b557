"""Cells of a table that take minutes each, in a JSON file: what is finished is never computed again."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

Numbers = dict[str, float]


class Cell(NamedTuple):
    """What a cell is called, and how its numbers are found."""

    name: str
    compute: Callable[[], Numbers]


@dataclass(frozen=True)
class Record:
    """The finished cells of a part.

    Attributes:
        settings: what every number of it depends on.
        machine: the facts of the machine that began it.
        cells: numbers by the names of the cells.
    """

    settings: Mapping[str, str]
    machine: Mapping[str, str]
    cells: dict[str, Numbers] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Record:
        """As it was saved."""
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        """Replace the file at once: whoever stops this process leaves the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(new, path)

    def finished(self, groups: Iterable[Iterable[str]]) -> str:
        """How many samples a mean is over, where each group has the names of a cell's samples."""
        counts = sorted({sum(name in self.cells for name in names) for names in groups} - {0}) or [0]
        return " to ".join(dict.fromkeys(str(n) for n in (counts[0], counts[-1])))

    def of(self, names: Iterable[str], number: str) -> Spread | None:
        """One number over those of these cells that are finished; None if none is."""
        values = [self.cells[name][number] for name in names if name in self.cells]
        return Spread.of(values) if values else None


@dataclass(frozen=True)
class Spread:
    """A mean, its standard error (None of a single value), and of how many values."""

    mean: float
    error: float | None
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        n = len(values)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else None, n)

    def __format__(self, spec: str) -> str:
        """The mean as asked; its error with as many digits, without a sign."""
        error = "" if self.error is None else f" ± {format(self.error, spec.removeprefix('+'))}"
        return format(self.mean, spec) + error


def finish(path: Path, settings: Mapping[str, str], machine: Mapping[str, str], cells: Iterable[Cell]) -> None:
    """Compute the cells that the file does not have yet, and save each as soon as it is there.

    Args:
        path: of the file.
        settings: those of an older file must be the same.
        machine: what this machine is, for a new file.
        cells: in the order in which they are computed.

    Raises:
        ValueError: the file's numbers were found with other settings.
    """
    if path.exists():
        record = Record.load(path)
        if record.settings != settings:
            raise ValueError(f"{path} holds numbers of {record.settings}, not of {settings}: remove it to begin anew")
    else:
        record = Record(settings, machine)
    for cell in cells:
        if cell.name not in record.cells:
            record.cells[cell.name] = cell.compute()
            record.save(path)
            numbers = ", ".join(f"{name} {number:.4g}" for name, number in record.cells[cell.name].items())
            print(f"{path.stem}: {cell.name}: {numbers}", flush=True)
