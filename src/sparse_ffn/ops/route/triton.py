"""Route out of the Triton kernels; the products of its backward pass that torch has are torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends.device import on_device
from sparse_ffn.backends.layout import contiguous
from sparse_ffn.backends.triton import router as kernels
from sparse_ffn.backends.triton.launch import precision, rows
from sparse_ffn.ops.route.backend import Gradients, Routed, Router, Selected


@on_device
def forward(x: Tensor, router: Router, k: int, gate_function: str, groups: int) -> Routed:
    """The results."""
    router_weight, router_bias, mask = router
    selected, gate = _slots(x, k)
    logits = gate.new_empty(x.shape[0], router_weight.shape[0])
    operands = (rows(x), router_weight, contiguous(router_bias), contiguous(mask))
    sums = kernels.route(*operands, selected, gate, logits, groups, gate_function, precision(router_weight))
    return Routed(gate, selected, gate.new_empty(0, logits.shape[1]) if sums is None else sums, logits)


@on_device
def inference(x: Tensor, router: Router, k: int, gate_function: str, groups: int) -> Selected:
    """The first two results, nothing kept."""
    router_weight, router_bias, _ = router
    selected, gate = _slots(x, k)
    operands = (rows(x), router_weight, contiguous(router_bias), None)
    kernels.route(*operands, selected, gate, None, 0, gate_function, precision(router_weight))
    return Selected(gate, selected)


def _slots(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (x.new_empty(x.shape[0], k, dtype=torch.int64), x.new_empty(x.shape[0], k, dtype=torch.float32))


def backward(
    grad: Tensor | None,
    grad_sums: Tensor | None,
    x: Tensor,
    router_weight: Tensor,
    mask: Tensor | None,
    gate: Tensor,
    selected: Tensor,
    logits: Tensor,
    gate_function: str,
) -> Gradients:
    """The gradients. Those of the scores are rounded to x's dtype, as all operands of products are."""
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        dgate, dsums, mask = map(contiguous, (grad, grad_sums, mask))
        dlogits = x.new_empty(logits.shape)
        # one kernel for both: in 16 bits the rows of the router, however many, fit into registers
        dx = None if x.dtype == torch.float32 else x.new_empty(x.shape)
        kernels.gradient(dgate, dsums, router_weight, mask, selected, gate, logits, dlogits, dx, gate_function)
        dx = torch.mm(dlogits, router_weight) if dx is None else dx
        return Gradients(dx, _weight_gradient(dlogits, x, router_weight.dtype))


def _weight_gradient(dlogits: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The router's, [R, D]: of 16-bit operands in fp32 as it was summed, where torch has such a product."""
    if dtype == torch.float32 != x.dtype and x.is_cuda and torch.version.hip is None:
        return torch.mm(dlogits.t(), x, out_dtype=dtype)
    return torch.mm(dlogits.t(), x).to(dtype)
