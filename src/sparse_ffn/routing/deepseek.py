"""DeepSeekRouter: selection by biased sigmoid scores within the best groups of experts, gates renormalised."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.checks import check_flag, check_positive
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.options import Unpack
from sparse_ffn.routing.base import RouterOptions
from sparse_ffn.routing.routers import SigmoidRouter

# T tokens, E experts, K selected experts, N groups of experts


class DeepSeekRouter(SigmoidRouter):
    """The router of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), which many later models share.

    Its scores are sigmoids, and the selection bias is added to these, not to the logits. A group of experts is worth
    the sum of its two best biased scores; only experts of the best groups can be selected. Where a model scales its
    gates by a factor, the factor is in the layer's values.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        k: experts selected for a token.
        normalize: divide the gates of the selected experts by their sum.
        n_groups: groups of consecutive experts; 1 for no limit.
        topk_groups: groups that a token can reach; None for all.
        options: ``Router``'s other arguments.

    Raises:
        ValueError: n_groups does not divide n_experts into groups of two or more, or k does not fit into topk_groups.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int,
        *,
        normalize: bool = True,
        n_groups: int = 1,
        topk_groups: int | None = None,
        **options: Unpack[RouterOptions],
    ) -> None:
        self.normalize, self.n_groups = check_flag("normalize", normalize), check_positive("n_groups", n_groups)
        topk_groups = self.n_groups if topk_groups is None else topk_groups
        self.topk_groups = check_positive("topk_groups", topk_groups, at_most=self.n_groups, limit="n_groups")
        # all is checked before weights are drawn
        n_experts = check_positive("n_experts", n_experts)
        size, rest = divmod(n_experts, self.n_groups)
        if n_groups > 1 and (rest or size < 2):
            raise ValueError(f"n_groups = {n_groups} must divide n_experts = {n_experts} into groups of 2 or more")
        super().__init__(d_model, n_experts, k, **options)

    def _checked_k(self, k: int) -> int:
        k, reached = super()._checked_k(k), self.topk_groups * (self.n_experts // self.n_groups)
        if k > reached:
            raise ValueError(f"k = {k} must be at most topk_groups·(n_experts/n_groups) = {reached}")
        return k

    def rank(self, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        """The sigmoid scores: a bias that was trained on them means something else on logits."""
        return torch.sigmoid(logits_TE)

    def limit(self, score_TE: Tensor) -> Tensor:
        """The scores within the best groups, -inf elsewhere."""
        if self.topk_groups == self.n_groups:
            return score_TE
        score_TNG = score_TE.view(-1, self.n_groups, self.n_experts // self.n_groups)
        worth_TN = score_TNG.topk(2, dim=2).values.sum(2)
        reached_TN = torch.zeros_like(worth_TN, dtype=torch.bool)
        reached_TN = reached_TN.scatter(1, stable_topk(worth_TN, self.topk_groups), True)
        return score_TNG.masked_fill(~reached_TN.unsqueeze(2), -torch.inf).flatten(1)

    def gate(self, logits_TE: Tensor, index_TK: Tensor, alive_TK: Tensor | None) -> Tensor:
        """σ(logit) of the selected experts, divided by the sum over those that live."""
        gate_TK = super().gate(logits_TE, index_TK, alive_TK)
        if not self.normalize:
            return gate_TK
        if alive_TK is not None:
            gate_TK = gate_TK * alive_TK  # before the division: where none lives, σ/1e-20 would have an infinite slope
        return gate_TK / (gate_TK.sum(1, keepdim=True) + 1e-20)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults."""
        text = super().extra_repr()
        if not self.normalize:
            text += ", normalize=False"
        return text if self.n_groups == 1 else f"{text}, n_groups={self.n_groups}, topk_groups={self.topk_groups}"
