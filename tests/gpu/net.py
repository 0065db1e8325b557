"""The net that every kernel must pass: results against float64, with traps around all memory that it touches.

Inputs lie inside larger buffers of NaN (or of huge indices), so that a read outside shows in the result. Whatever the
host code allocates lies inside larger buffers too: filled with NaN, since reading what nothing wrote must show, and
between canaries, since writing there must show. (A checker that knows of each allocation wants no margins: see
SPARSE_FFN_TEST_MARGIN.) With ``guard_pages`` all of them lie beside memory without access
instead: that also shows what is read and not used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import flat
import pages
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_ffn as sf
from sparse_ffn import ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MARGIN = int(os.environ.get("SPARSE_FFN_TEST_MARGIN", 4096))  # elements on either side
CANARY = {torch.float32: -12345.5, torch.float16: -12344.0, torch.bfloat16: -12352.0}
CANARY |= {torch.int32: -7777777, torch.int64: -7777777}
# for sweeps: 16 bits go the ways of fp32, so that they may come after it
fp32_first = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16", marks=pytest.mark.exhaustive),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.exhaustive),
    ],
)
_fence: pages.Side | None = None


@contextmanager
def guard_pages(side: pages.Side) -> Iterator[None]:
    """Put all tensors at fences instead of between margins; a process that crosses one dies."""
    global _fence
    _fence = side
    try:
        yield
    finally:
        _fence = None


def _poison(x: Tensor) -> Tensor:
    """Fill: NaN, an index that points into the margin, or a large code."""
    return x.fill_(float("nan") if x.is_floating_point() else 99 if x.element_size() == 1 else -2000)


def guarded(x: Tensor) -> Tensor:
    """The same numbers and strides between margins of NaN."""
    if 0 in x.stride():
        return x  # expanded: its rows overlap
    size = 1 + sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    if _fence is not None:
        view = pages.fenced(size, x.dtype, _fence)
        view = view.as_strided(x.shape, x.stride(), view.storage_offset())
    else:
        parent = _poison(torch.zeros(size + 2 * MARGIN, dtype=x.dtype, device=x.device))
        view = parent.as_strided(x.shape, x.stride(), MARGIN)
    view.copy_(x)
    return view


@contextmanager
def traps() -> Iterator[None]:
    """Guard all that is allocated inside; AssertionError at the end if a canary died."""
    parents: list[tuple[Tensor, int]] = []
    empty, new_empty, empty_like, strided = torch.empty, Tensor.new_empty, torch.empty_like, torch.empty_strided

    def allocate(shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        shape = torch.Size(shape)
        if _fence is not None:
            return _poison(pages.fenced(shape.numel(), dtype, _fence)).view(shape)
        parent = empty(shape.numel() + 2 * MARGIN, dtype=dtype, device=device).fill_(CANARY[dtype])
        parents.append((parent, shape.numel()))
        return _poison(parent[MARGIN : MARGIN + shape.numel()]).view(shape)

    def trapped_new_empty(self: Tensor, *shape: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        dtype = dtype or self.dtype
        if rest or dtype not in CANARY:
            return new_empty(self, *shape, dtype=dtype, **rest)
        return allocate(shape[0] if not isinstance(shape[0], int) else shape, dtype, self.device)

    def trapped_empty_strided(shape: Any, stride: Any, **options: Any) -> Tensor:
        if options.keys() != {"dtype", "device"}:
            return strided(shape, stride, **options)
        flat = allocate((torch.Size(shape).numel(),), **options)  # strides without gaps
        return flat.as_strided(shape, stride, flat.storage_offset())

    torch.empty_strided = trapped_empty_strided
    torch.empty_like = lambda x, **k: trapped_new_empty(x, x.shape, **k)  # type: ignore[assignment]
    Tensor.new_empty = trapped_new_empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty_like, Tensor.new_empty = empty_like, new_empty  # type: ignore[assignment]
        torch.empty_strided = strided
    for parent, size in parents:
        canary = CANARY[parent.dtype]
        assert (parent[:MARGIN] == canary).all(), "written before the begin of a tensor"
        assert (parent[MARGIN + size :] == canary).all(), "written past the end of a tensor"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let products of fp32 round their factors to tf32, or not, as torch's own switch says."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass
class Case:
    """A call of an op: its tensors in float64, its dtype, its other options."""

    op: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    sum_gradient: bool = False  # the stride-0 gradient that y.sum() sends
    wide: tuple[str, ...] = ()  # tensors that stay in fp32, as weights under autocast


def results(case: Case, tensors: dict[str, Tensor], grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients, or the output of a call without any."""
    if grad is None:
        with torch.no_grad():
            return {"output": case.op(**tensors, **case.options)}
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if n in case.trained}
    y = case.op(**tensors | leaves, **case.options)
    grads = torch.autograd.grad(y, leaves.values(), grad.to(y.dtype))
    return {"output": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def gradient(case: Case, shape: torch.Size, device: str) -> Tensor | None:
    if not case.trained:
        return None
    if case.sum_gradient:
        return torch.ones((), dtype=case.dtype, device=device).expand(shape)
    return torch.linspace(-1, 1, shape.numel(), device=device).view(shape).to(case.dtype)


def magnitudes(case: Case, tensors: dict[str, Tensor], grad: Tensor | None) -> dict[str, Tensor]:
    """What every sum would be if nothing in it cancelled: the scale of each number's rounding errors."""
    options = dict(case.options)
    if options.get("activation") not in (None, "square", "squared_relu"):
        options["activation"] = "identity"
    tensors = {n: t.abs() if t.is_floating_point() else t for n, t in tensors.items()}
    return results(replace(case, options=options), tensors, None if grad is None else grad.abs())


def check(case: Case, device: str = "cpu", backend: str = "triton") -> dict[str, Tensor]:
    """Assert that a backend meets the reference in float64 on the same numbers; return its results."""
    narrow = {n: _cast(t, torch.float32 if n in case.wide else case.dtype, n, device) for n, t in case.tensors.items()}
    wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in narrow.items()}
    with sf.backend("reference"):
        grad = gradient(case, results(case, wide)["output"].shape, device)
        expected, scales = results(case, wide, grad), magnitudes(case, wide, grad)
    narrow = {n: guarded(t) for n, t in narrow.items()}
    with sf.backend(backend), traps():
        actual = results(case, narrow, None if grad is None else guarded(grad))
    compare(case.dtype, narrow, actual, expected, scales)
    return actual


