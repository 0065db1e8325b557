"""All features, and the single cases that the tests run."""

from __future__ import annotations

from typing import NamedTuple

from . import compiler, copies, distributed, functions, tools, training
from .feature import REFERENCE, Feature

GROUPS: dict[str, tuple[Feature, ...]] = {
    "Compilers": compiler.FEATURES,
    "Training": training.FEATURES,
    "torch.func and higher derivatives": functions.FEATURES,
    "Two processes": distributed.FEATURES,
    "Copies and files": copies.FEATURES,
    "Tools that change parameters": tools.FEATURES,
}
FEATURES = tuple(feature for features in GROUPS.values() for feature in features)


class Case(NamedTuple):
    """A feature with one layer on one backend, and the words of the error that is right, if one is."""

    feature: Feature
    backend: str
    layer: str
    error: str | None

    def __str__(self) -> str:
        return f"{self.feature.check.__name__}-{self.layer}-{self.backend}"


CASES = [
    Case(feature, backend, layer, error)
    for feature in FEATURES
    for outcome, error in ((feature.works, None), (feature.refused, REFERENCE))
    for backend, layers in outcome.items()
    for layer in layers
]
