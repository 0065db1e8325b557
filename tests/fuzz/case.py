"""A drawn call, computed by every backend and held against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flat
import torch
from strange import SMOOTH
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import ops
from sparse_ffn.backends import cpu
from sparse_ffn.ops.topk_ffn.cpu import gathers, gathers_back

from .numbers import LOW
from .sums import Bound, Exact, Overflow

Results = dict[str, Tensor]
MANY = 1 << 20
"""Numbers of a gathered table that are too many for a test."""


def outcomes(y: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"output": y} if isinstance(y, Tensor) else dict(zip(("output", "gate", "sums"), y, strict=True))


@dataclass
class Case:
    """Tensors, and what to compute: ``op`` with ``options``, and the same in float64 as ``sums``.

    A ``kind`` of numbers is in one of the tensors, or in the gradients that come back.
    """

    op: Callable[..., Any]
    sums: Callable[..., Any]
    tensors: dict[str, Tensor]
    upstream: list[Tensor]
    dtype: torch.dtype
    kind: str
    trained: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    """What the sums take beside the tensors: for selections what was selected."""
    gathered: int = 0
    """How many numbers a gathered table has."""
    backends: tuple[str, ...] = ("reference", "torch", "cpu")
    wide: tuple[str, ...] = ()
    """Outcomes in fp32, whatever the dtype."""

    def check(self) -> None:
        expected, bounds, lost = self.expected()
        for backend in on(self.dtype, self.backends):
            with sf.backend(backend):
                actual = self.run()
            for name, found in actual.items():
                dtype = self.tensors[name].dtype if name in self.tensors else self.dtype
                assert found.dtype == (torch.float32 if name in self.wide else dtype), name
                assert found.shape == expected[name].shape, name
                allowed = self.tolerance(backend) * bounds[name]
                leaks = self.leaks(backend, name in self.trained)
                any_sign = name in self.trained
                wrong = self.wrong(found.double(), expected[name].double(), allowed, lost[name], leaks, any_sign)
                assert not wrong.any(), self.report(backend, name, found, expected[name], allowed, wrong)

    def run(self) -> Results:
        """Outcomes and gradients of the chosen backend."""
        if not self.trained:
            with torch.no_grad():
                return outcomes(self.op(**self.tensors, **self.options))
        found = outcomes(self.op(**self.tensors, **self.options))
        return found | self.gradients(found, self.tensors, self.upstream)

    def gradients(self, found: Results, tensors: Results, upstream: list[Tensor]) -> Results:
        differentiable = [y for y in found.values() if y.requires_grad]
        if not differentiable:  # no slot, so no sum
            return {n: torch.zeros_like(tensors[n]) for n in self.trained}
        arriving = [u.to(y.dtype) for u, y in zip(upstream, found.values(), strict=True) if y.requires_grad]
        wanted = [tensors[n] for n in self.trained]
        grads = torch.autograd.grad(differentiable, wanted, arriving, materialize_grads=True)
        return dict(zip(self.trained, (g.to_dense() for g in grads), strict=True))

    # -------------------------------------------------------------------------------------------------- in float64

    def expected(self) -> tuple[Results, Results, Results]:
        """What is right, the magnitudes that errors are relative to, and where an overflow may have been."""
        info = torch.finfo(self.dtype)
        sparse = self.kind in ("nan", "infinity")
        expected = self.follow(Exact(sparse), lambda t: t)
        # below the normal numbers: zero, where torch or the core multiply with AVX-512-BF16; elsewhere each of a sum's
        # terms errs by half the least number, while ``tolerance`` grants it an eighth of what is added here
        slack = info.tiny / info.eps if self.dtype == torch.bfloat16 else 4 * info.tiny
        limit = info.max / 4 if self.dtype != torch.float64 else torch.inf
        bound = Bound(slack, limit, sparse=self.gathered <= MANY)
        bounds = self.follow(bound, lambda t: t.abs().nan_to_num(nan=0, posinf=0, neginf=0) + slack)
        bounds = {n: t + slack for n, t in bounds.items()}
        return expected, bounds, self.lost(limit)

    def lost(self, limit: float) -> Results:
        """Where something on the way may be too large; factors below 1 may come later than it."""
        bound = Bound(0.0, limit, sparse=self.gathered <= MANY, at_least=1.0)
        largest = self.follow(bound, lambda t: t.abs().nan_to_num(nan=0, posinf=0, neginf=0), at_least=1.0)
        lost = {n: t > limit for n, t in largest.items()}
        if bound.overflows() and not bound.sparse:
            return {n: torch.ones_like(t) for n, t in lost.items()}
        if bound.overflows():
            depends = self.follow(Overflow(bound), lambda t: t)
            return {n: t | depends[n].isnan() for n, t in lost.items()}
        return lost

    def follow(self, kept: Exact, change: Callable[[Tensor], Tensor], at_least: float = -torch.inf) -> Results:
        linear = self.op in (ops.weighted_bag, ops.cvmm)  # any factor may come last
        weights = ("weight",) if self.op is ops.weighted_bag else ("gate", "reduction", "dropout_mask")
        wide = {}
        for name, t in self.tensors.items():
            if t.is_floating_point():
                t = change(t.detach().double())
                t = t.clamp_min(at_least) if linear or name in weights else t
                t.requires_grad_(name in self.trained)
            wide[name] = t
        taken = {n: kept(t) if n in weights else t for n, t in wide.items()}
        y = self.sums(kept, **taken, **self.known)
        found = outcomes(y)
        if self.trained:
            upstream = [change(u.double()) for u in self.upstream]
            found |= self.gradients(found, wide, [u.clamp_min(at_least) for u in upstream] if linear else upstream)
        return {n: t.detach() for n, t in found.items()}

    # -------------------------------------------------------------------------------------------------- the judgement

    def tolerance(self, backend: str) -> float:
        """Of the sum of all magnitudes, what roundings may make of it.

        Sums are in fp32 at least: of 16 bits a few roundings are left, but torch rounds each of its sums and products,
        and its embedding bag each partial sum. In the other dtypes a row's terms or all slots are added one by one;
        where they are equal, as in an expanded tensor, all these roundings lean to one side.
        """
        if self.dtype in LOW:
            roundings = 5.0 if backend == "cpu" else 50.0
        else:
            slots = max((t.numel() for t in self.tensors.values() if not t.is_floating_point()), default=0)
            roundings = 40 + (slots + max(n for t in self.tensors.values() for n in t.shape)) / 8
        return roundings * torch.finfo(self.dtype).eps

    def leaks(self, backend: str, gradient: bool) -> bool:
        """Whether zeros may be multiplied by what is not finite, or a smooth activation at infinity be torch's own."""
        dense = self.op in (ops.weighted_bag, flat.topk_ffn)
        smooth = self.options.get("activation") in SMOOTH
        if backend == "cpu":  # where a smooth activation is flat an infinite gradient arrives
            return (smooth and gradient) or (self.op is flat.topk_ffn and not self.gathers(gradient))
        return backend == "reference" or dense or smooth

    def gathers(self, gradient: bool) -> bool:
        """Whether the CPU core reads the selected units' rows and no others: a dense product multiplies by zero."""
        (tokens, _), (n_units, width) = self.tensors["x"].shape, self.tensors["values"].shape
        sizes = (tokens, n_units, self.options["k"], width, self.dtype)
        return gathers(*sizes) and (not gradient or gathers_back(*sizes))

    def wrong(
        self, actual: Tensor, expected: Tensor, allowed: Tensor, lost: Tensor, leaks: bool, any_sign: bool
    ) -> Tensor:
        """Where a result is neither right to rounding nor what an overflow makes of it.

        A NaN stays one. Of infinities an order of sums may make infinity or NaN: inf·a + inf·b, or inf·(a + b). With
        ``any_sign`` the sign of infinity is that of a sum which may be no more than its rounding. What an overflow
        leaves is not finite either, unless an activation made 0 of it.
        """
        right = (actual - expected).abs() <= allowed
        right |= expected.isnan() & (actual.isnan() | ((self.kind == "infinity") & actual.isinf()))
        right |= expected.isinf() & ((actual == expected) | actual.isnan() | (any_sign & actual.isinf()))
        right |= lost & ~actual.isfinite() if "activation" not in self.options else lost
        if leaks and (self.kind in ("nan", "infinity") or lost.any()):
            right |= actual.isnan()
        return ~right

    def report(self, backend: str, name: str, *tensors: Tensor) -> str:
        *_, wrong = tensors
        at = tuple(wrong.nonzero()[0].tolist())
        found, wanted, allowed = (t[at].item() for t in tensors[:3])
        return (
            f"{backend}, {name}{list(at)} ({int(wrong.sum())} of {wrong.numel()}): {found:.9g}, expected {wanted:.9g} "
            f"with an error of at most {allowed:.2g}"
        )


def on(dtype: torch.dtype, backends: tuple[str, ...] = ("reference", "torch", "cpu")) -> tuple[str, ...]:
    """Of some backends those that compute here."""
    core = dtype != torch.float64 and not cpu.PROBLEM
    return tuple(name for name in backends if core or name != "cpu")
