"""The study's two pictures: bits per byte against bytes, and against FLOPs and CPU time (needs matplotlib)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks import plot

from .results import Record, machine_of
from .variants import VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BYTES, COSTS = "evidence-bytes.png", "evidence-costs.png"
# Okabe and Ito's colours, told apart by colour-blind readers: one for each family, dashes within it
STYLES = {
    "dense": ("#000000", "-"),
    "dense-equal-flops": ("#000000", ":"),
    "sigma": ("#D55E00", "-"),
    "sigma-8": ("#D55E00", "--"),
    "topk-16": ("#0072B2", "-"),
    "topk-4": ("#0072B2", "--"),
    "pkm": ("#009E73", "-"),
    "pkm-softmax": ("#009E73", "--"),
    "softmax-after": ("#CC79A7", "-"),
    "softmax-before": ("#CC79A7", "--"),
    "switch": ("#E69F00", "-"),
    "sbase": ("#56B4E9", "-"),
    "noisy": ("#999999", "-"),
}
SHOWN = 0.7
"""Of a run: the last part. The first would leave the layers no room."""


def draw(records: Mapping[str, Sequence[Record]], folder: Path) -> None:
    """Sizes without results are left out; without any there are no pictures."""
    found = {size: [r for r in of if not r["diverged"]] for size, of in records.items()}
    found = {size: of for size, of in found.items() if of}
    if not found:
        return
    columns = [1.0] * len(found)
    picture, axes = plot.figure([1.0], columns, 7.0, 4.5)
    for ax, (size, of) in zip(axes[0], found.items(), strict=True):
        _curves(ax, of, "bytes", 1e6, "MB of text", size)
    plot.save(picture, folder / BYTES)
    picture, axes = plot.figure([1.0, 1.0], columns, 7.0, 4.5)
    for (above, below), (size, of) in zip(axes.T, found.items(), strict=True):
        _curves(above, of, "flops", 1e15, "training PFLOPs", size)
        (machine, threads), _ = Counter(map(machine_of, of)).most_common(1)[0]
        same = [record for record in of if machine_of(record) == (machine, threads)]
        if "GPU" in same[0]["machine"]:
            _curves(below, same, "seconds", 60, f"minutes of training, {machine}", size)
        else:
            _curves(below, same, "cpu_seconds", 60, f"CPU minutes of training, {threads} thread(s) of {machine}", size)
    plot.save(picture, folder / COSTS)


def _curves(ax: Axes, records: Sequence[Record], key: str, unit: float, label: str, size: str) -> None:
    for variant, (colour, style) in STYLES.items():
        curves = [record["curve"] for record in records if record["variant"] == variant]
        if curves:
            xs, ys = (
                [mean(at) for at in zip(*(curve[k] for curve in curves), strict=True)] for k in (key, "bits_per_byte")
            )
            first = round(len(xs) * (1 - SHOWN))
            what: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.3}
            what["label"] = f"{VARIANTS[variant].label} ({len(curves)})"
            ax.plot([x / unit for x in xs[first:]], ys[first:], **what)
    ax.set(xlabel=label, ylabel="validation bits per byte", title=f"size {size}")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7, title="in brackets: seeds")
