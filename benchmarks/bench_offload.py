"""Benchmark of experts that are not all where they are computed: beside a GPU, or with --cpu in a file.

With --cpu: the first token after the page cache forgot the file, with and without prefetch. Else: tokens one by one
through caches of several sizes, their hits beside a simulated LRU's; on a GPU also their time beside that of the copies
and that of the layer with all experts there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Cached:
    """What a cache did over all tokens, and seconds of a token: of the layer, its copies, and all experts there."""

    hit_rate: float
    simulated: float
    token: float
    copies: float
    resident: float


def hit_rate(routings: Sequence[Sequence[int]], n_slots: int) -> float:
    """Of an LRU that calls ask for experts, each call for those first that it holds."""
    here: list[int] = []
    hits = asked = 0
    for experts in routings:
        for e in sorted(set(experts), key=lambda e: (e not in here, e)):
            hits, asked = hits + (e in here), asked + 1
            here = [*(other for other in here if other != e), e][-n_slots:]
    return hits / max(asked, 1)


@torch.no_grad()
def cached_tokens(device: torch.device, n_experts: int, size: int, n_tokens: int) -> dict[int, Cached]:
    """By the experts that a cache holds. A token is like the one before, so that some experts are asked for again."""
    make = {"dtype": torch.bfloat16, "device": "cpu"}
    resident = sf.SigmaMoE(size, n_experts, size // 2, K, **make).eval()
    steps = torch.randn(n_tokens, 1, size)
    tokens = [steps[0]]
    for step in steps[1:]:
        tokens.append(0.8 * tokens[-1] + 0.6 * step)
    xs = [token.bfloat16().to(device) for token in tokens]
    routings = [resident.router(x.cpu()).index_TK.flatten().tolist() for x in xs]
    state = resident.state_dict()
    resident.to(device)
    resident(xs[0])  # compiles
    whole = _seconds(device, lambda: _each(resident, xs)) / n_tokens
    found = {}
    for n_slots in sorted({max(K, n_experts * share // 4) for share in (1, 2, 3)}):
        layer = sf.SigmaMoE(size, n_experts, size // 2, K, **make).eval()
        layer.load_state_dict(state)
        sf.offload_experts_(layer, cache=n_slots, device=device)
        layer.to(device)
        seconds = _seconds(device, lambda layer=layer: _each(layer, xs)) / n_tokens
        stats = sf.offload_stats(layer)[""]
        places = [(i % n_slots, i % n_experts) for i in range(stats["misses"])]
        copies = _seconds(device, lambda layer=layer, places=places: layer.values.cache.copies.start(places)) / n_tokens
        rate = stats["hits"] / (stats["hits"] + stats["misses"])
        found[n_slots] = Cached(rate, hit_rate(routings, n_slots), seconds, copies, whole)
    return found


def _each(layer: torch.nn.Module, xs: Sequence[Tensor]) -> None:
    for x in xs:
        layer(x)


def _seconds(device: torch.device, run: Callable[[], None]) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> dict[bool, list[float]] | dict[int, Cached]:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cpu", action="store_true", help="mapped files on the CPU")
    arguments.add_argument("--gigabytes", type=float, default=1.0, help="size of the file")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--folder", type=Path, help="where the file is made; the disk is what is measured")
    arguments.add_argument("--experts", type=int, default=32, help="without --cpu")
    arguments.add_argument("--width", type=int, default=D_MODEL, help="d_model, twice the size of an expert")
    arguments.add_argument("--tokens", type=int, default=300)
    options = arguments.parse_args(argv)
    if not options.cpu:
        return _beside_a_gpu(options)
    n_experts = max(K, round(options.gigabytes * 2**30 / EXPERT_BYTES))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seconds = cold_tokens(Path(folder) / "experts.pt", n_experts, options.rounds)
    without, with_ = (statistics.median(seconds[prefetch]) for prefetch in (False, True))
    touched = K * EXPERT_BYTES / 2**20
    print(", ".join(f"{name}: {fact}" for name, fact in machine.describe(torch.device("cpu")).items()))
    print(f"cold token, {n_experts} experts in {n_experts * EXPERT_BYTES / 2**30:.1f} GiB, {touched:.0f} MiB touched:")
    print(f"{without * 1e3:.0f} ms without prefetch, {with_ * 1e3:.0f} ms with: {without / with_:.2f} times faster")
    return seconds


def _beside_a_gpu(options: argparse.Namespace) -> dict[int, Cached]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    found = cached_tokens(device, options.experts, options.width, options.tokens)
    print(", ".join(f"{name}: {fact}" for name, fact in machine.describe(device).items()))
    if device.type == "cpu":
        print("There is no GPU: hits count, and times are those of copies within memory.")
    print(f"{options.experts} experts of {options.width // 2} units, d_model {options.width}, k = {K}, bf16")
    print("cache  hits  simulated  ms a token: here  its copies  all experts there  here / the longer")
    for n_slots, c in found.items():
        token, copies, resident = (1e3 * s for s in (c.token, c.copies, c.resident))
        ratio = c.token / max(c.copies, c.resident)
        print(
            f"{n_slots:5} {c.hit_rate:5.1%} {c.simulated:10.1%} {token:17.3f} {copies:11.3f} {resident:18.3f} "
            f"{ratio:18.2f}"
        )
    return found


if __name__ == "__main__":
    main()
