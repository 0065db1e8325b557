"""The matrix of docs/compatibility.md: every feature with every layer on every backend that it names."""

from __future__ import annotations

from typing import Any

import pytest
from matrix import compiler, layer_drop
from matrix.cases import Case, runnable
from matrix.layers import LAST
from matrix.table import PAGE, written


def case_of(case: Case) -> Any:
    """A compiler takes seconds for a case; the last mixtures are MoE's base with other experts."""
    repeated = case.layer in LAST and (case.backend != "cpu" or case.feature in layer_drop.FEATURES)
    slow = case.feature in compiler.FEATURES or repeated
    return pytest.param(case, id=str(case), marks=[pytest.mark.exhaustive] * slow)


@pytest.mark.parametrize("case", [case_of(case) for case in runnable(1, "reference", "torch", "cpu")])
def test_feature(case: Case) -> None:
    case.run()


def test_the_page_shows_what_is_declared() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run python -m tests.matrix"
