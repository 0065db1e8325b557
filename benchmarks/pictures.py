"""The documentation's pictures, each for light and for dark pages (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from benchmarks import comparison
from benchmarks.machines import Machine
from benchmarks.records import Row
from benchmarks.shapes import LARGE

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


def draw(found: Sequence[Machine], images: Path) -> None:
    """All pictures."""
    images.mkdir(parents=True, exist_ok=True)
    for ink in (LIGHT, DARK):
        for name, picture in (("idea", idea(ink)), ("result", result(found, ink))):
            # the same numbers give the same file: no date, and no random names inside it
            with mpl.rc_context({"svg.hashsalt": name}):
                picture.savefig(images / f"{name}-{ink.name}.svg", transparent=True, metadata={"Date": None})


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


# the result: a training step beside the dense FFN that the layer replaces


def result(found: Sequence[Machine], ink: Ink) -> Figure:
    """Bars from zero, a row of panels for each machine, a panel for each dtype; the dense FFN that is replaced is 1."""
    machines = [m for m in found if m.device == "cpu"]
    picture = Figure(figsize=(8, 1 + 2.5 * len(machines)), layout="constrained")
    axes = picture.subplots(len(machines), 2, squeeze=False, sharex=True)
    titles = comparison.titles(machines)
    for machine, title, panels in zip(machines, titles, axes, strict=True):
        for ax, dtype in zip(panels, ("fp32", "bf16"), strict=True):
            rows = comparison.rows(machine, "moe", "fwdbwd", dtype)
            _bars(ax, [row for row in rows if row.shape in map(str, LARGE)], ink)
            said = f"\n16-bit instructions: {comparison.instruction(machine)}" if dtype == "bf16" else "\n"
            ax.set_title(f"{title}, {dtype}{said}", loc="left", fontsize=10, color=ink.text)
    handles, labels = axes[0][0].get_legend_handles_labels()
    look = {"ncols": 2, "frameon": False, "labelcolor": ink.text, "fontsize": 10}
    picture.legend(handles, labels, loc="outside lower center", **look)
    picture.suptitle("Time of a training step; dense FFN of equal parameters = 1", color=ink.text, fontsize=13)
    return picture


def _bars(ax: Axes, rows: Sequence[Row], ink: Ink) -> None:
    contenders = {
        "sparse-ffn": ("SigmaMoE", ink.ours),
        comparison.COMPUTE: ("dense FFN of equal arithmetic, fewer parameters", ink.dense),
        "torch grouped_mm": ("the same with torch's grouped_mm", ink.others[0]),
        "per-expert loop": ("the same as a loop over experts", ink.others[1]),
    }
    for i, (name, (label, colour)) in enumerate(contenders.items()):
        places = [j + 0.2 * (i - 1.5) for j in range(len(rows))]
        values = [_of_replaced(row, name) for row in rows]
        bars = ax.barh(places, values, height=0.18, color=colour, label=label)
        ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8, color=ink.text)
    ax.axvline(1, color=ink.text, linewidth=1, linestyle=":")
    ax.set_yticks(range(len(rows)), [comparison.words(row).replace(", ", "\n") for row in rows])
    ax.invert_yaxis()
    ax.tick_params(colors=ink.text, labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(ink.faint)


def _of_replaced(row: Row, name: str) -> float:
    """A contender's time over that of the dense FFN of equal parameters; both are known over ours."""
    contender, dense = (comparison.over_ours(row, which) for which in (name, comparison.PARAMETERS))
    return contender / dense if contender and dense else float("nan")


def _main() -> None:
    from benchmarks import machines

    draw(machines.load([machines.PUBLISHED]), Path("docs/images"))


if __name__ == "__main__":
    _main()
