"""The CPU core: loads the library built from csrc/, and calls its C functions with torch tensors."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends import libraries
from sparse_ffn.backends.libraries import DTYPES as DTYPES

HUGE_PAGE = 2 << 20
LIBRARY_NAME = "libsparse_ffn_cpu.so"
LIBRARY_VARIABLE = "SPARSE_FFN_LIBRARY"
ISA_VARIABLE = "SPARSE_FFN_ISA"
ABI_VERSION = 11
ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "identity": 4, "squared_relu": 5, "square": 6}
NORMS = {"layer": 1, "rms": 2}
GATES = {"sigmoid": 0, "softmax": 1, "softmax_topk": 2, "unweighted": 3}
OPTIONS = {
    "experts_forward": 2,
    "experts_backward": 1,
    "moe_forward": 3,
    "moe_backward": 2,
    "cvmm_forward": 0,
    "cvmm_backward": 0,
    "quantized_cvmm": 1,
    "quantized_moe": 2,
    "bag_forward": 1,
    "bag_backward": 0,
    "bag_backward_sparse": 0,
    "wide_product_forward": 1,
    "normalised_backward": 1,
    "product_key_topk": 0,
    "product_key_topk_backward": 0,
    "topk_hidden_forward": 2,
    "topk_hidden_backward": 1,
    "topk_index": 1,
}
"""The functions of the core, each with the number of its options between the tensors and the threads."""
_ERRORS = {1: ValueError, 2: IndexError, 3: MemoryError, 4: ValueError, 5: TypeError}

_FOREIGN = 9
_CODES = {dtype: _FOREIGN for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_CODES |= {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4, torch.int32: 5, torch.bool: 6}
_CODES |= {torch.int8: 7, torch.uint8: 8}


def _packer(dims: int) -> Callable[..., bytes]:
    """Makes a ``sparse_ffn_tensor`` out of a dtype's number, an address, sizes and strides."""
    shown = min(dims, 4)
    half = f"{shown}q{8 * (4 - shown)}x"
    pack = struct.Struct(f"@qqP{half}{half}").pack
    if dims == shown:
        return functools.partial(pack, dims)
    return lambda code, data, *numbers: pack(dims, code, data, *numbers[:4], *numbers[dims : dims + 4])


_PACK = [_packer(dims) for dims in range(65)]  # torch has no more
_CPU = torch.device("cpu")
_ABSENT = bytes(len(_PACK[0](0, 0)))


def call(name: str, tensors: tuple[Tensor | None, ...], *options: int) -> None:
    """Call a function of the core, which checks all that the kernels rely on.

    Args:
        name: as in csrc/include/sparse_ffn.h.
        tensors: its block of tensors, in the order that they have there; None for one that is absent.
        options: numbers that stand between the tensors and the threads.

    Raises:
        ValueError, TypeError, IndexError, MemoryError: what the core refused, and why.
        RuntimeError: there is no core.
    """
    block = [
        _ABSENT
        if t is None
        else _PACK[t.ndim](_CODES[t.dtype] if t.is_cpu else _FOREIGN, t.data_ptr(), *t.shape, *t.stride())
        for t in tensors
    ]
    try:
        function = _functions[name]
    except KeyError:
        raise RuntimeError(
            f"the CPU core is missing ({PROBLEM}), and a program that torch.export made keeps its backend, here cpu: "
            "make one inside of sparse_ffn.backend('torch'), or install the core"
        ) from None
    status = function(b"".join(block), *options, torch.get_num_threads())
    if status:
        raise _ERRORS[status](_library.sparse_ffn_error().decode())


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU; a large one begins at a huge page and is mapped when it is first taken.

    Faults of small pages would cost as much as the arithmetic that fills a fresh weight gradient.
    """
    size = math.prod(shape) * dtype.itemsize
    address = _library.sparse_ffn_allocate(size) if size >= HUGE_PAGE else None
    if address is None:
        return torch.empty(*shape, dtype=dtype, device=_CPU)
    memory = (ctypes.c_char * size).from_address(address)
    # not at exit: tensors may outlive the interpreter
    weakref.finalize(memory, _library.sparse_ffn_free, address, size).atexit = False
    return torch.frombuffer(memory, dtype=dtype).resize_(shape)  # no view: those of an op cannot be changed in place


def instruction_set() -> str:
    """Name of the instruction set that the core uses here."""
    name: bytes = _library.sparse_ffn_isa()
    return name.decode()


def instruction_sets() -> list[str]:
    """Names of all that this processor has, the widest first; ``SPARSE_FFN_ISA`` chooses one."""
    names: bytes = _library.sparse_ffn_isas()
    return names.decode().split()


def _load() -> tuple[Any, dict[str, Callable[..., int]], str | None]:
    """The library, its functions that return a status, and None; or the reason why there is no library."""
    path = libraries.find(LIBRARY_NAME, LIBRARY_VARIABLE)
    if path is None:
        return None, {}, "it was not built when sparse-ffn was installed"
    functions: dict[str, Callable[..., int]] = {}
    try:
        library = ctypes.CDLL(str(path))
        version = library.sparse_ffn_abi_version()
        if version != ABI_VERSION:
            return None, {}, f"{path} has ABI version {version}, this package needs {ABI_VERSION}"
        for name, n_options in OPTIONS.items():
            functions[name] = getattr(library, f"sparse_ffn_{name}")
            functions[name].argtypes = (ctypes.c_void_p, *[ctypes.c_int32] * (n_options + 1))  # type: ignore[attr-defined]
        for text in (library.sparse_ffn_isa, library.sparse_ffn_isas, library.sparse_ffn_error):
            text.restype = ctypes.c_char_p
        address, n_bytes = ctypes.c_void_p, ctypes.c_int64
        library.sparse_ffn_allocate.restype, library.sparse_ffn_allocate.argtypes = address, (n_bytes,)
        library.sparse_ffn_free.restype, library.sparse_ffn_free.argtypes = None, (address, n_bytes)
    except (OSError, AttributeError) as error:
        return None, {}, f"{path} cannot be loaded: {error}"
    return library, functions, None


_library, _functions, PROBLEM = _load()
if PROBLEM is None and _library.sparse_ffn_isa() is None:
    raise RuntimeError(
        f"{ISA_VARIABLE} is {os.environ[ISA_VARIABLE]!r}; allowed on this processor are "
        f"{', '.join(map(repr, instruction_sets()))}"
    )
