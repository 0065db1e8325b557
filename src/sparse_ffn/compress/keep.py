"""Which experts stay when a model is pruned: what each is worth, and the best of each layer or of all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from sparse_ffn.checks import called, check_type, shown
from sparse_ffn.compress.statistics import ExpertStats, ratio
from sparse_ffn.layers.moe import MoE
from sparse_ffn.routing.deepseek import DeepSeekRouter

Score = Callable[[ExpertStats], Tensor]
SCORES: dict[str, Score] = {
    "reap": lambda stats: ratio(stats.contribution, stats.count),
    "contribution": lambda stats: stats.contribution,
    "frequency": lambda stats: stats.count,
}
"""What an expert is worth, [E], beside the error that it leaves; the least go."""


def score_of(by: str | Score, name: str, stats: ExpertStats) -> Tensor:
    """What each expert of a layer is worth, [E] in fp64."""
    score = (SCORES[by] if isinstance(by, str) else by)(stats)
    check_type("what by returns", score, Tensor, "a tensor")
    if score.shape != stats.count.shape or not bool(score.isfinite().all()):
        raise ValueError(
            f"by must give a finite number for each of the {len(stats.count)} experts of {called(name)}, "
            f"got {shown(score)}"
        )
    return score.double().clone()


def _ranked(score: Tensor) -> list[int]:
    """The best first, equal ones by the lower number."""
    order: list[int] = score.sort(descending=True, stable=True).indices.tolist()
    return order


def _number(keep: float, n_experts: int) -> int:
    return round(keep * n_experts) if isinstance(keep, float) else keep


def best_of_each(layers: Mapping[str, MoE], scores: Mapping[str, Tensor], keep: float) -> dict[str, list[int]]:
    """The same share or number of experts in each layer; of groups of experts, in each group."""
    kept = {}
    for name, layer in layers.items():
        groups, number = n_groups_of(layer), _number(keep, layer.n_experts)
        if number > layer.n_experts:
            raise ValueError(f"keep = {number} is more than the n_experts = {layer.n_experts} of {called(name)}")
        if number % groups:
            raise ValueError(
                f"keep = {number} of {called(name)} must be a multiple of its router's n_groups = {groups}: "
                "groups stay of one size"
            )
        size = layer.n_experts // groups
        kept[name] = sorted(
            first + e
            for first in range(0, layer.n_experts, size)
            for e in _ranked(scores[name][first : first + size])[: number // groups]
        )
    return kept


def best_of_all(layers: Mapping[str, MoE], scores: Mapping[str, Tensor], keep: float) -> dict[str, list[int]]:
    """The best experts of all layers together, and k of each layer at least; layers without scores stay whole."""
    scored = {name: layers[name] for name in scores}
    if grouped := [name for name, layer in scored.items() if n_groups_of(layer) > 1]:
        raise ValueError(f"scope = 'model' would leave groups of unlike sizes in {', '.join(grouped)}: take 'layer'")
    n_experts = sum(layer.n_experts for layer in layers.values())
    number = _number(keep, n_experts)
    least = sum(_least(layer) if name in scores else layer.n_experts for name, layer in layers.items())
    if not least <= number <= n_experts:
        raise ValueError(
            f"keep = {number} of the model's experts must be in [{least}, {n_experts}]: each layer keeps k at least, "
            "and a protected one all"
        )
    ranked = {name: _ranked(score) for name, score in scores.items()}
    kept = {name: ranked[name][: _least(layer)] for name, layer in scored.items()}
    others = [
        (-float(scores[name][e]), name, e) for name, layer in scored.items() for e in ranked[name][_least(layer) :]
    ]
    for _, name, e in sorted(others, key=lambda other: other[0])[: number - least]:
        kept[name].append(e)
    return {name: sorted(experts) for name, experts in kept.items()}


def _least(layer: MoE) -> int:
    """Experts that a layer keeps at least: k, of which null experts may be a part."""
    return min(layer.k, layer.n_experts)


def n_groups_of(layer: MoE) -> int:
    """Groups of experts that the router chooses among first."""
    return layer.router.n_groups if isinstance(layer.router, DeepSeekRouter) else 1


def check_kept(name: str, layer: MoE, experts: list[int], protected: set[int]) -> None:
    """Raise unless a layer can do with these experts."""
    place, number, router = called(name), len(experts), layer.router
    if number < _least(layer):
        raise ValueError(f"{place} would keep {number} of its experts, fewer than its k = {layer.k}")
    if lost := protected - set(experts):
        raise ValueError(f"{place} would keep {number} experts, but protect has more: {sorted(lost)} would go")
    if isinstance(router, DeepSeekRouter) and router.n_groups > 1:
        size = number // router.n_groups
        if size < 2 or layer.k > router.topk_groups * size:
            raise ValueError(
                f"{place} would keep {size} experts of each of its router's {router.n_groups} groups: too few for "
                f"k = {layer.k} in topk_groups = {router.topk_groups} of them, or for two"
            )
