"""Pictures of routing: load per expert and co-activation (needs the extra ``plot``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparse_ffn.backends.warning import how_to_install
from sparse_ffn.checks import check_module, check_type
from sparse_ffn.layers.balanced import Balanced, balanced_in
from sparse_ffn.routing.statistics import coactivation, slot_counts, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_load(ax: Axes, layer: Balanced, title: str = "load per expert") -> None:
    """Bars of each expert's share of the slots in the layer's last forward, with the balanced share as a line.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: the layer has not run.
    """
    _check(ax, layer, title)
    load = summary(slot_counts(*_routed(layer), layer.n_experts + layer.null_experts), layer.null_experts)["load"]
    ax.bar(range(layer.n_experts), load.tolist(), color="#4477aa")
    ax.axhline(1 / layer.n_experts, color="#222222", linewidth=0.8, linestyle="--")
    ax.set(title=title, xlabel="expert", ylabel="share of slots")
    ax.spines[["top", "right"]].set_visible(False)


def plot_coactivation(ax: Axes, layer: Balanced, title: str = "co-activation") -> None:
    """Colours for the share of the tokens with expert i (row) that also use expert j (column), in the last forward.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: the layer has not run.
    """
    _check(ax, layer, title)
    n = layer.n_experts
    together = coactivation(*_routed(layer), n + layer.null_experts)[:n, :n]
    together.fill_diagonal_(float("nan"))  # 1 by definition; it would take the whole colour range
    image = ax.imshow(together.tolist(), cmap="viridis", vmin=0, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04)
    ax.set(title=title, xlabel="expert j", ylabel="expert i")


def routing_figure(model: nn.Module) -> Figure:
    """Load and co-activation of every MoE layer that has run, a row for each.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: the model is no module.
        ValueError: no MoE layer of the model has run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: {how_to_install('plot')}") from error
    check_module("model", model)
    layers = [(n, m) for n, m in balanced_in(model).items() if m._routed is not None]
    if not layers:
        raise ValueError("no MoE layer of this model has run: call the model first")
    figure = Figure(figsize=(9, 3.2 * len(layers)), layout="constrained")
    for (name, layer), (left, right) in zip(layers, figure.subplots(len(layers), 2, squeeze=False), strict=True):
        plot_load(left, layer, f"{name or type(layer).__name__}: load")
        plot_coactivation(right, layer)
    return figure


def _check(ax: Any, layer: Any, title: Any) -> None:
    if not hasattr(ax, "imshow"):
        raise TypeError(f"ax must be Axes of matplotlib, got a value of type {type(ax).__name__}")
    check_type("layer", layer, Balanced, "a mixture of experts such as a sparse_ffn.MoE")
    check_type("title", title, str, "a string")


def _routed(layer: Balanced) -> tuple[Tensor, Tensor | None]:
    if layer._routed is None:
        raise ValueError("the layer has not run: call it first")
    return layer._routed
