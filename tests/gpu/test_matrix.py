"""The column triton of docs/compatibility.md: the checks make CPU tensors, so that only the interpreter runs them."""

from __future__ import annotations

import pytest
from matrix.cases import Case, runnable


@pytest.mark.parametrize("case", runnable(1, "triton"), ids=str)
def test_feature(case: Case) -> None:
    case.run()
