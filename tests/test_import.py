"""Importing is light, and works where triton, a compiler and CUDA are absent."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_ffn


def run(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter without a compiler on its path and without a visible CUDA device."""
    env = {**os.environ, "PATH": "", "CUDA_VISIBLE_DEVICES": "", "CC": "", "CXX": "", **environment}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


WITHOUT_TRITON = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_import_and_training_step_without_triton_compiler_and_cuda() -> None:
    out = run(
        WITHOUT_TRITON
        + """
import torch, sparse_ffn as sf
for layer in (sf.DenseFFN(8, 16), sf.TopKFFN(8, 16, 4), sf.ProductKeyMemory(8, 4, 4), sf.SigmaMoE(8, 4, 4, 2)):
    (layer(torch.randn(5, 8)).sum() + sf.aux_loss(layer)).backward()
print("trained", torch.cuda.is_initialized())
"""
    )
    assert out.split() == ["trained", "False"]


def test_import_loads_no_triton_no_compiler_and_no_plotting() -> None:
    out = run(
        """
import sys, torch
before = set(sys.modules)
import sparse_ffn
heavy = ("triton", "torch._dynamo", "torch._inductor", "matplotlib", "transformers", "numba", "distutils", "setuptools")
print([name for name in set(sys.modules) - before if name.startswith(heavy)], torch.cuda.is_initialized())
"""
    )
    assert out.strip() == "[] False"


@pytest.mark.exhaustive
def test_import_takes_under_three_tenths_of_a_second_beyond_torch() -> None:
    code = """
import os, torch
def busy():  # of all threads and children, in user and system mode: a busy machine does not lengthen it
    return sum(os.times()[:4])
start = busy()
import sparse_ffn
print(busy() - start)
"""
    assert min(float(run(code)) for _ in range(3)) < 0.3


@pytest.mark.exhaustive
def test_info_names_versions_devices_backends_and_the_choice() -> None:
    command = [sys.executable, "-m", "sparse_ffn.info"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for words in (
        "sparse-ffn",
        "torch",
        "triton",
        "einops",
        "devices",
        "reference",
        "CPU core",
        "triton kernels",
        "(automatic: ",
    ):
        assert words in out
    env = {**os.environ, "SPARSE_FFN_BACKEND": "reference"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    assert "reference (forced by SPARSE_FFN_BACKEND)" in out
    for name, words in (
        ("foo", "cpu: none: environment variable"),
        ("triton", "cpu: none: backend 'triton' is forced, but"),
    ):
        env = {**os.environ, "SPARSE_FFN_BACKEND": name}
        assert words in subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def test_unknown_backend_in_the_environment_is_an_error_that_lists_the_known() -> None:
    code = """
import torch, sparse_ffn as sf
try:
    sf.SigmaMoE(8, 4, 4, 2)(torch.randn(2, 8))
except ValueError as error:
    print(error)
"""
    out = run(code, SPARSE_FFN_BACKEND="fast")
    assert "SPARSE_FFN_BACKEND is 'fast'" in out
    assert "'reference', 'torch', 'cpu', 'triton', 'cuda'" in out


@pytest.mark.exhaustive
def test_forcing_triton_where_it_cannot_compute_says_why() -> None:
    code = """
import sys, torch, sparse_ffn as sf
layer, x = sf.SigmaMoE(8, 4, 4, 2), torch.randn(2, 8)
with sf.backend("triton"):
    try:
        layer(x)
    except RuntimeError as error:
        print(error)
print([name for name in sys.modules if name.startswith("sparse_ffn.backends.triton")])
"""
    assert "backend 'triton' is forced, but it computes on CUDA and ROCm devices, not on cpu" in run(code)
    assert "triton is not installed" in run(WITHOUT_TRITON + code, TRITON_INTERPRET="1")
    double = code.replace(
        "import sys, torch", "import sys, torch; torch.set_default_dtype(torch.float64)\nimport torch"
    )
    out = run(double, TRITON_INTERPRET="1")
    assert "it has no float64" in out
    assert out.endswith("[]\n")


def test_the_kernels_import_nothing_from_above() -> None:
    below = tuple(f"sparse_ffn.backends.{name}" for name in ("triton", "sort", "warning", "kept", "versions"))
    kernels = list((Path(sparse_ffn.__file__).parent / "backends" / "triton").glob("*.py"))
    assert kernels
    for path in kernels:
        for module in re.findall(r"^\s*(?:from|import) (sparse_ffn[\w.]*)", path.read_text(), re.MULTILINE):
            assert module.startswith(below), f"{path.name} imports {module}"


def test_the_version_is_the_packages() -> None:
    assert sparse_ffn.__version__ == importlib.metadata.version("sparse-ffn")
