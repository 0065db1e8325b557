"""SharedExpertMoE: a mixture of experts beside a dense FFN that every token uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_flag, check_type, shape_error
from sparse_ffn.layers.base import OthersFailed
from sparse_ffn.layers.dense import DenseFFN
from sparse_ffn.layers.latent import LatentMoE
from sparse_ffn.layers.routed import Routed
from sparse_ffn.layers.rows.base import n_numbers
from sparse_ffn.module import is_brought, is_called_alone, unwrapped
from sparse_ffn.options import OptionOf


class SharedExpertMoE(nn.Module):
    """y = routed(x) + shared(x), or routed(x) + σ(gate x)·shared(x) (DeepSeekMoE, arXiv 2401.06066; Qwen2-MoE).

    Where several processes share the routed experts (``sparse_ffn.parallel``), the shared one is computed while tokens
    travel to them.

    Args:
        routed: the mixture of experts, a ``MoE``, ``MixedMoE``, ``LowRankMoE`` or ``LatentMoE``.
        shared: the FFN of all tokens, of the same widths.
        gated: whether a learned scalar weighs it, ``gate.weight`` [1, d_model].

    Raises:
        TypeError: ``routed`` is no mixture of experts, ``shared`` no ``DenseFFN`` or ``gated`` no bool.
        ValueError: the widths differ.
    """

    gate: nn.Linear | None
    d_model: int
    d_out: int
    expert_dropout, balance, balance_weight, balance_over, aux, sync_balance = (
        OptionOf(lambda layer: [layer._own_moe()]) for _ in range(6)
    )
    activation, dropout = (OptionOf(lambda layer: [layer._own_moe(), layer._own_shared()]) for _ in range(2))

    def __init__(self, routed: Routed | LatentMoE, shared: DenseFFN, *, gated: bool = False) -> None:
        super().__init__()
        check_type("routed", routed, (Routed, LatentMoE), "a mixture of experts such as a sparse_ffn.MoE")
        check_type("shared", shared, DenseFFN, "a sparse_ffn.DenseFFN")
        widths = (routed.d_model, routed.d_out)
        if (shared.d_model, shared.d_out) != widths:
            raise ValueError(
                f"shared has (d_model, d_out) = {(shared.d_model, shared.d_out)}, the routed experts {widths}"
            )
        self.routed, self.shared = routed, shared
        self.d_model, self.d_out = widths
        own = {"device": shared.values.device, "dtype": shared.values.dtype}
        self.gate = nn.Linear(routed.d_model, 1, bias=False, **own) if check_flag("gated", gated) else None

    def forward(self, x: Tensor, *, mask: Tensor | None = None, router_input: Tensor | None = None) -> Tensor:
        """As ``SparseFFN``'s; ``mask`` and ``router_input`` are for the routed experts."""
        # both parts check all that they are given before either draws or keeps anything
        routed, moe = self._own_routed(), self._own_moe()
        if not (is_brought(routed, moe._typical) or is_brought(moe, moe._typical)):  # else they check at their call
            try:
                routed._check_call(x, mask)
                routed._selector_input(x, router_input)
            except Exception:
                moe._tell_failure()
                raise
        if moe._split is not None and self._calls_directly(routed, moe):
            return self._while_tokens_travel(moe, x, mask, router_input)
        try:
            shared = self._weighed(x)
        except OthersFailed:
            raise
        except Exception:
            moe._tell_failure()
            raise
        y: Tensor = self.routed(x, mask=mask, router_input=router_input) + shared
        return y

    def _while_tokens_travel(self, moe: Routed, x: Tensor, mask: Tensor | None, router_input: Tensor | None) -> Tensor:
        try:
            shared = self._own_shared()
            if not is_brought(shared, shared.values):
                shared._check_call(x, None)
                shared._units()
            self._check_gate()
        except Exception:
            moe._tell_failure()
            raise
        computed: list[Tensor] = []
        moe._split.errand = lambda: computed.append(self._weighed(x))
        try:
            y: Tensor = self.routed(x, mask=mask, router_input=router_input)
        finally:
            moe._split.errand = None
        return y + (computed[0] if computed else self._weighed(x))

    def _calls_directly(self, routed: Routed | LatentMoE, moe: Routed) -> bool:
        """Whether the shared expert's work may be done within the routed experts' call."""
        inner = routed.moe if isinstance(routed, LatentMoE) else routed
        return self.routed is routed and inner is moe and is_called_alone(routed) and is_called_alone(moe)

    def _weighed(self, x: Tensor) -> Tensor:
        """What the shared expert adds."""
        shared: Tensor = self.shared(x)
        if self.gate is None:
            return shared
        self._check_gate()
        return torch.sigmoid(self.gate(x)) * shared

    def _check_gate(self) -> None:
        own = (1, self.d_model)
        if type(self.gate) is nn.Linear and self.gate.weight.shape != own:  # others may store it packed
            raise shape_error({"gate.weight": (self.gate.weight, own)})

    def _own_shared(self) -> DenseFFN:
        return unwrapped("shared", self.shared, DenseFFN)

    def _own_routed(self) -> Routed | LatentMoE:
        return next(module for module in self.routed.modules() if isinstance(module, (Routed, LatentMoE)))

    def _own_moe(self) -> Routed:
        return unwrapped("routed", self.routed, Routed)

    @property
    def k(self) -> int:
        """Routed experts selected for a token; may be set at any time."""
        return self._own_moe().k

    @k.setter
    def k(self, k: int) -> None:
        self._own_moe().k = k

    @property
    def d_ff(self) -> int:
        """Hidden units in all, the shared expert's among them."""
        return self._own_routed().d_ff + self._own_shared().d_ff

    def reset_parameters(self) -> None:
        """Initialise all parameters and buffers anew."""
        self._own_routed().reset_parameters()
        self._own_shared().reset_parameters()
        if self.gate is not None:
            unwrapped("gate", self.gate, nn.Linear).reset_parameters()

    @property
    def active_fraction(self) -> float:
        """Share of the hidden units that a token uses, of the routed experts' and the shared one's."""
        return sum(part.active_fraction * part.d_ff for part in (self._own_routed(), self._own_shared())) / self.d_ff

    def flops_per_token(self) -> int:
        """The routed experts', the shared one's, and the gate's score if there is one."""
        gate = 0 if self.gate is None else 2 * self.d_model
        return self._own_routed().flops_per_token() + self._own_shared().flops_per_token() + gate

    @property
    def n_parameters(self) -> int:
        """Number of parameters; quantised and other stored experts count as the parameters that they stand for."""
        return n_numbers(self)
