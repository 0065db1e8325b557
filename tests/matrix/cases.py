"""All features, and the single cases that the tests run."""

from __future__ import annotations

import torch

from sparse_ffn.backends.choice import unavailable

from . import compiler, copies, distributed, functions, layer_drop, threads, tools, training
from .feature import REFERENCE, Case, Feature

GROUPS: dict[str, tuple[Feature, ...]] = {
    "Compilers": compiler.FEATURES,
    "Training": (*training.FEATURES, *layer_drop.FEATURES),
    "torch.func and higher derivatives": functions.FEATURES,
    "Threads": threads.FEATURES,
    "Two processes": distributed.FEATURES,
    "Copies and files": copies.FEATURES,
    "Tools that change parameters": tools.FEATURES,
}
FEATURES = tuple(feature for features in GROUPS.values() for feature in features)


CASES = [
    Case(feature, backend, layer, error)
    for feature in FEATURES
    for outcome, error in ((feature.works, None), (feature.refused, REFERENCE))
    for backend, layers in outcome.items()
    for layer in layers
]


def runnable(processes: int, *backends: str) -> list[Case]:
    """The cases of these backends, as far as they can compute on a CPU here."""
    usable = [name for name in backends if unavailable(name, torch.device("cpu")) is None]
    return [case for case in CASES if case.feature.processes == processes and case.backend in usable]
