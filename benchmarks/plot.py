"""Pictures of the results: `python -m benchmarks.plot FOLDER` draws those of a run. Needs matplotlib."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measuring.records import MODES, Report, Row
from benchmarks.measuring.report import GROUPS
from sparse_ffn.backends.warning import how_to_install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; ours is the first
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
FINE = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 8)
COARSE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def figure(rows: Sequence[float], columns: Sequence[float], width: float, height: float) -> tuple[Figure, Any]:
    """An empty grid of axes, of these relative heights and widths; width and height are inches of one unit.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"--plot needs matplotlib: {how_to_install('bench')}") from error
    result = Figure(figsize=(width * sum(columns), height * sum(rows)), layout="constrained")
    return result, result.subplots(len(rows), len(columns), squeeze=False, height_ratios=rows, width_ratios=columns)


def save(picture: Figure, path: Path) -> None:
    """Write it, folders included; a PNG in 256 colours, which makes it small enough for the documentation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".png":
        picture.savefig(path)
        return
    from PIL import Image  # matplotlib needs it too

    pixels = io.BytesIO()
    picture.savefig(pixels, format="png", dpi=100)
    Image.open(pixels).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def ratios(report: Report, path: Path) -> None:
    """Time relative to the baseline on a logarithmic scale: a line for each shape, a panel for each group and pass."""
    groups = list(report.groups())
    modes = list(dict.fromkeys(row.mode for row in report.rows))
    # room for a line a shape, and for the legend
    lines = [max(len({(r.shape, r.dtype) for r in rows}), 0.7 * len(rows[0].results)) for _, rows in groups]
    picture, axes = figure([n + 3 for n in lines], [1.0] * len(modes), 5.5, 0.25)
    for (group, rows), panels in zip(groups, axes, strict=True):
        for ax, mode in zip(panels, modes, strict=True):
            _ratios(ax, [row for row in rows if row.mode == mode], labels=ax is panels[0])
            ax.set_xlabel(f"{MODES[mode]}: time relative to {rows[0].baseline}", fontsize=7)
        panels[0].set_title(GROUPS.get(group, group), loc="left", fontsize=9)
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        panels[-1].legend(fontsize=7, frameon=False, reverse=True, **place)
    save(picture, path)


def _ratios(ax: Axes, rows: list[Row], *, labels: bool) -> None:
    names = list(dict.fromkeys(result.name for row in rows for result in row.results))
    for i, name in reversed(list(enumerate(names))):  # ours is drawn last, on top
        found = [(y, r.ratio) for y, row in enumerate(rows) for r in row.results if r.name == name and r.ratio]
        medians = [ratio.median for _, ratio in found]
        spread = [[r.median - r.low for _, r in found], [r.high - r.median for _, r in found]]
        ax.errorbar(medians, [y for y, _ in found], xerr=spread, **_style(i), linestyle="none", label=name)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xticks([tick for tick in (FINE if high < 10 * low else COARSE) if low <= tick <= high])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.axvline(1, color="grey", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(rows)), [f"{row.shape}, {row.dtype}" for row in rows] if labels else [""] * len(rows))
    ax.tick_params(labelsize=7)
    ax.minorticks_off()
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.spines[["top", "right"]].set_visible(False)


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def growth(report: Report, path: Path) -> None:
    """Time and memory of the sweeps against what grows, a row of panels for each sweep."""
    groups = [((group, dtype), [row for row in rows if row.dtype == dtype])
              for group, rows in report.groups() for dtype in dict.fromkeys(row.dtype for row in rows)]  # fmt: skip
    picture, axes = figure([1.0] * len(groups), [1.0, 1.0], 5.5, 3.6)
    for ((group, _), rows), (left, right) in zip(groups, axes, strict=True):
        grows, fixed = rows[0].shape.split("; ")
        xs = [int(row.shape.split("; ")[0].split("=")[1]) for row in rows]
        for i, name in enumerate(result.name for result in rows[0].results):
            results = [row.of(name) for row in rows]
            style = {**_style(i), "label": name}
            left.plot(xs, [r.seconds.median * 1e3 if r.seconds else float("nan") for r in results], **style)
            right.plot(xs, [r.saved.elements / 1e6 if r.saved else float("nan") for r in results], **style)
        for ax, label in ((left, "ms, forward + backward"), (right, "million numbers kept for backward")):
            ax.set(xscale="log", yscale="log", xlabel=f"{grows.split('=')[0]} ({fixed})", ylabel=label)
            ax.set_xticks(xs, [str(x) for x in xs], minor=False)
            ax.minorticks_off()
            ax.spines[["top", "right"]].set_visible(False)
        left.set_title(f"{GROUPS[group]}, {rows[0].dtype}", loc="left", fontsize=10)
        left.legend(fontsize=7)
    save(picture, path)


PICTURES = {"layers": ratios, "cvmm": ratios, "sweeps": growth}


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path, help="of one run, as runs/bench is")
    folder = arguments.parse_args(argv).folder
    for part, draw in PICTURES.items():
        if (folder / f"{part}.json").is_file():
            draw(Report.load(folder / f"{part}.json"), folder / f"{part}.png")


if __name__ == "__main__":
    main()
