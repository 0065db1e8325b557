"""Proves and measures the library on a card, in three calls of at most nine minutes each: tests, bench and tune.

Each part has its own share of a call's time. One that takes longer is stopped; what it has found by then stays, the
others go on, and it is not proven: the same call made once more goes on where this one stopped. What a part leaves of
its share goes to those after it. ``summary.json`` says how each ended.

Results lie in runs/gpu/<card>-<code>: those of another state of the code are never taken for this one's. What is to be
carried away lies in runs/gpu/out, or in $OUT: an archive of all, the summary and pictures, at most eight files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.card import delivery
from benchmarks.card.gpu_parts import KERNELS, LIBRARIES, ROOT, STAGES, Part, parts

RUNS = ROOT / "runs" / "gpu"
LIMIT = 540.0
"""Seconds that a call may take, from its first line to its last; ``--limit`` sets another."""
RESERVE = 25.0
"""Of these, for stopping the last part and packing."""
SILENT = 90.0
"""Seconds after which a card that does not answer never will."""
SHORT = 3
"""Exit status of a part whose time was too short, and of a call with such a part."""
CARD = """
import torch, triton
from sparse_ffn.backends.triton import config
from sparse_ffn.backends.triton.tuned import Card
device = torch.device("cuda")
print(Card.of(device).path.stem, config.architecture(device), torch.__version__, triton.__version__)
"""


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "ok", "failed", "not proven" (its time was too short) or "skipped" (one can do without it)."""

    name: str
    status: str
    seconds: float
    note: str = ""


def missing(needs: Iterable[str]) -> str | None:
    """What of these is not there."""
    for need in needs:
        kind, _, module = need.partition(":")
        if kind == "python" and importlib.util.find_spec(module) is None:
            return f"{module} cannot be imported"
        if kind != "python" and shutil.which(need) is None:
            return f"{need} is not here"
    return None


class Stage:
    """Runs the parts of a stage one after the other.

    Args:
        name: of the stage.
        work: where logs and the summary go, and where those of an earlier call lie.
        begin: when the call began, by ``clock``.
        start: runs a part for at most so many seconds with its log in a file: its exit status, None if it was stopped.
        clock: seconds.
        keep: called after each part.
        limit: seconds that the call may take.
    """

    def __init__(
        self,
        name: str,
        work: Path,
        begin: float,
        start: Callable[[Part, float, Path], int | None],
        clock: Callable[[], float] = time.monotonic,
        keep: Callable[[], object] = lambda: None,
        limit: float = LIMIT,
    ) -> None:
        self.name, self.work, self.begin, self.start, self.clock, self.keep = name, work, begin, start, clock, keep
        self.limit, self.file = limit, work / "summary.json"
        self.summary: dict[str, list[dict[str, object]]] = {}
        with contextlib.suppress(FileNotFoundError):
            self.summary = json.loads(self.file.read_text())
        self.before = {str(o["name"]): Outcome(**o) for o in self.summary.get(name, ())}  # type: ignore[arg-type]

    def run(self, todo: Sequence[Part]) -> list[Outcome]:
        """All parts that an earlier call has not done."""
        outcomes: list[Outcome] = []
        end, anew = self.begin, False
        for part in todo:
            end += part.seconds  # by then this part is over, however long those before took
            before = self.before.get(part.name)
            done = before is not None and before.status == "ok" and all(path.exists() for path in part.makes)
            if before is not None and done and not (part.sums_up and anew):
                print(f"[{self.clock() - self.begin:5.0f} s] {part.name}: done in an earlier call", flush=True)
                outcomes.append(before)
            else:
                outcomes.append(self._run(part, min(end, self.begin + self.limit - RESERVE)))
                anew = anew or outcomes[-1].status != "skipped"
            self.summary[self.name] = [asdict(o) for o in outcomes]
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.summary, indent=1) + "\n")
            partial.replace(self.file)
            self.keep()
        return outcomes

    def _run(self, part: Part, end: float) -> Outcome:
        lacking = missing(part.needs)
        if lacking is not None:
            return Outcome(part.name, "skipped" if part.optional else "not proven", 0.0, lacking)
        since = self.clock()
        if since >= end:
            return Outcome(part.name, "not proven", 0.0, "no time was left")
        print(f"[{since - self.begin:5.0f} s] {part.name}, at most {end - since:.0f} s", flush=True)
        log = self.work / f"{part.name}.log"
        code = self.start(part, end - since, log)
        seconds = round(self.clock() - since, 1)
        last = _last_line(log)
        if code == 0:
            return Outcome(part.name, "ok", seconds, last)
        short = code in (None, SHORT)
        why = "the time was too short" if short else f"exit status {code}"
        note = ": ".join(filter(None, (f"{why}, see {log.name}", last)))
        return Outcome(part.name, "not proven" if short else "failed", seconds, note)


