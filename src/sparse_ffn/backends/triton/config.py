"""Block sizes: tables per architecture, kernel, arithmetic and size of the problem, looked up in Python.

Nothing is measured at run time. The numbers in the tables come from ``make gate``, which compiles every kernel: the
largest tiles that keep accumulators in registers and operands in shared memory on that architecture. What
``python -m sparse_ffn.tune`` measured on this card goes before them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_ffn.backends.triton import candidates, tuned
from sparse_ffn.backends.triton.tile import Table, table
from sparse_ffn.backends.triton.tile import Tile as Tile


@dataclass(frozen=True)
class Sort:
    """Block sizes of the routing: slots of a block, its parts, rows and columns of a scan, positions, tiles.

    A scan works in place, so its block needs a number for each thread: where several threads hold the same number, one
    may read what another has already written.
    ``experts`` is the most that the counting sort takes: a program holds a number of each in registers, and 16384
    spilled; between the kernels lie 4·E/block bytes a slot.
    """

    block: int = 256
    part: int = 16
    scan: int = 64
    columns: int = 16
    positions: int = 512
    tiles: int = 64
    experts: int = 4096


@dataclass(frozen=True)
class Bag:
    """Block sizes of the weighted bag: rows gathered at once, columns of a program, most slots of a segment."""

    rows: int = 8
    columns: int = 512
    cap: int = 256


SORT = Sort()
BAG = Bag()
DEEP, MOST = 512, 128 * 128

# Kernels by what they hold in registers: "one" accumulator (rows, plain up), "two" or as much as that (up of a GLU, any
# hidden gradient); "outer" is the gradient of the matrices, m and n their sides,
# "pair" that of a GLU's two stacks, with two accumulators. Their rows are found by a load, and the pipeliner gives that
# load a part of the stages: three buffers are left of 5 for wgmma, of 7 for the others (`make gate` looks).
# "half" is bf16 and fp16; "odd" is either of them or tf32 where a size, a stride or an address is no multiple of 16:
# loads are narrow there, and their addresses take the registers.
_SM80 = table("""
    one    half   16x64x64/4/4   16x128x64/4/4   32x64x64/4/3   32x128x64/4/3
    one    half   64x64x64/4/3   64x128x64/8/3   128x64x64/4/3  128x128x32/8/4
    two    half   16x64x64/4/4   32x64x64/4/3    64x64x32/4/4   128x64x32/8/4
    outer  half   64x64x64/4/7   64x128x32/4/7   128x64x32/4/7  128x128x32/8/7
    pair   half   64x64x32/4/7   128x64x32/8/7
    one    tf32   16x64x32/4/4   16x128x32/4/4   32x64x32/4/4   32x128x32/4/3
    one    tf32   64x64x32/4/3   64x128x32/4/3   128x64x32/4/3  128x128x16/8/4
    two    tf32   16x64x32/4/3   32x64x32/4/3    64x64x16/4/4   128x64x16/8/4
    outer  tf32   64x64x32/4/7   64x128x16/4/7   128x64x16/4/7  128x128x16/8/7
    pair   tf32   64x64x16/4/7   128x64x16/8/7
    one    odd    16x64x32/4/2   32x64x32/4/2    64x64x32/8/2
    two    odd    16x64x32/4/2   32x64x32/4/2    64x32x32/8/2
    outer  odd    64x64x32/4/2
    pair   odd    64x32x32/4/2
    one    fp32   16x64x16/4/2   32x64x16/8/2    64x64x16/8/3
    two    fp32   16x32x16/8/2   32x32x16/4/2    64x32x16/4/2
    outer  fp32   32x64x16/4/2   64x64x16/8/2
    pair   fp32   32x32x16/4/2   64x32x16/8/2
""")
# Its wgmma of tf32 wants both operands contiguous along the sum, which those of "outer" are not: copies that turn them
# round go number by number, all to the same banks. Tiles of fewer than 64 rows, or of two warps, are for mma.sync.
_SM90 = _SM80 | table("""
    one    half   16x64x64/4/4   16x128x64/4/4   32x64x64/4/4   32x128x64/4/4
    one    half   64x64x64/4/4   64x128x64/4/4   128x64x64/4/4  128x128x64/8/3  128x256x64/8/3
    two    half   16x64x64/4/4   32x64x64/4/4    64x64x64/4/4   128x64x64/8/3
    outer  half   64x64x64/4/5   64x128x64/4/5   128x64x64/4/5  128x128x64/8/5
    pair   half   64x64x64/4/5   128x128x64/8/5
    one    tf32   16x64x32/4/4   16x128x32/4/4   32x64x32/4/4   32x128x32/4/3
    one    tf32   64x64x32/8/3   64x128x32/8/3   128x64x32/4/3  128x128x16/8/4
    outer  tf32   32x64x32/4/7   64x64x32/2/7
    pair   tf32   32x64x32/4/7
    one    odd    16x64x32/4/2   32x64x32/8/2    64x64x32/8/2
    one    fp32   16x64x16/4/2   32x64x16/8/3
    two    fp32   16x32x16/8/2   32x32x16/4/2
