"""Runs the problems on a device: against torch's own products first, then by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.backends.choice import backend
from sparse_ffn.backends.triton import config
from sparse_ffn.backends.triton.tuned import Tuned
from sparse_ffn.tune.problems import DTYPES, Problem

ERROR = {"half": 2e-2, "tf32": 5e-3, "fp32": 1e-4}  # relative, in the Frobenius norm
LEAST, MOST, SECONDS = 5, 50, 0.05  # samples of one time, and about how long they may take


@contextmanager
def arithmetic(kind: str) -> Iterator[None]:
    """Torch's switch for fp32 products, as a kind of problem needs it."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class DeviceRunner:
    """A ``search.Runner``.

    Args:
        device: where to run.
        stopwatch: seconds of a call.
    """

    def __init__(self, device: torch.device, stopwatch: Callable[[Callable[[], object]], float]) -> None:
        self.device, self.stopwatch = device, stopwatch
        self.problem: Problem | None = None

    def check(self, problem: Problem, table: Tuned) -> str | None:
        """Compare output and gradients with the backend that is made of torch's products."""
        from triton.errors import TritonError

        self._prepare(problem)
        try:
            with arithmetic(problem.kind), config.using(table), backend("triton"):
                found = self._step()
        except (TritonError, RuntimeError) as failure:  # too much shared memory; MLIR's passes raise RuntimeError
            return f"does not run ({type(failure).__name__})"
        for name, (tensor, expected) in zip(self.names, zip(found, self.expected, strict=True), strict=True):
            error = float((tensor.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
            if not error <= ERROR[problem.kind]:
                return f"wrong: relative error {error:.1e} of {name}"
        return None

    def seconds(self, problem: Problem, table: Tuned) -> float:
        """Median over some steps, of a table that was checked: its kernels are compiled."""
        self._prepare(problem)
        begin, samples = time.perf_counter(), [0.0]
        with arithmetic(problem.kind), config.using(table), backend("triton"):
            while len(samples) <= LEAST or (len(samples) <= MOST and time.perf_counter() - begin < SECONDS):
                samples.append(self.stopwatch(self._step))
        return statistics.median(samples[1:])

    def _prepare(self, problem: Problem) -> None:
        """The problem's tensors, and what must come out."""
        if problem == self.problem:
            return
        self.problem, p = problem, problem
        random = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"device": self.device, "generator": random}

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, **options) * std).to(DTYPES[p.kind]).requires_grad_()

        x, keys, values = normal(p.T, p.D), normal(p.E, p.G, p.D, std=p.D**-0.5), normal(p.E, p.G, p.D, std=p.G**-0.5)
        index = torch.rand(p.T, p.E, **options).topk(p.K).indices
        gate = torch.rand(p.T, p.K, **options).requires_grad_()
        self.arguments: dict[str, Any] = {"x": x, "keys": keys, "values": values, "index": index, "gate": gate}
        if p.glu:
            self.arguments["gate_keys"] = normal(p.E, p.G, p.D, std=p.D**-0.5)
        self.trained = [t for name, t in self.arguments.items() if name != "index"]
        self.names = ["the output", *(f"{name}'s gradient" for name in self.arguments if name != "index")]
        self.grad = torch.randn(p.T, p.D, **options).to(DTYPES[p.kind])
        with arithmetic(p.kind), backend("torch"):
            self.expected = [t.detach().clone() for t in self._step()]

    def _step(self) -> list[Tensor]:
        """Output and gradients. SiLU has no kink: rounding cannot change a unit's slope."""
        experts = ops.Units(**{name: t for name, t in self.arguments.items() if name in ops.Units._fields})
        others = {name: t for name, t in self.arguments.items() if name not in ops.Units._fields}
        y = ops.expert_ffn(experts=experts, **others, activation="silu")
        return [y.detach(), *torch.autograd.grad(y, self.trained, self.grad)]
