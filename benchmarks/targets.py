"""The targets beside what a run measured: met, missed and why, or not to be judged on this machine."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.machine import has_amx
from benchmarks.measuring import report
from benchmarks.measuring.records import Result, Row
from benchmarks.pages import bars, machines, reasons
from benchmarks.pages.machines import Machine
from benchmarks.pages.reasons import Reason
from benchmarks.shapes import TOPK_TOKENS, topk_sweep

TO, PEERS = "time relative to ", "times faster than "
MET, MISSED, NO_AMX, NOT_TIMED = "met", "missed", "no AMX here", "not timed"
OWN = "set by this run"
NOT_EXPLAINED = "not explained"
SWEEPS = {str(s): f"T={s.T} D={s.D} d_ff={s.F}" for tokens in TOPK_TOKENS for s in topk_sweep(tokens)}


@dataclass(frozen=True)
class Verdict:
    """One target beside what was measured.

    Attributes:
        group, shape, dtype, mode: of the row, see ``records.Row``.
        what: is measured.
        bound: of the target.
        most: whether it is an upper bound.
        measured: None where it could not be.
        status: ``MET``, ``MISSED``, ``NO_AMX``, ``NOT_TIMED``, or ``OWN``: the bound is what this very run measured.
        on_amx: whether it is a target of machines with matrix units alone.
    """

    group: str
    shape: str
    dtype: str
    mode: str
    what: str
    bound: float
    most: bool
    measured: float | None
    status: str
    on_amx: bool = False

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Group, shape, dtype and pass; of a sweep the shape says which k it was."""
        sweep = SWEEPS.get(self.shape)
        k = self.shape.rpartition("k=")[2]
        shape = self.shape if sweep is None else f"{sweep}, every k" + (f" ({k})" if self.measured else "")
        return self.group, shape, self.dtype, self.mode

    @property
    def text(self) -> str:
        """What a reason is found by."""
        return " ".join((*self.row, self.what))

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.status == MET

    @property
    def target(self) -> str:
        """As text."""
        digits = 2 if self.most else 1
        number = f"{self.bound:,}" if isinstance(self.bound, int) else f"{self.bound:.{digits}f}"
        return f"{'≤' if self.most else '≥'} {number}"

    @property
    def distance(self) -> float:
        """How many times the target was missed by; below 1 it was met with room to spare."""
        if self.measured is None:
            return float("inf")
        return self.measured / self.bound if self.most else self.bound / self.measured


def verdicts(row: Row, facts: Mapping[str, str]) -> Iterator[Verdict]:
    """The targets of a row, on the machine of these facts."""
    ours, key = row.results[0], (row.device, row.group, row.shape, row.mode)
    amx = has_amx(facts)

    def judged(what: str, bound: float, measured: float | None, *, most: bool, on_amx: bool = False) -> Verdict:
        found = Verdict(row.group, row.shape, row.dtype, row.mode, what, bound, most, measured, MET, on_amx)
        if on_amx and not amx:
            return replace(found, status=NO_AMX)
        return found if found.distance <= 1 else replace(found, status=MISSED)

    to_dense = None if ours.ratio is None else ours.ratio.median
    for limits, on_amx in _limits(facts):
        if row.dtype in limits.get(key, {}):
            bound = limits[key][row.dtype]
            found = judged(f"{TO}{row.baseline}", bound, to_dense, most=True, on_amx=on_amx)
            yield replace(found, status=OWN) if bars.was_set_by(to_dense, bound, key, row.dtype, facts) else found
    for peer in (result for result in row.results if result.kind == "peer"):
        least = bars.GPU_OVER_PEERS if row.device == "cuda" else bars.OVER_PEERS.get(key)
        if least is not None and (peer.status == "timed" or ours.status != "timed"):
            yield judged(f"{PEERS}{peer.name}", least, speed_up(ours, peer), most=False)
        on_tiles = bars.OVER_PEERS_ON_AMX.get(key, {}).get(peer.name)
        if on_tiles is not None:
            found = judged(f"{PEERS}{peer.name}", on_tiles, speed_up(ours, peer), most=False, on_amx=True)
            yield replace(found, status=NOT_TIMED) if amx and peer.status != "timed" else found
    if row.mode != "fwdbwd":
        return
    if row.saved_bound is not None:
        kept = None if ours.saved is None else ours.saved.elements
        yield judged("elements kept for backward", row.saved_bound, kept, most=True)
    if row.experts_bound is not None:
        what = "bytes kept by the experts, against SonicMoE's formula"
        yield judged(what, row.experts_bound, row.experts_kept, most=True)