def compare(
    dtype: torch.dtype,
    given: dict[str, Tensor],
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    scales: dict[str, Tensor],
) -> None:
    """Assert that an op's results for the tensors given are those of float64, in the right dtypes."""
    for name, want in expected.items():
        assert actual[name].shape == want.shape, f"{name}: {actual[name].shape}"
        assert actual[name].dtype == (dtype if name == "output" else given[name[1:]].dtype), name
        excess = (actual[name].double() - want).abs() / (TOLERANCE[dtype] * scales[name].abs() + 1e-30)
        worst = excess.max().item() if want.numel() else 0.0
        assert worst <= 1, f"{name}: {worst:.3g} times the error allowed"


def check_void(case: Case, device: str = "cpu", backend: str = "triton") -> None:
    """Assert that nothing reads a void slot's gate and dropout's multipliers, or weights that no slot asks for."""
    tensors = {n: t.float().to(device) if t.is_floating_point() else t.to(device) for n, t in case.tensors.items()}
    index, gate = (tensors[n] for n in (("expert", "reduction") if case.op is ops.cvmm else ("index", "gate")))
    weights = [tensors[n] for n in ("weight", "keys", "values", "gate_keys", "key_bias") if n in tensors]
    with sf.backend(backend):
        grad = gradient(case, results(case, tensors)["output"].shape, device)
        expected = results(case, tensors, grad)
        void = index == len(weights[0])
        for slots in (gate, *(tensors[n] for n in ("dropout_mask",) if n in tensors)):
            slots[void] = torch.nan
        for matrices in weights:
            matrices[[e for e in range(len(matrices)) if e not in index]] = torch.nan
        with traps():
            actual = results(case, tensors, grad)
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


class Gradients(TorchDispatchMode):
    """The sizes of what our backward ops give inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func.namespace == "sparse_ffn" and func.__name__.endswith("_backward.default"):
            self.sizes += [t.numel() for t in result]
        return result


def check_frozen(case: Case, device: str = "cpu", backend: str = "triton", *, exact: bool = True) -> None:
    """Assert that frozen matrices get no gradients, not even unseen, and all else its own; if exact, to the bit."""
    matrices = {ops.cvmm: ("weight",), ops.weighted_bag: ("values",)}
    frozen = matrices.get(case.op, ("keys", "values", "gate_keys", "key_bias"))
    others = replace(case, trained=tuple(n for n in case.trained if n not in frozen))
    with Gradients() as found:
        actual = check(others, device, backend)
    assert sum(found.sizes) == sum(case.tensors[n].numel() for n in others.trained)
    expected = check(case, device, backend) if exact else {}
    for name in actual.keys() & expected.keys():
        assert torch.equal(actual[name], expected[name]), name


def _cast(x: Tensor, dtype: torch.dtype, name: str, device: str) -> Tensor:
    if not x.is_floating_point():
        return moved(x, x.dtype, device)
    # gates keep a dtype of their own
    return moved(x, torch.float32 if name in ("gate", "reduction") else dtype, device)


def moved(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The same numbers and strides elsewhere: Tensor.to closes gaps between rows and fills in what is expanded."""
    once = x[tuple(slice(None if step else 1) for step in x.stride())]
    return torch.empty_strided(once.shape, x.stride(), dtype=dtype, device=device).copy_(once).expand(x.shape)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


