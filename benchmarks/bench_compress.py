"""Quality of compressed experts: what a small byte language model, trained here, loses, and its bytes."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_ffn as sf
from examples.language_model.data import batch, even_starts, load, windows
from examples.language_model.model import ByteTransformer
from sparse_ffn import ExpertQuantization

CONTEXT, BATCH, RATE = 128, 16, 3e-3
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


def make(seed: int) -> ByteTransformer:
    """The model, untrained."""
    torch.manual_seed(seed)
    return ByteTransformer(
        d_model=128, n_layers=4, n_heads=4, d_head=32, context=CONTEXT, dropout=0.0,
        make_ffn=lambda _: sf.SigmaMoE(128, 32, 32, 4, n_layers=4),
    )  # fmt: skip


def train(part: Tensor, steps: int, seed: int) -> ByteTransformer:
    """A model that has seen so many batches: AdamW, a cosine from ``RATE`` to 0."""
    model = make(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for step in range(steps):
        x, y = batch(part, seed=seed, step=step, batch_size=BATCH, context=CONTEXT)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) + sf.aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def trained(part: Tensor, digest: str, steps: int, seed: int, folder: Path) -> ByteTransformer:
    """The same, kept in a folder for the next time."""
    path = folder / f"{digest[:12]}-{steps}-{seed}.pt"
    if not path.is_file():
        model = train(part, steps, seed)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    model = make(seed)
    model.load_state_dict(torch.load(path))
    return model.eval()


@torch.no_grad()
def bits_per_byte(model: ByteTransformer, part: Tensor, n_windows: int) -> float:
    """On windows that are spread evenly over a text."""
    losses = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
        for starts in even_starts(part, n_windows, CONTEXT).split(BATCH)
        for x, y in [windows(part, starts, CONTEXT)]
    ]
    return sum(losses) / len(losses) / math.log(2)


def measure(model: ByteTransformer, part: Tensor, n_windows: int) -> dict[str, tuple[float, float]]:
    """For each form the bits per byte that it costs, and its bytes as a share of bf16's."""
    base, found = bits_per_byte(model, part, n_windows), {}
    for name, config in FORMS.items():
        small = copy.deepcopy(model).bfloat16().float()  # scales of 16 bits, as a model in bf16 has them
        report = sf.quantize_experts_(small, config)
        stored = sum(
            rows.qdata.nbytes + 2 * rows.scale.numel() + (0 if rows.zero_point is None else rows.zero_point.nbytes)
            for rows in small.modules()
            if isinstance(rows, sf.layers.rows.QuantizedRows)
        )
        found[name] = (bits_per_byte(small, part, n_windows) - base, stored / (report.n_bytes[0] / 2))
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, list[tuple[float, float]]]:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=3, help="models")
    parser.add_argument("--windows", type=int, default=128, help="of the validation text")
    parser.add_argument("--data", default="python", help="'python', 'enwik8' or the path of a file")
    parser.add_argument("--cache", type=Path, default=Path("runs/compress"), help="folder of the trained models")
    options = parser.parse_args(argv)
    corpus = load(options.data, CONTEXT)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for seed in range(options.seeds):
        model = trained(corpus.train, corpus.digest, options.steps, seed, options.cache)
        print(f"seed {seed}: {bits_per_byte(model, corpus.valid, options.windows):.4f} bits per byte", flush=True)
        for name, result in measure(model, corpus.valid, options.windows).items():
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
