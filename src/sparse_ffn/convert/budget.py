"""The budget of a model: its FFNs share out the units that a token uses in all, by what each loses with fewer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.convert.batches import decoder_of, evaluated, of_tokens
from sparse_ffn.convert.config_base import FFNConfig
from sparse_ffn.convert.config_experts import DEALT, ExpertsConfig
from sparse_ffn.convert.curve import Curve, Point, allocate, shares_to_try
from sparse_ffn.convert.group import Group
from sparse_ffn.convert.init.build import Trial
from sparse_ffn.convert.init.weights import wide
from sparse_ffn.convert.outputs import tensors_in
from sparse_ffn.convert.places import Places, put, take_out
from sparse_ffn.running import run_batch

MOST_ROWS = 2048  # of a batch's outputs: logits of a large vocabulary take a gigabyte for so many
CHUNK = 1 << 20  # numbers that are compared at once, in fp32 at least: in caches, and in memory that is used again


@torch.no_grad()
def share_out(
    model: nn.Module, groups: list[Group], uses: Callable[[nn.Module], int], places: Places, batches: Iterable[Any]
) -> None:
    """Give each group whose config says a share of active units its own share of all of theirs, and its curve.

    Args:
        model: before any is replaced; it is put back as it was.
        groups: all that are to be replaced.
        uses: in how many places a module of the model is used.
        places: of the model's modules.
        batches: what the model's outputs are compared on.

    Warns:
        SparseFFNWarning: no output tells what is lost: FFNs go by the errors of their own outputs.
    """
    sharing = [group for group in groups if _shares(group.config)]
    if len(sharing) < 2:
        return
    judge, chosen = Judge(model, batches), []
    for group in sharing:
        chosen.append(ways := _Ways(group))
        group.curve = _curve(model, group, ways, places, judge)
    _check_changes(sharing)
    units = [ways.d_ff * sum(uses(f.module) for f in g.members) for g, ways in zip(sharing, chosen, strict=True)]
    curves = [Curve(g.curve, ways.step, n) for g, ways, n in zip(sharing, chosen, units, strict=True)]
    budget = sum(ways.active * n for ways, n in zip(chosen, units, strict=True))
    for group, ways, share in zip(sharing, chosen, allocate(curves, budget), strict=True):
        group.config = ways.of(ways.count(share))


def _check_changes(groups: list[Group]) -> None:
    """Where the model's outputs tell nothing, let the errors of the FFNs' own outputs stand for their changes."""
    points = [point for group in groups for point in group.curve]
    blind = any(p.error for p in points) and not any(p.change for p in points)
    if blind or not all(math.isfinite(p.change) for p in points):
        what = "do not depend on any FFN" if blind else "are not finite"
        warnings.warn(
            f"the model's first outputs {what}: FFNs share out the active units by the errors of their own outputs",
            SparseFFNWarning,
            stacklevel=6,  # beyond sparsify_ and the decorators
        )
        for group in groups:
            group.curve = tuple(p._replace(change=p.error**2) for p in group.curve)


def _shares(config: FFNConfig) -> bool:
    """Whether FFNs of this config take part in the budget."""
    return isinstance(config, ExpertsConfig) and config.init in DEALT and config.active not in (None, 1)


class _Ways:
    """A group's configs for each number of active experts: those of the router, or with the shared expert's units.

    A shared expert whose size was left open stays in proportion, and its units count as experts; one of a given size
    stays, and the experts of the router count alone.
    """

    def __init__(self, group: Group) -> None:
        given: Any = group.config
        ffn = group.members[0].weights()
        with group.at_work():
            sizes = given.resolve(ffn)
        shared, size = sizes.shared_size or 0, sizes.expert_size
        if sizes.k == sizes.n_experts > 1:  # a choice for all of them would be none for fewer
            group.config = replace(given, active=(shared + (sizes.n_experts - 1) * size) / ffn.d_ff)
        group.settle()
        config = group.config
        assert isinstance(config, ExpertsConfig)
        self.config = config
        self.d_ff: int = ffn.d_ff
        self.active: float = given.active
        self.size: int = size
        self.fixed: int = 0 if given.shared_size is None else shared
        self.n: int = (ffn.d_ff - self.fixed) // self.size
        self.ratio = (config.shared_size or 0) / (config.active * ffn.d_ff) if not self.fixed and config.active else 0.0
        self.step = self.size / ffn.d_ff

    def count(self, share: float) -> int:
        """The number of experts that comes nearest to a share of the units."""
        experts = (share * self.d_ff - self.fixed) / self.size
        return min(self.n, max(1, round(experts)))

    def share(self, n: int) -> float:
        """Of the units."""
        return (self.fixed + n * self.size) / self.d_ff

    def of(self, n: int) -> ExpertsConfig:
        """Where n experts are active."""
        beside = min(n - 1, round(self.ratio * n))
        return replace(
            self.config, active=None, k=n - beside, expert_size=self.size, n_experts=None,
            shared_size=self.fixed + beside * self.size,
        )  # fmt: skip


def _curve(model: nn.Module, group: Group, ways: _Ways, places: Places, judge: Judge) -> tuple[Point, ...]:
    """What is lost where layers of fewer or more active experts stand in the places of a group."""
    rows = group.rows
    assert rows is not None
    trial = Trial(group.members[0].weights(), rows)
    with group.at_work():
        counts = sorted({ways.count(share) for share in shares_to_try(ways.active)})
        tried = {n: trial.build(ways.of(n)) for n in counts}
    new, error = tried[ways.count(ways.active)]
    undo = put(model, [(f, new) for f in group.members], places)
    try:
        change = judge.change()
    finally:
        take_out(undo)
    scale = change / max(error, 1e-30) ** 2
    return tuple(Point(ways.share(n), e, scale * e**2) for n, (_, e) in tried.items())


class Judge:
    """How far the outputs of a model are from what they were, on a few batches.

    Args:
        model: as it was.
        batches: as ``calibrate``'s.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        self.model, self.batches = model, list(batches)
        self.mask = "decoder_attention_mask" if decoder_of(model) else "attention_mask"
        with evaluated(model):
            self.before = [self._outputs(batch).taken() for batch in self.batches]

    def change(self) -> float:
        """Of the outputs, as ``Point`` has it. Those of one batch at a time: they may take gigabytes."""
        lost = whole = 0.0
        with evaluated(self.model):
            for batch, old in zip(self.batches, self.before, strict=True):
                new = self._outputs(batch)
                step = max(1, CHUNK // max(1, old.shape[-1]))
                for start in range(0, len(old), step):
                    rows = slice(start, start + step)
                    was, now = wide(old[rows]), wide(new.taken(rows))
                    if new.logits:
                        of, to = F.log_softmax(was, -1), F.log_softmax(now, -1)
                        parts = F.kl_div(to, of, reduction="none", log_target=True)
                        lost += parts.masked_fill_(of.isneginf(), 0).sum().item()  # 0 · log 0 is 0
                        whole += len(was)
                    else:
                        lost, whole = lost + (now - was).square().sum().item(), whole + was.square().sum().item()
                del new  # before the model makes the next
        return lost / max(whole, 1e-30)

    @torch.no_grad()
    def _outputs(self, batch: Any) -> _Outputs:
        mask = batch.get(self.mask) if isinstance(batch, Mapping) else None
        return _Outputs.of(run_batch(self.model, batch), mask)


class _Outputs(NamedTuple):
    """Of a batch: all rows [rows, n], which of them are compared, at most MOST_ROWS of real tokens, what they are."""

    rows: Tensor
    chosen: Tensor
    logits: bool

    @classmethod
    def of(cls, output: Any, mask: Any) -> _Outputs:
        y: Any = getattr(output, "logits", None)
        is_logits = isinstance(y, Tensor) and y.shape[-1] > 1  # one is a number, not a class
        if not isinstance(y, Tensor):
            nothing = torch.empty(0, 1, device="cpu")
            y = next((t for t in tensors_in(output) if t.is_floating_point() and t.dim()), nothing)
        rows, of_rows = y.reshape(-1, y.shape[-1]), of_tokens(mask, y)
        chosen = torch.arange(len(rows), device=y.device) if of_rows is None else of_rows.nonzero().flatten()
        if len(chosen) > MOST_ROWS:  # evenly spread, and so the same each time
            chosen = chosen[torch.arange(MOST_ROWS, device=y.device) * len(chosen) // MOST_ROWS]
        return cls(rows, chosen, is_logits)

    def taken(self, which: slice = slice(None)) -> Tensor:
        """A copy of those of the chosen rows."""
        return self.rows[self.chosen[which]]