VOID = ("half of the slots void", "all slots void", "one token, void slots")
ROUTINGS: dict[str, Callable[[], tuple[int, Tensor]]] = {  # experts, index
    "random": lambda: (5, torch.rand(23, 5).topk(3).indices),
    "one token": lambda: (5, torch.tensor([[4, 0]])),
    "no token": lambda: (5, torch.empty(0, 3, dtype=torch.int64)),
    "all on one expert": lambda: (5, torch.full((37, 1), 3)),
    "an expert named twice": lambda: (5, torch.tensor([[1, 1], [1, 2], [0, 0]] * 6)),
    "empty experts first": lambda: (5, torch.full((20, 2), 4) - torch.tensor([[0, 1]])),
    "ragged": lambda: (4, torch.repeat_interleave(torch.arange(4), torch.tensor([1, 17, 0, 46])).flip(0).unsqueeze(1)),
    "k = E": lambda: (5, torch.arange(5).repeat(7, 1)),
    "half of the slots void": lambda: (5, torch.where(torch.rand(23, 3) < 0.5, 5, torch.rand(23, 5).topk(3).indices)),
    "all slots void": lambda: (5, torch.full((19, 2), 5)),
    "one token, void slots": lambda: (5, torch.tensor([[5, 2, 5]])),
    "one expert": lambda: (1, torch.zeros(19, 1, dtype=torch.int64)),
}


def expert_case(
    routing: str = "random",
    dtype: torch.dtype = torch.float32,
    *,
    form: str = "plain",
    activation: str = "relu",
    sizes: tuple[int, int, int] = (24, 20, 33),
    train: bool = True,
) -> Case:
    """Expert FFN of D, G, O = sizes; form "everything" has GLU, bias and dropout, "biased" the latter two."""
    (E, index), (D, G, O) = ROUTINGS[routing](), sizes
    T, K = index.shape
    tensors = {"x": random(T, D), "keys": random(E, G, D), "values": random(E, G, O), "index": index}
    tensors["gate"] = torch.rand(T, K, dtype=torch.float64)
    if form == "everything":
        tensors["gate_keys"] = random(E, G, D)
    if form in ("everything", "biased"):
        tensors["key_bias"] = random(E, G)
        tensors["dropout_mask"] = (torch.rand(T, K, G) > 0.3).double() * 1.5
    trained = tuple(n for n in tensors if n not in ("index", "dropout_mask")) if train else ()
    return Case(flat.expert_ffn, tensors, dtype, {"activation": activation}, trained)


def cvmm_case(
    routing: str = "random",
    dtype: torch.dtype = torch.float32,
    *,
    form: str = "plain",
    sizes: tuple[int, int] = (24, 33),
    train: bool = True,
) -> Case:
    """CVMM of M, L = sizes; form names which of gather, scatter and reduction it has, and a transposed weight."""
    (E, index), (M, L) = ROUTINGS[routing](), sizes
    expert = index.flatten()
    S = expert.numel()
    n_rows = 4 if "gather" in form else S
    weight = random(E, L, M).mT if "transposed" in form else random(E, M, L)
    tensors = {"x": random(n_rows, M), "weight": weight, "expert": expert}
    options: dict[str, Any] = {}
    if "gather" in form:
        tensors["gather"] = torch.randint(0, n_rows, (S,))
    if "scatter" in form:
        tensors["scatter"], options["n_out"] = torch.randint(0, 6, (S,)), 7  # a row that no slot names is zero
    if "reduction" in form:
        tensors["reduction"] = torch.rand(S, dtype=torch.float64)
    trained = tuple(n for n in ("x", "weight", "reduction") if n in tensors) if train else ()
    return Case(ops.cvmm, tensors, dtype, options, trained)
