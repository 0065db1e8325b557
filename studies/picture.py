"""The study's two pictures: bits per byte against bytes, and against FLOPs and CPU time (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks import plot

from .results import Record, machine_of
from .tables import times
from .variants import DENSE, VARIANTS

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
    found = {size: of_shared_seeds(of) for size, of in records.items()}
    found = {size: of for size, of in found.items() if of}
    if not found:
        return
    columns = [1.0] * len(found)
    picture, axes = plot.figure([1.0], columns, 7.0, 4.5)
    for ax, (size, of) in zip(axes[0], found.items(), strict=True):
        _curves(ax, of, dict.fromkeys(of, 1e-6), "MB of text", size)
    plot.save(picture, folder / BYTES)
    picture, axes = plot.figure([1.0, 1.0], columns, 7.0, 4.5)
    for (above, below), (size, of) in zip(axes.T, found.items(), strict=True):
        flops = {variant: runs[0]["training_flops_per_byte"] / 1e15 for variant, runs in of.items()}
        _curves(above, of, flops, "training PFLOPs", size)
        _curves(below, of, *_minutes(records[size]), size)
    plot.save(picture, folder / COSTS)


def of_shared_seeds(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of each layer that is drawn, of the seeds that all of them have: others would be easier or harder."""
    runs: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["variant"] in STYLES and not record["diverged"]:
            runs.setdefault(record["variant"], {})[record["seed"]] = record
    if DENSE in runs:
        runs = {variant: of for variant, of in runs.items() if of.keys() & runs[DENSE].keys()}
    shared = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    return {variant: [of[seed] for seed in shared] for variant, of in runs.items() if shared}


def _minutes(records: Sequence[Record]) -> tuple[dict[str, float], str]:
    """Of training a byte, on the machine that most layers were trained on and that computes in bfloat16; its name."""
    seconds: dict[tuple[str, int], dict[str, float]] = {}
    for variant in STYLES:
        for machine, taken in times([record for record in records if record["variant"] == variant]).items():
            seconds.setdefault(machine, {})[variant] = taken / 60
    if not seconds:
        return {}, "minutes of training: on no machine with instructions for bfloat16"
    (name, threads), of = max(seconds.items(), key=lambda item: len(item[1]))
    what = f"minutes of training, {name}"
    if all("GPU" not in record["machine"] for record in records if machine_of(record) == (name, threads)):
        what = f"CPU minutes of training, {threads} thread(s) of {name}"
    return of, what


def _curves(ax: Axes, runs: Mapping[str, Sequence[Record]], costs: Mapping[str, float], label: str, size: str) -> None:
    """Against what a byte costs each layer; layers whose cost is not known are left out."""
    for variant, (colour, style) in STYLES.items():
        if variant in runs and variant in costs:
            curves = [record["curve"] for record in runs[variant]]
            ys = [mean(at) for at in zip(*(curve["bits_per_byte"] for curve in curves), strict=True)]
            xs = [done * costs[variant] for done in curves[0]["bytes"]]
            first = round(len(xs) * (1 - SHOWN))
            what: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.3}
            ax.plot(xs[first:], ys[first:], label=VARIANTS[variant].label, **what)
    seeds = ", ".join(str(record["seed"]) for record in next(iter(runs.values())))
    ax.set(xlabel=label, ylabel="validation bits per byte", title=f"size {size}, seeds: {seeds}")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7)
