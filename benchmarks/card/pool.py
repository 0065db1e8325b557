"""Runs tests in several processes, which share one card: `python -m benchmarks.card.pool --folder F -- ARGUMENTS`.

The kernels that the tests need are compiled on all cores that way, too. Each verdict is written down at once: a call
that was stopped, or that lost a process, is gone on with by the next one on the same folder. A test that ends its
process has failed. One that ran out of memory beside the others is run once more, alone on the card.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.card.pool_worker import BROKEN, CLAIMS, FAILED, FOLDER, NO_MEMORY, PASSED, SKIPPED, verdicts, write

ROOT = Path(__file__).parents[2]
UNPROVEN = 3
"""Exit status where tests are left, or none has passed."""


class Unusable(Exception):
    """The tests cannot be run at all."""


class Pool:
    """Processes that run the tests of ``arguments`` between them.

    Args:
        folder: of the verdicts and of the processes' logs.
        arguments: pytest's.
    """

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder, self.arguments = folder, arguments
        self.workers: dict[subprocess.Popen[bytes], int] = {}
        self.before, self.interrupted = 0, list[str]()

    def run(self, jobs: int) -> None:
        """Run what has no verdict yet, in so many processes.

        Raises:
            Unusable: a process ended before any had begun a test.
        """
        with contextlib.suppress(FileNotFoundError):
            self.before = len((self.folder / "verdicts.jsonl").read_text().splitlines())
        with tempfile.TemporaryDirectory() as name:
            claims = Path(name)
            for n in range(jobs):
                self._start(n, claims)
            try:
                while self.workers:
                    for process in [p for p in self.workers if p.poll() is not None]:
                        self._ended(process, self.workers.pop(process), claims)
                    time.sleep(0.05)
            except SystemExit:
                for file in claims.glob("pid-*"):
                    with contextlib.suppress(FileNotFoundError):  # it has ended since
                        self.interrupted.append(file.read_text())
                raise

    def _ended(self, process: subprocess.Popen[bytes], n: int, claims: Path) -> None:
        if process.returncode in (0, 1):
            return
        if process.returncode == BROKEN or self._blame(process, claims):
            self._start(n, claims)
        elif not any(claims.iterdir()):
            raise Unusable(f"exit status {process.returncode} before any test, see worker-{n}.log")

    def _start(self, n: int, claims: Path) -> None:
        environment = os.environ | {FOLDER: str(self.folder), CLAIMS: str(claims), "OMP_NUM_THREADS": "1"}
        command = (sys.executable, "-m", "pytest", "-p", "benchmarks.card.pool_worker", *self.arguments)
        with (self.folder / f"worker-{n}.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.workers[process] = n

    def _blame(self, process: subprocess.Popen[bytes], claims: Path) -> bool:
        """The test that was running when its process ended has failed; what the process had taken beside is free.

        Returns:
            Whether it had taken any. It may have ended between two, or after the last.
        """
        with contextlib.suppress(FileNotFoundError):
            running = claims / f"pid-{process.pid}"
            write(self.folder, running.read_text(), FAILED, 0.0, f"its process ended with status {process.returncode}")
            running.unlink()
        known, began = verdicts(self.folder, self.before), False
        for claim in claims.glob("*"):
            with contextlib.suppress(ValueError, FileNotFoundError):
                owner, taken = claim.read_text().split(" ", 1)
                if owner == str(process.pid):
                    began = True
                    if taken not in known:
                        claim.unlink()
        return began

    def stop(self) -> None:
        """End the processes that are left."""
        for process in self.workers:
            process.kill()
        for process in self.workers:
            process.wait()

    def report(self) -> int:
        """Print what came out; the exit status."""
        known = verdicts(self.folder)
        with contextlib.suppress(FileNotFoundError):
            tests = json.loads((self.folder / "collected.json").read_text())
            known = {test: known.get(test, {"outcome": "left"}) for test in tests}
        for test, verdict in known.items():
            if verdict["outcome"] in (FAILED, NO_MEMORY):
                print(f"\n{verdict['outcome']}: {test}\n{verdict['why']}")
        skipped = Counter(v["why"] for v in known.values() if v["outcome"] == SKIPPED)
        print("".join(f"\nskipped {n}: {why}" for why, n in skipped.items()))
        count = Counter(verdict["outcome"] for verdict in known.values())
        outcomes = (PASSED, FAILED, NO_MEMORY, SKIPPED, "left")
        print(", ".join(f"{count[what]} {what}" for what in outcomes if count[what]))
        if count[FAILED] or count[NO_MEMORY]:
            return 1
        return UNPROVEN if count["left"] or not count[PASSED] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 if all passed or were skipped, 1 if some failed, 3 if some are left."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.card.pool", description=__doc__)
    arguments.add_argument("--folder", type=Path, required=True, help="of the verdicts")
    arguments.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="processes, default: cores")
    arguments.add_argument("arguments", nargs="+", metavar="ARGUMENT", help="pytest's, after --")
    options = arguments.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    pool = Pool(options.folder, options.arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(UNPROVEN))
    try:
        pool.run(options.jobs)
        if any(verdict["outcome"] == NO_MEMORY for verdict in verdicts(options.folder).values()):
            pool.run(1)
    except Unusable as error:
        print(f"no verdict: {error}")
        return 1
    except SystemExit:
        print("\n".join(["stopped before the end, in the middle of", *pool.interrupted]))
    finally:
        pool.stop()
    return pool.report()


if __name__ == "__main__":
    sys.exit(main())
