"""SharedExpertMoE: a mixture of experts beside a dense FFN that every token uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_flag, check_type, shape_error
from sparse_ffn.layers.dense import DenseFFN
from sparse_ffn.layers.moe import MoE


class SharedExpertMoE(nn.Module):
    """y = routed(x) + shared(x), or routed(x) + σ(gate x)·shared(x) (DeepSeekMoE, arXiv 2401.06066; Qwen2-MoE).

    Args:
        routed: the mixture of experts.
        shared: the FFN of all tokens, of the same widths.
        gated: whether a learned scalar weighs it, ``gate.weight`` [1, d_model].

    Raises:
        TypeError: ``routed`` is no ``MoE``, ``shared`` no ``DenseFFN`` or ``gated`` no bool.
        ValueError: the widths differ.
    """

    gate: nn.Linear | None
    d_model: int
    d_out: int
    d_ff: int
    """Hidden units in all, the shared expert's among them."""

    def __init__(self, routed: MoE, shared: DenseFFN, *, gated: bool = False) -> None:
        super().__init__()
        check_type("routed", routed, MoE, "a sparse_ffn.MoE")
        check_type("shared", shared, DenseFFN, "a sparse_ffn.DenseFFN")
        widths = (routed.d_model, routed.d_out)
        if (shared.d_model, shared.d_out) != widths:
            raise ValueError(
                f"shared has (d_model, d_out) = {(shared.d_model, shared.d_out)}, the routed experts {widths}"
            )
        self.routed, self.shared = routed, shared
        self.d_model, self.d_out = widths
        self.d_ff = routed.d_ff + shared.d_ff
        own = {"device": routed.values.device, "dtype": routed.values.dtype}
        self.gate = nn.Linear(routed.d_model, 1, bias=False, **own) if check_flag("gated", gated) else None

    def forward(self, x: Tensor, *, mask: Tensor | None = None, router_input: Tensor | None = None) -> Tensor:
        """As ``SparseFFN``'s; ``mask`` and ``router_input`` are for the routed experts."""
        # both parts check all that they are given before either draws or keeps anything
        try:
            self.routed._check_call(x, mask)
            self.routed._selector_input(x, router_input)
        except Exception:
            if self.routed._split is not None:
                self.routed._split.fail()  # other processes wait for its tokens
            raise
        shared: Tensor = self.shared(x)
        if self.gate is not None:
            own = (1, self.d_model)
            if type(self.gate) is nn.Linear and self.gate.weight.shape != own:  # others may store it packed
                raise shape_error({"gate.weight": (self.gate.weight, own)})
            shared = torch.sigmoid(self.gate(x)) * shared
        y: Tensor = self.routed(x, mask=mask, router_input=router_input) + shared
        return y

    @property
    def k(self) -> int:
        """Routed experts selected for a token; may be set at any time."""
        return self.routed.k

    @k.setter
    def k(self, k: int) -> None:
        self.routed.k = k

    def reset_parameters(self) -> None:
        """Initialise all parameters and buffers anew."""
        for part in (self.routed, self.shared, self.gate):
            if part is not None:
                part.reset_parameters()

    @property
    def active_fraction(self) -> float:
        """Share of the hidden units that a token uses: those of k experts and of the shared one."""
        return (self.routed.k * self.routed.expert_size + self.shared.d_ff) / self.d_ff

    def flops_per_token(self) -> int:
        """The routed experts', the shared one's, and the gate's score if there is one."""
        gate = 0 if self.gate is None else 2 * self.d_model
        return self.routed.flops_per_token() + self.shared.flops_per_token() + gate

    @property
    def n_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())
