"""What an op's fake promises, the op gives, whatever dtype the gates have: compiled code reads its results by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import sparse_ffn as sf
from sparse_ffn import functional, ops
from sparse_ffn.backends import cpu
from sparse_ffn.ops.codes import Codes

S, E, G, D, O, K = 6, 3, 4, 8, 5, 2


class Promised(TorchDispatchMode):
    """Each of our ops inside gives results of its fake's dtypes, sizes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if func.namespace == "sparse_ffn":
            self.names.add(func.name().removeprefix("sparse_ffn::"))
            with FakeTensorMode() as fake:
                promised = func(*tree_map_only(Tensor, fake.from_tensor, args))
            assert [*map(_described, tree_leaves(found))] == [*map(_described, tree_leaves(promised))], func.name()
        return found


def _described(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.shape, [step for step, n in zip(t.stride(), t.shape, strict=True) if n > 1]


def step(y: Tensor, *operands: Tensor) -> None:
    torch.autograd.grad(y, [t for t in operands if t.requires_grad], torch.randn_like(y))


CASES = {  # the tokens' dtype, the gates', the backend
    "torch, wider gates": (torch.bfloat16, torch.float32, "torch"),
    "torch, narrower gates": (torch.float32, torch.bfloat16, "torch"),
    "torch, fp64 and fp32": (torch.float64, torch.float32, "torch"),
    "cpu, wider gates": (torch.bfloat16, torch.float32, "cpu"),
    "cpu, narrower gates": (torch.float32, torch.bfloat16, "cpu"),
    "cpu, fp64 gates": (torch.float32, torch.float64, "cpu"),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("case", [name for name in CASES if not (cpu.PROBLEM and name.startswith("cpu"))])
def test_gradients_are_as_promised(case: str, frozen: bool) -> None:
    """With frozen matrices there are none of theirs."""
    dtype, of_gates, backend = CASES[case]
    x, weight, keys, values, gate_keys, bias, table = (
        torch.randn(shape).to(dtype).requires_grad_()
        for shape in ((S, D), (E, O, D), (E, G, D), (E, G, O), (E, G, D), (E, G), (40, O))
    )
    gate, slot_gate = torch.rand(S, K).to(of_gates).requires_grad_(), torch.rand(S).to(of_gates).requires_grad_()
    expert, index, bags = (torch.randint(0, n, shape) for n, shape in ((E + 1, (S,)), (E + 1, (S, K)), (40, (S, K))))
    codes = Codes(torch.randint(-8, 8, (E, G, D)).to(torch.int8), torch.rand(E, G, 2))
    with sf.backend(backend), Promised() as promised:
        for matrices in (weight, keys, values, gate_keys, bias, table) if frozen else ():
            matrices.requires_grad_(False)
        step(functional.cvmm(x, weight.mT, expert, reduction_weight=slot_gate), x, weight, slot_gate)
        step(
            functional.expert_ffn(x, keys, values, index, gate, gate_keys=gate_keys, key_bias=bias, activation="silu"),
            *(x, keys, values, gate_keys, bias, gate),
        )
        step(functional.weighted_bag(table, bags, gate), table, gate)
        step(functional.topk_ffn(x, keys[0], values[0], 3, gate_keys=gate_keys[0], key_bias=bias[0]), x, keys, values)
        step(ops.quantized_cvmm(x, codes, expert, down=False, reduction=slot_gate), x, slot_gate)
    assert {"cvmm_backward", "expert_ffn_backward", "weighted_bag_backward", "quantized_cvmm_backward"} < promised.names
