"""The report of sparsify_: what it replaced and what it left, which prints as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparse_ffn.convert.config_base import FFNConfig
from sparse_ffn.convert.curve import Point


@dataclass(frozen=True)
class Replacement:
    """One FFN that was replaced."""

    name: str
    """Where the new layer is."""
    pattern: str
    """What was there: its linear maps, activation, GLU."""
    layer: str
    """The new layer's class and sizes."""
    config: FFNConfig
    """Resolved: with ``init="fresh"`` it makes a layer of the same shapes."""
    parameters: tuple[int, int]
    """Before and after."""
    flops: tuple[int, int]
    """Forward, for a token, before and after."""
    note: str
    """What was done with the weights."""
    shared: tuple[str, ...] = ()
    """Other names of the same module, which share the new layer."""
    relative_error: float | None = None
    """‖new - old‖ / ‖old‖ of the outputs on the calibration data, without any on 64 standard normal tokens; None of
    fresh weights, and of those on meta."""
    on_noise: bool = False
    """Whether it is of normal tokens: near 0 where nothing is lost, else it says little about real ones."""
    tied: str | None = None
    """The earlier place whose layer this is too, for FFNs that had the same parameters."""
    curve: tuple[Point, ...] = ()
    """What is lost with fewer and with more active units, where ``sparsify_`` gave each FFN its own k."""
    match: dict[str, Any] | None = None
    """How an FFN that an example has shown lies in the model, in plain values, to find it without one."""


@dataclass(frozen=True)
class Report:
    """All replacements, and all that was left as it was. ``print`` it."""

    replacements: tuple[Replacement, ...]
    unknown: dict[str, str]
    """What looked like an FFN by its shapes: name, and why it was left."""
    skipped: tuple[str, ...]
    """FFNs that ``filter_fn`` or the given names left out."""
    others: dict[str, int]
    """All other modules with matrices, as ``layers.*.name (Kind, shape)``, and how many."""

    @property
    def names(self) -> list[str]:
        """Where the new layers are."""
        return [new.name for new in self.replacements]

    @property
    def configs(self) -> dict[str, FFNConfig]:
        """Resolved configs by name: ``sparsify_`` takes them, to give another copy of the model the same layers."""
        return {new.name: new.config for new in self.replacements}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: by name, the config of each layer."""
        return {name: config.to_dict() for name, config in self.configs.items()}

    def __str__(self) -> str:
        measured = any(new.relative_error is not None for new in self.replacements)
        what = "error on noise" if any(new.on_noise for new in self.replacements) else "error"
        rows = [("name", "was", "is", "parameters", "FLOPs/token", *((what,) if measured else ()), "weights")]
        for r in self.replacements:
            error = ("-" if r.relative_error is None else f"{r.relative_error:.2%}",) if measured else ()
            name = " = ".join((r.name, *r.shared))
            rows.append((name, r.pattern, r.layer, _change(*r.parameters), _change(*r.flops), *error, r.note))
        lines = [f"{len(self.replacements)} FFN{'' if len(self.replacements) == 1 else 's'} replaced"]
        if self.replacements:
            parameters = _total(r.parameters for r in self.replacements if r.tied is None)
            flops = _total(r.flops for r in self.replacements for _ in (r.name, *r.shared))
            lines[0] += f": parameters {_change(*parameters)}, FLOPs/token {_change(*flops)}"
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        curves = [f"{r.name}: {', '.join(map(str, r.curve))}" for r in self.replacements if r.curve and r.tied is None]
        lines += _section("active units: error of the FFN, change of the model's outputs", curves)
        lines += _section("left: looked like an FFN", [f"{name}: {why}" for name, why in self.unknown.items()])
        lines += _section("left: not selected", self.skipped)
        lines += _section("left: no FFN", [f"{count} x {name}" for name, count in self.others.items()])
        return "\n".join(lines)


def _total(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    before, after = zip(*pairs, strict=True)
    return sum(before), sum(after)


def _section(title: str, entries: Iterable[str]) -> list[str]:
    entries = list(entries)
    return [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []


def _change(before: int, after: int) -> str:
    return f"{_short(before)} -> {_short(after)} ({after / max(before, 1):.0%})"


def _short(n: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
