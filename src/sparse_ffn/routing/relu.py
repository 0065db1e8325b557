"""ReLURouter: gates that are zero for some experts, and as many experts a token as have one above zero."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.checks import check_finite, check_flag, check_positive, shown
from sparse_ffn.options import Unpack
from sparse_ffn.routing.base import Router, RouterOptions
from sparse_ffn.routing.targets import Targets

START, FACTOR = 1e-8, 1.2
SMALLEST, LARGEST = 1e-30, 1e30  # beyond these fp32 ends: 0 times infinity is NaN, and a subnormal times 1.2 may stay


class ReLURouter(Router):
    """The router of ReMoE (arXiv 2412.14711, section 3): the gate is relu(logit), and without one no expert computes.

    A token uses those of its k best experts whose logit is positive, perhaps none; k = n_experts is the paper's layer.
    With ``balance="l1"`` the layer adds an L1 norm of the gates to the loss, and ``sparse_ffn.update_router_bias``
    multiplies its weight, the buffer ``l1``, by 1.2 while experts with a positive logit are more than wished, and
    divides it by 1.2 while they are fewer (section 3.3).

    Args:
        d_model: width of the tokens.
        n_experts: E.
        k: the most experts of a token.
        active: the mean number of experts of a token that the L1 loss aims at, in (0, n_experts]; None for k.
        options: ``Router``'s other arguments. There is no selection bias: the gates themselves say what is selected.

    Raises:
        ValueError: ``active`` is outside its range, or ``selection_bias`` is True.
    """

    voids_zeros = True
    l1: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int,
        *,
        active: float | None = None,
        **options: Unpack[RouterOptions],
    ) -> None:
        if check_flag("selection_bias", options.get("selection_bias", False)):
            raise ValueError('selection_bias = True (balance = "bias") is not for ReLURouter: take balance = "l1"')
        n_experts = check_positive("n_experts", n_experts)
        if active is not None and (check_finite("active", active, positive=True) > n_experts):
            raise ValueError(f"active must be at most n_experts = {n_experts}, got {shown(active)}")
        self.active = None if active is None else float(active)
        super().__init__(d_model, n_experts, k, **options)

    def add_parameters(self) -> None:
        """The buffer ``l1``, the L1 loss's weight."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.register_buffer("l1", torch.empty((), device=self.weight.device, dtype=wide))

    def reset_parameters(self) -> None:
        """As ``Router``; the loss's weight starts at 1e-8."""
        super().reset_parameters()
        self.l1.fill_(START)

    def gate(self, logits_TE: Tensor, index_TK: Tensor, alive_TK: Tensor | None) -> Tensor:
        """relu(logit) of the selected experts."""
        return torch.relu(logits_TE).gather(1, index_TK)

    @property
    def adapted(self) -> Tensor:
        """``l1``."""
        return self.l1

    @property
    def load_shape(self) -> tuple[int, ...]:
        """Active experts of all tokens, and tokens."""
        return (2,)

    def count_active(self, logits_TE: Tensor, mask_T: Tensor | None) -> None:
        """Add the real tokens, and their experts with a positive logit, be they among the k or not, to ``load``."""
        active_T = (logits_TE > 0).sum(1)
        real_T = torch.ones_like(active_T) if mask_T is None else mask_T.to(active_T.dtype)
        self.add_load(torch.stack([(active_T * real_T).sum(), real_T.sum()]), "l1")

    def adapt(self, load: Tensor, rate: float, targets: Targets | None) -> None:
        """One step of the loss's weight; ``rate`` is for biases."""
        active, tokens = load.to(self.l1.dtype)
        wished = self.k if self.active is None else self.active
        self.l1.mul_(FACTOR ** torch.sign(active - wished * tokens)).clamp_(SMALLEST, LARGEST)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults."""
        return super().extra_repr() + ("" if self.active is None else f", active={self.active}")
