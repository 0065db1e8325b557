"""A byte language model with a σ-MoE in each block, trained once on the demo's text: what compression is tried on."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_ffn as sf
from examples.language_model import data
from examples.language_model.model import ByteTransformer

CONTEXT, BATCH, LAYERS = 128, 16, 4
FOLDER = Path("runs/compress")


@dataclass(frozen=True)
class ByteModel:
    """The trained model and its text."""

    model: ByteTransformer
    corpus: data.Corpus

    def calibration(self, n_windows: int = 64) -> list[Tensor]:
        """Batches of the training text."""
        starts = data.even_starts(self.corpus.train, n_windows, CONTEXT)
        return [data.windows(self.corpus.train, part, CONTEXT)[0] for part in starts.split(BATCH)]

    @torch.no_grad()
    def bits_per_byte(self, model: torch.nn.Module, n_windows: int = 128) -> float:
        """Of the model or a changed copy, over windows spread evenly over the validation text."""
        model.eval()
        total, count = 0.0, 0
        for starts in data.even_starts(self.corpus.valid, n_windows, CONTEXT).split(BATCH):
            x, y = data.windows(self.corpus.valid, starts, CONTEXT)
            total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
            count += y.numel()
        return total / count / math.log(2)


def trained(steps: int = 2500, seed: int = 0, folder: Path = FOLDER, source: str = "python") -> ByteModel:
    """The model after so many steps, kept in the folder: width 128, 4 blocks, 32 experts of 32 units, k = 4."""
    corpus, path = data.load(source, CONTEXT), folder / f"byte-model-{steps}-{seed}.pt"
    model = fresh(lambda: sf.SigmaMoE(128, 32, 32, 4, n_layers=LAYERS), seed)
    about = {"digest": corpus.digest, "steps": steps, "seed": seed}
    kept = _kept(path)
    if kept.get("about") == about:
        model.load_state_dict(kept["model"])
        return ByteModel(model, corpus)
    train(model, corpus, steps, seed)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save({"about": about, "model": model.state_dict()}, part)
    part.replace(path)  # whole or not at all
    return ByteModel(model, corpus)


def _kept(path: Path) -> dict[str, Any]:
    """What an earlier call saved; nothing where that cannot be read."""
    try:
        kept: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError):
        return {}
    return kept


def fresh(make_ffn: Callable[[], torch.nn.Module], seed: int) -> ByteTransformer:
    """A model before training, with these FFNs."""
    torch.manual_seed(seed)
    return ByteTransformer(
        d_model=128, n_layers=LAYERS, n_heads=4, d_head=32, context=CONTEXT, dropout=0.0, make_ffn=lambda i: make_ffn()
    )


def train(model: torch.nn.Module, corpus: data.Corpus, steps: int, seed: int, rate: float = 3e-3) -> None:
    """Train by AdamW, with a learning rate that falls from this one to zero as a cosine."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x, y = data.batch(corpus.train, seed=seed, step=step, batch_size=BATCH, context=CONTEXT)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        (loss + sf.aux_loss(model)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits/byte", file=sys.stderr)
