"""Benchmark of experts read from a file: the first token after the page cache forgot it, with and without prefetch."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks import machine

D_MODEL, EXPERT_SIZE, K = 2048, 1024, 4
EXPERT_BYTES = 2 * EXPERT_SIZE * D_MODEL * 2  # bf16


def _forget(path: Path) -> None:
    """Take the file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold_tokens(path: Path, n_experts: int, rounds: int) -> dict[bool, list[float]]:
    """Seconds of a cold token, by whether its experts are prefetched; each round takes both, in turn."""
    loaded = sf.SigmaMoE(D_MODEL, n_experts, EXPERT_SIZE, K, dtype=torch.bfloat16)
    torch.save(loaded.state_dict(), path)
    router = loaded.router
    del loaded
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for round_ in range(rounds):
        for prefetch in (False, True) if round_ % 2 else (True, False):
            layer = sf.SigmaMoE(D_MODEL, n_experts, EXPERT_SIZE, K, dtype=torch.bfloat16, device="meta").eval()
            layer.router = router
            sf.map_experts_(layer, path, prefetch=prefetch)
            x = torch.randn(1, D_MODEL, dtype=torch.bfloat16)
            _forget(path)
            start = time.perf_counter()
            with torch.no_grad():
                layer(x)
            seconds[prefetch].append(time.perf_counter() - start)
            del layer  # the next one's pages are its own
    return seconds


def main(argv: Sequence[str] | None = None) -> dict[bool, list[float]]:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--cpu", action="store_true", help="mapped files on the CPU, which is all that there is")
    arguments.add_argument("--gigabytes", type=float, default=1.0, help="size of the file")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--folder", type=Path, help="where the file is made; the disk is what is measured")
    options = arguments.parse_args(argv)
    n_experts = max(K, round(options.gigabytes * 2**30 / EXPERT_BYTES))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seconds = cold_tokens(Path(folder) / "experts.pt", n_experts, options.rounds)
    without, with_ = (statistics.median(seconds[prefetch]) for prefetch in (False, True))
    touched = K * EXPERT_BYTES / 2**20
    print(", ".join(f"{name}: {fact}" for name, fact in machine.describe(torch.device("cpu")).items()))
    print(f"cold token, {n_experts} experts in {n_experts * EXPERT_BYTES / 2**30:.1f} GiB, {touched:.0f} MiB touched:")
    print(f"{without * 1e3:.0f} ms without prefetch, {with_ * 1e3:.0f} ms with: {without / with_:.2f} times faster")
    return seconds


if __name__ == "__main__":
    main()
