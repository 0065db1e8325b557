"""Kernels are not compiled anew when a batch has another number of tokens."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

import sparse_ffn.backends.triton
from sparse_ffn.backends.triton.launch import OF_TOKENS


def kernels() -> dict[str, JITFunction]:
    found = {}
    for module in pkgutil.iter_modules(sparse_ffn.backends.triton.__path__):
        members = vars(importlib.import_module(f"sparse_ffn.backends.triton.{module.name}"))
        found |= {name: it for name, it in members.items() if name.endswith("_kernel") and isinstance(it, JITFunction)}
    return found


def test_what_grows_with_the_tokens_is_not_specialised_for() -> None:
    told = {(name, p.name): p.do_not_specialize for name, it in kernels().items() for p in it.params}
    of_tokens = {key: left for key, left in told.items() if key[1] in OF_TOKENS}
    assert {name for _, name in of_tokens} == set(OF_TOKENS)
    assert all(of_tokens.values()), of_tokens
    assert not any(left for key, left in told.items() if key not in of_tokens)  # of sizes wide loads depend
