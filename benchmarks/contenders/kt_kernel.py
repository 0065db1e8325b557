"""kt-kernel's experts, with our weights: kernels for serving on AMX or AVX-512, without a backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sparse_ffn as sf
from benchmarks.measuring.contender import Contender, NotInstalled, Oracle, require
from benchmarks.shapes import MoEShape

ABOUT = "AMXBF16_MOE with weights that it packed when it was built, our router; forward only"


class KTExperts(nn.Module):
    """Experts of a gated layer of ours in kt-kernel, behind its router.

    Args:
        layer: in bf16.
        shape: its sizes and the most tokens.
        kind: the name of kt-kernel's class.

    Raises:
        NotInstalled: the package is missing, or has no such experts for this processor.
    """

    def __init__(self, layer: sf.MoE, shape: MoEShape, kind: str = "AMXBF16_MOE") -> None:
        super().__init__()
        assert layer.gate_keys is not None
        # it asks for a torch of its own, which it does not need for this
        extension = require("kt_kernel", "--no-deps kt-kernel gguf").kt_kernel_ext
        if not hasattr(extension.moe, kind):
            raise NotInstalled(f"{kind} needs AMX or AVX-512")
        self.router, self.k = layer.router, shape.k
        self.pool = extension.CPUInfer(torch.get_num_threads())
        config = extension.moe.MOEConfig(shape.E, shape.k, shape.D, shape.G, 0)
        config.max_len = -(-shape.T // 32) * 32  # whole tiles
        config.pool = self.pool.backend_
        with torch.no_grad():
            down = layer.values.transpose(1, 2).contiguous()
        config.gate_proj, config.up_proj = layer.gate_keys.data_ptr(), layer.keys.data_ptr()
        config.down_proj = down.data_ptr()
        config.gate_scale = config.up_scale = config.down_scale = 0
        self.experts = getattr(extension.moe, kind)(config)
        places = torch.arange(shape.E)  # of the experts: none is moved
        self._run(self.experts.load_weights_task(places.data_ptr()))

    def _run(self, task: Any) -> None:
        self.pool.submit(task)
        self.pool.sync()

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        routing = self.router(x)
        tokens, y = torch.tensor([len(x)]), torch.empty_like(x)
        operands = (routing.index_TK.contiguous(), routing.gate_TK.float().contiguous(), x.contiguous(), y)
        pointers = (operand.data_ptr() for operand in operands)
        self._run(self.experts.forward_task(tokens.data_ptr(), self.k, *pointers, False))
        return y


def contender(layer: sf.MoE, oracle: Oracle, shape: MoEShape) -> Contender:
    """Of a gated layer in bf16.

    Raises:
        NotInstalled: the package is missing, or has no such experts for this processor.
    """
    return Contender(KTExperts(layer, shape), oracle, inference=True)
