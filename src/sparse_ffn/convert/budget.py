"""The budget of a model: its FFNs share out the units that a token uses in all, by what each loses with fewer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.convert.batches import decoder_of
from sparse_ffn.convert.config_base import FFNConfig
from sparse_ffn.convert.config_experts import DEALT, ExpertsConfig
from sparse_ffn.convert.curve import Curve, Point, allocate, experts_to_try
from sparse_ffn.convert.group import Group
from sparse_ffn.convert.init.build import Trial
from sparse_ffn.convert.init.weights import wide
from sparse_ffn.convert.places import Places, put, take_out
from sparse_ffn.module import in_evaluation, run_batch

MOST_ROWS = 2048  # of a batch's outputs: logits of a large vocabulary take a gigabyte for so many
CHUNK = 256  # rows that are compared at once, in fp32 at least


@torch.no_grad()
def share_out(model: nn.Module, groups: list[Group], places: Places, batches: Iterable[Any]) -> None:
    """Give each group whose config says a share of active units its own share of all of theirs, and its curve.

    Args:
        model: before any is replaced; it is put back as it was.
        groups: all that are to be replaced.
        places: of the model's modules.
        batches: what the model's outputs are compared on.
    """
    sharing = [group for group in groups if _shares(group.config)]
    if len(sharing) < 2:
        return
    judge, curves, budget, chosen = Judge(model, batches), [], 0.0, []
    for group in sharing:
        ffn, ways = group.members[0].weights(), _Ways(group)
        units = ffn.d_ff * len(group.members)
        budget += ways.active * units
        group.curve = _curve(model, group, ways, places, judge)
        curves.append(Curve(group.curve, 1 / ways.n, units))
        chosen.append(ways)
    for group, ways, share in zip(sharing, chosen, allocate(curves, budget), strict=True):
        group.config = ways.of(round(share * ways.n))


def _shares(config: FFNConfig) -> bool:
    """Whether FFNs of this config take part in the budget."""
    return isinstance(config, ExpertsConfig) and config.init in DEALT and config.active not in (None, 1)


class _Ways:
    """A group's configs for each number of active experts, the shared expert's units counted in experts.

    Where the shared expert's size was left open, it stays in proportion.
    """

    def __init__(self, group: Group) -> None:
        given: Any = group.config
        group.settle()
        ffn, config = group.members[0].weights(), group.config
        assert isinstance(config, ExpertsConfig)
        assert config.active is not None
        scaled = given.shared_size is None
        self.config, self.active = config, config.active
        with group.named():
            self.size = config.resolve(ffn).expert_size or 1
        self.n = ffn.d_ff // self.size
        shared = config.shared_size or 0
        self.ratio = shared / (config.active * ffn.d_ff) if scaled else None
        self.least = 1 if scaled else min(self.n, 1 + -(-shared // self.size))  # one beside the shared one

    def of(self, n: int) -> ExpertsConfig:
        """Where n experts are active."""
        shared = self.config.shared_size or 0
        if self.ratio is not None:
            shared = self.size * min(n - 1, round(self.ratio * n))
        return replace(self.config, active=n / self.n, expert_size=self.size, n_experts=None, shared_size=shared)


def _curve(model: nn.Module, group: Group, ways: _Ways, places: Places, judge: Judge) -> tuple[Point, ...]:
    """What is lost where layers of fewer or more active experts stand in the places of a group."""
    rows = group.rows
    assert rows is not None
    trial = Trial(group.members[0].weights(), rows)
    with group.named():
        tried = {n: trial.build(ways.of(n)) for n in experts_to_try(ways.active, ways.n, ways.least)}
    new, error = tried[max(ways.least, round(ways.active * ways.n))]
    undo = put(model, [(f, new) for f in group.members], places)
    try:
        change = judge.change()
    finally:
        take_out(undo)
    scale = change / max(error, 1e-30) ** 2
    return tuple(Point(n / ways.n, e, scale * e**2) for n, (_, e) in tried.items())


class Judge:
    """How far the outputs of a model are from what they were, on a few batches.

    Args:
        model: as it was.
        batches: as ``calibrate``'s.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        self.model, self.batches = model, list(batches)
        self.before = self._outputs()

    def change(self) -> float:
        """Of the outputs, as ``Point`` has it."""
        lost = whole = 0.0
        for (old, is_logits), (new, _) in zip(self.before, self._outputs(), strict=True):
            for start in range(0, len(old), CHUNK):
                was, now = (wide(rows[start : start + CHUNK]) for rows in (old, new))
                if is_logits:
                    of, to = F.log_softmax(was, -1), F.log_softmax(now, -1)
                    lost += F.kl_div(to, of, reduction="sum", log_target=True).item()
                    whole += len(was)
                else:
                    lost, whole = lost + (now - was).square().sum().item(), whole + was.square().sum().item()
        return lost / max(whole, 1e-30)

    @torch.no_grad()
    def _outputs(self) -> list[tuple[Tensor, bool]]:
        """Of each batch rows [at most MOST_ROWS, n] of real tokens, and whether they are logits."""
        with in_evaluation(self.model):
            mask = "decoder_attention_mask" if decoder_of(self.model) else "attention_mask"
            return [
                _rows(run_batch(self.model, batch), batch.get(mask) if isinstance(batch, Mapping) else None)
                for batch in self.batches
            ]


def _rows(output: Any, mask: Any) -> tuple[Tensor, bool]:
    from torch.utils._pytree import tree_leaves  # here: it would double the library's import time

    y: Any = getattr(output, "logits", None)
    is_logits = isinstance(y, Tensor)
    if not is_logits:
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
        if not tensors:
            raise ValueError("the model's outputs hold no floating tensor to compare: give every FFN its k")
        y = tensors[0]
    rows = y.reshape(-1, y.shape[-1])
    fits = isinstance(mask, Tensor) and mask.shape == y.shape[:-1]
    real = mask.to(y.device).flatten().nonzero().flatten() if fits else torch.arange(len(rows), device=y.device)
    if len(real) > MOST_ROWS:  # evenly spread, and so the same each time
        real = real[torch.arange(MOST_ROWS, device=y.device) * len(real) // MOST_ROWS]
    return rows[real], is_logits
