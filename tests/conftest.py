"""What every test starts from: fixed seeds, two threads at most, and uninitialised memory that is not zero."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from sparse_ffn import backend
from sparse_ffn.backends import cpu

BACKENDS = ("reference", "torch") if cpu.PROBLEM else ("reference", "torch", "cpu")
# interpreted kernels need TRITON_INTERPRET=1 before anything imports triton: a run of their own, see `make test`
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["gpu"]


def pytest_report_header() -> str:
    return f"CPU core: {cpu.PROBLEM or cpu.instruction_set()}; backends under test: {', '.join(BACKENDS)}"


def pytest_configure(config: pytest.Config) -> None:
    if cpu.PROBLEM:  # without a compiler the suite tests plain torch; CI insists on the core
        config.addinivalue_line("filterwarnings", "ignore:the CPU core is missing")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def on_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend; "cpu" is not forced, since fp64 is not its own."""
    with backend("auto" if request.param == "cpu" else request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return: NaN, or -1 for integers, so that reading it shows."""

    def fill(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return x.fill_(float("nan"))
        return x.fill_(-1) if x.dtype in (torch.int32, torch.int64) else x

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=original, **k: fill(_f(*a, **k)))
