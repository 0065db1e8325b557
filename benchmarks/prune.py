"""What pruning costs a trained byte language model: bits per byte for each measure of an expert's worth."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks.pretrained.byte_model import FOLDER, trained
from sparse_ffn.compress import ExpertStats


def _random(stats: ExpertStats) -> Tensor:
    return torch.rand(len(stats.count), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


WAYS: dict[str, dict[str, object]] = {
    "error, replaced by the mean": {"by": "error", "replace": "mean"},
    "error": {"by": "error"},
    "contribution": {"by": "contribution"},
    "REAP": {"by": "reap"},
    "frequency": {"by": "frequency"},
    "random": {"by": _random},
}


@dataclass(frozen=True)
class Pruned:
    """A row of the table."""

    way: str
    keep: float
    delta: float
    """Bits per byte more than the whole model's."""
    parameters: float
    """Share of the model's."""


def rows(
    model: nn.Module,
    calibration: Iterable[Tensor],
    bits_per_byte: Callable[[nn.Module], float],
    keeps: Sequence[float] = (0.75, 0.5),
) -> list[Pruned]:
    """All ways of pruning a trained model at each share of the experts."""
    stats, whole = sf.expert_stats(model, calibration), bits_per_byte(model)
    found = []
    for keep in keeps:
        for way, options in WAYS.items():
            small = copy.deepcopy(model)
            before, after = sf.prune_experts_(small, stats, keep, **options).parameters  # type: ignore[arg-type]
            found.append(Pruned(way, keep, bits_per_byte(small) - whole, after / before))
    return found


def table(found: Sequence[Pruned]) -> str:
    """As Markdown: a line for each way, a column for each share."""
    keeps = sorted({row.keep for row in found}, reverse=True)
    lines = [
        "| experts go by | " + " | ".join(f"{keep:.0%} kept" for keep in keeps) + " |",
        "|---|" + "---|" * len(keeps),
    ]
    for way in dict.fromkeys(row.way for row in found):
        deltas = [next(row.delta for row in found if (row.way, row.keep) == (way, keep)) for keep in keeps]
        lines.append(f"| {way} | " + " | ".join(f"{delta:+.3f}" for delta in deltas) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Pruned]:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=2500, help="of the model's training")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--text", default="python", help="what the demo takes: python, enwik8 or a file")
    arguments.add_argument("--folder", type=Path, default=FOLDER, help="where the trained model is kept")
    options = arguments.parse_args(argv)
    of = trained(options.steps, options.seed, options.folder, options.text)
    found = rows(of.model, of.calibration(), of.bits_per_byte)
    print(f"{of.bits_per_byte(of.model):.3f} bits/byte before; more after pruning:\n\n{table(found)}")
    return found


if __name__ == "__main__":
    main()
