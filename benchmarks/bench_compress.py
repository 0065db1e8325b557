"""Quality of compressed experts: what a byte language model, trained here, and a real sentence encoder lose."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import sparse_ffn as sf
from benchmarks.pretrained import byte_model
from benchmarks.pretrained.byte_model import ByteModel
from benchmarks.pretrained.encoder import Encoder
from benchmarks.pretrained.texts import EVALUATION, pairs
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
ENCODER_FORMS: dict[str, tuple[ExpertQuantization, float]] = {
    "int8, a scale a row": (ExpertQuantization(bits=8), 0.999),
    "int4 g32 asymmetric": (ExpertQuantization(), 0.980),
    "int4 g64 keys, int8 values": (ExpertQuantization(group_size=64, values_bits=8), 0.980),
}
"""For the encoder, each with the least mean cosine that it may have."""


def cosines(n_queries: int) -> dict[str, float]:
    """For each form the mean cosine of MiniLM's sentence embeddings with the dense model's; FFNs alone are quantised.

    An FFN becomes 12 experts of 128 units, all of which every token takes: the same function.
    """
    encoder, found = Encoder.load(), {}
    queries = [head for head, _ in pairs(EVALUATION, n_queries)]
    experts, expected = copy.deepcopy(encoder.model), encoder.embed(encoder.model, queries)
    sf.sparsify_(experts, sf.MoEConfig(router="unweighted", expert_size=128, k=12, init="split"))
    for name, (config, _) in ENCODER_FORMS.items():
        small = copy.deepcopy(experts)
        sf.quantize_experts_(small, config)
        found[name] = (encoder.embed(small, queries) * expected).sum(1).mean().item()
    return found


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
    """Run from the command line; what the byte model loses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=3, help="models")
    parser.add_argument("--windows", type=int, default=128, help="of the validation text")
    parser.add_argument("--data", default="python", help="'python', 'enwik8' or the path of a file")
    parser.add_argument("--folder", type=Path, default=byte_model.FOLDER, help="of the trained models")
    parser.add_argument("--queries", type=int, default=150, help="sentences for the encoder; 0 for none")
    options = parser.parse_args(argv)
    if options.queries:
        print(f"{'FFNs of MiniLM in':30} mean cosine of {options.queries} sentence embeddings")
        for name, cosine in cosines(options.queries).items():
            print(f"{name:30} {cosine:.4f}  {_judged(cosine >= ENCODER_FORMS[name][1])} {ENCODER_FORMS[name][1]:.3f}")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for seed in range(options.seeds):
        trained = byte_model.trained(options.steps, seed, options.folder, options.data)
        print(f"seed {seed}: {trained.bits_per_byte(trained.model, options.windows):.4f} bits per byte", flush=True)
        for name, result in measure(trained, options.windows).items():
            found[name].append(result)
    if options.seeds:
        print(f"{'experts in':30} {'bytes of bf16':>13}  bits per byte more, by seed")
    for name, results in found.items() if options.seeds else ():
        worst, bar = max(more for more, _ in results), BARS.get(name)
        judged = "" if bar is None else f"  {_judged(worst <= bar)} {bar:+.3f}"
        costs = " ".join(f"{more:+.4f}" for more, _ in results)
        print(f"{name:30} {results[0][1]:13.1%}  {costs}{judged}")
    return found


def _judged(holds: bool) -> str:
    return f"{'holds' if holds else 'misses'} the bar of"


if __name__ == "__main__":
    main()
