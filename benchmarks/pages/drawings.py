"""Drawings without numbers: the idea of the layers, and how the GPU kernels compute a mixture (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Ink:
    """The colours of one kind of page; the background is the page's own."""

    name: str
    text: str
    faint: str
    ours: str
    dense: str
    others: tuple[str, str]


LIGHT = Ink("light", "#24292f", "#d8dee4", "#c2410c", "#1d4ed8", ("#6b7280", "#a8b0ba"))
DARK = Ink("dark", "#e6edf3", "#3d444d", "#fb8b4b", "#79a8ff", ("#9aa4b0", "#656d78"))


# the idea: a sum over hidden units, and four ways to choose them

GRID = 4
ACTIVATIONS = ((0.1, 0.5, 0.0, 0.9), (0.3, 0.1, 0.7, 0.2), (0.4, 0.0, 0.8, 0.1), (0.3, 0.0, 0.6, 0.2))
SUB_KEYS = ((0.3, 0.9, 0.1, 0.5), (0.8, 0.1, 0.6, 0.3))  # scores of the first and of the second halves
GROUPS = (1, 3)  # that the router chose


def idea(ink: Ink) -> Figure:
    """Sixteen hidden units in four panels: whose keys are computed, and who is in the sum."""
    picture = Figure(figsize=(8, 3.3))
    picture.text(0.5, 0.92, "A sum over hidden units:  y = Σᵢ f(kᵢ·x) vᵢ", ha="center", fontsize=13, color=ink.text)
    panels = (
        (_dense, "DenseFFN", "all units"),
        (_topk, "TopKFFN", "the k largest\nactivations"),
        (_memory, "ProductKeyMemory", "the k largest sums\nof two sub-keys"),
        (_mixture, "MoE", "k groups,\nchosen by a router"),
    )
    for i, (panel, name, how) in enumerate(panels):
        ax = picture.add_axes((0.005 + 0.25 * i, 0.33, 0.24, 0.55))
        ax.set(xlim=(-1.2, 5.2), ylim=(-0.1, 5.4), aspect="equal")
        ax.axis("off")
        panel(ax, ink)
        middle = 0.125 + 0.25 * i
        picture.text(middle, 0.31, name, ha="center", va="top", fontsize=11, fontweight="bold", color=ink.text)
        picture.text(middle, 0.245, how, ha="center", va="top", fontsize=10, color=ink.text)
    computed = {
        "key and value computed": (0.16, ink.ours),
        "key computed": (0.48, ink.dense),
        "neither": (0.7, ink.faint),
    }
    for said, (x, colour) in computed.items():
        picture.patches.append(Rectangle((x, 0.025), 0.016, 0.039, facecolor=colour, transform=picture.transFigure))
        picture.text(x + 0.025, 0.03, said, fontsize=10, color=ink.text)
    return picture


def _largest(scores: Sequence[Sequence[float]], k: int) -> set[tuple[int, int]]:
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    return set(sorted(cells, key=lambda cell: -scores[cell[0]][cell[1]])[:k])


def _grid(ax: Axes, colour: Callable[[tuple[int, int]], str]) -> None:
    for row in range(GRID):
        for column in range(GRID):
            _box(ax, column + 0.07, 3 - row + 0.07, 0.86, 0.86, colour((row, column)))


def _box(ax: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0))


def _dense(ax: Axes, ink: Ink) -> None:
    _grid(ax, lambda _: ink.ours)


def _topk(ax: Axes, ink: Ink) -> None:
    chosen = _largest(ACTIVATIONS, GRID)
    _grid(ax, lambda unit: ink.ours if unit in chosen else ink.dense)


def _memory(ax: Axes, ink: Ink) -> None:
    first, second = SUB_KEYS
    chosen = _largest([[a + b for b in second] for a in first], GRID)
    _grid(ax, lambda unit: ink.ours if unit in chosen else ink.faint)
    for i in range(GRID):  # the sub-keys: one for each row, one for each column
        _box(ax, -0.75, 3 - i + 0.07, 0.5, 0.86, ink.dense)
        _box(ax, i + 0.07, 4.25, 0.86, 0.5, ink.dense)


def _mixture(ax: Axes, ink: Ink) -> None:
    _grid(ax, lambda unit: ink.ours if unit[1] in GROUPS else ink.faint)
    for column in GROUPS:
        style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": ink.text}
        ax.add_patch(FancyArrowPatch((2, 4.85), (column + 0.5, 4.0), **style))
    ax.text(2, 4.85, "router", ha="center", va="bottom", fontsize=10, color=ink.text)


# how the kernels compute a mixture: slots sorted by expert, and back

CHOICES = ((0, 1), (1, 2), (0, 2), (0, 1), (1, 0), (2, 1))  # two experts of each of six tokens
SLOT, TOKEN, GAP = 0.7, 1.4, 0.5  # heights of a slot and of a token, and between experts
STAGES = (
    ("x", "tokens, and\ntheir k experts"),
    ("sort", "slots by expert,\nin tiles"),
    ("up", "gather · keys,\nactivation"),
    ("down", "hidden · values,\nsome columns"),
    ("combine", "each token adds\nits k rows"),
)


def kernels(ink: Ink) -> Figure:
    """Six tokens go through three experts and come back; a colour is an expert."""
    colours = (ink.ours, ink.dense, ink.others[0])
    picture = Figure(figsize=(8, 3.6))
    ax = picture.add_axes((0.01, 0.0, 0.98, 1.0))
    ax.set(xlim=(0, 40), ylim=(-14.5, 1.5))
    ax.axis("off")
    for token, experts in enumerate(CHOICES):
        y = -TOKEN * (token + 1) + 0.2
        _box(ax, 0.5, y, 4, 1, ink.faint)
        for choice, expert in enumerate(experts):
            _box(ax, 4.8 + 0.8 * choice, y + 0.15, 0.7, 0.7, colours[expert])
        _box(ax, 34.5, y, 4, 1, ink.others[1])
    slots = sorted((expert, token) for token, experts in enumerate(CHOICES) for expert in experts)
    for slot, (expert, token) in enumerate(slots):
        y = -SLOT * (slot + 1) - GAP * (expert - 1)
        for x, width in ((10.5, 0.7), (17.5, 2.2), (25.5, 4)):
            _box(ax, x, y, width, 0.6, colours[expert])
        ax.text(10, y + 0.25, str(token), ha="right", va="center", fontsize=7, color=ink.text)
    for x in (7, 13, 20.8, 30.8):
        style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": ink.text}
        ax.add_patch(FancyArrowPatch((x, -4.4), (x + 2.2, -4.4), **style))
    for (name, how), x in zip(STAGES, (3, 10.9, 18.6, 27.5, 36.5), strict=True):
        ax.text(x, -10.4, name, ha="center", va="top", fontsize=11, fontweight="bold", color=ink.text)
        ax.text(x, -11.7, how, ha="center", va="top", fontsize=9, color=ink.text)
    return picture
