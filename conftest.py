"""Runs the Python code blocks of README.md and docs/ as tests: the blocks of a file share one namespace."""

from __future__ import annotations

from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

TOGETHER = (
    ".md", "test_balance.py", "test_cuda.py", "test_cuda_build.py", "test_demo.py", "test_matrix_distributed.py",
    "test_packaging.py", "test_studies.py",
)  # fmt: skip

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
).pytest()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a document's blocks, and tests that share a build or a run, on one worker; others go anywhere."""
    from xdist.scheduler import LoadScopeScheduling

    class OneFileOneWorker(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, _ = nodeid.partition("::")
            return path if path.endswith(TOGETHER) else nodeid

        def _pending_of(self, workload: dict[str, dict[str, bool]]) -> int:
            for scope in [scope for scope, tests in workload.items() if all(tests.values())]:
                del workload[scope]  # or all that was ever done is counted again after each of the many tests
            return super()._pending_of(workload)

    return OneFileOneWorker(config, log)
