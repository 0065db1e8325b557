"""The matrix of docs/compatibility.md: every feature with every layer on every backend that it names."""

from __future__ import annotations

import pytest
from matrix.cases import Case, runnable
from matrix.table import PAGE, written


@pytest.mark.parametrize("case", runnable(1, "reference", "torch", "cpu"), ids=str)
def test_feature(case: Case) -> None:
    case.run()


def test_the_page_shows_what_is_declared() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run python -m tests.matrix"
