"""auto: the way to make experts that loses least on calibration data that it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sparse_ffn.convert.config_experts import ExpertsConfig
from sparse_ffn.convert.init.weights import FFNWeights

SHARED = (0.5, 0.25, 0.75, 0.0)
"""Shares of the active units that are tried as the shared expert's."""


def choose(config: ExpertsConfig, ffn: FFNWeights, lost: Callable[[ExpertsConfig], float]) -> ExpertsConfig:
    """What ``init="auto"`` stands for with calibration; what else the config says is kept.

    One thing after the other: the size of the shared expert, the router, how units are dealt out. The values are
    refitted.

    Args:
        config: with that init.
        ffn: what is converted.
        lost: what a layer of such a config loses.
    """
    if config.active is None and config.k is None:
        config = replace(config, active=0.25)
    resolved = config.resolve(ffn)
    if resolved.k == resolved.n_experts:
        return replace(config, init="split", cluster_by=None, router_init="mean_keys")  # exact
    bias = True if config.bias is None else config.bias  # for the mean of what is left out
    config = replace(config, init="cluster", expert_size=resolved.expert_size, bias=bias)
    best: ExpertsConfig | None = None
    least = float("inf")
    for choices in (_shared_sizes(config, ffn.d_ff), _routers(config), _deals(config)):
        for choice in choices:
            tried = replace(best or config, **choice)
            found = lost(tried)
            if best is None or found < least:  # the first may have overflowed
                best, least = tried, found
    assert best is not None, "sizes of a shared expert are always tried"
    return replace(best, refit=True)


def _shared_sizes(config: ExpertsConfig, d_ff: int) -> list[dict[str, Any]]:
    router_init = config.router_init or "ranked"
    size, sizes = config.expert_size, [config.shared_size or 0]
    if config.shared_size is None and config.n_experts is None and config.active is not None and size is not None:
        n = max(1, round(config.active * d_ff / size))
        sizes = sorted({size * min(round(share * n), n - 1) for share in SHARED})
    return [{"shared_size": shared, "router_init": router_init} for shared in sizes]


def _routers(config: ExpertsConfig) -> list[dict[str, Any]]:
    return [] if config.router_init is not None else [{"router_init": "fitted"}]


def _deals(config: ExpertsConfig) -> list[dict[str, Any]]:
    if config.cluster_by is not None:
        return []
    return [{"init": "split"}, {"init": "cluster", "cluster_by": "keys"}]