def _last_line(log: Path) -> str:
    """What a part said last; a short one: some end with a table."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last if len(last) <= 100 else ""


def start(part: Part, seconds: float, log: Path) -> int | None:
    """Run a part as a process of its own, its children included when it is stopped."""
    # a library that could not be built must not stand before one that is installed
    added = {n: v for n, v in part.environment.items() if not v.endswith(".so") or Path(v).is_file()}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | added
    with log.open("wb") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(part.command, cwd=ROOT, env=environment, **options)  # type: ignore[call-overload]
        try:
            return int(process.wait(seconds))
        except subprocess.TimeoutExpired:
            for how in (signal.SIGTERM, signal.SIGKILL):  # the second one for whoever is left of the group
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, how)
                    process.wait(5)
            return None


def code(*facts: str) -> str:
    """Eight digits of all code that a result depends on, and of these facts: results of two states never mix."""
    digest = hashlib.sha256("\n".join(facts).encode())
    for folder in ("src", "csrc", "tests", "tools", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*")):
            known = file.suffix in (".py", ".cpp", ".cu", ".h", ".sh") or file.name == "CMakeLists.txt"
            if known and "build" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def status(outcomes: Iterable[Outcome]) -> int:
    """The exit status: 1 if a part failed, 3 if one is not proven, 0 otherwise."""
    ended = {outcome.status for outcome in outcomes}
    return 1 if "failed" in ended else SHORT if "not proven" in ended else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 if all is done, 1 if a part failed, 3 if one is not proven, 2 without a GPU."""
    begin = time.monotonic()
    arguments = argparse.ArgumentParser(prog="benchmarks/run_gpu.sh", description=__doc__)
    add = arguments.add_argument
    add("stage", choices=STAGES, help="tests: on the card; bench: times, beside other libraries; tune: block sizes")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU, for a machine without a GPU")
    add("--archive", type=Path, help="what an earlier call on another machine of the kind brought home, to go on with")
    add("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"of this call, where {LIMIT:.0f} are not left")
    options = arguments.parse_args(argv)
    card, architecture, *versions = "rehearsal", None
    if not options.rehearse:
        try:
            found = subprocess.run((sys.executable, "-c", CARD), capture_output=True, text=True, timeout=SILENT)
            reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1] if found.returncode else None
        except subprocess.TimeoutExpired:
            reason = f"no answer within {SILENT:.0f} s"
        if reason is not None:
            print(f"no GPU that torch can use: {reason}. --rehearse needs none.", file=sys.stderr)
            return 2
        card, architecture, *versions = found.stdout.split()
    work = RUNS / f"{card}-{code(*versions)}"
    work.mkdir(parents=True, exist_ok=True)
    if options.archive is not None:
        try:
            delivery.unpack(options.archive, RUNS, work.name)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    out = Path(os.environ.get("OUT") or RUNS / "out" / work.name).resolve()

    def keep() -> None:
        delivery.deliver(work, out, (LIBRARIES, KERNELS))

    stage = Stage(options.stage, work, begin, start, keep=keep, limit=options.limit)
    outcomes = stage.run(parts(options.stage, work, architecture))
    for o in outcomes:
        print(f"{o.name:12} {o.status:12} {o.seconds:6.1f} s  {o.note}")
    wrong = delivery.beyond(out)
    print("\n".join([f"results in {work}; to carry away: {out}", *(f"beyond the limits: {line}" for line in wrong)]))
    print(f"{time.monotonic() - begin:.0f} s of {options.limit:.0f}")
    return 1 if wrong else status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
