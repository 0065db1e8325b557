"""The CUDA kernels built from csrc/cuda: loads the library when first asked for, and calls its functions.

Loading it neither needs nor initialises a GPU. Built for tests, the library runs its kernels on the CPU (``emulated``).
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends import libraries
from sparse_ffn.backends.libraries import DTYPES as DTYPES

LIBRARY_NAME = "libsparse_ffn_cuda.so"
LIBRARY_VARIABLE = "SPARSE_FFN_CUDA_LIBRARY"
ABI_VERSION = 3

_p, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Product(ctypes.Structure):
    """``sparse_ffn_cuda_product`` of csrc/include/sparse_ffn_cuda.h."""

    _fields_ = (
        *((name, _i64) for name in ("S", "E", "K", "N")),
        *((name, _i32) for name in ("dtype", "tf32", "device", "reserved")),
        ("stream", _p),
        *(field for name in ("x", "y") for field in ((name, _p), (f"{name}_stride", _i64))),
        ("w", _p),
        *((name, _i64) for name in ("w_stride_e", "w_stride_k", "w_stride_n")),
        *((name, _p) for name in ("offsets", "x_rows", "y_rows", "scale")),
    )


class Bag(ctypes.Structure):
    """``sparse_ffn_cuda_bag``."""

    _fields_ = (
        *((name, _i64) for name in ("T", "J", "N", "O")),
        *((name, _i32) for name in ("dtype", "device")),
        *((name, _p) for name in ("stream", "bags", "values", "weight", "index", "members", "offsets")),
    )


_POINTER = ctypes.POINTER
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "device_count": (_POINTER(_i32),),
    **dict.fromkeys(("usable", "status_text"), (_i32,)),
    **dict.fromkeys(("product_rows", "product_matrices"), (_POINTER(Product),)),
    **dict.fromkeys(("bag_sums", "bag_weights", "bag_values"), (_POINTER(Bag),)),
}


@dataclass(frozen=True)
class Library:
    """A loaded library, or the reason why there is none."""

    functions: dict[str, Any]
    problem: str | None = None
    emulated: bool = False


@functools.cache
def library() -> Library:
    """The library, loaded at the first call."""
    path = libraries.find(LIBRARY_NAME, LIBRARY_VARIABLE)
    if path is None:
        return Library({}, "it was not built when sparse-ffn was installed (set SPARSE_FFN_CUDA=1 for that)")
    try:
        loaded = ctypes.CDLL(str(path))
        version = loaded.sparse_ffn_cuda_abi_version()
        if version != ABI_VERSION:
            return Library({}, f"{path} has ABI version {version}, this package needs {ABI_VERSION}")
        functions = {name: getattr(loaded, f"sparse_ffn_cuda_{name}") for name in _SIGNATURES}
        emulated = bool(loaded.sparse_ffn_cuda_emulated())
    except (OSError, AttributeError) as error:
        return Library({}, f"{path} cannot be loaded: {error}")
    for name, function in functions.items():
        function.argtypes = _SIGNATURES[name]
        function.restype = _i32
    functions["status_text"].restype = ctypes.c_char_p
    return Library(functions, None, emulated)


@functools.cache
def driver_problem() -> str | None:
    """Why the library sees no GPU, or None if it does."""
    count = _i32(0)
    status = library().functions["device_count"](ctypes.byref(count))
    return None if status == 0 and count.value > 0 else _text(status)


@functools.cache
def device_problem(device: torch.device) -> str | None:
    """Why the library's code does not run on a GPU, or None if it does.

    A library built for other cards, or with a newer CUDA than the driver knows, fails at its first launch only. This
    loads its code, so that what asks before a capture of a CUDA graph also makes it ready for that.
    """
    with torch.cuda.device(device):  # the library makes it the current one
        status = library().functions["usable"](torch.cuda.current_device())
    return None if status == 0 else f"its code does not run on {device}: {_text(status)}"


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library.

    Raises:
        ValueError: the library refused an argument.
        RuntimeError: CUDA reported an error.
    """
    status = library().functions[name](*arguments)
    if status:
        raise (RuntimeError if status >= 1000 else ValueError)(f"sparse_ffn CUDA kernels, {name}: {_text(status)}")


def multiply(
    name: str,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    offsets: Tensor,
    x_rows: Tensor | None,
    y_rows: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Call ``product_rows``, which writes y, or ``product_matrices``, which writes w.

    Shapes: x [*, K] and y [*, N] with unit stride inside their rows, w [E, K, N] with one unit stride, offsets int32
    [E + 1], x_rows and y_rows int64 [S], scale fp32 [S]; without x_rows or y_rows slot s has row s.
    """
    slots, (E, K, N) = len(y if y_rows is None else y_rows), w.shape
    _fit(
        x,
        x=(x, x.dtype, (slots if x_rows is None else len(x), K)),
        y=(y, x.dtype, (len(y), N)),
        w=(w, x.dtype, (E, K, N)),
        offsets=(offsets, torch.int32, (E + 1,)),
        x_rows=(x_rows, torch.int64, (slots,)),
        y_rows=(y_rows, torch.int64, (slots,)),
        scale=(scale, torch.float32, (slots,)),
    )
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    arguments = Product(
        *(slots, *w.shape, DTYPES[x.dtype], tf32, _index(x.device), 0, _stream(x)),
        *(x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), w.data_ptr(), *w.stride()),
        *(_pointer(t) for t in (offsets, x_rows, y_rows, scale)),
    )
    call(name, ctypes.byref(arguments))


def bag(
    name: str,
    bags: Tensor,
    values: Tensor,
    weight: Tensor | None,
    *,
    k: int = 1,
    index: Tensor | None = None,
    members: Tensor | None = None,
    offsets: Tensor | None = None,
) -> None:
    """Call ``bag_sums``, ``bag_weights`` or ``bag_values``, which writes bags, weight or values.

    Shapes, all contiguous: bags [T, O], values [N, O], weight fp32 [T, k], index int64 [T, k] (the last function reads
    members, int32 [T·k], and offsets, int32 [N + 1], instead).
    """
    (T, O), N = bags.shape, len(values)
    _fit(
        values,
        bags=(bags, values.dtype, (T, O)),
        values=(values, values.dtype, (N, O)),
        weight=(weight, torch.float32, (T, k)),
        index=(index, torch.int64, (T, k)),
        members=(members, torch.int32, (T * k,)),
        offsets=(offsets, torch.int32, (N + 1,)),
    )
    arguments = Bag(
        *(T, k, N, O, DTYPES[values.dtype], _index(values.device), _stream(values)),
        *(_pointer(t) for t in (bags, values, weight, index, members, offsets)),
    )
    call(name, ctypes.byref(arguments))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _fit(like: Tensor, **wanted: tuple[Tensor | None, torch.dtype, tuple[int, ...]]) -> None:
    """What the kernels rely on, which see pointers alone."""
    for name, (t, dtype, shape) in wanted.items():
        if t is not None and (t.device != like.device or t.dtype != dtype or t.shape != shape):
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {like.device}, got {t.dtype} {list(t.shape)} on {t.device}"
            )


def _index(device: torch.device) -> int:
    return device.index or 0


def _stream(x: Tensor) -> int | None:
    return torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else None


def _text(status: int) -> str:
    text: bytes = library().functions["status_text"](status)
    return f"{text.decode()} ({status - 1000 if status >= 1000 else status})"
