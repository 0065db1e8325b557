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
ABI_VERSION = 1

_p, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Cvmm(ctypes.Structure):
    """``sparse_ffn_cuda_cvmm`` of csrc/include/sparse_ffn_cuda.h."""

    _fields_ = (
        *((name, _i64) for name in ("rows_x", "rows_out", "S", "E", "M", "L")),
        *((name, _i32) for name in ("dtype", "tf32", "device", "reserved")),
        ("stream", _p),
        ("workspace", _p),
        ("workspace_bytes", _i64),
        ("x", _p),
        ("x_stride", _i64),
        ("w", _p),
        *((name, _i64) for name in ("w_stride_e", "w_stride_m", "w_stride_l")),
        *((name, _p) for name in ("offsets", "gather", "scatter", "scale")),
        *((name, _p) for name in ("out_members", "out_offsets", "x_members", "x_offsets")),
    )


class Bag(ctypes.Structure):
    """``sparse_ffn_cuda_bag``."""

    _fields_ = (
        *((name, _i64) for name in ("T", "J", "N", "O", "rows")),
        *((name, _i32) for name in ("dtype", "device")),
        ("stream", _p),
        ("workspace", _p),
        ("workspace_bytes", _i64),
        *((name, _p) for name in ("values", "index", "weight", "members", "offsets")),
    )


_POINTER = ctypes.POINTER
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "device_count": (_POINTER(_i32),),
    "status_text": (_i32,),
    "cvmm_forward_workspace": (_POINTER(Cvmm),),
    "cvmm_forward": (_POINTER(Cvmm), _p),
    "cvmm_backward_workspace": (_POINTER(Cvmm),),
    "cvmm_backward": (_POINTER(Cvmm), _p, _i64, _p, _p, _p),
    "bag_forward": (_POINTER(Bag), _p),
    "bag_backward_workspace": (_POINTER(Bag),),
    "bag_backward": (_POINTER(Bag), _p, _p, _p),
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
        functions = {name: getattr(loaded, f"sparse_ffn_cuda_{name}") for name in _SIGNATURES}
        emulated = bool(loaded.sparse_ffn_cuda_emulated())
    except (OSError, AttributeError) as error:
        return Library({}, f"{path} cannot be loaded: {error}")
    if version != ABI_VERSION:
        return Library({}, f"{path} has ABI version {version}, this package needs {ABI_VERSION}")
    for name, function in functions.items():
        function.argtypes = _SIGNATURES[name]
        function.restype = _i64 if name.endswith("_workspace") else _i32
    functions["status_text"].restype = ctypes.c_char_p
    return Library(functions, None, emulated)


def driver_problem() -> str | None:
    """Why the library sees no GPU, or None if it does."""
    count = _i32(0)
    status = library().functions["device_count"](ctypes.byref(count))
    return None if status == 0 and count.value > 0 else _text(status)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library.

    Raises:
        ValueError: the library refused an argument.
        RuntimeError: CUDA reported an error.
    """
    status = library().functions[name](*arguments)
    if status:
        raise (RuntimeError if status >= 1000 else ValueError)(f"sparse_ffn CUDA kernels, {name}: {_text(status)}")


def give_workspace(arguments: Any, name: str, like: Tensor) -> Tensor:
    """Allocate the workspace of a function and enter it into its argument block; keep what this returns alive."""
    size = library().functions[f"{name}_workspace"](arguments)
    workspace = like.new_empty(-(-size // 4), dtype=torch.float32)
    arguments.workspace, arguments.workspace_bytes = workspace.data_ptr(), size
    return workspace


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's data; null for None."""
    return None if x is None else x.data_ptr()


def device_number(x: Tensor) -> int:
    """The number of a tensor's device, as the library wants it."""
    return x.device.index or 0


def stream(x: Tensor) -> int | None:
    """The stream that is current on a tensor's device."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else None


def _text(status: int) -> str:
    text: bytes = library().functions["status_text"](status)
    return f"{text.decode()} ({status - 1000 if status >= 1000 else status})"
