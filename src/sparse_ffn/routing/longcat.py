"""LongCatRouter: selection by biased probabilities, gates that are not divided by their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.checks import check_finite
from sparse_ffn.options import Unpack
from sparse_ffn.routing.base import RouterOptions
from sparse_ffn.routing.routers import SoftmaxRouter


class LongCatRouter(SoftmaxRouter):
    """The router of LongCat-Flash (arXiv 2509.01322, section 2.1): a softmax over all experts, null ones included.

    The selection bias is added to the probabilities, not to the logits.

    Args:
        d_model: width of the tokens.
        n_experts: experts and null experts.
        k: of them selected for a token.
        scale: factor of the gates, those of null experts too.
        options: ``Router``'s other arguments.

    Raises:
        ValueError: ``scale`` is not finite and > 0.
    """

    def __init__(
        self, d_model: int, n_experts: int, k: int, *, scale: float = 1.0, **options: Unpack[RouterOptions]
    ) -> None:
        self.scale = check_finite("scale", scale, positive=True)
        super().__init__(d_model, n_experts, k, **options)

    def rank(self, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        """The probabilities: a bias that was trained on them means something else on logits."""
        return torch.softmax(logits_TE, dim=1)

    def gate(self, logits_TE: Tensor, index_TK: Tensor, alive_TK: Tensor | None) -> Tensor:
        """The selected experts' probabilities, scaled."""
        return self.scale * super().gate(logits_TE, index_TK, alive_TK)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults."""
        return super().extra_repr() + ("" if self.scale == 1 else f", scale={self.scale}")
