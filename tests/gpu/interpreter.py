"""Makes Triton's interpreter as strict as a GPU, and right in bf16: what it lacks, and what it lets pass.

Everything here patches Triton's interpreter and language in the process that imports it, before a kernel runs.

- bf16: the interpreter computes on the raw 16 bits. Here loads, stores, casts and tl.dot are right (casts round to
  nearest even) and any other arithmetic on bf16 is an error: kernels compute in fp32.
- A masked load without ``other`` gives NaN (or a huge integer) in the masked lanes, not 0.
- Programs run in a shuffled order, which ``seed`` picks, so that none can count on another's output.
- Integer arithmetic that overflows 32 bits is an error; so is a tl.dot of fewer than 16 along any axis.
- A launch looks through the language once for each module of the kernels, and not at each call of a function in them;
  integers are checked by numpy, and dtypes looked up in a table that is made once.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
FLOAT_ARITHMETIC = (
    *("fadd", "fmul", "fdiv", "frem", "fsub", "fneg", "fma", "fabs", "exp", "exp2", "log", "log2", "sqrt", "erf"),
    *("minimumf", "minnumf", "maximumf", "maxnumf", "clampf", "precise_divf", "approx_divf", "precise_sqrt", "rsqrt"),
    *("floor", "ceil", "sin", "cos"),
)
seed = 0


def install() -> None:
    """Patch all of it."""
    _bf16()
    _poison()
    _shuffle()
    _dots_of_sixteen()
    _look_once()
    _overflows()
    _one_table_of_dtypes()
    object.__setattr__(interpreter.interpreter_builder.options, "debug", True)  # turns the overflow checks on


def _is_bf16(x: Any) -> bool:
    return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16


def _widened(x: Any) -> Any:
    if not _is_bf16(x):
        return x
    return Handle((np.asarray(x.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(x: Any) -> Any:
    values = np.ascontiguousarray(x.data, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(values), np.uint16(0x7FC0), nearest_even), tl.bfloat16)


def _bf16() -> None:
    dot, cast = Builder.create_dot, Builder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if _is_bf16(source):
            return source if to.scalar == tl.bfloat16 else cast(self, _widened(source), to)
        if to.scalar == tl.bfloat16:
            return _narrowed(cast(self, source, tl.float32))
        return cast(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def refusing(name: str) -> Any:
        original = getattr(Builder, name)

        def checked(self: Any, *operands: Any, **options: Any) -> Any:
            assert not any(map(_is_bf16, operands)), f"{name} on bf16: kernels compute in fp32"
            return original(self, *operands, **options)

        return checked

    Builder.cast_impl, Builder.create_dot = cast_impl, create_dot
    Builder.get_bf16 = lambda self, value: _narrowed(Handle(np.array([value], np.float32), tl.float32))
    names = [f"create_{name}" for name in FLOAT_ARITHMETIC] + [n for n in dir(Builder) if n.startswith("create_fcmp")]
    for name in names:
        if hasattr(Builder, name):
            setattr(Builder, name, refusing(name))


def _poison() -> None:
    load = Builder.create_masked_load

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        if other is None:
            kind = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(kind)
            if kind == tl.bfloat16:
                poison = 0x7FC0
            else:
                poison = np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max // 3
            other = Handle(np.full(pointers.data.shape, poison, dtype=dtype), kind)
        return load(self, pointers, mask, other, *rest, **options)

    Builder.create_masked_load = create_masked_load


def _shuffle() -> None:
    set_dim, set_index = Builder.set_grid_dim, Builder.set_grid_idx
    state: dict[str, Any] = {}

    def set_grid_dim(self: Any, x: int, y: int, z: int) -> Any:
        order = list(range(x * y * z))
        random.Random(seed).shuffle(order)
        state.update(order=order, y=y, z=z)
        return set_dim(self, x, y, z)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> Any:
        at = state["order"][(x * state["y"] + y) * state["z"] + z]
        return set_index(self, at // (state["y"] * state["z"]), at // state["z"] % state["y"], at % state["z"])

    Builder.set_grid_dim, Builder.set_grid_idx = set_grid_dim, set_grid_idx


def _dots_of_sixteen() -> None:
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = lambda left, right: (16, 16, 16)


def _look_once() -> None:
    look, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[int] = set()

    def _patch_lang(fn: Any) -> Any:
        if id(fn.__globals__) in seen:
            return None  # a function called by the kernel, which asks for nothing
        seen.add(id(fn.__globals__))
        return look(fn)

    def __call__(self: Any, *args: Any, **options: Any) -> Any:
        seen.clear()  # what a launch has changed, it has put back
        return launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = _patch_lang, __call__


def _overflows() -> None:
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        """As the semantics' own, which makes a dozen tensors of the language for each sum of indices."""
        kind, name = lhs.type.scalar, operation.__name__
        if kind.int_bitwidth < 64:
            result = exact[name](lhs.handle.data, rhs.handle.data, dtype=np.int64)
            least, most = kind.get_int_min_value(), kind.get_int_max_value()
            assert result.min() >= least, f"{name} below {kind}"
            assert result.max() <= most, f"{name} above {kind}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _one_table_of_dtypes() -> None:
    of = functools.cache(interpreter._get_np_dtype)
    pointers = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda kind: pointers if kind.scalar.is_ptr() else of(kind.scalar)
