"""What a GPU's peak rates allow: predictions from arithmetic and bytes, kernel by kernel. None of it is measured.

Each kernel takes as long as its operations at a fraction of the peak rate or its bytes at a fraction of the memory's,
whichever is longer, plus a launch. Rows that an expert's last tile lacks are computed, too: half a tile an expert. What
fits into the second-level cache is read once, however often it is gathered. Waves of tiles are not considered.

`python -m benchmarks.predict` prints what each decision of the design changes in a layer's step, router included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.measuring import report
from benchmarks.shapes import GPU_FINE, GPU_WIDE, MemoryShape, MoEShape
from sparse_ffn.backends.triton import columns, config


@dataclass(frozen=True)
class Kernel:
    """What a kernel computes and moves; or several launches of one, or of one kind, together."""

    name: str
    operations: float = 0
    data: float = 0  # bytes of memory
    near: float = 0  # bytes that are read from the second-level cache
    launches: int = 1
    slower: float = 1  # how many times as long as in bf16 the operations take


@dataclass(frozen=True)
class Card:
    """Rates of a card, and the fractions of them that good kernels reach."""

    name: str
    operations: float  # of bf16 products per second
    memory: float  # bytes per second
    cache: float  # bytes that a gathered matrix may have to be read from memory once only
    level_2: int  # bytes of the second-level cache
    processors: int
    fp32: float  # operations per second without tensor cores
    compute: float = 0.70
    stream: float = 0.90
    near: float = 0.55  # what reading from the second-level cache costs, of reading from memory
    launch: float = 4e-6

    def seconds(self, kernel: Kernel) -> float:
        """Of one kernel."""
        computing = kernel.slower * kernel.operations / (self.compute * self.operations)
        moving = (kernel.data + self.near * kernel.near) / (self.stream * self.memory)
        return max(computing, moving) + kernel.launches * self.launch


H100 = Card("H100", operations=790e12, memory=3.0e12, cache=30e6, level_2=50 << 20, processors=132, fp32=67e12)
TILE = 128  # rows
SIZE = 2  # bytes of a bf16
MIB = 2**20


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


@dataclass(frozen=True)
class Design:
    """What is decided of a step's kernels; the defaults are those of the library."""

    fused: bool = True  # the router is one kernel each way
    buffers: int = 3  # of the operands of the matrices' gradients
    pair: bool = True  # one kernel for the gradients of a GLU's two stacks, which reads x once
    by_cache: bool = True  # blocks of columns where the cache then holds their rows; else of 64 MiB
    merged: bool = True  # the sort's last kernel makes the plan, and the last sum adds up the gates' gradients


BEFORE = Design(fused=False, buffers=2, pair=False, by_cache=False, merged=False)
DESIGNS = (
    ("before", BEFORE),
    ("+ router in one kernel", replace(BEFORE, fused=True)),
    ("+ three buffers in dW", replace(BEFORE, fused=True, buffers=3)),
    ("+ one dW kernel for a GLU", replace(BEFORE, fused=True, buffers=3, pair=True)),
    ("+ columns by the cache", Design(merged=False)),
    ("+ plan and gates without launches", Design()),
)
"""Each with all that stands before it."""

Passes = tuple[list[Kernel], list[Kernel]]  # forward and backward


