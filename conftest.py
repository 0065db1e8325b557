"""Runs the Python code blocks of README.md and docs/ as tests: the blocks of a file share one namespace."""

from __future__ import annotations

from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
).pytest()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a document's blocks, and tests of one build or pair of processes, on one worker; others go anywhere."""
    from xdist.scheduler import LoadScopeScheduling

    class OneFileOneWorker(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, _ = nodeid.partition("::")
            together = (".md", "test_packaging.py", "test_matrix_distributed.py", "test_amx.py")
            return path if path.endswith(together) else nodeid

    return OneFileOneWorker(config, log)
