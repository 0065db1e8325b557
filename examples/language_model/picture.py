"""The picture of a run: the curves of all variants, and where the experts of the MoE are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # no display is needed to write a file

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from sparse_ffn import MoE
from sparse_ffn.plot import plot_coactivation, plot_load

from .model import ByteModel

# Okabe and Ito's colours, told apart by colour-blind readers; line styles help in print.
STYLES = {
    "dense": ("#000000", "-"),
    "moe": ("#D55E00", "-"),
    "topk": ("#0072B2", "--"),
    "pkm": ("#009E73", "-."),
}
N_LOADS = 4


def draw(path: Path, title: str, results: dict[str, dict[str, Any]], unigram: float, moe: ByteModel | None) -> None:
    """`moe` is the model whose routing is shown; it must have run. Without one there are only the curves."""
    if moe is None:
        figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
        draw_curves(axes, results, unigram)
    else:
        figure = plt.figure(figsize=(15, 6), layout="constrained")
        panels = figure.subfigures(1, 2, width_ratios=(1, 1.2), squeeze=False)
        draw_curves(panels[0, 0].subplots(), results, unigram)
        draw_routing(panels[0, 1], moe)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(axes: Axes, results: dict[str, dict[str, Any]], unigram: float) -> None:
    for variant, result in results.items():
        colour, style = STYLES[variant]
        steps, bits = zip(*result["curve"], strict=True)
        label = f"{result['label']}: {result['bits_per_byte']['valid']:.2f}"
        axes.plot(steps, bits, style, color=colour, linewidth=1.8, label=label)
    axes.axhline(unigram, color="grey", linewidth=1, linestyle=":")
    axes.annotate(
        f"byte frequencies alone: {unigram:.2f}",
        (0.99, unigram),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color="dimgrey",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("steps")
    axes.set_ylabel("validation bits per byte")
    axes.set_title("Learning at equal parameters, same data order")
    axes.grid(alpha=0.25)
    axes.legend(title="bits per byte at the end")


def draw_routing(figure: SubFigure, moe: ByteModel) -> None:
    """The load of up to four layers spread over the depth, and co-activation in the deepest of them."""
    layers = [ffn for ffn in moe.ffns if isinstance(ffn, MoE)]
    n_shown = min(N_LOADS, len(layers))
    shown = [round(i * (len(layers) - 1) / max(1, n_shown - 1)) for i in range(n_shown)]
    grid = figure.add_gridspec(n_shown, 2, width_ratios=(1, 1.5))
    loads: list[Axes] = []
    for row, index in enumerate(shown):
        axes = figure.add_subplot(grid[row, 0], sharey=loads[0] if loads else None)
        plot_load(axes, layers[index], f"SigmaMoE layer {index}: load")
        loads.append(axes)
    for axes in loads:
        axes.title.set_fontsize("medium")
        axes.set_ylabel("share")
        if axes is not loads[-1]:
            axes.set_xlabel("")  # the same under every bar chart: once is enough
    together = figure.add_subplot(grid[:, 1])
    plot_coactivation(together, layers[shown[-1]], f"SigmaMoE layer {shown[-1]}: share of i's tokens that use j too")
    together.title.set_fontsize("medium")
