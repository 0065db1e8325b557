"""The results of a run as numbers: one JSON and one table."""

from __future__ import annotations

import statistics
from typing import Any

import torch

import sparse_ffn

from . import data
from .configs import Config
from .train import Learner, bits_per_byte
from .variants import LABELS, ffn_flops


@torch.no_grad()
def routing(learner: Learner, corpus: data.Corpus, config: Config) -> dict[str, dict[str, Any]]:
    """Statistics of each MoE layer's last forward pass: one batch from all over the validation part."""
    x, _ = data.windows(corpus.valid, data.even_starts(corpus.valid, config.batch_size, config.context), config.context)
    with learner.autocast():
        learner.model.eval()(x.to(learner.device))
    return {
        name: {**stats, "load": [float(share) for share in stats["load"]]}
        for name, stats in sparse_ffn.routing_stats(learner.model).items()
    }


def measure(learners: list[Learner], corpus: data.Corpus, config: Config) -> dict[str, dict[str, Any]]:
    """Everything the table shows and more, by variant. Relative numbers are None without the dense variant."""
    dense = next((learner for learner in learners if learner.variant == "dense"), None)
    results = {}
    for learner in learners:
        model = learner.model
        parts = {"train": corpus.train, "valid": corpus.valid, "test": corpus.test}
        bits = {
            name: bits_per_byte(learner, part, config.final_windows, config.batch_size) for name, part in parts.items()
        }
        results[learner.variant] = {
            "label": LABELS.get(learner.variant, learner.variant),
            "parameters": sum(p.numel() for p in model.parameters()),
            "ffn_flops_per_byte": ffn_flops(model),
            "ffn_flops_relative": ffn_flops(model) / ffn_flops(dense.model) if dense else None,
            "bits_per_byte": bits,
            "bytes_per_second": config.batch_size * config.context / statistics.median(learner.seconds),
            "step_seconds_median": statistics.median(learner.seconds),
            "step_time_relative": relative_time(learner, dense) if dense else None,
            "routing": routing(learner, corpus, config),
            "curve": learner.curve,
        }
    return results


def relative_time(learner: Learner, dense: Learner) -> float:
    """Median over the steps of this variant's time over the dense one's, both taken within the same moment."""
    return statistics.median(a / b for a, b in zip(learner.seconds, dense.seconds, strict=True))


HEADER = ["FFN", "parameters", "FFN FLOPs", "train", "valid", "test", "bytes/s", "step time", "expert load"]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Plain text, numbers to the right."""
    rows = [HEADER, ["", "", "of dense", "bits/byte", "bits/byte", "bits/byte", "", "of dense", ""]]
    for result in results.values():
        flops, seconds = result["ffn_flops_relative"], result["step_time_relative"]
        rows.append(
            [
                result["label"],
                f"{result['parameters']:,}",
                f"{flops:.1%}" if flops else "-",
                *(f"{result['bits_per_byte'][part]:.3f}" for part in ("train", "valid", "test")),
                f"{result['bytes_per_second']:,.0f}",
                f"{seconds:.2f}x" if seconds else "-",
                load(result["routing"]),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    last = len(HEADER) - 1
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(2, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def load(routing: dict[str, dict[str, Any]]) -> str:
    """Of all MoE layers: the mean entropy (1 is even) and the largest share that one expert got."""
    if not routing:
        return "-"
    entropy = statistics.mean(stats["entropy"] for stats in routing.values())
    busiest = max(stats["busiest"] for stats in routing.values())
    even = 1 / len(next(iter(routing.values()))["load"])
    return f"entropy {entropy:.2f}, busiest {busiest:.0%} (even {even:.0%})"
