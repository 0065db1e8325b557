"""The configs of the MoE family, and how many experts of which size an FFN becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparse_ffn import layers
from sparse_ffn.checks import check_choice
from sparse_ffn.convert.config_base import FFNConfig
from sparse_ffn.convert.init.weights import FFNWeights
from sparse_ffn.routing import ROUTERS

SIZES = (16, 128)
"""The least and the largest size of an expert that is chosen when the config gives none."""


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(FFNConfig):
    """The MoE family's arguments, and how a dense FFN becomes experts.

    Args:
        n_experts: E; None for d_ff / expert_size (8 for ``"upcycle"``).
        expert_size: G; None for d_ff / n_experts, or if that is None too the largest divisor of d_ff from 16 to 128
            that makes two experts or more (d_ff for ``"upcycle"``).
        k: experts for a token; None for a quarter of them (2 for ``"upcycle"``).
        init: ``"split"`` cuts the hidden units into experts in their order, ``"cluster"`` groups units that belong
            together; both give the dense output at k = n_experts. ``"upcycle"`` copies the whole FFN into every expert,
            ``"fresh"`` starts anew.
        cluster_by: ``"keys"`` or ``"coactivation"`` (needs calibration); None for the latter with calibration.
        router_init: ``"mean_keys"`` (Avg-K) or ``"fitted"`` to the experts' true contributions (needs calibration);
            None for the latter with calibration.

    ``"fresh"`` takes no notice of the last two: with it a config that was used makes layers of the same shapes.

    Raises:
        ValueError: as all configs; ``cluster_by`` or ``router_init`` with an ``init`` that has no use for it; when an
            FFN is replaced, no size is given and its d_ff has no such divisor.
    """

    inits = ("split", "cluster", "upcycle", "fresh")

    init: str = "split"
    n_experts: int | None = None
    expert_size: int | None = None
    k: int | None = None
    glu: bool | None = None
    bias: bool | None = None
    expert_dropout: float = 0.0
    balance: str | Sequence[str] = "entropy"
    balance_weight: float | Sequence[float] = 1e-3
    balance_over: str = "batch"
    aux: str = "attach"
    sync_balance: bool = False
    cluster_by: str | None = None
    router_init: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cluster_by is not None:
            check_choice("cluster_by", self.cluster_by, ("keys", "coactivation"))
        if self.router_init is not None:
            check_choice("router_init", self.router_init, ("mean_keys", "fitted"))
        if self.init in ("split", "upcycle") and self.cluster_by is not None:
            raise ValueError(f'cluster_by = {self.cluster_by!r} is for init = "cluster", not init = {self.init!r}')
        if self.init == "upcycle" and self.router_init is not None:
            raise ValueError(f'router_init = {self.router_init!r} is not for init = "upcycle": its router is fresh')

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        if self.init == "upcycle":
            n, size = self.n_experts or 8, self.expert_size or ffn.d_ff
            if size != ffn.d_ff:
                raise ValueError(f"expert_size = {size} must be d_ff = {ffn.d_ff} to upcycle: each expert is a copy")
            return {"n_experts": n, "expert_size": size, "k": self.k or min(2, n)}
        n, size = self.n_experts or 0, self.expert_size or 0
        if not size:
            size = ffn.d_ff // n if n else _expert_size(ffn.d_ff)
        n = n or ffn.d_ff // size
        if self.init != "fresh" and n * size != ffn.d_ff:
            raise ValueError(
                f"n_experts·expert_size = {n}·{size} must be d_ff = {ffn.d_ff}: init={self.init!r} deals out its units"
            )
        return {"n_experts": n, "expert_size": size, "k": self.k or max(1, n // 4)}


@dataclass(frozen=True, kw_only=True)
class MoEConfig(ExpertsConfig):
    """For ``MoE``: fields as all configs of the family, and ``router``, by name.

    ``router="unweighted"`` weighs every selected expert 1, so that a converted layer computes a part of the dense sum.
    """

    layer = layers.MoE

    router: str = "sigmoid"

    def __post_init__(self) -> None:
        check_choice("router", self.router, ROUTERS)  # the layer takes modules too, which no two layers can share
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SigmaMoEConfig(ExpertsConfig):
    """For ``SigmaMoE``."""

    layer = layers.SigmaMoE


@dataclass(frozen=True, kw_only=True)
class SoftmaxMoEConfig(ExpertsConfig):
    """For ``SoftmaxMoE``, with its ``router``."""

    layer = layers.SoftmaxMoE

    router: str = "softmax_topk"


@dataclass(frozen=True, kw_only=True)
class SwitchMoEConfig(ExpertsConfig):
    """For ``SwitchMoE``."""

    layer = layers.SwitchMoE

    k: int | None = 1
    balance: str | Sequence[str] = "switch"
    balance_weight: float | Sequence[float] = 1e-2


@dataclass(frozen=True, kw_only=True)
class SBaseMoEConfig(ExpertsConfig):
    """For ``SBaseMoE``, with its ``n_iters``."""

    layer = layers.SBaseMoE

    n_iters: int = 3
    balance: str | Sequence[str] = "none"


@dataclass(frozen=True, kw_only=True)
class NoisyTopKMoEConfig(ExpertsConfig):
    """For ``NoisyTopKMoE``."""

    layer = layers.NoisyTopKMoE

    balance: str | Sequence[str] = "cv2"


def _expert_size(d_ff: int) -> int:
    least, largest = SIZES
    found = [size for size in range(least, min(largest, d_ff // 2) + 1) if d_ff % size == 0]
    if not found:
        raise ValueError(
            f"expert_size or n_experts must be given: d_ff = {d_ff} has no divisor from {least} to {largest} that "
            "makes two experts or more"
        )
    return found[-1]
