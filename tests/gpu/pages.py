"""Memory between pages that nobody may touch: a read or a write outside kills the process at once."""

from __future__ import annotations

import ctypes
import mmap
from typing import Literal

import torch
from torch import Tensor

Side = Literal["before", "after"]
FENCE = 1 << 20  # bytes without access on either side, a whole number of pages
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def fenced(size: int, dtype: torch.dtype, side: Side) -> Tensor:
    """Uninitialised memory for ``size`` elements that begins or ends at a fence. It is never given back."""
    n_bytes = size * dtype.itemsize
    room = -(-max(n_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    start = _libc.mmap(None, room + 2 * FENCE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert start not in (None, ctypes.c_void_p(-1).value), ctypes.get_errno()
    assert _libc.mprotect(start + FENCE, room, mmap.PROT_READ | mmap.PROT_WRITE) == 0, ctypes.get_errno()
    memory = torch.frombuffer((ctypes.c_byte * room).from_address(start + FENCE), dtype=dtype)
    return memory[:size] if side == "before" else memory[memory.numel() - size :]
