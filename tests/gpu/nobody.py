"""Slots of nobody: whatever stands in an index outside [0, E) is as void as E, to the last bit, and reads nothing.

Nothing checks indices on a GPU, and on the CPU the ops refuse all but E: the backends' own functions are called here.
"""

from __future__ import annotations

import torch
from net import Case, gradient, guarded, traps
from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.cvmm.op import implementation as cvmm
from sparse_ffn.ops.expert_ffn.op import implementation as expert_ffn
from sparse_ffn.ops.units import Units


def check_nobody(case: Case, device: str = "cpu", backend: str = "triton") -> None:
    """Assert it for the void slots of a case, forward, backward and, where there is one, in inference."""
    tensors = {n: t.to(case.dtype if t.is_floating_point() else t.dtype).to(device) for n, t in case.tensors.items()}
    name, n_experts = ("expert", len(tensors["weight"])) if case.op is ops.cvmm else ("index", len(tensors["keys"]))
    void = tensors[name] == n_experts
    numbers = (-1, n_experts + 1, -(1 << 32), (1 << 32) + 1, 1 << 62)  # some are experts in their lower 32 bits
    wrong = torch.tensor(numbers, device=device)[torch.arange(void.numel(), device=device) % 5].view(void.shape)
    expected = _results(case, tensors, backend)
    actual = _results(case, tensors | {name: torch.where(void, wrong, tensors[name])}, backend)
    assert void.any()
    for which, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert (got is None) == (wanted is None)
        assert got is None or torch.equal(got, wanted), f"result {which}"  # a NaN that nothing wrote equals nothing
    *_, dfactor = actual
    assert dfactor is None or (dfactor[void] == 0).all()


def _results(case: Case, tensors: dict[str, Tensor], backend: str) -> list[Tensor | None]:
    given = {n: guarded(t) for n, t in tensors.items()}
    with traps():
        if case.op is ops.cvmm:
            module, x, weight = cvmm(backend), given["x"], given["weight"]
            slots = Slots(given["expert"], *(given.get(n) for n in ("gather", "scatter", "reduction")))
            out = module.forward(x, weight, slots, case.options.get("n_out", len(slots.expert)))
            grad = gradient(case, out.shape, str(x.device))
            assert grad is not None
            return [out, *module.backward(grad, x, weight, slots, True)]
        units = Units(*(given.get(n) for n in ("keys", "values", "gate_keys", "key_bias")))  # type: ignore[arg-type]
        x, gate, mask, activation = given["x"], given["gate"], given.get("dropout_mask"), case.options["activation"]
        out, saved = expert_ffn(backend).forward(x, units, given["index"], gate, mask, activation)
        alone = expert_ffn(backend).inference(x, units, given["index"], gate, mask, activation)
        grad = gradient(case, out.shape, str(x.device))
        assert grad is not None
        dx, dunits, dgate = expert_ffn(backend).backward(grad, x, units, gate, mask, saved, True, activation)
        return [out, alone, dx, *dunits, dgate]