def _limits(facts: Mapping[str, str]) -> Iterator[tuple[dict[bars.Key, dict[str, float]], bool]]:
    """Limits relative to dense networks, and whether they hold on AMX alone."""
    yield bars.TO_DENSE, False
    yield bars.TO_DENSE_ON_AMX, True
    if not has_amx(facts):
        yield bars.TO_DENSE_WITHOUT_AMX.get(facts.get("CPU core", ""), {}), False


def speed_up(ours: Result, peer: Result) -> float | None:
    """How many times faster than the peer we are."""
    return None if ours.status != "timed" or peer.slowdown is None else peer.slowdown.median


def lines(rows: Iterable[Row], facts: Mapping[str, str]) -> list[Verdict]:
    """The verdicts of a table: of a row's peers the nearest, of a sweep of TopKFFN the worst k."""
    found: dict[tuple[object, ...], Verdict] = {}
    for row in rows:
        for verdict in verdicts(row, facts):
            what = PEERS if verdict.what.startswith(PEERS) and not verdict.on_amx else verdict.what
            key = (row.group, SWEEPS.get(row.shape, row.shape), row.dtype, row.mode, what, verdict.target)
            if key not in found or verdict.distance > found[key].distance:
                found[key] = verdict
    return list(found.values())


def of_machine(machine: Machine) -> list[Verdict]:
    """All lines of a machine; for a row of a CPU that it did not run, that it did not."""
    rows = [row for part in machine.reports for row in machine.rows(part)]
    there = {(row.device, row.group, row.shape, row.mode, row.dtype) for row in rows}
    absent = [
        Verdict(group, shape, dtype, mode, f"{TO}its dense network", bound, True, None, NOT_TIMED)
        for limits, _ in _limits(machine.facts)
        for (device, group, shape, mode), of_dtype in limits.items()
        for dtype, bound in of_dtype.items()
        if device == machine.device == "cpu" and (device, group, shape, mode, dtype) not in there
    ]
    absent += [
        Verdict(group, shape, "bf16", mode, f"{PEERS}{peer}", bound, False, None, NOT_TIMED)
        for (device, group, shape, mode), of_peer in bars.OVER_PEERS_ON_AMX.items()
        for peer, bound in of_peer.items()
        if device == machine.device and (device, group, shape, mode, "bf16") not in there
    ]
    unique = {(v.group, SWEEPS.get(v.shape, v.shape), v.dtype, v.mode, v.what, v.target): v for v in absent}
    return [*lines(rows, machine.facts), *unique.values()]


def table(found: Sequence[Verdict], facts: Mapping[str, str]) -> tuple[report.Table, list[Reason]]:
    """Each target beside what was measured; a missed one has the number of its reason in the list, from 1 on."""
    header = ("", "shape", "dtype", "pass", "what", "target", "measured", "")
    body, given = [], list[Reason]()
    for verdict in found:
        status = verdict.status
        if status == MISSED:
            reason = reasons.find(verdict.text, facts)
            if reason is not None and reason not in given:
                given.append(reason)
            status += f": {NOT_EXPLAINED if reason is None else given.index(reason) + 1}"
        body.append([*verdict.row, verdict.what, verdict.target, _number(verdict.measured), status])
    return (header, body), given


def _number(measured: float | None) -> str:
    return "-" if measured is None else f"{measured:,}" if isinstance(measured, int) else f"{measured:.2f}"


def counted(found: Sequence[Verdict]) -> str:
    """How many were met, and what became of the others."""
    count = Counter(verdict.status for verdict in found)
    return ", ".join(f"{count[status]} {status}" for status in (MET, MISSED, OWN, NO_AMX, NOT_TIMED) if count[status])


def summary(found: Sequence[Verdict], facts: Mapping[str, str]) -> str:
    """For the terminal; empty without targets."""
    if not found:
        return ""
    judged, given = table(found, facts)
    why = "".join(f"\n{i:3}. {reason.why} Run: {reason.command}" for i, reason in enumerate(given, 1))
    return f"Targets: {counted(found)}\n\n{report.text(judged)}\n{why}".rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    words = "folders of machines, as benchmarks/results is; default: what make bench wrote"
    arguments.add_argument("results", nargs="*", type=Path, default=[Path("runs/bench")], help=words)
    options = arguments.parse_args(argv)
    found = machines.load(options.results)
    if not found:
        raise SystemExit(f"no JSON of a machine in {', '.join(map(str, options.results))}: run make bench")
    for machine in found:
        print(f"\n{machine.title}; 16-bit instructions: {machine.instructions}")
        print(summary(of_machine(machine), machine.facts))


if __name__ == "__main__":
    main()
