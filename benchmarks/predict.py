"""What a GPU's peak rates allow: predictions from arithmetic and bytes, kernel by kernel. None of it is measured.

Each kernel takes as long as its operations at a fraction of the peak rate or its bytes at a fraction of the memory's,
whichever is longer, plus a launch. Rows that an expert's last tile lacks are computed, too: half a tile an expert. What
fits into the second-level cache is read once, however often it is gathered. Waves of tiles are not considered.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import MemoryShape, MoEShape


@dataclass(frozen=True)
class Card:
    """Rates of a card, and the fractions of them that good kernels reach."""

    name: str
    operations: float  # of bf16 products per second
    memory: float  # bytes per second
    cache: float  # bytes that a gathered matrix may have to be read from memory once only
    compute: float = 0.70
    stream: float = 0.90
    launch: float = 4e-6
    routing: float = 12e-6

    def seconds(self, operations: float, data: float) -> float:
        """Of one kernel."""
        return max(operations / (self.compute * self.operations), data / (self.stream * self.memory)) + self.launch


H100 = Card("H100", operations=790e12, memory=3.0e12, cache=30e6)
TILE = 128  # rows
SIZE = 2  # bytes of a bf16


@dataclass(frozen=True)
class Step:
    """Seconds of a forward and of a backward pass, and their useful operations."""

    forward: float
    backward: float
    operations: float  # of the forward pass; the backward pass has twice as many

    @property
    def rate(self) -> float:
        """Operations per second of both passes."""
        return 3 * self.operations / (self.forward + self.backward)

    @property
    def rates(self) -> tuple[float, float]:
        """Operations per second of the forward and of the backward pass."""
        return self.operations / self.forward, 2 * self.operations / self.backward


def experts(shape: MoEShape, *, glu: bool, cached: bool = False, card: Card = H100) -> Step:
    """A training step of the experts, sort included, router not: the kernels of sparse_ffn.backends.triton one by one.

    ``cached``: if each gathered matrix were read once, and the rows of the slots never left the cache between the two
    kernels that write and read them, where reading costs 0.55 of what memory does. An upper bound.
    """
    T, D, E, G, k = shape.T, shape.D, shape.E, shape.G, shape.k
    S, n = T * k, 2 if glu else 1  # slots; matrices of keys
    rows = S + E * TILE / 2
    product = 2 * rows * D * G
    once = cached or card.cache > SIZE * T * D
    gathered = SIZE * D * (T if once else S)
    wide, units, matrix = SIZE * S * D, SIZE * S * G, SIZE * E * G * D  # slots x d_model, slots x units, one stack
    written, read = (0.0, 0.55 * wide) if cached else (wide, wide)
    combine = card.seconds(0, read + SIZE * T * D)
    kept = 2 * units if glu else 0  # of ReLU the units themselves
    forward = (
        card.routing
        + card.seconds(n * product, gathered + n * matrix + kept + units)  # up
        + card.seconds(product, units + matrix + written)  # down
        + combine
    )
    backward = (
        card.seconds(product, gathered + matrix + n * units + n * units + units)  # gradient of the units
        + card.seconds(product, units + gathered + matrix)  # of the values
        + card.seconds(n * product, n * units + gathered + n * matrix)  # of the keys
        + card.seconds(n * product, n * units + n * matrix + written)  # of x, by slots
        + combine
    )
    return Step(forward, backward, (n + 1) * 2 * S * D * G)


def dense(shape: MoEShape, *, glu: bool, card: Card = H100) -> Step:
    """The dense network of equal compute, its activation fused."""
    T, D, F, n = shape.T, shape.D, shape.G * shape.k, 2 if glu else 1
    product, x, units, matrix = 2 * T * D * F, SIZE * T * D, SIZE * T * F, SIZE * D * F
    up = card.seconds(n * product, x + n * matrix + n * units)
    down = card.seconds(product, units + matrix + x)
    backward = (
        card.seconds(product, x + matrix + units)  # of the units
        + card.seconds(product, units + x + matrix)  # of the second matrix
        + 2 * card.seconds(n * product, n * units + x + n * matrix)  # of the first one, and of x
    )
    return Step(up + down, backward, (n + 1) * product)


def kept_bytes(shape: MoEShape, *, glu: bool) -> int:
    """For the backward pass, x included, indices and gates not."""
    return SIZE * shape.T * (shape.D + (2 if glu else 1) * shape.k * shape.G)


def bag(shape: MemoryShape, card: Card = H100) -> float:
    """Seconds of a memory's forward read: a row for every selected value, too many for the cache."""
    return card.seconds(0, SIZE * shape.T * shape.D * (shape.H * shape.k + 1))
