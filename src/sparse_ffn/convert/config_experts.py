"""The configs of mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparse_ffn import layers
from sparse_ffn.checks import check_choice, check_count, check_flag, check_rate
from sparse_ffn.convert.config_base import Converted, FFNConfig
from sparse_ffn.convert.init.weights import FFNWeights
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.routing import ROUTERS

EXPERT_SIZES = (16, 128)
"""The least and the largest size of an expert that is chosen when the config gives none. The paper's have 128."""

OFF = 0.1
"""How far, of itself, the active share may be off for a larger size of that choice."""

DEALT = ("split", "cluster", "auto")
"""Inits whose experts are made of the FFN's hidden units."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(FFNConfig):
    """The arguments that all mixtures of experts share.

    Those of null experts are for ``init="fresh"``: an FFN has no units for them.
    """

    n_experts: int | None = None
    expert_size: int | None = None
    k: int | None = None
    glu: bool | None = None
    bias: bool | None = None
    null_experts: int = 0
    null_kind: str = "zero"
    null_share: float | None = None
    expert_dropout: float = 0.0
    balance: str | Sequence[str] = "entropy"
    balance_weight: float | Sequence[float] = 1e-3
    balance_over: str = "batch"
    aux: str = "attach"
    sync_balance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.null_experts and self.init != "fresh":
            raise ValueError(f'null_experts = {self.null_experts} is for init = "fresh", not init = {self.init!r}')

    def _copies(self, ffn: FFNWeights) -> dict[str, Any]:
        """The sizes of experts that are copies of the FFN."""
        n, size = self.n_experts or 8, self.expert_size or ffn.d_ff
        if size != ffn.d_ff and self.init != "fresh":
            raise ValueError(f"expert_size = {size} must be d_ff = {ffn.d_ff} to upcycle: each expert is a copy")
        return {"n_experts": n, "expert_size": size, "k": self.k or min(2, n)}


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(MixtureConfig):
    """The MoE family's arguments, and how a dense FFN becomes experts.

    Args:
        n_experts: E, those that the router chooses from; None for what expert_size makes of the units that are not the
            shared expert's (8 for ``"upcycle"``).
        expert_size: G; None for what n_experts makes of them, or if that is None too the largest divisor of d_ff from
            16 to 128 that makes two experts or more, some of which have ``active`` of the units but for a tenth of it
            (d_ff for ``"upcycle"``).
        k: experts for a token; None for what ``active`` says, or a quarter of them (2 for ``"upcycle"``).
        active: share of the FFN's hidden units that a token uses, in (0, 1], instead of k; the shared expert's count.
        shared_size: units that all tokens use, beside the mixture: the layer is then a ``SharedExpertMoE``. 0 for none;
            None for what ``"auto"`` chooses, else none. They are those of the largest mean abs(h)·‖v‖ on the
            calibration data, h the hidden unit and v its value; without calibration those of the largest keys and
            values. (CMoE, arXiv 2502.04416, has such experts, chosen by how often their units are among the largest.)
        init: ``"split"`` cuts the hidden units into experts in their order, ``"cluster"`` groups units that belong
            together; both give the dense output at k = n_experts. ``"auto"`` tries these, the routers and sizes of the
            shared expert on the calibration data and takes what loses least on a part of it that was kept back; without
            calibration it clusters. ``"upcycle"`` copies the whole FFN into every expert, ``"fresh"`` starts anew.
        cluster_by: ``"keys"`` or ``"coactivation"`` (needs calibration); None for the latter with calibration.
        router_init: ``"mean_keys"`` (Avg-K), or with calibration ``"fitted"`` to the experts' shares of the output or
            ``"ranked"``, fitted to which experts are the k largest; None for ``"fitted"`` with calibration.
        refit: with calibration and ``"split"`` or ``"cluster"``, fit the values to what the dense FFN gives, so that
            they make up for experts that are not selected (ridge regression); at k = n_experts nothing is missing.
        reinit: with ``"upcycle"`` the share of each expert's units, its own draw, whose rows are drawn anew, normal
            with the mean and deviation of the FFN's own: copies that differ learn different things (Drop-Upcycling,
            arXiv 2502.19261, section 3).

    ``"fresh"`` takes no notice of cluster_by, router_init, refit and reinit: with it a config that was used makes
    layers of the same shapes.

    Raises:
        ValueError: as all configs; ``cluster_by``, ``router_init``, ``active``, ``shared_size`` or ``reinit`` with an
            ``init`` that has no use for it; both k and ``active``; when an FFN is replaced, no size is given and its
            d_ff has no such divisor, or the shared expert leaves no units or no active ones to the others.
    """

    inits = ("split", "cluster", "auto", "upcycle", "fresh")

    init: str = "split"
    active: float | None = None
    shared_size: int | None = None
    cluster_by: str | None = None
    router_init: str | None = None
    refit: bool = False
    reinit: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cluster_by is not None:
            check_choice("cluster_by", self.cluster_by, ("keys", "coactivation"))
        if self.router_init is not None:
            check_choice("router_init", self.router_init, ("mean_keys", "fitted", "ranked"))
        if check_flag("refit", self.refit) and self.init == "upcycle":
            raise ValueError('refit = True is not for init = "upcycle": its experts are copies')
        if self.shared_size is not None:
            check_count("shared_size", self.shared_size)
        if self.active is not None:
            check_rate("active", self.active, inclusive=True)
            if not self.active or self.k is not None:
                why = f"k = {self.k} decides that, give k=None" if self.active else "it must be above 0"
                raise ValueError(f"active = {self.active!r}: {why}")
        if check_rate("reinit", self.reinit, inclusive=True) and self.init in DEALT:
            raise ValueError(f'reinit = {self.reinit!r} is for init = "upcycle", not init = {self.init!r}')
        if self.init in ("split", "upcycle") and self.cluster_by is not None:
            raise ValueError(f'cluster_by = {self.cluster_by!r} is for init = "cluster", not init = {self.init!r}')
        if self.init == "upcycle" and self.router_init is not None:
            raise ValueError(f'router_init = {self.router_init!r} is not for init = "upcycle": its router is fresh')
        for name in ("active", "shared_size"):
            if self.init == "upcycle" and getattr(self, name):
                raise ValueError(
                    f'{name} = {getattr(self, name)!r} is not for init = "upcycle": its experts are copies'
                )

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        if self.init == "upcycle":
            return self._copies(ffn)
        shared = self.shared_size or 0
        rest = ffn.d_ff - shared
        if rest < 1:
            raise ValueError(f"shared_size = {shared} must be below d_ff = {ffn.d_ff}")
        for name, other in (("n_experts", "expert_size"), ("expert_size", "n_experts")):
            if getattr(self, other) is None and (given := getattr(self, name) or 0) > rest:
                raise ValueError(f"{name} = {given} must be at most {rest}, the units of the experts")
        size = self.expert_size or (rest // self.n_experts if self.n_experts else _expert_size(ffn.d_ff, self.active))
        n = self.n_experts or rest // max(1, size)
        if self.init != "fresh" and (n < 1 or n * size != rest):
            less = f" - shared_size = {shared}" if shared else ""
            raise ValueError(
                f"n_experts·expert_size = {n}·{size} must be d_ff = {ffn.d_ff}{less}: init={self.init!r} deals out its "
                "units"
            )
        return {"n_experts": n, "expert_size": size, "shared_size": shared, "k": self._k(ffn, n, size), "active": None}

    def _k(self, ffn: FFNWeights, n: int, size: int) -> int:
        if self.active is None:
            return self.k or max(1, n // 4)
        shared = self.shared_size or 0
        k = round((self.active * ffn.d_ff - shared) / size)
        if shared and k < 1:
            raise ValueError(f"shared_size = {shared} leaves no expert of {size} units of active = {self.active!r}")
        return min(n, max(1, k))

    def make(self, ffn: FFNWeights) -> Converted:
        """As all configs; a ``SharedExpertMoE`` of the layer and a ``DenseFFN`` if there is a shared expert."""
        routed = super().make(ffn)
        if not self.shared_size:
            return routed
        assert isinstance(routed, layers.MoE)
        options = ("activation", "glu", "bias", "dropout", "init_scale", "n_layers")
        chosen: dict[str, Any] = {name: getattr(self, name) for name in options}
        own: dict[str, Any] = {"d_out": ffn.d_out, "device": ffn.keys.device, "dtype": ffn.keys.dtype}
        return SharedExpertMoE(routed, layers.DenseFFN(ffn.d_model, self.shared_size, **own, **chosen))


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


@dataclass(frozen=True, kw_only=True)
class LowRankMoEConfig(MixtureConfig):
    """For ``LowRankMoE``: the FFN becomes the base of all experts, which differ from it by nothing at first.

    Args:
        n_experts: E; None for 8.
        expert_size: G; None for d_ff, which it must be but with ``init="fresh"``.
        k: experts for a token; None for 2.
        rank: of what an expert learns for itself; None for a sixteenth of d_ff.
        router: by name. With ``"softmax_topk"`` the gates sum to 1, and the layer starts as exactly the FFN; with
            others its values are divided by what the gates sum to where the router is undecided.
    """

    layer = layers.LowRankMoE
    inits = ("upcycle", "fresh")

    init: str = "upcycle"
    rank: int | None = None
    router: str = "softmax_topk"

    def __post_init__(self) -> None:
        check_choice("router", self.router, ROUTERS)
        super().__post_init__()

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        return {**self._copies(ffn), "rank": self.rank or max(1, ffn.d_ff // 16)}


def _expert_size(d_ff: int, active: float | None) -> int:
    """The largest divisor that makes two experts or more, some of which come near the active share."""
    least, largest = EXPERT_SIZES
    sizes = [size for size in range(least, min(largest, d_ff // 2) + 1) if d_ff % size == 0]
    if not sizes:
        raise ValueError(
            f"expert_size or n_experts must be given: d_ff = {d_ff} has no divisor from {least} to {largest} that "
            "makes two experts or more"
        )
    if active is None:
        return sizes[-1]
    off = {size: abs(max(1, round(active * d_ff / size)) * size / (active * d_ff) - 1) for size in sizes}
    return max((size for size in sizes if off[size] <= OFF), default=min(sizes, key=off.__getitem__))
