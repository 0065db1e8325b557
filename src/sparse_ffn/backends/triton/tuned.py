"""Block sizes measured on the user's card by ``python -m sparse_ffn.tune``: their file, and looking a tile up in it.

One JSON file for each card and its capability, in ``kept.directory()``. It counts only for the kernels and the version
of Triton that it was measured with.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sparse_ffn.backends.kept as kept
from sparse_ffn.backends.triton.tile import Tile
from sparse_ffn.backends.versions import version_of

FORMAT = 2
ROWS = (16, 32, 64, 128)
WIDTHS = (64, 128, 256, 1024)
"""A class of problems is named by its largest size; the last one has all that is larger, too."""
Key = tuple[str, str, int, int, int]
"""Kernel, arithmetic, rows of the tile ("outer": class of the product's rows), class of its columns, of its depth."""


def size_class(size: float, classes: tuple[int, ...]) -> int:
    """The class that a size belongs to."""
    return next((c for c in classes if size <= c), classes[-1])


@dataclass
class Tuned:
    """What was measured; classes that were not have no entry.

    Attributes:
        heights: rows of a tile by arithmetic and class of an expert's mean rows.
        tiles: by ``Key``; the depth is what a product sums over ("outer": an expert's mean rows).
        decided: classes of tiles of which everything was tried, the built-in tile being the best of it or not.
    """

    heights: dict[tuple[str, int], int] = field(default_factory=dict)
    tiles: dict[Key, Tile] = field(default_factory=dict)
    decided: set[Key] = field(default_factory=set, compare=False)

    def height(self, kind: str, mean_rows: float) -> int | None:
        """Rows of a tile for experts of so many rows."""
        return self.heights.get((kind, size_class(mean_rows, ROWS)))

    def tile(self, kernel: str, kind: str, m: int, n: int, depth: float) -> Tile | None:
        """The tile of m rows for n columns and sums of ``depth``; "outer": for a product of m rows and n columns."""
        rows = size_class(m, WIDTHS) if kernel == "outer" else m
        return self.tiles.get((kernel, kind, rows, size_class(n, WIDTHS), size_class(depth, WIDTHS)))

    def to_data(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {
            "heights": [[*key, height] for key, height in self.heights.items()],
            "tiles": [[*key, str(tile)] for key, tile in self.tiles.items()],
            "decided": sorted(map(list, self.decided)),
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], allowed: Iterable[tuple[str, str, Tile]]) -> Tuned:
        """From what ``to_data`` gave.

        Args:
            data: of the file.
            allowed: kernel, arithmetic and tile of everything that may be launched.

        Raises:
            ValueError: it is something else, or names a tile that is not allowed.
        """
        known = set(allowed)
        try:
            heights = {(str(kind), int(rows)): int(height) for kind, rows, height in data["heights"]}
            tiles = {
                (str(kernel), str(kind), int(m), int(n), int(depth)): Tile.parse(text)
                for kernel, kind, m, n, depth, text in data["tiles"]
            }
            decided = {
                (str(kernel), str(kind), int(m), int(n), int(depth))
                for kernel, kind, m, n, depth in data.get("decided", ())
            }
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a table of tiles ({type(error).__name__}: {error})") from error
        tall = {(kind, tile.m) for kernel, kind, tile in known if kernel == "one"}
        bad = [
            f"{kernel} {kind} {tile}"
            for (kernel, kind, m, *_), tile in tiles.items()
            if (kernel, kind, tile) not in known or (kernel != "outer" and tile.m != m)
        ]
        bad += [f"{kind} of {height} rows" for (kind, _), height in heights.items() if (kind, height) not in tall]
        if bad:
            raise ValueError(f"not among the tiles that this version may launch: {', '.join(bad)}")
        return cls(heights, tiles, decided)


@dataclass(frozen=True)
class Card:
    """A GPU as the file's key: its name and its capability (on ROCm its architecture)."""

    name: str
    capability: str

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """Of a device that is there."""
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return cls(properties.name, str(properties.gcnArchName).partition(":")[0])
        return cls(properties.name, f"sm_{properties.major}{properties.minor}")

    @property
    def path(self) -> Path:
        """Its file."""
        return kept.file_of(self.name, self.capability)


@functools.cache
def versions() -> dict[str, str]:
    """What the measurements depend on beyond the card: Triton, and the source of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return {"triton": version_of("triton") or "none", "kernels": digest.hexdigest()[:16]}


def save(found: Tuned, card: Card, **facts: str) -> Path:
    """Write a card's file; what else is to be known of the run goes beside the numbers."""
    kept.write(card.path, _key(card), {"facts": facts, **found.to_data()}, indent=1)
    return card.path


def load(card: Card, allowed: Iterable[tuple[str, str, Tile]]) -> Tuned | None:
    """What was measured on this card; None if nothing was, or, with a warning, if the file is of no use."""
    return kept.read(card.path, _key(card), "block sizes", partial(Tuned.from_data, allowed=allowed))


def _key(card: Card) -> kept.Key:
    return {"format": FORMAT, "card": card.name, "capability": card.capability, "versions": versions()}
