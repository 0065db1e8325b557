"""What split layers send between processes, for 2 to 64 of them, beside FSDP2; and what was aimed at beside what is.

python -m benchmarks.bench_parallel [--markdown] [--seconds S]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import sparse_ffn as sf
from benchmarks import machine, simulated_ranks
from benchmarks.measuring.timing import Run, race
from sparse_ffn import functional
from sparse_ffn.parallel import ExpertParallel, traffic

RANKS = (2, 4, 8, 16, 32, 64)
TOKENS = 16384


def experts(n_experts: int = 64, expert_size: int = 256) -> sf.MoE:
    """The layer of the tables, without weights."""
    with torch.device("meta"):
        return sf.SigmaMoE(1024, n_experts, expert_size, 8, glu=True)


def memory() -> sf.ProductKeyMemory:
    """A memory of a million values, without weights."""
    with torch.device("meta"):
        return sf.ProductKeyMemory(1024, 1024, 32, n_heads=4)


def expert_table() -> list[list[str]]:
    """A row for each number of processes: MB of a step."""
    layer = experts()
    rows = [["processes", "gather", "slots", "tokens", "auto", "FSDP2", "weights on each, MB", "less below, tokens"]]
    for ranks in RANKS:
        found = traffic(layer, TOKENS, ranks)
        sent = [f"{2 * found.forward[name] / 1e6:,.0f}" for name in ("gather", "slots", "tokens")]
        weights = f"{found.parameters / 1e6:.0f} of {found.parameters_whole / 1e6:.0f}"
        rows.append([str(ranks), *sent, found.auto, f"{found.fsdp / 1e6:,.0f}", weights, f"{found.tokens_below:,.0f}"])
    return rows


def memory_table() -> list[list[str]]:
    """A row for each number of processes: MB of a forward."""
    rows = [["processes", "columns", "rows", "auto", "FSDP2's table"]]
    for ranks in RANKS:
        found = traffic(memory(), TOKENS, ranks)
        sent = [f"{found.forward[name] / 1e6:,.0f}" for name in ("columns", "rows")]
        rows.append([str(ranks), *sent, found.auto, f"{found.fsdp / 3e6:,.0f}"])
    return rows


def bytes_sent() -> list[tuple[str, float, float]]:
    """Targets of bytes: words, the ratio, its limit."""
    layer = traffic(experts(), TOKENS, 8)
    table = traffic(memory(), TOKENS, 8)
    return [
        ("bytes of tokens / bytes of slots, 8 processes", layer.forward["tokens"] / layer.forward["slots"], 0.70),
        ("bytes of columns / bytes of FSDP2's table, 8 processes", table.forward["columns"] / (table.fsdp / 3), 0.10),
    ]


def times(seconds: float) -> list[tuple[str, float, float]]:
    """Targets of time on this machine, by paired calls: words, the ratio, its limit."""
    sizes, x, k = (256, 32, 128), torch.randn(1024, 256), 4
    alone, split = (sf.SigmaMoE(*sizes, k) for _ in range(2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallelize_module(split, init_device_mesh("cpu", (1,)), ExpertParallel())
    runs = {name: _step(layer, x) for name, layer in (("alone", alone), ("split", split))}
    one = race(runs, seconds).ratio("split", "alone").median
    dist.destroy_process_group()

    index = torch.rand(len(x), 32).argsort(1)[:, :8]
    void, gate = index.masked_fill(index >= 4, 32), torch.rand(len(x), 8)
    weights = [p.detach() for p in (alone.keys, alone.values)]
    slots = {
        name: Run(lambda: None, lambda i=i: functional.expert_ffn(x, *weights, i, gate))  # type: ignore[misc]
        for name, i in (("all", index), ("void", void))
    }
    few = race(slots, seconds).ratio("void", "all").median
    return [
        ("time of a step of experts split in a group of one / of the layer", one, 1.05),
        ("time of a forward with 7/8 of the slots of nobody / of one that computes them", few, 0.2),
    ]


def _step(layer: sf.MoE, x: torch.Tensor) -> Run:
    def call() -> None:
        layer(x).square().mean().backward()

    return Run(layer.zero_grad, call)


def simulation() -> list[tuple[str, float, float]]:
    """Targets of the simulation: words, seconds, their limit."""
    with simulated_ranks.fake_group(64):
        return [
            (f"seconds of 64 ranks simulated in one process, {name}", simulated_ranks.simulate(name, 64).seconds, 60)
            for name in ("gather", "slots", "tokens")
        ]


def written(rows: list[list[str]], markdown: bool = True) -> str:
    """A table of text."""
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="tables as the documentation has them")
    parser.add_argument("--seconds", type=float, default=5, help="for each ratio of times")
    options = parser.parse_args(argv)
    markdown = options.markdown
    print(f"MoE, d_model 1024, 64 experts of 256, GLU, k = 8, bf16, {TOKENS} tokens a process: MB sent in a step\n")
    print(written(expert_table(), markdown))
    print(f"\nProductKeyMemory, 1024² values, 4 heads, k = 32, bf16, {TOKENS} tokens a process: MB sent in a forward\n")
    print(written(memory_table(), markdown))
    print("\n" + ", ".join(f"{name}: {fact}" for name, fact in machine.describe(torch.device("cpu")).items()) + "\n")
    found = bytes_sent() + times(options.seconds)
    if simulated_ranks.available():
        found += simulation()
    for words, value, limit in found:
        print(f"{words}: {value:.3g}, target {limit:g}: {'met' if value <= limit else 'missed'}")
    print("Not measured, since it needs several accelerators: every time of what travels.")


if __name__ == "__main__":
    main()