""")
# Its compiler spills for more programs on a processor, whether or not they find room there: these take more threads.
_WIDER = {("one", "half", 64, 64), ("two", "half", 32, 64), ("pair", "half", 64, 64), ("one", "fp32", 16, 64)}
_SM100 = {
    key: tuple(replace(t, warps=8) if (*key, t.m, t.n) in _WIDER else t for t in tiles) for key, tiles in _SM90.items()
}
_GFX942 = {key: tuple(Tile(t.m, t.n, min(t.k, 32), t.warps, 2) for t in tiles) for key, tiles in _SM80.items()}
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB; sm_80's tiles also serve sm_86 and sm_120
TABLES: dict[str, Table] = {"sm_80": _SM80, "sm_90": _SM90, "sm_100": _SM100, "gfx942": _GFX942}

_fixed: Tile | None = None
_architecture: str | None = None
_measured: tuned.Tuned | None = None


@contextmanager
def fixed(tile: Tile | None = None, architecture: str | None = None) -> Iterator[None]:
    """Launch everything with one tile, or by one architecture's table (tests, ``make gate``, tuning)."""
    global _fixed, _architecture
    previous, (_fixed, _architecture) = (_fixed, _architecture), (tile, architecture)
    try:
        yield
    finally:
        _fixed, _architecture = previous


@contextmanager
def using(measured: tuned.Tuned) -> Iterator[None]:
    """Launch by a table of measurements instead of the one in the user's cache directory (tuning, its check, tests)."""
    global _measured
    previous, _measured = _measured, measured
    try:
        yield
    finally:
        _measured = previous


def launchable(name: str) -> Iterator[tuple[str, str, Tile]]:
    """Kernel, arithmetic and tile of all that may be launched on an architecture: its table, and the candidates."""
    yield from entries(TABLES[name])
    yield from entries(candidates.TABLES.get(name, {}))


def entries(tiles: Table) -> Iterator[tuple[str, str, Tile]]:
    """Kernel, arithmetic and tile of a table."""
    for (kernel, kind), choices in tiles.items():
        yield from ((kernel, kind, t) for t in choices)


def _tuned(device: torch.device) -> tuned.Tuned | None:
    """What was measured on a device, read from its file at the first launch there."""
    if _measured is not None:
        return _measured
    return None if device.type != "cuda" or _architecture is not None else _from_file(device)


@functools.cache
def _from_file(device: torch.device) -> tuned.Tuned | None:
    return tuned.load(tuned.Card.of(device), launchable(_of_device(device)))


def architecture(device: torch.device) -> str:
    """The table for a device: its own one, or that of the oldest architecture of its kind."""
    if _architecture is not None:
        return _architecture
    return "sm_80" if device.type != "cuda" else _of_device(device)


def shared_memory(device: torch.device) -> int:
    """Bytes that the programs on a processor share, as the table for the device counts on."""
    return SHARED[architecture(device)] << 10


def has_descriptors(device: torch.device) -> bool:
    """Whether products read their operands by tensor descriptors there."""
    return architecture(device) in ("sm_90", "sm_100")


@functools.cache
def _of_device(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def arithmetic(dtype: torch.dtype, precision: str, *operands: Tensor | None) -> str:
    """The column of the tables for products of rows [*, n] and matrices [E, m, n]: "half", "tf32", "odd" or "fp32"."""
    if dtype == torch.float32 and precision != "tf32":
        return "fp32"
    if any(_is_odd(x) for x in operands if x is not None):
        return "odd"
    return "tf32" if dtype == torch.float32 else "half"


def _is_odd(x: Tensor) -> bool:
    """Whether loads are narrow: a side or a stride is no multiple of 16, or the first number not at one of 16 bytes.

    Memory that torch allocates begins at such a multiple; of other memory that is not checked, and costs only time.
    """
    steps = (step for step in x.stride() if step != 1)
    return any(n % 16 for n in (*x.shape[1:], *steps)) or x.storage_offset() * x.element_size() % 16 != 0


def block_m(device: torch.device, kind: str, mean_rows: float) -> int:
    """Rows of a tile: one table of tiles serves all products of a call, so all take the same."""
    if _fixed is not None:
        return _fixed.m
    measured = _tuned(device)
    height = None if measured is None else measured.height(kind, mean_rows)
    if height is not None:
        return height
    heights = sorted({t.m for t in TABLES[architecture(device)]["one", kind]})
    return next((m for m in heights if mean_rows <= m), heights[-1])


def tile(
    device: torch.device,
    kernel: str,
    kind: str,
    n: int,
    depth: float,
    m: int | None = None,
    side: int | None = None,
    *,
    alone: bool = False,
) -> Tile:
    """The tile of a kernel for n columns.

    Args:
        device: where it runs.
        kernel: "one", "two", "outer" or "pair", see above the tables.
        kind: what ``arithmetic`` says.
        n: columns of the product.
        depth: what the product sums over ("outer" and "pair": an expert's mean rows).
        m: rows of the tile as ``block_m`` says (not for "outer" and "pair").
        side: rows of the product ("outer" and "pair").
        alone: whether nothing but the sum is in registers. Only then, and with a depth of at least ``DEEP``, a tile
            has more than ``MOST`` numbers: it leaves no room for a second program on a processor.
    """
    if _fixed is not None:
        return _fixed
    measured, rows = _tuned(device), m if side is None else side
    any_size = side is not None or (alone and depth >= DEEP)
    found = None if measured is None or rows is None else measured.tile(kernel, kind, rows, n, depth)
    if found is not None and (any_size or found.m * found.n <= MOST):
        return found
    choices = TABLES[architecture(device)][kernel, kind]
    if side is not None:
        m = max((t.m for t in choices if t.m < 2 * side), default=min(t.m for t in choices))
    choices = tuple(t for t in choices if t.m == m)
    if not any_size:
        choices = tuple(t for t in choices if t.m * t.n <= MOST)
    return next((t for t in choices if n <= t.n), choices[-1])


def n_processors(device: torch.device) -> int:
    """Multiprocessors of a device; 108 (an A100's) where there is none to ask."""
    return 108 if device.type != "cuda" or _architecture is not None else _processors(device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
