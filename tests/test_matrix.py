"""The matrix of docs/compatibility.md: every feature with every layer on every backend that it names."""

from __future__ import annotations

from typing import Any

import pytest
from matrix import compiler
from matrix.cases import Case, runnable
from matrix.table import PAGE, written


def case_of(case: Case) -> Any:
    """A compiler takes seconds for a case."""
    return pytest.param(case, id=str(case), marks=[pytest.mark.exhaustive] * (case.feature in compiler.FEATURES))


@pytest.mark.parametrize("case", [case_of(case) for case in runnable(1, "reference", "torch", "cpu")])
def test_feature(case: Case) -> None:
    case.run()


def test_the_page_shows_what_is_declared() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run python -m tests.matrix"
