"""How long the runs take: what finished ones took on this machine, or else a few steps, measured now.

On a CPU the time that a process computes is counted, not its waiting for a core: what it takes with a core of its own.
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks import machine
from examples.language_model import data
from examples.language_model.configs import Config
from examples.language_model.train import bits_per_byte, train_step

from . import plan, results
from .plan import Run
from .rounded import products
from .training import learner_of
from .work import Order

STEPS, WARM_UP, WINDOWS = 5, 2, 64


def evaluation_bytes(config: Config, corpus_bytes: int) -> int:
    """Of all points of the curve, the final validation and the whole test part."""
    part = corpus_bytes * 5 // 100
    points = config.evaluations * min(part, config.eval_windows * config.context)
    return points + min(part, config.final_windows * config.context) + part


def measured(run: Run, device: torch.device, corpus_bytes: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds that a run takes, from a few steps on random bytes."""
    config = run.config(plan.LEARNING_RATES[0])
    learner = learner_of(run, config, device)
    text = torch.randint(256, (20 * WINDOWS * config.context,), generator=torch.Generator().manual_seed(0))
    part = text.to(torch.uint8)
    with products(device):
        for step in range(WARM_UP + STEPS):
            x, y = data.batch(part, seed=0, step=step, batch_size=config.batch_size, context=config.context)
            train_step(learner, x.to(device), y.to(device), config, 0, step)
        start = time.perf_counter(), time.process_time()
        bits_per_byte(learner, part, WINDOWS, config.batch_size)
        end = time.perf_counter(), time.process_time()
    evaluations = evaluation_bytes(config, corpus_bytes) / (WINDOWS * config.context)
    wall, cpu = (
        config.steps * statistics.median(seconds[WARM_UP:]) + evaluations * (after - before)
        for seconds, before, after in zip((learner.seconds, learner.cpu_seconds), start, end, strict=True)
    )
    return wall, cpu


class Clock:
    """Estimates by size and layer; each is measured once, and none that a finished run tells."""

    def __init__(self, order: Order, corpus_bytes: int) -> None:
        self.device, self.threads, self.corpus_bytes = torch.device(order.device), order.threads, corpus_bytes
        facts = machine.describe(self.device)
        here = facts.get("GPU", facts["processor"]), order.threads
        taken: dict[tuple[str, str], list[float]] = {}
        for record in results.load_all(run.path(order.results) for run in order.runs):
            if results.machine_of(record) == here and not record["diverged"]:
                seconds = self._own(record["run_seconds"], record["run_cpu_seconds"])
                taken.setdefault((record["size"], record["variant"]), []).append(seconds)
        self.told = {key: statistics.median(seconds) for key, seconds in taken.items()}
        self.measured: dict[tuple[str, str], float] = {}

    def seconds(self, run: Run) -> float:
        """Of the whole run, evaluation included."""
        key = run.size, run.variant
        if key in self.told:
            return self.told[key]
        if key not in self.measured:
            self.measured[key] = self._own(*measured(run, self.device, self.corpus_bytes))
        return self.measured[key]

    def _own(self, wall: float, cpu: float) -> float:
        return wall if self.device.type == "cuda" else cpu / self.threads
