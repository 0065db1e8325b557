"""What a feature of the matrix is: a check, and on which backend it is run with which layers and with what result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

import sparse_ffn as sf

from .layers import ALL, FFNS

REFERENCE = r"sparse_ffn\.backend\('reference'\)"
"""Words of the errors that send to the reference backend."""
EVERY_BACKEND = {"reference": FFNS, "torch": FFNS, "cpu": ALL}
AND_TRITON = {**EVERY_BACKEND, "triton": ("SigmaMoE",)}
"""Triton's interpreter takes seconds for what takes a kernel microseconds."""
Layers = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Feature:
    """A row of the table."""

    name: str
    check: Callable[[str], None]
    """Takes the name of a layer and raises unless the feature works; its docstring says what is checked."""
    works: Layers
    """Backend -> layers that are run on it and work."""
    refused: Layers = field(default_factory=dict)
    """Backend -> layers that must refuse with an error that names the reference backend."""
    processes: int = 1


Check = Callable[[str], None]


def feature(
    name: str, works: Layers | None = None, refused: Layers | None = None, processes: int = 1
) -> Callable[[Check], Feature]:
    """Declare a feature; without ``works`` every layer works on every backend of a CPU."""
    return lambda check: Feature(name, check, EVERY_BACKEND if works is None else works, refused or {}, processes)


class Case(NamedTuple):
    """A feature with one layer on one backend, and the words of the error that is right, if one is."""

    feature: Feature
    backend: str
    layer: str
    error: str | None

    def __str__(self) -> str:
        return f"{self.feature.check.__name__}-{self.layer}-{self.backend}"

    def run(self) -> None:
        """Check the feature.

        Raises:
            Exception: it does not behave as declared.
        """
        with sf.backend(self.backend), pytest.raises(RuntimeError, match=self.error) if self.error else nullcontext():
            self.feature.check(self.layer)
