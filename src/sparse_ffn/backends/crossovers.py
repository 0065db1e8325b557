"""Up to how many tokens an expert FFN is decoded in inference, as ``python -m sparse_ffn.tune`` measured.

There are two ways: ``decode`` reads the rows of experts where they lie, ``sorted`` sorts the slots by expert and then
packs or tiles. Where they cross depends on the machine and the layer (EPS-MoE, 2410.12247). Without a measurement
constants count.
"""

from __future__ import annotations

import functools
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ffn.backends import cpu, kept
from sparse_ffn.backends.warning import SparseFFNWarning

FORMAT = 2
DECODE_TOKENS = 32
"""Of the CPU core, unmeasured: up to here reading the touched weights is the whole cost, and decoding packs nothing."""


class Layer(NamedTuple):
    """A class of layers: sizes are rounded up to powers of two."""

    dtype: str
    D: int
    E: int
    G: int
    K: int

    @classmethod
    def of(cls, dtype: torch.dtype, D: int, E: int, G: int, K: int) -> Layer:
        """The class of a layer of width D and E experts of G units, of which a token uses K."""
        return cls(str(dtype).removeprefix("torch."), *(1 << max(n - 1, 0).bit_length() for n in (D, E, G, K)))


Table = Mapping[Layer, int]
"""The most tokens that are decoded; 0: none are."""
_tables: dict[tuple[str, int], Table] = {}
"""Those that were read, of a device and its number of threads."""
_forced: int | None = None


@contextmanager
def using(most: int) -> Iterator[None]:
    """Decode so many tokens whatever was measured (tuning, tests)."""
    global _forced
    previous, _forced = _forced, most
    try:
        yield
    finally:
        _forced = previous


def decode_tokens(dtype: torch.dtype, keys: Tensor, k: int) -> int:
    """Of the CPU core, for keys [E, G, D]."""
    found = _find("cpu", dtype, keys, k)
    return DECODE_TOKENS if found is None else found


def decode_tokens_on_gpu(x: Tensor, keys: Tensor, k: int) -> int | None:
    """Of the Triton kernels, for keys [E, G, D]; None where nothing was measured."""
    if x.is_cpu and _forced is None:  # interpreted
        return None
    return _find(str(x.device), x.dtype, keys, k)


def _find(device: str, dtype: torch.dtype, keys: Tensor, k: int) -> int | None:
    if _forced is not None:
        return _forced
    table = table_of(device)
    if not table:
        return None
    E, G, D = keys.shape
    return table.get(Layer.of(dtype, D, E, G, k))


def table_of(device: str) -> Table:
    """What was measured on a device; empty if nothing was or, with a warning, if the file is of no use."""
    key = (device, torch.get_num_threads() if device == "cpu" else 1)  # each number of threads has a file
    if key not in _tables:
        _tables[key] = _read(torch.device(device))
    return _tables[key]


def _read(device: torch.device) -> Table:
    """What the device's file says."""
    return kept.read(path_of(device), _key(device), "crossovers", _parse) or {}


def path_of(device: torch.device) -> Path:
    """The device's file."""
    return kept.file_of("crossovers", *_key(device)["device"])


def save(found: Table, device: torch.device) -> Path:
    """Write a device's file, with what it said of other layers before."""
    path = path_of(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparseFFNWarning)
        every = {**_read(device), **found}
    kept.write(path, _key(device), {"crossovers": [[*layer, most] for layer, most in every.items()]})
    _tables.clear()
    return path


def _parse(data: dict[str, Any]) -> Table:
    """What a file says.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = {Layer(str(name), *map(int, sizes)): most for name, *sizes, most in data["crossovers"]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a table of numbers: {error}") from error
    for most in found.values():
        if not isinstance(most, int) or most < 0:
            raise ValueError(f"{most!r} is no number of tokens")
    return found


def _key(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on beyond the layer."""
    if device.type == "cpu":
        isa = "none" if cpu.PROBLEM else cpu.instruction_set()
        threads = str(torch.get_num_threads())
        return {"format": FORMAT, "device": [_processor(), isa, threads, "threads"], "kernels": cpu.ABI_VERSION}
    from sparse_ffn.backends.triton import tuned  # which only GPUs need

    card = tuned.Card.of(device)
    return {"format": FORMAT, "device": [card.name, card.capability], "kernels": tuned.versions()}


@functools.cache
def _processor() -> str:
    with_names = Path("/proc/cpuinfo")
    if with_names.is_file():
        found = re.search(r"^model name\s*: (.+)$", with_names.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
