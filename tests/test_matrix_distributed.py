"""The rows of docs/compatibility.md that need two processes: one pair of them runs all."""

from __future__ import annotations

import matrix
import pytest
from conftest import BACKENDS
from matrix import distributed

CASES = [case for case in matrix.CASES if case.feature.processes == 2 and case.backend in BACKENDS]


@pytest.fixture(scope="module")
def problems() -> distributed.Problems:
    return distributed.run(BACKENDS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_feature_works_in_two_processes(case: matrix.Case, problems: distributed.Problems) -> None:
    problem = problems[case.feature.name, case.backend, case.layer]
    assert not problem, problem
