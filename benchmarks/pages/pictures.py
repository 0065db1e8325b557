"""The documentation's pictures, each for light and for dark pages (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.measuring.records import Row
from benchmarks.pages import comparison, drawings
from benchmarks.pages.drawings import DARK, LIGHT, Ink
from benchmarks.pages.machines import Machine
from benchmarks.shapes import LARGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(found: Sequence[Machine], images: Path) -> None:
    """All pictures."""
    images.mkdir(parents=True, exist_ok=True)
    for ink in (LIGHT, DARK):
        pictures = {"idea": drawings.idea(ink), "kernels": drawings.kernels(ink), "result": result(found, ink)}
        for name, picture in pictures.items():
            # the same numbers give the same file: no date, and no random names inside it
            with mpl.rc_context({"svg.hashsalt": name}):
                picture.savefig(images / f"{name}-{ink.name}.svg", transparent=True, metadata={"Date": None})


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
            said = f"\n16-bit instructions: {machine.instructions}" if dtype == "bf16" else "\n"
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
