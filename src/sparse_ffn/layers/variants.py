"""The named mixtures of experts: MoE with the routing and the balance loss of one paper each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sparse_ffn.checks import check_choice
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.routed import MoEOptions
from sparse_ffn.module import unwrapped
from sparse_ffn.options import Unpack
from sparse_ffn.routing.routers import SinkhornRouter


class SigmaMoE(MoE):
    """σ-MoE: sigmoid gates, entropy regularisation (arXiv 2310.10837, section 5). Arguments: ``MoE``'s."""

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expert_size: int,
        k: int,
        *,
        balance: str | Sequence[str] = "entropy",
        balance_weight: float | Sequence[float] = 1e-3,
        **options: Unpack[MoEOptions],
    ) -> None:
        super().__init__(
            d_model, n_experts, expert_size, k,
            router="sigmoid", balance=balance, balance_weight=balance_weight, **options,
        )  # fmt: skip


class SoftmaxMoE(MoE):
    """Softmax gates (arXiv 2310.10837, section 4 and the ablations). Arguments: ``MoE``'s.

    Args:
        router: ``"softmax_topk"``, over the selected experts, or ``"softmax"``, over all. With ``"softmax_topk"`` and
            k = 1 a gate is always 1: the router then learns from the balance loss alone (not from ``"cv2"``, which
            sees gates only).
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expert_size: int,
        k: int,
        *,
        router: str = "softmax_topk",
        balance: str | Sequence[str] = "entropy",
        balance_weight: float | Sequence[float] = 1e-3,
        **options: Unpack[MoEOptions],
    ) -> None:
        check_choice("router", router, ("softmax", "softmax_topk"))
        super().__init__(
            d_model, n_experts, expert_size, k,
            router=router, balance=balance, balance_weight=balance_weight, **options,
        )  # fmt: skip


class SwitchMoE(MoE):
    """Switch: softmax over all experts, the best k (one) of them (2101.03961; arXiv 2310.10837, Eq. 15-17).

    Arguments: ``MoE``'s. The original's initialisation is smaller: pass ``init_scale``.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expert_size: int,
        k: int = 1,
        *,
        balance: str | Sequence[str] = "switch",
        balance_weight: float | Sequence[float] = 1e-2,
        **options: Unpack[MoEOptions],
    ) -> None:
        super().__init__(
            d_model, n_experts, expert_size, k,
            router="softmax", balance=balance, balance_weight=balance_weight, **options,
        )  # fmt: skip


class SBaseMoE(MoE):
    """S-BASE: training selects by Sinkhorn-balanced logits, gates are sigmoids (arXiv 2310.10837, section 4).

    Arguments: ``MoE``'s and ``n_iters``.

    Args:
        n_iters: Sinkhorn iterations, over all real tokens of the batch. They end on the update that balances the
            experts; three do not balance sharp logits, a few tens do.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expert_size: int,
        k: int,
        *,
        n_iters: int = 3,
        balance: str | Sequence[str] = "none",
        balance_weight: float | Sequence[float] = 1e-3,
        **options: Unpack[MoEOptions],
    ) -> None:
        super().__init__(
            d_model, n_experts, expert_size, k,
            router=partial(SinkhornRouter, n_iters=n_iters), balance=balance, balance_weight=balance_weight, **options,
        )  # fmt: skip

    @property
    def n_iters(self) -> int:
        """The router's; may be set."""
        return unwrapped("router", self.router, SinkhornRouter).n_iters

    @n_iters.setter
    def n_iters(self, n_iters: int) -> None:
        unwrapped("router", self.router, SinkhornRouter).n_iters = n_iters


class NoisyTopKMoE(MoE):
    """Sparsely-gated MoE: noise on the logits in training, softmax over the selected (1701.06538; Eq. 13-14).

    Arguments: ``MoE``'s. One more parameter, ``router.noise_weight`` [E + null_experts, d_router], which starts at
    zero. At k = 1 a gate is always 1 and ``"cv2"`` has no gradient: take k >= 2 or another balance loss.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expert_size: int,
        k: int,
        *,
        balance: str | Sequence[str] = "cv2",
        balance_weight: float | Sequence[float] = 1e-3,
        **options: Unpack[MoEOptions],
    ) -> None:
        super().__init__(
            d_model, n_experts, expert_size, k,
            router="noisy_topk", balance=balance, balance_weight=balance_weight, **options,
        )  # fmt: skip
