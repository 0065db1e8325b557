"""The targets: how long a layer may take beside a dense FFN, and how much faster than peers it must be."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.shapes import (
    DECODE,
    GPU_FINE,
    GPU_WIDE,
    LARGE,
    MOE_SHAPES,
    SERVED,
    SINGLE,
    SMALL,
    TOPK_TOKENS,
    WIDE_SINGLE,
    MemoryShape,
    TopKShape,
    topk_sweep,
)

Key = tuple[str, str, str, str]  # device, group, shape, pass
MODES = ("fwd", "fwdbwd")

TO_DENSE: dict[Key, dict[str, float]] = {
    **{("cpu", "moe", str(shape), "fwdbwd"): {"fp32": 1.10} for shape in (*LARGE[:2], SMALL)},
    ("cpu", "moe", str(LARGE[2]), "fwdbwd"): {"fp32": 1.15},
    ("cpu", "moe", str(DECODE), "fwd"): {"fp32": 1.5},
    ("cpu", "moe", str(SINGLE), "fwd"): {"fp32": 0.9, "bf16": 0.9},
    ("cpu", "moe", str(WIDE_SINGLE), "fwd"): {"fp32": 1.0, "bf16": 1.0},
    ("cpu", "topk", str(TopKShape()), "fwdbwd"): {"fp32": 0.6, "bf16": 0.6},
    **{
        ("cpu", group, str(shape), mode): {"fp32": 1.15, "bf16": 1.15}
        for group in ("topk", "topk-glu")
        for tokens in TOPK_TOKENS
        for shape in topk_sweep(tokens)
        for mode in MODES
    },
    # of an H100: 0.75 and 0.6 of the dense network's rate
    ("cuda", "moe", str(GPU_WIDE), "fwdbwd"): {"bf16": 1 / 0.75},
    ("cuda", "moe", str(GPU_FINE), "fwdbwd"): {"bf16": 1 / 0.6},
}
"""Largest time relative to the row's dense network: of equal compute, or for TopKFFN the one that it replaces."""
TO_DENSE_ON_AMX: dict[Key, dict[str, float]] = {
    ("cpu", "moe", str(LARGE[0]), "fwdbwd"): {"bf16": 1.25},
    ("cpu", "moe", str(LARGE[1]), "fwdbwd"): {"bf16": 1.35},
    ("cpu", "moe", str(LARGE[2]), "fwdbwd"): {"bf16": 1.8},
    ("cpu", "moe", str(SMALL), "fwdbwd"): {"bf16": 1.4},
    ("cpu", "moe", str(DECODE), "fwd"): {"bf16": 2.2},
    ("cpu", "moe-glu", str(SERVED), "fwdbwd"): {"bf16": 1.0},
}
"""The same where torch's dense networks run on matrix units."""
_NOISE = 1.05
_BEFORE = {
    "avx512_bf16": ((1.31, 1.26, 1.46, 1.69), 2.03),
    "avx512": ((0.66, 0.71, 0.72, 0.75), 1.17),
}
TO_DENSE_WITHOUT_AMX: dict[str, dict[Key, dict[str, float]]] = {
    core: {
        **{
            ("cpu", "moe", str(shape), "fwdbwd"): {"bf16": ratio * _NOISE}
            for shape, ratio in zip((*LARGE, SMALL), steps, strict=True)
        },
        ("cpu", "moe", str(DECODE), "fwd"): {"bf16": decode * _NOISE},
    }
    for core, (steps, decode) in _BEFORE.items()
}
"""The same elsewhere, by the CPU core's instruction set: what was published when these targets were set."""


def was_set_by(measured: float | None, bound: float, key: Key, dtype: str, facts: Mapping[str, str]) -> bool:
    """Whether a bar is of ``TO_DENSE_WITHOUT_AMX`` and from this very measurement, which proves nothing then."""
    own = TO_DENSE_WITHOUT_AMX.get(facts.get("CPU core", ""), {}).get(key, {}).get(dtype)
    return own == bound and measured is not None and round(measured, 2) == round(bound / _NOISE, 2)


OVER_PEERS: dict[Key, float] = {
    **{("cpu", group, str(shape), "fwdbwd"): 1.8 for group in ("moe", "moe-glu") for shape in MOE_SHAPES},
    **{("cpu", group, str(MemoryShape()), mode): 3.0 for group in ("pkm", "pkm-query") for mode in MODES},
}
"""Smallest speed-up over every peer on a CPU."""
OVER_PEERS_ON_AMX: dict[Key, dict[str, float]] = {("cpu", "moe-glu", str(SERVED), "fwd"): {"kt-kernel": 1.3}}
"""Over a peer that runs on matrix units and nowhere else, in bf16."""
GPU_OVER_PEERS = 1.0
"""Over every peer on a GPU, where no shape of the benchmark is to be slower."""
