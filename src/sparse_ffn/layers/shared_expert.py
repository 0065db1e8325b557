"""SharedExpertMoE: a mixture of experts beside a dense FFN that every token uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_ffn.layers.dense import DenseFFN
from sparse_ffn.layers.moe import MoE


class SharedExpertMoE(nn.Module):
    """y = routed(x) + shared(x), or routed(x) + σ(gate x)·shared(x) (DeepSeekMoE, arXiv 2401.06066; Qwen2-MoE).

    Args:
        routed: the mixture of experts.
        shared: the FFN of all tokens, of the same widths.
        gated: whether a learned scalar weighs it, ``gate.weight`` [1, d_model].

    Raises:
        ValueError: the widths differ.
    """

    gate: nn.Linear | None

    def __init__(self, routed: MoE, shared: DenseFFN, *, gated: bool = False) -> None:
        super().__init__()
        widths = (routed.d_model, routed.d_out)
        if (shared.d_model, shared.d_out) != widths:
            raise ValueError(
                f"shared has (d_model, d_out) = {(shared.d_model, shared.d_out)}, the routed experts {widths}"
            )
        self.routed, self.shared = routed, shared
        own = {"device": routed.values.device, "dtype": routed.values.dtype}
        self.gate = nn.Linear(routed.d_model, 1, bias=False, **own) if gated else None

    def forward(self, x: Tensor, *, mask: Tensor | None = None, router_input: Tensor | None = None) -> Tensor:
        """As ``SparseFFN``'s; ``mask`` and ``router_input`` are for the routed experts."""
        shared = self.shared(x)
        if self.gate is not None:
            shared = torch.sigmoid(self.gate(x)) * shared
        y: Tensor = self.routed(x, mask=mask, router_input=router_input) + shared
        return y
