"""What computes on a GPU that the kernels cannot use, and what is said of it. No GPU is needed to ask."""

from __future__ import annotations

import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_ffn as sf
from sparse_ffn.backends import choice
from sparse_ffn.backends.choice import choose


def test_a_gpu_that_no_kernel_can_use_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reasons = {"triton": "Triton does not start: Failed to find C compiler", "cuda": "it was not built"}
    monkeypatch.setattr(choice, "unavailable", lambda name, *_: reasons[name])
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, device="cuda")
    with pytest.warns(sf.SparseFFNWarning, match=r"\(triton: .*Failed to find C compiler; cuda: it was not built\)"):
        assert choose(x) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(x) == choose(x.double()) == "torch"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="it is Triton's start that fails")
def test_a_triton_that_does_not_start_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU, as on one without the compiler that some versions need."""
    from triton.runtime import driver

    def fail() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=fail), raising=False)
    found = choice._start_triton.__wrapped__()
    assert found is not None
    assert found.startswith("Triton does not start: ")
    assert "\n" not in found
