"""Workers: each takes the first run that is left and that nobody else has, until none is or it is told to stop."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType

import torch

from examples.language_model import data

from . import plan, results
from .plan import Run
from .sizes import SIZES
from .training import train_run

POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Order:
    """What a worker is to do, and where things are."""

    runs: tuple[Run, ...]
    data: str
    results: Path
    scratch: Path
    """Checkpoints and locks."""
    device: str = "cpu"
    threads: int = 1
    deadline: float | None = None
    """Of time.time()."""

    def left(self) -> list[Run]:
        """The runs without results."""
        return [run for run in self.runs if not run.path(self.results).exists()]


@dataclass
class Stop:
    """Asked between two steps: was there a signal, is the time over, is whoever started the workers gone?"""

    deadline: float | None
    parent: int | None = field(default_factory=lambda: p.pid if (p := multiprocessing.parent_process()) else None)
    """Not os.getppid(), which is another's if whoever started the workers went while they imported."""
    signalled: bool = False

    def __call__(self) -> bool:
        late = self.deadline is not None and time.time() > self.deadline
        return self.signalled or late or (self.parent is not None and os.getppid() != self.parent)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run at its next step, with a checkpoint."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signalled = True

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def work(order: Order) -> None:
    """Until nothing is left to do."""
    torch.set_num_threads(order.threads)
    keep_memory()
    stop = Stop(order.deadline)
    with stop.listening():
        while not stop():
            plan.adopt_trials(order.results)
            rate = plan.learning_rate(order.results)
            left = order.left()
            ready = [run for run in left if rate is not None or run.trial is not None or not SIZES[run.size].tune]
            if any(attempt(order, run, rate, stop) for run in ready):
                continue
            if ready == left:
                return
            time.sleep(POLL_SECONDS)  # until the trials are made that others have


def attempt(order: Order, run: Run, rate: float | None, stop: Stop) -> bool:
    """Whether this process got the run; then it is finished, or was told to stop."""
    with lock(order.scratch / f"{run.name}.lock") as mine:
        if not mine or run.path(order.results).exists():
            return False
        config = run.config(rate)
        checkpoint = order.scratch / f"{run.name}.pt"
        corpus = load_corpus(order.data, config.context)
        record = train_run(run, config, corpus, torch.device(order.device), checkpoint, stop)
        if record is not None:
            results.save(run.path(order.results), record)
            checkpoint.unlink(missing_ok=True)
            print(f"{run.name}: finished, {told(record)}", flush=True)
        return True


load_corpus = cache(data.load)


def told(record: results.Record) -> str:
    """The outcome in words."""
    if record["diverged"]:
        return str(record["diverged"])
    bits = record["bits_per_byte"]
    return f"{bits['valid']:.4f} bits per byte of the validation text, {bits['test']:.4f} of the test text"


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Whether this process got it. The system lets go of it however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def keep_memory() -> None:
    """Free memory stays: glibc gives it back and takes it again in every step, some percent of the time."""
    trim_threshold, mmap_threshold, largest = -1, -3, 2**25
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, largest)
        mallopt(trim_threshold, 2**31 - 1)
