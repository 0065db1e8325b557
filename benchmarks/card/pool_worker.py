"""A pytest plugin: runs the tests that no other process has taken, and writes each verdict down as soon as it is known.

``benchmarks.card.pool`` starts several such processes. A test is taken by creating a file, which only one of them can
do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER, CLAIMS = "POOL_FOLDER", "POOL_CLAIMS"
"""Environment variables: where verdicts go, and where tests are taken."""
BROKEN = 70
"""Exit status of a process that gave up since its CUDA context is of no more use."""
PASSED, SKIPPED, FAILED, NO_MEMORY = "passed", "skipped", "failed", "no memory"
POISON = re.compile(r"CUDA error|Triton Error \[CUDA\]|device-side assert|cudaError|sparse_ffn CUDA kernels.*\(\d{3}\)")
# a library that cannot get its workspace says that it could not begin
MEMORY = re.compile(r"OutOfMemoryError|out of memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)", re.IGNORECASE)
MOST = 3000  # characters of a failure that are kept


def verdicts(folder: Path, begin: int = 0) -> dict[str, dict[str, Any]]:
    """The last verdict of each test, of the lines from ``begin`` on; one that was cut off by a crash is none."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "verdicts.jsonl").read_text().splitlines()[begin:]:
            with contextlib.suppress(ValueError):
                verdict = json.loads(line)
                found[verdict["test"]] = verdict
    return found


def write(folder: Path, test: str, outcome: str, seconds: float, why: str) -> None:
    """Append a verdict, in one call of the system: several processes write to the same file."""
    line = json.dumps({"test": test, "outcome": outcome, "seconds": round(seconds, 3), "why": why[-MOST:]}) + "\n"
    file = os.open(folder / "verdicts.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


class Worker:
    """Of one process.

    Args:
        folder: of the verdicts.
        claims: of the files that say who has taken a test, and what each process runs.
    """

    def __init__(self, folder: Path, claims: Path) -> None:
        self.folder, self.claims = folder, claims
        self.running = claims / f"pid-{os.getpid()}"
        self.broken = False

    def take(self, test: str) -> bool:
        """Whether this process has it now."""
        try:
            with self._claim(test).open("x") as file:
                file.write(f"{os.getpid()} {test}")
        except FileExistsError:
            return False
        return True

    def _claim(self, test: str) -> Path:
        return self.claims / hashlib.sha256(test.encode()).hexdigest()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Of other folders only what needs a GPU; what only a GPU can show comes first."""
        marked = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = marked + [item for item in items if item not in marked and item.path.parent.name == "gpu"]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of pytest's own."""
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        tests = [item.nodeid for item in session.items]
        partial = self.folder / f"collected-{os.getpid()}"
        partial.write_text(json.dumps(tests))
        partial.replace(self.folder / "collected.json")
        free = self._free(session.items)
        item = next(free, None)
        while item is not None and not self.broken:
            following = next(free, None)  # pytest keeps the fixtures that it shares with this one
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.broken and following is not None:
                self._claim(following.nodeid).unlink()
            item = following
        return True

    def _free(self, items: list[pytest.Item]) -> Iterator[pytest.Item]:
        # what was skipped may have lacked what has been built since
        done = {test for test, verdict in verdicts(self.folder).items() if verdict["outcome"] in (PASSED, FAILED)}
        return (item for item in items if item.nodeid not in done and self.take(item.nodeid))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Say what runs, for the case that it ends the process."""
        self.running.write_text(nodeid)
        self.outcome, self.seconds, self.why = PASSED, 0.0, ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of setup, call and teardown together."""
        self.seconds += report.duration
        if report.failed:
            self.outcome, self.why = FAILED, f"{self.why}\n{report.longreprtext}".strip()
        elif report.skipped and self.outcome == PASSED:
            reason = report.longrepr
            self.outcome, self.why = SKIPPED, reason[2] if isinstance(reason, tuple) else report.longreprtext
        if report.when == "teardown":
            memory = self.outcome == FAILED and MEMORY.search(self.why) is not None
            self.broken = self.outcome == FAILED and not memory and POISON.search(self.why) is not None
            write(self.folder, report.nodeid, NO_MEMORY if memory else self.outcome, self.seconds, self.why)
            self.running.unlink()
            if not self.broken:
                _give_memory_back()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Tell the pool that tests are left for another process; destructors on a useless context would abort."""
        if self.broken:
            sys.stdout.flush()
            os._exit(BROKEN)


def _give_memory_back() -> None:
    """What torch keeps for later is the other processes' memory, too."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def pytest_configure(config: pytest.Config) -> None:
    """Join the pool."""
    config.pluginmanager.register(Worker(Path(os.environ[FOLDER]), Path(os.environ[CLAIMS])), "pool worker")