def kernels(
    shape: MoEShape,
    *,
    glu: bool,
    once: bool = True,
    near: bool = False,
    design: Design | None = None,
    card: Card = H100,
) -> Passes:
    """Of a training step of the experts, sort included, router not: those of sparse_ffn.backends.triton one by one.

    ``once``: each gathered matrix is read from memory once. ``near``: what is handed from down to combine stays in the
    cache. Without a design no columns come in blocks, and nothing small is counted.
    """
    T, D, E, G, k = shape.T, shape.D, shape.E, shape.G, shape.k
    S, n = T * k, 2 if glu else 1  # slots; matrices of keys
    product = 2 * (S + E * TILE / 2) * D * G
    gathered, out = SIZE * D * (T if once else S), SIZE * T * D
    wide, units, matrix = SIZE * S * D, SIZE * S * G, SIZE * E * G * D  # slots x d_model, slots x units, one stack
    chosen = design or Design()

    def summed(name: str, stacks: int) -> list[Kernel]:
        """The products of that many stacks, and the sums over a token's slots, in blocks of columns."""
        blocks, kept = (1, near) if design is None else _blocks(S, D, stacks * G, design, card)
        rows = blocks * stacks * units + stacks * matrix
        return [
            Kernel(name, stacks * product, rows if kept else rows + wide, launches=blocks),
            Kernel("combine", 0, out if kept else out + wide, wide if kept else 0, launches=blocks),
        ]

    sort = [Kernel("sort", launches=3 if chosen.merged else 4)]
    gates = [] if chosen.merged else [Kernel("gates", launches=2)]  # zeros, and a sum
    saved = 2 * units if glu else 0  # of ReLU the units themselves
    dkeys = Kernel("dkeys", n * product, n * units + gathered + n * matrix)
    if not chosen.pair:
        dkeys = replace(dkeys, data=n * (units + gathered + matrix), launches=n)
    return (
        [*sort, Kernel("up", n * product, gathered + n * matrix + saved + units), *summed("down", 1)],
        [
            *([] if design is None else [Kernel("plan"), *gates]),
            Kernel("gradient of the units", product, gathered + matrix + n * units + n * units + units),
            Kernel("dvalues", product, units + gathered + matrix),
            dkeys,
            *summed("dx", n),
        ],
    )


