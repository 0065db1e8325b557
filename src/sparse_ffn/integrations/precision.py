"""Precision: what transformers keeps in fp32 where a model is loaded in 16 bits, which a converted layer cannot."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.layers import SparseFFN


def kept_in_fp32(model: Any) -> dict[str, set[torch.dtype]]:
    """The parameters that transformers keeps in fp32, and in which dtypes of the model it does."""
    found: dict[str, set[torch.dtype]] = {}
    for modules, dtypes in (
        ("_keep_in_fp32_modules", {torch.float16}),
        ("_keep_in_fp32_modules_strict", {torch.float16, torch.bfloat16}),
    ):
        words = "|".join(map(re.escape, getattr(model, modules, None) or ()))
        within = re.compile(rf"(^|\.)({words})($|\.)")
        for name, _ in model.named_parameters() if words else ():
            if within.search(name):
                found[name] = found.get(name, set()) | dtypes
    return found


def check_precision(model: Any, kept: Mapping[str, set[torch.dtype]]) -> None:
    """Warn where what was to be kept in fp32 went into a layer that is in another dtype."""
    modules = dict(model.named_modules(remove_duplicate=False))
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = []
    for name in (name for name in kept if name not in left):
        place = name
        while place not in modules:  # until it is what stands there now
            place = place.rpartition(".")[0]
        layer = next((m for m in modules[place].modules() if isinstance(m, SparseFFN)), None)
        if layer is not None and layer.values.dtype in kept[name]:
            names.append(f"{name} is in {layer.values.dtype}")
    if names:
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"{names[0]}{more}: transformers keeps it in fp32 beside "
            "16 bits, where it overflows, but a converted layer has one dtype. Load with dtype=torch.float32, or "
            "torch.bfloat16 for what was trained in that",
            SparseFFNWarning,
            stacklevel=3,
        )
