"""What split layers send between processes, for 2 to 64 of them, beside FSDP2: arithmetic, not time.

python -m benchmarks.bench_parallel [--markdown]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import sparse_ffn as sf
from sparse_ffn.parallel import traffic

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


def targets() -> list[tuple[str, float, float]]:
    """What was aimed at: words, the ratio, its limit."""
    layer = traffic(experts(), TOKENS, 8)
    table = traffic(memory(), TOKENS, 8)
    return [
        ("bytes of tokens / bytes of slots, 8 processes", layer.forward["tokens"] / layer.forward["slots"], 0.70),
        ("bytes of columns / bytes of FSDP2's table, 8 processes", table.forward["columns"] / (table.fsdp / 3), 0.10),
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
    markdown = parser.parse_args(argv).markdown
    print(f"MoE, d_model 1024, 64 experts of 256, GLU, k = 8, bf16, {TOKENS} tokens a process: MB sent in a step\n")
    print(written(expert_table(), markdown))
    print(f"\nProductKeyMemory, 1024² values, 4 heads, k = 32, bf16, {TOKENS} tokens a process: MB sent in a forward\n")
    print(written(memory_table(), markdown))
    print()
    for words, ratio, limit in targets():
        print(f"{words}: {ratio:.3f}, target {limit:.2f}: {'met' if ratio <= limit else 'missed'}")
    print("Not measured, since they need several accelerators or a machine that does nothing else: every time.")


if __name__ == "__main__":
    main()
