"""What compressed experts cost a byte language model, trained here, a real sentence encoder and a real decoder."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import sparse_ffn as sf
from benchmarks.measuring.timing import race
from benchmarks.pretrained import byte_model
from benchmarks.pretrained.byte_model import ByteModel
from benchmarks.pretrained.decoder import SMOLLM2, Sizes, losses, with_own
from benchmarks.pretrained.decoder_rows import decode
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


DECODER_FORMS = ("int8, a scale a row", "int4 g32 keys, int8 values", "int4 g32 asymmetric")
IN_BF16 = "dense, in bf16"


class Decoded(NamedTuple):
    """Of a decoder: MB of its FFNs' matrices, nats a token of held-out text, tokens that it decodes in a second."""

    megabytes: float
    nats: float
    rate: float


@torch.no_grad()
def decoder(seconds: float, sizes: Sizes = Sizes()) -> dict[str, Decoded]:  # noqa: B008, it is frozen
    """SmolLM2 in bf16, and with its FFNs in each form: experts of 64 units, all of which every token takes."""
    loaded = SMOLLM2.load()
    held_out, dense = loaded.text(sizes).held_out, loaded.model.bfloat16()
    models = {IN_BF16: dense}
    megabytes = {IN_BF16: sum(p.nbytes for name, p in dense.named_parameters() if ".mlp." in name) / 1e6}
    for name in DECODER_FORMS:
        small = models[name] = with_own(dense, ".mlp.")
        sf.sparsify_(small, sf.MoEConfig(router="unweighted", expert_size=64, k=SMOLLM2.d_ff // 64, init="split"))
        report = sf.quantize_experts_(small, FORMS[name])
        megabytes[name] = report.n_bytes[1] / 1e6
    samples = race({name: decode(model, held_out[:1]) for name, model in models.items()}, seconds, lead=[IN_BF16])
    return {
        name: Decoded(megabytes[name], losses(model, held_out).mean().item(), 1 / samples.time(name).median)
        for name, model in models.items()
    }


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
    parser.add_argument("--decoder", type=float, default=60, help="seconds that it is timed; 0 for none")
    options = parser.parse_args(argv)
    if options.queries:
        print(f"{'FFNs of MiniLM in':30} mean cosine of {options.queries} sentence embeddings")
        for name, cosine in cosines(options.queries).items():
            print(f"{name:30} {cosine:.4f}  {_judged(cosine >= ENCODER_FORMS[name][1])} {ENCODER_FORMS[name][1]:.3f}")
    if options.decoder:
        print(f"{'FFNs of SmolLM2 in':30} {'MB':>6} {'nats':>7} {'tokens/s':>9}")
        for name, (megabytes, nats, rate) in decoder(options.decoder).items():
            print(f"{name:30} {megabytes:6.1f} {nats:7.4f} {rate:9.1f}", flush=True)
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
