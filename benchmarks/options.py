"""The command line that the benchmarks share, and the loop over their cases."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import machine, targets
from benchmarks.measuring import replay, report
from benchmarks.measuring.contender import DTYPES, Case
from benchmarks.measuring.records import MODES, Report, Row
from benchmarks.measuring.run import run_case
from benchmarks.shapes import MoEShape

Draw = Callable[[Report, Path], None]


def parser(description: str, *, seconds: float) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    found = argparse.ArgumentParser(description=description)
    add = found.add_argument
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu (the default) or cuda")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    add("--pass", dest="mode", choices=("fwd", "fwdbwd", "both"), default="both", help="forward without gradients, "
        "forward and backward, or both (the default)")  # fmt: skip
    add("--peers", nargs="+", metavar="NAME", default=["all"], help="all (the default), none, or names from the table")
    add("--without", nargs="+", metavar="NAME", default=[], help="leave these peers out")
    add("--seconds", type=float, default=seconds, help=f"to time one row for, about; default {seconds:g}")
    add("--json", type=Path, help="write all numbers to this file")
    add("--resume", action="store_true", help="leave out the cases that the file of --json has, and keep their numbers")
    add("--plot", type=Path, help="draw them to this file; needs matplotlib")
    return found


def add_shapes(found: argparse.ArgumentParser) -> None:
    """The option for the sizes of mixtures of experts; None: those of the device."""
    found.add_argument("--shapes", nargs="+", type=MoEShape.parse, metavar="T,D,E,G,k",
                       help="tokens, d_model, experts, units of an expert, selected experts")  # fmt: skip


def collect(
    options: argparse.Namespace, cases: Callable[[], Iterator[Case]], draw: Draw, argv: Sequence[str] | None
) -> Report:
    """Run the cases, print each row as it comes and the summary at the end, write what was asked for."""
    facts = machine.describe(options.device)
    name = Path(sys.argv[0]).stem
    command = f"python -m benchmarks.{name} {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()
    modes = list(MODES) if options.mode == "both" else [options.mode]
    torch.manual_seed(0)
    rows: list[Row] = []
    if options.resume and options.json and options.json.is_file():
        before = Report.load(options.json)
        if other := [name for name in machine.SAME if before.machine.get(name) != facts.get(name)]:
            raise SystemExit(f"--resume: {options.json} is of another {', '.join(other)}: give another file")
        rows += before.rows
    done = {(row.group, row.shape, row.dtype, row.mode) for row in rows}
    names = {"all", "none"}
    if options.device.type == "cuda":
        replay.leave_the_default_stream(options.device)
    for case in cases():
        names.update(entry.name for entry in case.entries)
        left = [mode for mode in modes if (case.group, case.shape, case.dtype, mode) not in done]
        if not left:
            continue
        every = [entry.name for entry in case.entries] if options.peers == ["all"] else options.peers
        found = run_case(case, left, options.seconds, peers=set(every) - set(options.without))
        for row in found:
            print(f"\n{report.title(row)}\n\n{report.text(report.contenders(row))}", flush=True)
        rows += found
        if options.json:  # after every case: a crash leaves what was measured
            Report(facts, command, tuple(rows)).save(options.json)
    result = Report(facts, command, tuple(rows))
    judged = targets.summary(targets.lines(rows, facts), facts)
    print("\n" + "\n\n".join(filter(None, (report.summary(result), judged))))
    for name in {*options.peers, *options.without} - names:
        print(f"\nno case has a peer named {name!r}")
    if options.plot:
        draw(result, options.plot)
    return result
