"""One run: from its first step or its last checkpoint to its results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from benchmarks import machine
from examples.language_model import data, report
from examples.language_model.configs import Config
from examples.language_model.model import ByteModel
from examples.language_model.train import (
    Learner,
    TrainingError,
    bits_per_byte,
    load_checkpoint,
    make_learner,
    save_checkpoint,
    train,
)
from examples.language_model.variants import ffn_flops, transformer
from sparse_ffn import info

from .activity import active_units
from .plan import Run
from .results import Record
from .rounded import products
from .source import commit, source
from .variants import VARIANTS

WHOLE = 10**9  # windows: more than any part has
MACHINE = ("processor", "GPU", "torch", "triton", "CPU core", "backend", "sparse-ffn")
"""What of it changes the numbers, by their rounding at least."""


def learner_of(run: Run, config: Config, device: torch.device) -> Learner:
    """Untrained. Layers of one seed start from the same weights but for the FFNs."""
    model = transformer(VARIANTS[run.variant].make, config, run.seed).to(device)
    return make_learner(run.variant, model, config)


def train_run(
    run: Run, config: Config, corpus: data.Corpus, device: torch.device, checkpoint: Path, stop: Callable[[], bool]
) -> Record | None:
    """Its results, or None if it was told to stop: the next call goes on from the checkpoint, to the same numbers."""
    facts = {**machine.describe(device), "sparse-ffn": info.version("sparse-ffn"), "commit": commit()}
    about = {
        "run": run.name,
        "config": asdict(config),
        "data": corpus.digest,
        "machine": [str(facts.get(key)) for key in MACHINE],
        "source": source(),
        "threads": torch.get_num_threads(),
    }
    learner = learner_of(run, config, device)
    for abandoned in checkpoint.parent.glob(f"{checkpoint.stem}.*.part"):
        abandoned.unlink()
    first_step = 0
    if checkpoint.exists():
        try:
            first_step = load_checkpoint(checkpoint, about, [learner])
        except TrainingError as error:
            print(f"{run.name}: starts anew, since {error}", flush=True)
    diverged = None
    with products(device):
        try:
            steps = train(
                [learner], corpus, config, seed=run.seed, first_step=first_step, checkpoint=checkpoint, about=about
            )
            for done, _ in steps:
                if learner.curve and learner.curve[-1][0] == done:
                    print(_progress(run, config, learner), flush=True)
                if stop():
                    save_checkpoint(checkpoint, about, [learner], done)
                    return None
        except TrainingError as error:
            diverged = str(error)
        return _record(run, config, corpus, learner, facts, diverged)


def steps_done(checkpoint: Path) -> int:
    """Of a run that was stopped; 0 without a checkpoint that can be read."""
    try:
        return int(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["step"])
    except (OSError, EOFError, RuntimeError, UnpicklingError):
        return 0


def flops_per_byte(model: ByteModel, config: Config) -> int:
    """Of a training step: the forward pass thrice. Attention is counted to the bytes that it may see."""
    attended = (config.context + 1) / 2
    width = config.n_heads * config.d_head
    linears = 2 * sum(layer.weight.numel() for layer in (model.head, *_projections(model)))
    attention = config.n_layers * 2 * 2 * attended * width
    return round(3 * (linears + attention + ffn_flops(model)))


def _projections(model: ByteModel) -> list[torch.nn.Linear]:
    attentions = [block.get_submodule("attention") for block in model.blocks]
    return [layer for part in attentions for layer in part.modules() if isinstance(layer, torch.nn.Linear)]


def _record(
    run: Run, config: Config, corpus: data.Corpus, learner: Learner, facts: dict[str, str], diverged: str | None
) -> Record:
    model, step_bytes = learner.model, config.batch_size * config.context
    flops = flops_per_byte(model, config)
    wall, cpu = ([0.0, *accumulate(seconds)] for seconds in (learner.seconds, learner.cpu_seconds))
    done = [step for step, _ in learner.curve]
    start = time.perf_counter(), time.process_time()
    bits: dict[str, float] | None = None
    if diverged is None:
        bits = {
            "valid": bits_per_byte(learner, corpus.valid, config.final_windows, config.batch_size),
            "test": bits_per_byte(learner, corpus.test, WHOLE, config.batch_size),
        }
        if not all(map(math.isfinite, bits.values())):  # the last step was one too many
            bits, diverged = None, f"the loss of {run.variant} is not finite after the last step"
    end = time.perf_counter(), time.process_time()
    # the points of the curve cost what as many bytes of the test text do
    part = min(len(corpus.valid), config.eval_windows * config.context)
    final = len(corpus.test) + min(len(corpus.valid), config.final_windows * config.context)
    share = 1 + len(learner.curve) * part / final
    return {
        "size": run.size,
        "variant": run.variant,
        "seed": run.seed,
        "label": VARIANTS[run.variant].label,
        "diverged": diverged,
        "bits_per_byte": bits and {part: round(value, 5) for part, value in bits.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "ffn_parameters": sum(p.numel() for ffn in model.ffns for p in ffn.parameters()),
        "ffn_flops_per_byte": ffn_flops(model),
        "training_flops_per_byte": flops,
        "training_bytes": len(learner.seconds) * step_bytes,
        "training_seconds": round(wall[-1], 1),
        "training_cpu_seconds": round(cpu[-1], 1),
        "run_seconds": round(wall[-1] + share * (end[0] - start[0]), 1),
        "run_cpu_seconds": round(cpu[-1] + share * (end[1] - start[1]), 1),
        "curve": {
            "bytes": [step * step_bytes for step in done],
            "flops": [step * step_bytes * flops for step in done],
            "seconds": [round(wall[step], 1) for step in done],
            "cpu_seconds": [round(cpu[step], 1) for step in done],
            "bits_per_byte": [round(value, 5) if math.isfinite(value) else None for _, value in learner.curve],
        },
        "routing": _rounded(report.routing(learner, corpus, config)) if diverged is None else {},
        "active_units": [round(n, 1) for n in active_units(learner, corpus, config)] if diverged is None else [],
        "config": asdict(config),
        "data": {"name": Path(corpus.name).name, "md5": corpus.digest, "bytes": corpus.n_bytes},
        "threads": torch.get_num_threads(),
        "machine": facts,
    }


def _rounded(routing: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        layer: {
            name: [round(share, 4) for share in value] if name == "load" else round(value, 4)
            for name, value in stats.items()
        }
        for layer, stats in routing.items()
    }


def _progress(run: Run, config: Config, learner: Learner) -> str:
    step_bytes, recent = config.batch_size * config.context, learner.seconds[-100:]
    done, bits = learner.curve[-1]
    return (
        f"{run.name}: {done * step_bytes / 1e6:.1f} of {config.steps * step_bytes / 1e6:.1f} MB, "
        f"{bits:.3f} bits per byte, {len(recent) * step_bytes / sum(recent):,.0f} bytes/s"
    )
