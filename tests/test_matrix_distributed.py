"""The rows of docs/compatibility.md that need two processes: one pair of them runs all."""

from __future__ import annotations

import pytest
from matrix import distributed
from matrix.cases import Case, runnable

pytestmark = pytest.mark.exhaustive
CASES = runnable(2, "reference", "torch", "cpu")


@pytest.fixture(scope="module")
def problems() -> distributed.Problems:
    return distributed.run(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_feature_in_two_processes(case: Case, problems: distributed.Problems) -> None:
    assert not problems[str(case)], problems[str(case)]
