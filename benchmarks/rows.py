"""Prints the rows that machines measured: every contender, with quartiles, memory and error."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measuring import report
from benchmarks.measuring.records import MODES
from benchmarks.pages import machines
from benchmarks.pages.machines import PARTS, PUBLISHED, Machine

PASSES = "passes"  # of the CPU core; not rows, but asked for in the same way


def tables(machine: Machine, parts: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Of each row its title, its pass, and its table."""
    for row in (row for part in parts for row in machine.rows(part)):
        yield report.title(row), row.mode, report.text(report.contenders(row))
    for found in machine.profiles if PASSES in parts else ():
        yield f"Passes of the CPU core: {found.title()}", found.mode, report.text(found.table())


def contenders(machine: Machine) -> str:
    """What each contender is, a group after the other."""
    lines: dict[str, None] = {}
    for row in (row for part in PARTS for row in machine.rows(part)):
        lines[f"\n{report.GROUPS.get(row.group, row.group)}"] = None
        lines |= dict.fromkeys(f"  {row.group}: {r.name} ({r.kind}): {r.about}" for r in row.results)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    add = arguments.add_argument
    add("--results", nargs="+", type=Path, default=[PUBLISHED], help="folders of machines; default: the published ones")
    add("--machine", default="", help="only machines whose name has this in it")
    add("--part", nargs="+", choices=(*PARTS, PASSES), default=list(PARTS), help="default: all but the passes")
    add("--layer", default="", help="only rows whose title has this in it: a layer, a shape, a dtype")
    add("--pass", dest="mode", choices=MODES, help="only one of the two")
    add("--contenders", action="store_true", help="what each contender is, in place of the rows")
    options = arguments.parse_args(argv)
    found = [m for m in machines.load(options.results) if options.machine.lower() in f"{m.name} {m.title}".lower()]
    if not found:
        raise SystemExit(f"no machine in {', '.join(map(str, options.results))} has {options.machine!r} in its name")
    for machine in found:
        print("\n".join([f"\n{machine.name}", *(f"  {name:28} {value}" for name, value in machine.facts.items())]))
        if options.contenders:
            print(contenders(machine))
            continue
        for title, mode, table in tables(machine, options.part):
            if options.layer.lower() in title.lower() and options.mode in (None, mode):
                print(f"\n{title}\n\n{table}")


if __name__ == "__main__":
    main()
