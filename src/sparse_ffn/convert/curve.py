"""Curves: what FFNs lose with fewer units, and which of them get how many of those that a token may use in all.

An FFN's curve says how much the model's outputs change where it alone is converted, for a few shares. Changes add up to
a good approximation, so that the units go, an expert at a time, where the curve falls most (greedily; curves are made
convex first, and then that is the best there is).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """What is lost where an FFN uses a share of its hidden units."""

    active: float
    """The share."""
    error: float
    """Relative error of the FFN's output on calibration that was kept back: ‖new - old‖ / ‖old‖."""
    change: float
    """Of the model's outputs on a batch, this FFN alone being converted: mean KL divergence in nats if they are
    logits, else the squared relative error. Measured at the wished share; elsewhere as the squared error goes."""

    def __str__(self) -> str:
        return f"{self.active:.0%} {self.error:.2%} {self.change:.2g}"


class Curve(NamedTuple):
    """Of one layer that is to be made, in all of its places."""

    points: Sequence[Point]
    """Of ascending shares."""
    step: float
    """An expert's share of the hidden units."""
    units: int
    """Hidden units in all places."""


def shares_to_try(active: float) -> tuple[float, ...]:
    """Below and above a share, as much as one is ready to take from or give to an FFN."""
    return active / 2, active * 0.75, active, active + (1 - active) / 4, active + (1 - active) / 2


def allocate(curves: Sequence[Curve], budget: float) -> list[float]:
    """The share of each FFN, which together use at most ``budget`` units."""
    hulls = [_convex(curve.points) for curve in curves]
    shares = [hull[0].active for hull in hulls]
    left = budget - sum(share * curve.units for share, curve in zip(shares, curves, strict=True))
    while True:
        gains = []
        for i, (curve, hull, share) in enumerate(zip(curves, hulls, shares, strict=True)):
            if share + curve.step <= hull[-1].active + 1e-9 and curve.step * curve.units <= left + 1e-6:
                gain = _at(hull, share) - _at(hull, share + curve.step)
                gains.append((gain / (curve.step * curve.units), -i))
        if not gains:
            return shares
        i = -max(gains)[1]
        shares[i] += curves[i].step
        left -= curves[i].step * curves[i].units


def _convex(points: Sequence[Point]) -> list[Point]:
    """The points on the lower convex hull."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    return (b.change - a.change) / (b.active - a.active)


def _at(hull: Sequence[Point], share: float) -> float:
    """The change at a share between the first and the last point."""
    a, b = next(((a, b) for a, b in itertools.pairwise(hull) if share <= b.active + 1e-9), hull[-2:])
    return a.change + _slope(a, b) * (share - a.active)
