"""Quality of compressed experts: what a small byte language model, trained here, loses, and its bytes."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import sparse_ffn as sf
from benchmarks import byte_model
from benchmarks.byte_model import ByteModel
from sparse_ffn import ExpertQuantization

FORMS: dict[str, ExpertQuantization] = {
    "int8, a scale a row": ExpertQuantization(bits=8),
    "int4 g32 asymmetric": ExpertQuantization(),
    "int4 g32 asymmetric, max": ExpertQuantization(scale="max"),
    "int4 g32 symmetric": ExpertQuantization(symmetric=True),
    "int4 g64 symmetric": ExpertQuantization(group_size=64, symmetric=True),
    "int4 g64 symmetric, max": ExpertQuantization(group_size=64, symmetric=True, scale="max"),
    "int4 g32 keys, int8 values": ExpertQuantization(values_bits=8),
}
BARS = {"int8, a scale a row": 0.002, "int4 g32 asymmetric": 0.006, "int4 g64 symmetric": 0.006}
"""Most bits per byte that a form may cost."""


def measure(trained: ByteModel, n_windows: int) -> dict[str, tuple[float, float]]:
    """For each form the bits per byte that it costs, and its bytes as a share of bf16's."""
    base, found = trained.bits_per_byte(trained.model, n_windows), {}
    for name, config in FORMS.items():
        small = copy.deepcopy(trained.model).bfloat16().float()  # scales of 16 bits, as a model in bf16 has them
        report = sf.quantize_experts_(small, config)
        stored = sum(
            rows.qdata.nbytes + 2 * rows.scale.numel() + (0 if rows.zero_point is None else rows.zero_point.nbytes)
            for rows in small.modules()
            if isinstance(rows, sf.layers.rows.QuantizedRows)
        )
        found[name] = (trained.bits_per_byte(small, n_windows) - base, stored / (report.n_bytes[0] / 2))
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, list[tuple[float, float]]]:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=3, help="models")
    parser.add_argument("--windows", type=int, default=128, help="of the validation text")
    parser.add_argument("--data", default="python", help="'python', 'enwik8' or the path of a file")
    parser.add_argument("--folder", type=Path, default=byte_model.FOLDER, help="of the trained models")
    options = parser.parse_args(argv)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for seed in range(options.seeds):
        trained = byte_model.trained(options.steps, seed, options.folder, options.data)
        print(f"seed {seed}: {trained.bits_per_byte(trained.model, options.windows):.4f} bits per byte", flush=True)
        for name, result in measure(trained, options.windows).items():
            found[name].append(result)
    print(f"{'experts in':30} {'bytes of bf16':>13}  bits per byte more, by seed")
    for name, results in found.items():
        worst, bar = max(more for more, _ in results), BARS.get(name)
        judged = "" if bar is None else f"  {'holds' if worst <= bar else 'misses'} the bar of {bar:+.3f}"
        costs = " ".join(f"{more:+.4f}" for more, _ in results)
        print(f"{name:30} {results[0][1]:13.1%}  {costs}{judged}")
    return found


if __name__ == "__main__":
    main()
