"""Command line of the study: trains what is left, as long as it may, in as many processes as it may."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from examples.language_model import data
from examples.language_model.arguments import positive

from . import plan
from .results import RESULTS
from .sizes import SIZES
from .speed import Clock
from .training import steps_done
from .variants import VARIANTS
from .work import Order, work


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.enwik8",
        description="Train small models of enwik8 with each layer at equal parameters. Runs that have finished are "
        "never run again; one that was stopped goes on from its last checkpoint to the same numbers.",
    )
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=["S", "M"], help="default: S M; L needs --device cuda")
    add("--variants", nargs="+", choices=VARIANTS, help="default: all of a size")
    add("--seeds", nargs="+", type=int, help="default: all of a size")
    add("--plan", action="store_true", help="only say what is left and how long it takes on this machine")
    add("--jobs", type=positive, default=1, help="processes, each with a run of its own (default: 1)")
    add("--threads", type=positive, default=1, help="of each process (default: 1, which makes best use of a core)")
    add("--minutes", type=float, help="stop after so many, with checkpoints")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--data", default="enwik8", help="enwik8 (default: fetched once, checked) or a file")
    add("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/enwik8"), help="folder of the checkpoints (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for name in args.sizes:
        if SIZES[name].needs_gpu and args.device != "cuda":
            parser.error(f"--sizes {name} would take months on a CPU: add --device cuda")
    if args.data != "enwik8" and args.results == RESULTS:
        parser.error(f"--data {args.data} needs a folder of its own: add --results, where those of enwik8 are not")
    if not plan.queue(args.sizes, args.variants, args.seeds):
        parser.error("there is no run of these sizes, layers and seeds")
    return args


def print_plan(order: Order, jobs: int, corpus_bytes: int) -> None:
    """What is left, run by run, and the hours of it all."""
    torch.set_num_threads(order.threads)
    clock, total, left = Clock(order, corpus_bytes), 0.0, order.left()
    for run in left:
        done = steps_done(order.scratch / f"{run.name}.pt") / SIZES[run.size].config.steps
        seconds = clock.seconds(run) * (1 - done)
        begun = f", {done:.0%} done" if done else ""
        print(f"{run.name:26} {seconds / 60:5.0f} min{begun}", flush=True)
        total += seconds
    rate = plan.learning_rate(order.results)
    print(f"\n{len(order.runs) - len(left)} of {len(order.runs)} runs have finished")
    print(f"learning rate: {'not chosen yet' if rate is None else f'{rate:g}'}")
    print(f"left: {total / 3600:.1f} hours of one process with a core of its own, {total / 3600 / jobs:.1f} of {jobs}")
    print(f"told by finished runs: {len(clock.told)} kinds of them; by a few steps just now: {len(clock.measured)}")
    print(f"load average: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; what others take of them comes on top")


def run_jobs(order: Order, jobs: int) -> int:
    """One process for each job; signals reach all of them. Returns the number of those that failed."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(order,)) for _ in range(jobs)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.terminate()

    for process in processes:
        process.start()
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    for process in processes:
        process.join()
    for number, handler in before.items():
        signal.signal(number, handler)
    return sum(process.exitcode != 0 for process in processes)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    order = Order(
        runs=tuple(plan.queue(args.sizes, args.variants, args.seeds)),
        data=args.data,
        results=args.results,
        scratch=args.runs,
        device=args.device,
        threads=args.threads,
        deadline=time.time() + 60 * args.minutes if args.minutes is not None else None,
    )
    context = max(SIZES[run.size].config.context for run in order.runs)
    try:
        if args.plan and args.data == "enwik8":
            corpus_bytes = data.ENWIK8_BYTES  # which need not be here for that
        else:
            corpus_bytes = data.load(args.data, context).n_bytes  # fetched once, before several processes ask for it
    except data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.plan:
        print_plan(order, args.jobs, corpus_bytes)
        return 0
    failed = run_jobs(order, args.jobs) if args.jobs > 1 else 0
    if args.jobs == 1:
        work(order)
    print(f"{len(order.left())} of {len(order.runs)} runs are left")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
