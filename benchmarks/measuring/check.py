"""Check first: a contender's output and gradients against its oracle, before anything is timed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.measuring.contender import Contender, backward

OUTPUT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
GRADIENT = {torch.float32: 3e-3, torch.bfloat16: 3e-2}
"""Relative errors allowed, in the Frobenius norm. One slot that went astray among 32,768 is 5.5e-3. The gradient's is
wider since ReLU has a kink: a unit within rounding of zero may honestly have slope 0 or 1."""
ROUNDED = 0.7
"""Allowed of the output where low precision selects other units than float64 does. Unrelated outputs would have 1.4."""


def errors(contender: Contender, x: Tensor, cotangent: Tensor) -> tuple[dict[str, float], list[str]]:
    """Relative error of the output and of each gradient, and the names of those that are too large.

    Where a copy is checked in place of the module (see ``Contender.checked``), the module's own output is compared too,
    as ``y as timed``, widely: it may select otherwise.
    """
    module = contender.module if contender.checked is None else contender.checked
    dtype = next(module.parameters()).dtype
    x, cotangent = x[: contender.tokens].detach(), cotangent[: contender.tokens]
    expected = contender.oracle.answer(x, cotangent, with_loss=contender.loss is not None)

    found = {} if contender.inference else _run(module, contender, x.to(dtype), cotangent.to(dtype))
    limits = {name: GRADIENT[dtype] for name in found} | {"y": OUTPUT[dtype]}
    module.eval()
    with torch.no_grad():
        found["y without gradients"] = module(x.to(dtype)).detach()
        limits["y without gradients"] = OUTPUT[dtype]
        if contender.checked is not None and dtype != next(contender.module.parameters()).dtype:
            found["y as timed"] = contender.module.eval()(x).detach()
            limits["y as timed"] = ROUNDED
    measured = {name: relative_error(value, expected[name.split(" ")[0]]) for name, value in found.items()}
    missing = [name for name in expected if name not in found and not contender.inference]
    return measured, [name for name, error in measured.items() if not error <= limits[name]] + missing


def _run(module: nn.Module, contender: Contender, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = module.train()(x)
    backward(y, cotangent, None if contender.loss is None else contender.loss(module))
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad, **contender.gradients(module)}
    found = {name: value.clone() for name, value in found.items()}
    module.zero_grad(set_to_none=True)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; the norm itself where that is 0."""
    if found.shape != expected.shape:
        return float("inf")
    difference = float((found.double() - expected).norm())
    scale = float(expected.norm())
    return difference / scale if scale else difference
