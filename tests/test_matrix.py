"""The matrix of docs/compatibility.md: every feature with every layer on every backend that it names."""

from __future__ import annotations

import matrix
import pytest
from conftest import BACKENDS

import sparse_ffn as sf

CASES = [case for case in matrix.CASES if case.feature.processes == 1 and case.backend in BACKENDS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_feature_works_or_is_refused_in_clear_words(case: matrix.Case) -> None:
    with sf.backend(case.backend):
        if case.error is None:
            case.feature.check(case.layer)
        else:
            with pytest.raises(RuntimeError, match=case.error):
                case.feature.check(case.layer)
