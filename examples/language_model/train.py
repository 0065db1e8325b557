"""The training loop: every batch goes to all variants in turn, so that they share order, seeds and machine noise.

Taking turns at every step makes times comparable: whatever slows the machine down for a while slows all variants down.
Nothing random is carried from step to step: batches and dropout are functions of (seed, step), so a variant learns
the same alone or in company, and a resumed run needs no stored generator to go on bit for bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_ffn

from . import data
from .configs import Config
from .model import ByteModel


class TrainingError(Exception):
    """The run cannot start or go on; the message says why."""


@dataclass
class Learner:
    """One variant in training."""

    variant: str
    model: ByteModel
    optimizer: torch.optim.Optimizer
    bf16: bool  # autocast
    curve: list[tuple[int, float]] = field(default_factory=list)  # (steps done, validation bits per byte)
    seconds: list[float] = field(default_factory=list)  # of each step, evaluation left out
    cpu_seconds: list[float] = field(default_factory=list)  # the same, of all threads, without waiting for a core

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve, self.seconds, self.cpu_seconds = state["curve"], state["seconds"], state["cpu_seconds"]


def make_learner(variant: str, model: ByteModel, config: Config) -> Learner:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    return Learner(variant, model, optimizer, bf16=config.bf16 or model.head.weight.is_cuda)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # else the clock would only see the launches
    return time.perf_counter()


def train_step(learner: Learner, x: Tensor, y: Tensor, config: Config, seed: int, step: int) -> float:
    """One optimizer step; returns the bits per byte of the batch."""
    start, cpu_start = now(x.device), time.process_time()
    torch.manual_seed(data.step_seed(seed, step))
    model, optimizer = learner.model.train(), learner.optimizer
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    with learner.autocast():
        logits = model(x)
    loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
    (loss + sparse_ffn.aux_loss(model)).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    bits = loss.item() / math.log(2)
    learner.seconds.append(now(x.device) - start)
    learner.cpu_seconds.append(time.process_time() - cpu_start)
    if not math.isfinite(bits):
        raise TrainingError(f"the loss of {learner.variant} is {bits} at step {step}")
    return bits


@torch.no_grad()
def bits_per_byte(learner: Learner, part: Tensor, n_windows: int, batch_size: int) -> float:
    """Over windows spread evenly over the part; every window starts without context."""
    model, device = learner.model.eval(), learner.device
    total, count = 0.0, 0
    for starts in torch.split(data.even_starts(part, n_windows, model.context), batch_size):
        x, y = (t.to(device) for t in data.windows(part, starts, model.context))
        with learner.autocast():
            logits = model(x)
        total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
        count += y.numel()
    return total / count / math.log(2)


def save_checkpoint(path: Path, about: dict[str, Any], learners: list[Learner], step: int) -> None:
    """`about` says what the run is; a checkpoint of another run is refused on loading."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as file:
        torch.save({"about": about, "step": step, "learners": {x.variant: x.state() for x in learners}}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)  # an interruption, of the machine too, leaves the old checkpoint whole


def load_checkpoint(path: Path, about: dict[str, Any], learners: list[Learner]) -> int:
    """Puts the learners where they stood; returns the number of steps done."""
    if not path.is_file():
        raise TrainingError(f"nothing to resume: no checkpoint at {path}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise TrainingError(f"the checkpoint at {path} cannot be read: {error}") from error
    if not isinstance(stored, dict) or not {"about", "learners", "step"} <= stored.keys():
        raise TrainingError(f"the file at {path} is no checkpoint of this program")
    differing = [key for key in about if stored["about"].get(key) != about[key]]
    if differing:
        raise TrainingError(f"the checkpoint at {path} is of another run: it differs in {', '.join(differing)}")
    for learner in learners:
        learner.load_state(stored["learners"][learner.variant])
    return int(stored["step"])


def train(
    learners: list[Learner],
    corpus: data.Corpus,
    config: Config,
    *,
    seed: int,
    first_step: int,
    checkpoint: Path,
    about: dict[str, Any],
) -> Iterator[tuple[int, dict[str, float]]]:
    """Gives after each step the number of steps done and each learner's bits per byte of the batch.

    Whoever asks for no more of them may `save_checkpoint` and go on later.
    """
    device = learners[0].device
    evaluate_every = max(1, config.steps // config.evaluations)
    checkpoint_every = max(1, config.steps // config.checkpoints)
    for step in range(first_step, config.steps):
        x, y = data.batch(corpus.train, seed=seed, step=step, batch_size=config.batch_size, context=config.context)
        x, y = x.to(device), y.to(device)
        bits = {learner.variant: train_step(learner, x, y, config, seed, step) for learner in learners}
        done = step + 1
        last = done == config.steps
        if done % evaluate_every == 0 or last:
            for learner in learners:
                valid = bits_per_byte(learner, corpus.valid, config.eval_windows, config.batch_size)
                learner.curve.append((done, valid))
        if done % checkpoint_every == 0 or last:
            save_checkpoint(checkpoint, about, learners, done)
        yield done, bits
