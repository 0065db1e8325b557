"""The tables of docs/compatibility.md, from the declarations."""

from __future__ import annotations

from pathlib import Path

from .cases import GROUPS
from .feature import Feature
from .layers import ALL

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- tables: written by python -m tests.matrix -->\n", "<!-- end of the tables -->\n"
COLUMNS = ("reference", "torch", "cpu", "triton")


def tables() -> str:
    """A table for each group of features: a row a feature, a column a backend, the layers in the cells."""
    return "\n".join(f"### {title}\n\n{_table(features)}" for title, features in GROUPS.items())


def _table(features: tuple[Feature, ...]) -> str:
    lines = ["| feature | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for feature in features:
        cells = [_cell(feature, backend) for backend in COLUMNS]
        lines.append(f"| **{feature.name}**<br>{_words(feature)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _words(feature: Feature) -> str:
    return " ".join((feature.check.__doc__ or "").split())


def _cell(feature: Feature, backend: str) -> str:
    works, refused = feature.works.get(backend, ()), feature.refused.get(backend, ())
    if not refused:
        return _names(works) if works else "-"
    return f"error: {_names(refused)}" + (f"; works: {_names(works)}" if works else "")


def _names(layers: tuple[str, ...]) -> str:
    """The layers, in the shorter way."""
    if layers == ALL:
        return "all"
    absent = [name for name in ALL if name not in layers]
    return f"all but {', '.join(absent)}" if len(absent) < len(layers) - 1 else ", ".join(layers)


def written(page: str) -> str:
    """The page with its tables as they should be."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"
