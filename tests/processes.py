"""Processes of one gloo group: what each of them computes, or the traceback of the first that failed.

They are forked from a server that has imported what they need, so that a group costs less than a second.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # tensors in shared memory stay there

PRELOADED = [
    "sparse_ffn", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint",
    "torch._dynamo",  # DDP and optimizers import it
]  # fmt: skip
TIMEOUT = 240.0
"""Seconds for a group of processes, on a machine that others use as well."""
GRACE = 20.0
"""Seconds for the others to end by themselves once one has failed."""


class Failed(AssertionError):
    """Some of the processes raised."""

    def __init__(self, problems: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {problem}" for rank, problem in sorted(problems.items())))
        self.problems = problems


def run(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Call ``function(rank, *arguments)`` in each process of a group: the results, by rank.

    Args:
        function: of a module's top level.
        world: number of processes.
        arguments: anything that pickles.
        timeout: seconds for all.

    Raises:
        Failed: a process raised, died or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_work, args=(rank, world, folder, function, arguments)) for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        _wait(workers, timeout)
        found = [_result(Path(folder, str(rank)), worker) for rank, worker in enumerate(workers)]
    problems = {rank: problem for rank, (problem, _) in enumerate(found) if problem}
    if problems:
        raise Failed(problems)
    return [result for _, result in found]


def _wait(workers: list[Any], timeout: float) -> None:
    """Until all have ended; those that outlive the timeout, or a failure by more than the grace, are ended."""
    end = time.monotonic() + timeout
    while running := [w for w in workers if w.is_alive()]:
        if any(w.exitcode for w in workers):
            end = min(end, time.monotonic() + GRACE)
        if time.monotonic() > end:
            break
        multiprocessing.connection.wait([w.sentinel for w in running], timeout=0.5)
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()


def _result(path: Path, worker: Any) -> tuple[str, Any]:
    if not path.exists():
        return f"ended with code {worker.exitcode} and without a result", None
    result: tuple[str, Any] = pickle.loads(path.read_bytes())
    return result


def _work(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    torch.manual_seed(0)
    problem, result = "", None
    try:
        result = function(rank, *arguments)
    except BaseException:
        problem = traceback.format_exc()
    part = Path(folder, f"{rank}.part")
    part.write_bytes(pickle.dumps((problem, result)))
    part.rename(Path(folder, str(rank)))
    if problem:
        os._exit(1)  # what hangs in a collective may not be waited for
    dist.barrier()  # gloo may abort a process whose peer has left already
    dist.destroy_process_group()
