"""The native CPU core: loads the library built from csrc/, and calls its C functions with torch tensors."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_ffn import libraries
from sparse_ffn.libraries import DTYPES as DTYPES

HUGE_PAGE = 2 << 20
LIBRARY_NAME = "libsparse_ffn_cpu.so"
LIBRARY_VARIABLE = "SPARSE_FFN_LIBRARY"
ABI_VERSION = 4
ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "identity": 4, "squared_relu": 5}
NORMS = {"layer": 1, "rms": 2}
GATES = {"sigmoid": 0, "softmax": 1, "softmax_selected": 2, "one": 3}

_nothing = ctypes.c_char()
_p, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Experts(ctypes.Structure):
    """``sparse_ffn_experts`` of csrc/include/sparse_ffn.h."""

    _fields_ = (
        *((name, _i64) for name in ("T", "D", "O", "E", "G", "K")),
        *((name, _i32) for name in ("dtype", "activation", "n_threads", "reserved")),
        ("x", _p),
        ("x_stride", _i64),
        *((name, _p) for name in ("keys", "gate_keys", "values", "key_bias", "gate", "hidden_scale")),
        *((name, _p) for name in ("order", "offsets")),
    )


class Router(ctypes.Structure):
    """``sparse_ffn_router``."""

    _fields_ = (
        *((name, _p) for name in ("weight", "bias", "mask")),
        ("groups", _i64),
        *((name, _i32) for name in ("gate", "reserved")),
    )


class Cvmm(ctypes.Structure):
    """``sparse_ffn_cvmm``."""

    _fields_ = (
        *((name, _i64) for name in ("rows_x", "rows_out", "S", "E", "M", "L")),
        *((name, _i32) for name in ("dtype", "n_threads")),
        ("x", _p),
        ("x_stride", _i64),
        ("w", _p),
        *((name, _i64) for name in ("w_stride_e", "w_stride_m", "w_stride_l")),
        *((name, _p) for name in ("offsets", "gather", "scatter", "scale")),
    )


class Bag(ctypes.Structure):
    """``sparse_ffn_bag``."""

    _fields_ = (
        *((name, _i64) for name in ("T", "J", "N", "O")),
        *((name, _i32) for name in ("dtype", "n_threads")),
        *((name, _p) for name in ("values", "index", "weight")),
    )


class WideProduct(ctypes.Structure):
    """``sparse_ffn_wide_product``."""

    _fields_ = (
        *((name, _i64) for name in ("B", "M", "N", "K", "x_stride_b", "x_stride_m", "norm_width")),
        *((name, _i32) for name in ("dtype", "norm", "n_threads", "reserved")),
        *((name, _p) for name in ("x", "w")),
    )


class Normalised(ctypes.Structure):
    """``sparse_ffn_normalised``."""

    _fields_ = (
        *((name, _i64) for name in ("M", "pieces", "width", "stride_m", "stride_piece")),
        *((name, _i32) for name in ("dtype", "norm", "n_threads", "reserved")),
    )


class ProductKeys(ctypes.Structure):
    """``sparse_ffn_product_keys``."""

    _fields_ = (
        *((name, _i64) for name in ("T", "H", "n", "k", "stride_t", "stride_h", "stride_s")),
        *((name, _i32) for name in ("n_threads", "reserved")),
    )


_POINTER = ctypes.POINTER
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "find_pages": (_p, _i64),
    "route": (_p, _i64, _i64, _p, _p),
    "experts_forward": (_POINTER(Experts), _p, _p, _p),
    "experts_infer": (_POINTER(Experts), _p, _p),
    "experts_backward": (_POINTER(Experts), _p, _i64, *[_p] * 8),
    "moe_forward": (_POINTER(Experts), _POINTER(Router), *[_p] * 8),
    "moe_backward": (_POINTER(Experts), _POINTER(Router), _p, _i64, *[_p] * 11),
    "cvmm_forward": (_POINTER(Cvmm), _p),
    "cvmm_backward": (_POINTER(Cvmm), _p, _i64, _p, _p, _p),
    "bag_forward": (_POINTER(Bag), _p),
    "bag_backward": (_POINTER(Bag), _p, _p, _p),
    "bag_backward_sparse": (_POINTER(Bag), _p, _p, _p, _p, _POINTER(_i64)),
    "wide_product_forward": (_POINTER(WideProduct), _p, _p),
    "normalised_backward": (_POINTER(Normalised), _p, _p, _p, _p),
    "product_key_topk": (_POINTER(ProductKeys), _p, _p, _p),
    "product_key_topk_backward": (_POINTER(ProductKeys), _p, _p, _p),
    "topk": (_p, _i64, _i64, _i64, _i64, _i32, _p, _p),
    "topk_activation": (_p, _i64, _i64, _i64, _i32, _i32, _p, _i64, _i32, _p, _p),
}
_ERRORS = {
    1: (ValueError, "bad argument"),
    2: (IndexError, "an index lies outside its table"),
    3: (MemoryError, "out of memory"),
    4: (ValueError, "more than 2**31 - 1 slots in one call"),
}


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's data, not null for an empty one; null for None."""
    return None if x is None else x.data_ptr() or ctypes.addressof(_nothing)


