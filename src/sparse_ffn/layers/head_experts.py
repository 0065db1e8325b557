"""HeadExperts: a projection of each head of attention by a mixture of the head's own experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn import ops
from sparse_ffn.checks import check_parameters
from sparse_ffn.layers.balanced import Balanced
from sparse_ffn.module import normal_
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.routing.balance import Terms
from sparse_ffn.routing.base import AnyRouting, Routing
from sparse_ffn.routing.distributed import Sync
from sparse_ffn.routing.inject import inject
from sparse_ffn.routing.routers import SigmoidRouter

# T tokens, H heads, E experts of a head, K slots of a token: k for each head


class HeadRouter(SigmoidRouter):
    """Sigmoid gates; each head selects the k best of its own experts, rows h·E to (h + 1)·E of ``weight``."""

    def __init__(self, n_heads: int, d_model: int, n_experts: int, k: int, **options: Any) -> None:
        self.n_heads = n_heads
        super().__init__(d_model, n_heads * n_experts, n_heads * k, **options)

    def _checked_k(self, k: int) -> int:
        if (k := super()._checked_k(k)) % self.n_heads:
            raise ValueError(f"k = {k} of all heads must be a multiple of n_heads = {self.n_heads}")
        return k

    def select(self, score_TE: Tensor) -> Tensor:
        """The k best experts of the first head, those of the second, ..."""
        score_THE = score_TE.view(score_TE.shape[0], self.n_heads, score_TE.shape[1] // self.n_heads)
        best_THk = stable_topk(score_THE, self.k // self.n_heads)
        first_H1 = torch.arange(self.n_heads, device=score_TE.device).unsqueeze(1) * score_THE.shape[2]
        return (best_THk + first_H1).flatten(1)


class HeadExperts(Balanced):
    """A projection of each head by k of its experts, weighted by the router's gates.

    Parameters: ``weight`` [H·E, d_in, d_out], ``router.weight`` [H·E, d_model].

    Args:
        to_heads: from a row for each token to one for each head of a token, or back to the sum over the heads.
        d_in: width of a row.
        d_out: width of a row of the result.
        make_router: makes the router; its ``n_experts`` are those of all heads.
        std: of the initialisation.
        balance: names, weights, ``balance_over``, ``aux`` and ``sync_balance``.
    """

    def __init__(
        self,
        to_heads: bool,
        d_in: int,
        d_out: int,
        make_router: Callable[[], HeadRouter],
        std: float,
        balance: tuple[tuple[str, ...], tuple[float, ...], str, str, Sync],
    ) -> None:
        super().__init__()
        self._set_balance(*balance)
        router = self.router = make_router()
        self.to_heads, self._std, self.n_heads, self.n_experts = to_heads, std, router.n_heads, router.n_experts
        own: dict[str, Any] = {"device": router.weight.device, "dtype": router.weight.dtype}
        self.weight = nn.Parameter(torch.empty(self.n_experts, d_in, d_out, **own))
        normal_(self.weight, std)

    def forward(self, x: Tensor, seen_TD: Tensor, mask_T: Tensor | None, n_sequences: int | None) -> Tensor:
        """Project x [T, d_in] to [T·H, d_out], or x [T·H, d_in] to [T, d_out]."""
        check_parameters(x, {"weight": self.weight})
        routing: Routing = self.router(seen_TD, mask_T)
        loss, gate_TK = self._balance_loss(routing, mask_T, n_sequences), routing.gate_TK
        if loss is not None and self.aux == "inject":
            gate_TK, loss = inject(gate_TK, loss), None
        tokens, slots = routing.index_TK.shape
        slot = torch.arange(tokens * slots, device=x.device)
        token, head = slot // slots, slot // (slots // self.n_heads)  # head h of token t is row t·H + h
        gather, scatter, n_out = (token, head, tokens * self.n_heads) if self.to_heads else (head, token, tokens)
        y = ops.cvmm(
            x, self.weight, routing.index_TK.flatten(),
            gather=gather, scatter=scatter, reduction=gate_TK.flatten(), n_out=n_out,
        )  # fmt: skip
        self._keep(loss, routing.index_TK, mask_T, (y, loss))
        return y

    def _losses(
        self, routing: AnyRouting, terms: Terms, mask_T: Tensor | None, n_groups: int, per_sequence: bool
    ) -> Tensor:
        """The mean of the heads' losses: the experts of one head compete with each other only."""
        assert isinstance(routing, Routing), "there is no fused call"
        n_heads = self.n_heads

        def by_head(x_TN: Tensor) -> Tensor:
            length, width = x_TN.shape[0] // max(n_groups, 1), x_TN.shape[1] // n_heads
            return x_TN.reshape(n_groups, length, n_heads, width).transpose(1, 2).reshape(-1, width)

        logits, index = by_head(routing.logits_TE), by_head(routing.index_TK)
        void, n_experts = index == routing.logits_TE.shape[1], logits.shape[1]
        own = Routing(logits, torch.where(void, n_experts, index % n_experts), by_head(routing.gate_TK))
        mask = None if mask_T is None else by_head(mask_T.unsqueeze(1).expand(-1, n_heads)).squeeze(1)
        return super()._losses(own, terms, mask, n_groups * n_heads, per_sequence)

    def reset_parameters(self) -> None:
        """Normal weights; the router's own initialisation."""
        normal_(self.weight, self._std)
        self._own_router().reset_parameters()

    def extra_repr(self) -> str:
        """Sizes and the balance."""
        options = self._balance_options().items()
        changed = (f"{name}={value!r}" for name, (value, default) in options if value != default)
        return ", ".join([str(list(self.weight.shape)), *changed])
