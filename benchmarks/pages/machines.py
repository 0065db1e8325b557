"""What each machine measured: a folder of JSON for each, under benchmarks/results those that are published."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import passes
from benchmarks.machine import SAME, was_busy
from benchmarks.measuring.records import Report, Row

PUBLISHED = Path(__file__).parents[1] / "results"
PARTS = ("layers", "wide", "topk", "cvmm", "sweeps", "authors", "authors-cvmm", "tuned")


@dataclass(frozen=True)
class Machine:
    """One machine and its numbers.

    Attributes:
        name: of its folder.
        reports: by part.
        profiles: of the CPU core's passes.
    """

    name: str
    reports: Mapping[str, Report]
    profiles: Sequence[passes.Passes] = ()

    @property
    def facts(self) -> Mapping[str, str]:
        """What ``machine.describe`` said before the first of its runs."""
        return next(iter(self.reports.values())).machine

    @property
    def busy(self) -> bool:
        """Whether other programs used more than half a processor before any of its runs."""
        return any(was_busy(report.machine) for report in self.reports.values())

    @property
    def title(self) -> str:
        """Its maker's name for it, short enough to head a column."""
        processor = self.facts.get("processor", self.name)
        return self.facts.get("GPU") or re.sub(r"\((R|TM)\)|,.*| (CPU|Processor|\d+-Core)\b.*", "", processor)

    @property
    def instructions(self) -> str:
        """Its 16-bit instructions."""
        return self.facts.get("16-bit instructions", "unknown").partition(" (")[0]

    @property
    def device(self) -> str:
        """``"cuda"`` for a graphics card."""
        return "cuda" if "GPU" in self.facts else "cpu"

    def rows(self, part: str = "layers") -> Sequence[Row]:
        """The rows of a part, none if it did not run."""
        return self.reports[part].rows if part in self.reports else ()


def load(folders: Iterable[Path]) -> list[Machine]:
    """The machines of these folders; each is a machine's own or holds a folder for each of several."""
    found = []
    for folder in folders:
        for place in [folder] if any(folder.glob("*.json")) else sorted(folder.glob("*/")):
            files = {part: place / f"{part}.json" for part in PARTS}
            reports = {part: Report.load(file) for part, file in files.items() if file.is_file()}
            timed = place / "passes.json"
            if len({tuple(map(r.machine.get, SAME)) for r in reports.values()}) > 1:
                raise ValueError(f"{place} has parts that differ in one of: {', '.join(SAME)}")
            if reports:
                found.append(Machine(place.name, reports, passes.load(timed) if timed.is_file() else ()))
    return found