def dense(x: Tensor | None) -> Tensor | None:
    """The tensor in row-major order, copied only if it is not."""
    return None if x is None else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """The matrix with unit stride inside its rows, copied only if it has not; rows themselves may be strided."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU; a large one begins at a huge page, so that the core finds its memory in few page faults.

    Faults of small pages would cost as much as the arithmetic that fills a fresh weight gradient.
    """
    size = math.prod(shape) * dtype.itemsize
    address = _library.sparse_ffn_allocate(size) if size >= HUGE_PAGE else None
    if address is None:
        return torch.empty(*shape, dtype=dtype, device="cpu")
    memory = (ctypes.c_char * size).from_address(address)
    # not at exit: tensors may outlive the interpreter
    weakref.finalize(memory, _library.sparse_ffn_free, address, size).atexit = False
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def empty_for_torch(*shape: int, dtype: torch.dtype) -> Tensor:
    """``empty`` for an output that torch's kernels write and not the core, which finds its outputs' memory itself."""
    out = empty(*shape, dtype=dtype)
    call("find_pages", out.data_ptr(), out.nbytes)
    return out


def call(name: str, *arguments: Any) -> None:
    """Call a function of the core.

    Raises:
        ValueError, IndexError, MemoryError: what the core refused.
    """
    status = _functions[name](*arguments)
    if status:
        error, words = _ERRORS[status]
        raise error(f"sparse_ffn native core, {name}: {words}")


def route(index: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Stable order of slots by expert: index int64 [S] -> order int32 [S], offsets int32 [E + 1]."""
    index = index.contiguous()
    order = empty(index.numel(), dtype=torch.int32)
    offsets = empty(n_experts + 1, dtype=torch.int32)
    call("route", index.data_ptr(), index.numel(), n_experts, order.data_ptr(), offsets.data_ptr())
    return order, offsets


def instruction_set() -> str:
    """Name of the instruction set that the core uses here."""
    name: bytes = _library.sparse_ffn_isa()
    return name.decode()


def _load() -> tuple[Any, str | None]:
    """The library and None, or None and the reason why there is none."""
    path = libraries.find(LIBRARY_NAME, LIBRARY_VARIABLE)
    if path is None:
        return None, "it was not built when sparse-ffn was installed"
    try:
        library = ctypes.CDLL(str(path))
        version = library.sparse_ffn_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return None, f"{path} has ABI version {version}, this package needs {ABI_VERSION}"
    library.sparse_ffn_isa.restype = ctypes.c_char_p
    library.sparse_ffn_allocate.restype, library.sparse_ffn_allocate.argtypes = _p, (_i64,)
    library.sparse_ffn_free.restype, library.sparse_ffn_free.argtypes = None, (_p, _i64)
    return library, None


_library, PROBLEM = _load()
_functions: dict[str, Callable[..., int]] = {}
if PROBLEM is None:
    for _name, _argtypes in _SIGNATURES.items():
        _functions[_name] = getattr(_library, f"sparse_ffn_{_name}")
        _functions[_name].argtypes = _argtypes  # type: ignore[attr-defined]
