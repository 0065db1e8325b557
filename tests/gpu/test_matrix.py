"""The cells of docs/compatibility.md in the column triton: its checks make CPU tensors, so only the interpreter runs."""

from __future__ import annotations

import pytest
from matrix.cases import Case, runnable


@pytest.mark.parametrize("case", runnable(1, "triton"), ids=str)
def test_feature(case: Case) -> None:
    case.run()
