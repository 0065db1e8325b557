"""The targets, and what a run measured of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.records import Result, Row
from benchmarks.shapes import (
    DECODE,
    GPU_FINE,
    GPU_WIDE,
    LARGE,
    MOE_SHAPES,
    SINGLE,
    SMALL,
    TOPK_TOKENS,
    MemoryShape,
    TopKShape,
    topk_sweep,
)

Key = tuple[str, str, str, str]  # device, group, shape, pass

TO_DENSE: dict[Key, dict[str, float]] = {
    **{("cpu", "moe", str(shape), "fwdbwd"): {"fp32": 1.05, "bf16": 1.20} for shape in LARGE},
    ("cpu", "moe", str(SMALL), "fwdbwd"): {"fp32": 1.15, "bf16": 1.25},
    ("cpu", "moe", str(DECODE), "fwd"): {"fp32": 1.5, "bf16": 1.3},
    ("cpu", "moe", str(SINGLE), "fwd"): {"fp32": 0.9, "bf16": 0.9},
    ("cpu", "topk", str(TopKShape()), "fwdbwd"): {"fp32": 0.6, "bf16": 0.6},
    **{
        ("cpu", group, str(shape), mode): dict.fromkeys(("fp32", "bf16"), 1.15)
        for group in ("topk", "topk-glu")
        for tokens in TOPK_TOKENS
        for shape in topk_sweep(tokens)
        for mode in ("fwd", "fwdbwd")
    },
    # of an H100: 0.75 and 0.6 of the dense network's rate
    ("cuda", "moe", str(GPU_WIDE), "fwdbwd"): {"bf16": 1 / 0.75},
    ("cuda", "moe", str(GPU_FINE), "fwdbwd"): {"bf16": 1 / 0.6},
}
"""Largest time relative to the row's dense network: of equal compute, or for TopKFFN the one that it replaces."""
OVER_PEERS: dict[Key, float] = {
    **{("cpu", group, str(shape), "fwdbwd"): 1.8 for group in ("moe", "moe-glu") for shape in MOE_SHAPES},
    **{("cpu", group, str(MemoryShape()), "fwdbwd"): 3.0 for group in ("pkm", "pkm-query")},
}
"""Smallest speed-up over every peer on a CPU."""
GPU_OVER_PEERS = 1.0
"""The same on a GPU, where no shape of the benchmark is to be slower than any peer."""


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
    key = (row.device, row.group, row.shape, row.mode)
    limit = TO_DENSE.get(key, {}).get(row.dtype)
    if limit is not None:
        measured = None if ours.ratio is None else ours.ratio.median
        met = measured is not None and measured <= limit
        yield Verdict(row, f"time relative to {row.baseline}", f"≤ {limit:.2f}", measured, met)
    least = GPU_OVER_PEERS if row.device == "cuda" else OVER_PEERS.get(key)
    if least is not None:
        for peer in row.results:
            if peer.kind == "peer" and (peer.status == "timed" or ours.status != "timed"):
                measured = speed_up(ours, peer)
                met = measured is not None and measured >= least
                yield Verdict(row, f"times faster than {peer.name}", f"≥ {least:.1f}", measured, met)
    if row.mode != "fwdbwd":
        return
    if row.saved_bound is not None:
        kept = None if ours.saved is None else ours.saved.elements
        met = kept is not None and kept <= row.saved_bound
        yield Verdict(row, "elements kept for backward", f"≤ {row.saved_bound:,}", kept, met)
    if row.experts_bound is not None:
        kept = row.experts_kept
        met = kept is not None and kept <= row.experts_bound
        yield Verdict(
            row, "bytes kept by the experts, against SonicMoE's formula", f"≤ {row.experts_bound:,}", kept, met
        )


def speed_up(ours: Result, peer: Result) -> float | None:
    """How many times faster than the peer we are."""
    return None if ours.status != "timed" or peer.slowdown is None else peer.slowdown.median
