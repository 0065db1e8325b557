"""The targets, and what a run measured of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.results import Result, Row
from benchmarks.shapes import DECODE, LARGE, MOE_SHAPES, SINGLE, SMALL, MemoryShape, TopKShape

TO_DENSE = {
    **{("moe", str(shape), "fwdbwd"): {"fp32": 1.05, "bf16": 1.20} for shape in LARGE},
    ("moe", str(SMALL), "fwdbwd"): {"fp32": 1.15, "bf16": 1.25},
    ("moe", str(DECODE), "fwd"): {"fp32": 1.5, "bf16": 1.3},
    ("moe", str(SINGLE), "fwd"): {"fp32": 0.9, "bf16": 0.9},
    ("topk", str(TopKShape()), "fwdbwd"): {"fp32": 0.6, "bf16": 0.6},
}
"""Largest time relative to the row's dense network: of equal compute, or for TopKFFN the one that it replaces."""
OVER_PEERS = {
    **{(group, str(shape), "fwdbwd"): 1.8 for group in ("moe", "moe-glu") for shape in MOE_SHAPES},
    **{(group, str(MemoryShape()), "fwdbwd"): 3.0 for group in ("pkm", "pkm-query")},
}
"""Smallest speed-up over every peer."""


@dataclass(frozen=True)
class Verdict:
    """One target beside what was measured; None if it could not be."""

    row: Row
    what: str
    target: str
    measured: float | None
    met: bool


def verdicts(row: Row) -> Iterator[Verdict]:
    """The targets of a row."""
    ours = row.results[0]
    key = (row.group, row.shape, row.mode)
    if key in TO_DENSE:
        limit = TO_DENSE[key][row.dtype]
        measured = None if ours.ratio is None else ours.ratio.median
        met = measured is not None and measured <= limit
        yield Verdict(row, f"time relative to {row.baseline}", f"≤ {limit:.2f}", measured, met)
    if key in OVER_PEERS:
        limit = OVER_PEERS[key]
        for peer in row.results:
            if peer.kind == "peer" and (peer.status == "timed" or ours.status != "timed"):
                measured = speed_up(ours, peer)
                met = measured is not None and measured >= limit
                yield Verdict(row, f"times faster than {peer.name}", f"≥ {limit:.1f}", measured, met)
    if row.saved_bound is not None and row.mode == "fwdbwd":
        kept = None if ours.saved is None else ours.saved.elements
        met = kept is not None and kept <= row.saved_bound
        yield Verdict(row, "elements kept for backward", f"≤ {row.saved_bound:,}", kept, met)


def speed_up(ours: Result, peer: Result) -> float | None:
    """How many times faster than the peer we are."""
    return None if ours.status != "timed" or peer.slowdown is None else peer.slowdown.median
