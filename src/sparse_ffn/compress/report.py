"""The reports of quantize_experts_, prune_experts_ and compress_experts_, which print as tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer whose experts were quantised."""

    name: str
    """Where it is; empty for the model itself."""
    n_bytes: tuple[int, int]
    """Of the stacks that were quantised, before and after."""
    errors: dict[str, float]
    """Of each stack ‖W - Ŵ‖ / ‖W‖; NaN on meta."""
    outliers: dict[str, float]
    """Of each stack the most that a column's largest weight is of the column's mean size, max |W_j| / mean |W_j| over
    an expert's units (2406.08155). Where it is large, a few weights make the scales coarse. NaN on meta."""
    output_error: float | None = None
    """Of the layer's output ‖y - ŷ‖ / ‖y‖ on the batches, if there were any; NaN if it saw no token of them."""


@dataclass(frozen=True)
class QuantizationReport:
    """The layers whose experts were quantised. ``print`` it."""

    layers: tuple[QuantizedLayer, ...]

    @property
    def n_bytes(self) -> tuple[int, int]:
        """Of all stacks that were quantised, before and after."""
        return sum(r.n_bytes[0] for r in self.layers), sum(r.n_bytes[1] for r in self.layers)

    def __str__(self) -> str:
        count = len(self.layers)
        lines = [f"experts of {count} layer{'' if count == 1 else 's'} quantised: {_change(*self.n_bytes)}"]
        rows: list[tuple[str, ...]] = [("name", "bytes", "relative error", "outliers")]
        for r in self.layers:
            errors = {**r.errors, **({} if r.output_error is None else {"output": r.output_error})}
            shown = ", ".join(f"{of} {error:.2%}" for of, error in errors.items())
            outliers = ", ".join(f"{stack} {score:.1f}" for stack, score in r.outliers.items())
            rows.append((r.name or "the model", _change(*r.n_bytes), shown, outliers))
        return "\n".join([*lines, *aligned(rows)])


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one layer."""

    name: str
    n_experts: int
    """Before."""
    kept: tuple[int, ...]
    """The old numbers of the experts that it has now, in their order."""
    constants: int
    """Experts that became constants."""
    error: float
    """Predicted relative error of the output on the statistics' tokens, sqrt(Σ lost / Σ energy), where an expert loses
    its ``energy``, or its ``residual`` where a constant replaces it; cross terms and rerouted tokens aside."""


@dataclass(frozen=True)
class PruningReport:
    """All layers that were pruned. ``print`` it."""

    layers: tuple[PrunedLayer, ...]
    parameters: tuple[int, int]
    """The model's, before and after."""

    def __str__(self) -> str:
        before, after = self.parameters
        rows: list[tuple[str, ...]] = [("name", "experts", "predicted error")]
        for of in self.layers:
            constants = f" + {of.constants} constants" if of.constants else ""
            rows.append((of.name, f"{of.n_experts} -> {len(of.kept)}{constants}", f"{of.error:.2%}"))
        head = f"{len(self.layers)} layers pruned: parameters {before} -> {after} ({after / max(before, 1):.0%})"
        return "\n".join([head, *aligned(rows)])


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one layer."""

    name: str
    parameters: tuple[int, int]
    """Before and after."""
    spread: tuple[float, ...]
    """The mean of ‖P_e W_e - C‖² over the experts, after each round: how far they are from the base."""
    errors: dict[str, float]
    """Of each stack ‖W - Ŵ‖ / ‖W‖."""


@dataclass(frozen=True)
class CompressionReport:
    """The layers whose experts were compressed. ``print`` it."""

    layers: tuple[CompressedLayer, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("name", "parameters", "relative error")]
        for of in self.layers:
            before, after = of.parameters
            errors = ", ".join(f"{stack} {error:.2%}" for stack, error in of.errors.items())
            rows.append((of.name, f"{before} -> {after} ({after / before:.1%})", errors))
        return "\n".join(aligned(rows))


def aligned(rows: list[tuple[str, ...]]) -> Iterable[str]:
    """The lines of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _change(before: int, after: int) -> str:
    return f"{_short(before)} -> {_short(after)} ({after / max(before, 1):.1%})"


def _short(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"