def _blocks(S: int, D: int, depth: int, design: Design, card: Card) -> tuple[int, bool]:
    """How many blocks of columns there are, and whether the cache holds one of them."""
    if design.by_cache:
        width = columns.fitting(card.level_2, SIZE, S, D, depth, columns.STEP)
        return -(-D // width), SIZE * S * width <= columns.SHARE * card.level_2
    width = max((64 << 20) // (SIZE * S * TILE), 1) * TILE
    return -(-D // width), False


def router(shape: MoEShape) -> Passes:
    """Of a router that is one kernel, its entropy loss included, and the sum of what it and the experts give to x."""
    T, D, E, k = shape.T, shape.D, shape.E, shape.k
    product, x, weight, scores, slots = 2 * T * D * E, SIZE * T * D, SIZE * E * D, 4 * T * E, 12 * T * k
    return (
        [Kernel("route", product, x + weight + scores + slots), Kernel("sum"), Kernel("loss")],
        [
            Kernel("loss"),
            Kernel("route", product, weight + scores + slots + 4 * T * k + scores / 2 + x),
            Kernel("weight", product, scores / 2 + x + weight),
            Kernel("add", 0, 3 * x),
        ],
    )


def called_router(shape: MoEShape, card: Card = H100) -> Passes:
    """Of a router that is called, as it runs on torch's ops: its products are fp32."""
    from benchmarks import launches  # asks Triton's interpreter

    product, slower = 2 * shape.T * shape.D * shape.E, card.operations / card.fp32
    forward, backward = (
        [Kernel(name, product if name == "mm" else 0, moved, slower=slower) for name, moved in found.routing.kernels]
        for found in launches.step(shape, fused=False)
    )
    return forward, backward


def experts(shape: MoEShape, *, glu: bool, cached: bool = False, card: Card = H100) -> Step:
    """A training step of the experts, sort included, router not; all columns at once.

    ``cached``: if each gathered matrix were read once, and the rows of the slots never left the cache between the two
    kernels that write and read them. An upper bound.
    """
    once = cached or card.cache > SIZE * shape.T * shape.D
    passes = kernels(shape, glu=glu, once=once, near=cached, card=card)
    return _step(passes, shape, glu, card)


def layer(shape: MoEShape, *, glu: bool, card: Card = H100) -> Step:
    """A training step of the library's layer, router and blocks of columns included; gathered rows are read once."""
    passes = kernels(shape, glu=glu, design=Design(), card=card)
    return _step(_both(router(shape), passes), shape, glu, card)


def _step(passes: Passes, shape: MoEShape, glu: bool, card: Card) -> Step:
    forward, backward = (sum(map(card.seconds, found)) for found in passes)
    return Step(forward, backward, (3 if glu else 2) * 2 * shape.T * shape.k * shape.D * shape.G)


def _both(one: Passes, other: Passes) -> Passes:
    return [*one[0], *other[0]], [*other[1], *one[1]]


def dense(shape: MoEShape, *, glu: bool, card: Card = H100) -> Step:
    """The dense network of equal compute, its activation fused."""
    T, D, F, n = shape.T, shape.D, shape.G * shape.k, 2 if glu else 1
    product, x, units, matrix = 2 * T * D * F, SIZE * T * D, SIZE * T * F, SIZE * D * F
    of_x = Kernel("dx", n * product, n * units + x + n * matrix)
    written = 3 * units if glu else units  # a GLU keeps what it multiplies, beside the units
    forward = [Kernel("up", n * product, x + n * matrix + written), Kernel("down", product, units + matrix + x)]
    backward = [
        Kernel("gradient of the units", product, x + matrix + 2 * n * units),
        Kernel("dvalues", product, units + x + matrix),
        *(of_x, replace(of_x, name="dkeys")),
    ]
    return _step((forward, backward), shape, glu, card)


def kept_bytes(shape: MoEShape, *, glu: bool) -> int:
    """For the backward pass, x included, indices and gates not."""
    return SIZE * shape.T * (shape.D + (2 if glu else 1) * shape.k * shape.G)


def bag(shape: MemoryShape, card: Card = H100) -> float:
    """Seconds of a memory's forward read: a row for every selected value, too many for the cache."""
    return card.seconds(Kernel("bag", 0, SIZE * shape.T * shape.D * (shape.H * shape.k + 1)))


def hidden_nanoseconds(buffers: int, card: Card = H100) -> float:
    """Of a matrices' gradient: how long a load may take until the products of the buffers before it are through."""
    tile = config.TABLES["sm_90"]["outer", "half"][-1]
    return (buffers - 1) * 2 * tile.m * tile.n * tile.k / (card.operations / card.processors) * 1e9


def table(shapes: Sequence[MoEShape], card: Card = H100) -> report.Table:
    """Forward and backward of a layer's step, and of its router alone, design by design."""
    header = ("T,D,E,G,k", "", "design", "launches", "GFLOP", "MiB", "µs", "of dense", "load of dW, ns")
    body, routers = [], {}
    for shape in shapes:
        routers[shape] = {False: called_router(shape, card), True: router(shape)}
        for name, passes in zip(("called", "in one kernel"), routers[shape].values(), strict=True):
            body.append([str(shape), "router", name, *_counts(passes, card), "", ""])
        for glu in (False, True):
            baseline = dense(shape, glu=glu, card=card)
            for name, design in DESIGNS:
                if "GLU" in name and not glu:
                    continue
                passes = _both(routers[shape][design.fused], kernels(shape, glu=glu, design=design, card=card))
                ratio = _step(passes, shape, glu, card).rate / baseline.rate
                slack = f"{hidden_nanoseconds(design.buffers, card):.0f}"
                body.append([str(shape), "GLU" if glu else "ReLU", name, *_counts(passes, card), f"{ratio:.2f}", slack])
    return header, body


def _counts(passes: Passes, card: Card) -> list[str]:
    def both(form: str, of: Sequence[float]) -> str:
        return " / ".join(format(number, form) for number in of)

    return [
        both("d", [sum(kernel.launches for kernel in found) for found in passes]),
        both(".0f", [sum(kernel.operations for kernel in found) / 1e9 for found in passes]),
        both(".0f", [sum(kernel.data for kernel in found) / MIB for found in passes]),
        both(".0f", [sum(map(card.seconds, found)) * 1e6 for found in passes]),
    ]


EXPLAINED = """\
Predicted for an {card} in bf16, not measured; forward / backward. Gathered rows reach memory once. MiB are of memory:
rows that a block of columns leaves in the cache are none. "Of dense" is the rate of both passes over that of the dense
network of equal compute. "Load of dW": the arithmetic of the buffers before it, which a load may take without delay.
"""


def main() -> int:
    """Run from the command line."""
    print(EXPLAINED.format(card=H100.name))
    print(report.markdown(table((GPU_WIDE, GPU_FINE))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
